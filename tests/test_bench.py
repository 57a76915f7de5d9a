"""bench.py in sizes so small that its figures say nothing: tested is that they are measured and come out."""

import importlib.util
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaling import bench, plan, race

SMALL = "layers=1 width=64 vocab=512 sequences=8 high=40 rounds=1".split()
BIGGER = "layers=2 width=256 vocab=4096 sequences=8 high=120".split()  # some 100 MiB


def run(capsys, *words):
    """bench.py's last line, the JSON one, and the table above it."""
    assert bench.main(list(words)) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["command"] == words[0].strip("-") and len(table) > 1
    return found, table


# The commands -----------------------------------------------------------------------------------------------


def test_step_equals_trl(capsys):
    if bench.trl_version() != bench.TRL:
        pytest.skip(f"needs trl=={bench.TRL}")
    found, table = run(capsys, "step", "--set", *SMALL)
    variants = found["variants"]
    assert set(variants) == {"ours", "trl", "trl_no_recompute", "floor"}
    for name in ("trl", "trl_no_recompute"):
        assert 0 < variants[name]["gradient_difference"] < 1e-4  # the same update, by other operations
        assert variants[name]["padding"] > 0
    for name in ("ours", "trl"):
        assert variants[name]["seconds"] > 0 and 0 < variants[name]["net"] < variants[name]["peak"]
        assert variants[name]["tokens_per_second"] * variants[name]["seconds"] == pytest.approx(
            found["tokens"]
        )
    assert variants["ours"]["speedup"] == 1 and table[1].startswith("ours")


def test_step_without_trl(capsys, monkeypatch):
    monkeypatch.setattr(bench, "trl_version", lambda: None)
    assert bench.main(["step"]) == 2
    assert (
        capsys.readouterr().err
        == "bench.py: error: bench.py step needs TRL 1.16.0, found: None; pip install trl==1.16.0\n"
    )


def test_logprobs(capsys):
    sizes = ["vocabs=[2048,4096]", "tokens=64", "width=16", "rounds=2"]
    found, _ = run(capsys, "logprobs", "--set", *sizes)
    assert set(found["vocabs"]) == {"2048", "4096"}
    for cell in found["vocabs"].values():
        assert cell["difference"] < 1e-4 and len(cell["ours"]["all"]) == 2
        assert cell["ours"]["seconds"] > 0 and cell["full"]["working"] > 0
    assert found["memory_spread"] >= 1


def test_padding(capsys):
    found, _ = run(capsys, "padding", "--set", "sequences=256", "processes=[1,2]")
    for processes in (1, 2):
        assert 0 <= found["batching"][f"ours, {processes} process(es)"]["padding"] < 0.05
    if bench.trl_version():
        assert found["batching"][f"trl {bench.trl_version()}"]["padding"] > 0.3
    # Responses of one length leave nothing to pad: exactly 0, whoever makes the batches.
    found, _ = run(
        capsys, "padding", "--set", "sequences=64", "low=50", "high=50", "prompt_low=9", "prompt_high=9"
    )
    assert {cell["padding"] for cell in found["batching"].values()} == {0.0}
    assert found["tokens"] == 64 * 59


def test_scale_with_two_processes(capsys):
    sizes = "layers=1 width=64 vocab=512 high=40 rounds=2 sequences=[2,4,8]".split()
    found, _ = run(capsys, "scale", "--set", *sizes)
    low, middle, high = found["tokens"]
    assert middle == pytest.approx(2 * low, rel=0.05) and high == pytest.approx(4 * low, rel=0.05)
    for processes in ("1", "2"):
        assert len(found[processes]["seconds"]) == 3 and found[processes]["r2"] <= 1
    assert found["grad_norm_difference"] < 1e-4


def test_verify(capsys):
    found, _ = run(capsys, "verify", "--set", "problems=3", "group=8", "rounds=1")
    ours, one_by_one = (found["variants"][name] for name in ("ours", "math_verify"))
    assert found["answers"] == 24 and 0 < ours["right"] < 24 and ours["right"] == one_by_one["right"]
    counts = ours["counts"]
    assert counts["fast"] + counts["solved"] == 24 and counts["timeouts"] == 0
    assert ours["per_second"] == pytest.approx(24 / ours["seconds"])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vllm")
def test_sampler(capsys):
    found, _ = run(capsys, "sampler", "--set", "prompts=2", "group=2", "max_tokens=8", "rounds=1")
    assert set(found["variants"]) - {"bare_eager"} == {"ours", "bare", "bare_logps"}
    for cell in found["variants"].values():
        assert 4 <= cell["tokens"] <= 32 and cell["tokens_per_second"] > 0


def test_plan_against_what_is_measured(capsys):
    checks = json.dumps(["--micro-tokens 1000", "--micro-tokens 1000 --gradient-checkpointing"])
    found, _ = run(capsys, "--plan", "--model", "0.5B", "--set", *BIGGER, f"checks={checks}")
    plain, recomputed = found["checks"]
    for check in (plain, recomputed):  # 0.9 to 1.1 in larger sizes
        assert 0.7 < check["ratio"] < 1.4, check
    assert recomputed["measured"] < plain["measured"] and recomputed["predicted"] < plain["predicted"]
    assert {row["model"] for row in found["rows"]} == {"Qwen2.5-0.5B"} and all(
        r["fits"] for r in found["rows"]
    )


# Its parts --------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_told_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="logprobs: a process died.*invalid literal for int"):
        race.race("logprobs", ["ours-many"], {"rounds": 1}, str(tmp_path))


@pytest.mark.parametrize(
    "words, part",
    [
        (["nothing"], "invalid choice"),
        (
            ["verify", "--set", "nosuch=1"],
            "--set (nosuch=1) must be K=V with K one of: problems, group, rounds",
        ),
        (["plan", "--model", "/no/such/folder"], "--model (/no/such/folder) is no folder"),
    ],
)
def test_bad_input(capsys, words, part):
    assert bench.main(words) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1


def test_flops_by_hand():
    # One layer of width 64 with one head and a vocabulary of 10; a sequence of 2 + 3 tokens.
    config = bench.step_config({"width": 64, "layers": 1, "vocab": 10}).to_dict()
    parts = plan.update_flops(config, [(2, 3)])
    q_and_o, k_and_v, gate_and_up, down, head, attention = (part[3] for part in parts)
    assert q_and_o == k_and_v == 6 * 64 * 64 * 2 * 5
    assert gate_and_up == 6 * 64 * 256 * 2 * 5 and down == gate_and_up / 2
    assert head == 6 * 64 * 10 * 3
    assert attention == 6 * 64 * 5**2


@pytest.mark.parametrize(
    "device, peaks",
    [
        ("NVIDIA H100 80GB HBM3", (989, 67)), ("NVIDIA H200", (989, 67)), ("NVIDIA H100 NVL", (835, 60)),
        ("NVIDIA H100 PCIe", (756, 51)), ("NVIDIA A100-SXM4-80GB", (312, 19.5)), ("NVIDIA L40S", (362, 91.6)),
        ("NVIDIA A100 80GB PCIe", (312, 19.5)), ("NVIDIA GeForce RTX 4090", (165, 82.6)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (None, None)), ("NVIDIA L40", (None, None)),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", (None, None)), ("NVIDIA A1000", (None, None)),
    ],
)  # fmt: skip
def test_peaks_of_gpus(device, peaks):
    assert tuple(plan.peak_tflops(device, dtype) for dtype in ("bfloat16", "float32")) == peaks


def test_gradient_distance_by_hand(tmp_path):
    torch.save([torch.tensor([3.0, 0.0]), torch.tensor([4.1])], tmp_path / "ours.pt")
    torch.save([torch.tensor([3.0, 0.0]), torch.tensor([4.0])], tmp_path / "trl.pt")
    assert bench.gradient_distance(str(tmp_path), "trl") == pytest.approx(0.1 / 5, rel=1e-5)


def test_parameters_are_the_published_ones():
    # Numbers of parameters of the published checkpoints.
    published = {
        "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-7B": 7_615_616_512,
        "Qwen2.5-14B": 14_770_033_664, "R1-Distill-1.5B": 1_777_088_000,
    }  # fmt: skip
    assert {name: plan.parameters(plan.MODELS[name]) for name in published} == published


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_saved_bytes_of_real_models(kind, tied):
    import transformers

    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=50, tie_word_embeddings=tied, head_dim=16)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    assert plan.parameters(config.to_dict()) == sum(p.numel() for p in model.parameters())
    if kind == "Qwen3":
        return  # its norms of queries and keys save more
    for dtype, param_dtype in ("float32",) * 2, ("bfloat16", "float32"), ("bfloat16",) * 2:
        model = model.to(getattr(torch, param_dtype))
        # What autograd keeps of a forward pass, each storage once, weights left out, against the formula.
        kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor, kept=kept, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        with bf16, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.get_decoder()(input_ids=torch.zeros(2, 40, dtype=torch.long), use_cache=False)
        assert out.last_hidden_state.requires_grad
        copies = 2 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) * (dtype != param_dtype)  # of the matrices
        bytes_per_token = plan.layer_bytes(config.to_dict(), dtype, param_dtype)
        assert sum(kept.values()) - copies == pytest.approx(80 * 3 * bytes_per_token, rel=0.1)


def test_the_table_in_the_docs_is_the_plan():
    rows = plan.table(plan.MODELS, [4096, 16_384], [1, 4, 8], 80, 1024)
    with open(os.path.join(os.path.dirname(bench.__file__), "docs", "scaling.md"), encoding="utf-8") as f:
        assert plan.markdown(rows) in f.read(), "python -m scaling.plan prints the new one"


@given(
    st.sampled_from(sorted(plan.MODELS)), st.integers(100, 50_000), st.booleans(), st.sampled_from([24, 80])
)  # fmt: skip
def test_plan_grows_with_the_work_and_keeps_to_the_gpu(name, tokens, recompute, gib):
    config, n = plan.MODELS[name], plan.parameters(plan.MODELS[name])
    rule = [config, tokens, "bfloat16", recompute]
    peak = plan.trainer_bytes(*rule, "adamw", True)
    assert plan.trainer_bytes(config, 2 * tokens, *rule[2:], "adamw", True) >= peak
    assert plan.trainer_bytes(*rule, "adamw8bit", True) == peak - 6 * n
    assert plan.trainer_bytes(*rule, "adamw", True, param_dtype="bfloat16") < peak - 4 * n
    assert plan.trainer_bytes(*rule, "adamw", True, shards=8) < peak - 10 * n
    if recompute:  # without, many tokens make adapters dearer: they keep their layers' inputs once more
        assert plan.trainer_bytes(*rule, "adamw", True, lora=8) < peak
    rows = plan.table({name: config}, [tokens], [1, 8], gib, 512)
    for row in rows:
        assert row["fits"] == (row["peak_gib"] <= gib) and row["trainer_gib"] < row["peak_gib"]
        both = row["trainer_gib"] + row["engine_gib"]
        assert row["peak_gib"] < both if "--vllm-sleep" in row["flags"] else row["peak_gib"] <= both
        assert ("does not fit" in row["flags"]) != row["fits"]
        assert row["gpus"] == 8 or "--fsdp" not in row["flags"]
    assert 1 <= len(rows) <= 2 and rows[0]["gpus"] == 1


def test_flags_of_the_plan_are_the_trainers():
    import train_grpo

    for way in plan.attempts(plan.MODELS["Qwen2.5-0.5B"], 5000, 8, 80):
        args = train_grpo.build_parser().parse_args(way["flags"].split())
        assert args.dtype == "bfloat16" and args.micro_tokens >= 5000 and 0 < args.vllm_memory < 1
