"""scaling.bench in sizes so small that its figures say nothing: tested is that they come out."""

import importlib.util
import json
import os
import re

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from scaling import bench, plan, race

SMALL = "layers=1 width=64 vocab=512 sequences=8 high=40 rounds=1".split()
BIGGER = "layers=2 width=256 vocab=4096 sequences=16 high=120".split()  # some 100 MiB


def run(capsys, *words):
    """The last line, the JSON one, and the table above it."""
    assert bench.main(list(words)) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["command"] == words[0] and len(table) > 1
    return found, table


# The commands -----------------------------------------------------------------------------------------------


def test_step_equals_trl(capsys):
    if not importlib.util.find_spec("trl"):
        pytest.skip(f"needs trl=={bench.TRL}")
    found, table = run(capsys, "step", "--set", *SMALL)
    ours, trl = found["variants"]["ours"], found["variants"]["trl"]
    assert 0 < found["gradient_difference"] < 1e-4  # the same update, by other operations
    assert trl["padding"] >= ours["padding"] > 0 and ours["speedup"] == ours["memory"] == 1
    for f in (ours, trl):
        assert f["seconds"] > 0 and 0 < f["held"] < f["peak"]
    assert trl["speedup"] == pytest.approx(trl["seconds"] / ours["seconds"]) and table[1].startswith("ours")


def test_step_without_trl(capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["step"]) == 2
    told = "scaling.bench: error: step needs TRL 1.16.0, found: None; pip install trl==1.16.0\n"
    assert capsys.readouterr().err == told


def test_logprobs(capsys):
    found, _ = run(capsys, "logprobs", "--set", "vocabs=[2048]", "tokens=64", "width=16", "rounds=2")
    (cell,) = found["vocabs"].values()
    assert cell["difference"] < 1e-4 and len(cell["ours"]["all"]) == 2
    assert cell["ours"]["seconds"] > 0 and cell["full"]["peak"] > cell["full"]["held"]


def test_prompts_once(capsys):
    sizes = "layers=1 width=64 vocab=512 sequences=16 rounds=1 lengths=[[24,8],[4,40]]".split()
    found, table = run(capsys, "prompts", "--set", *sizes)
    assert set(found["lengths"]) == {"24:8", "4:40"} and len(table) == 3
    for cell in found["lengths"].values():
        assert 0 < cell["gradient_difference"] < 1e-5  # another way to the same sum
        assert cell["once"]["seconds"] > 0 and cell["repeated"]["peak"] > 0


def test_padding_and_the_time_of_to_tensors(capsys):
    found, _ = run(capsys, "padding", "--set", "sequences=256", "processes=[1,2]")
    *ours, trl = found["padding"].values()
    assert all(0 <= share < 0.05 for share in ours) and trl > 0.3
    assert 0 < found["to_tensors"] <= 0.4  # microseconds a token
    # Responses of one length leave nothing to pad: exactly 0, whoever makes the batches.
    found, _ = run(capsys, "padding", "--set", "sequences=64", "low=50", "high=50", "responses=64")
    assert set(found["padding"].values()) == {0.0}


def test_scale_with_two_processes(capsys):
    sizes = "layers=1 width=64 vocab=512 high=40 rounds=1 sequences=[2,4,8]".split()
    found, _ = run(capsys, "scale", "--set", *sizes)
    low, middle, high = found["1"]["tokens"]
    assert middle == pytest.approx(2 * low, rel=0.05) and high == pytest.approx(4 * low, rel=0.05)
    for processes in ("1", "2"):
        assert len(found[processes]["seconds"]) == 3 and found[processes]["r2"] <= 1
    assert found["grad_norm_difference"] < 1e-4


def test_verify(capsys):
    found, _ = run(capsys, "verify", "--set", "problems=3", "group=8", "rounds=1")
    ours, one_by_one = (found["variants"][name] for name in ("ours", "math_verify"))
    assert found["answers"] == 24 and 0 < ours["right"] < 24 and ours["right"] == one_by_one["right"]
    assert sum(ours["counts"].values()) == 24 and ours["counts"]["fast"] and ours["counts"]["solved"]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vllm")
def test_sampler(capsys):
    sizes = "prompts=2 group=2 max_tokens=8 rounds=1 width=128 layers=2".split()
    found, _ = run(capsys, "sampler", "--set", *sizes)
    assert set(found["variants"]) == {"ours", "bare"}
    for cell in found["variants"].values():
        assert 4 <= cell["tokens"] <= 32 and cell["seconds"] > 0


def test_plan_against_what_is_measured(capsys, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "0")  # put back afterwards
    checks = json.dumps(["--micro-tokens 1000", "--micro-tokens 1000 --gradient-checkpointing --kl-coef 0.1"])
    found, table = run(capsys, "plan", "--model", "0.5B", "--set", *BIGGER, f"checks={checks}")
    plain, recomputed = found["checks"]
    for check in (plain, recomputed):  # 0.9 to 1.1 in larger sizes
        assert 0.85 < check["ratio"] < 1.15, check
    assert {row["model"] for row in found["rows"]} == {"Qwen2.5-0.5B"}
    assert all(r["fits"] for r in found["rows"]) and table[0].startswith("| model")


# Its parts --------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_told(tmp_path, capfd):
    sizes = {"rounds": 1, "dtype": "float32", "tokens": 1, "width": 1}
    with pytest.raises(SystemExit, match="logprobs_worker ours-many died"):
        race.race({"ours-many": bench.logprobs_worker}, sizes, tmp_path)
    assert "invalid literal for int" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words, part",
    [
        (["nothing"], "invalid choice"),
        (
            ["verify", "--set", "nosuch=1"],
            "--set (nosuch=1) must be K=V with K one of: problems, group, rounds",
        ),
        (["plan", "--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input(capsys, words, part):
    assert bench.main(words) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1


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
    for dtype in ("float32", "bfloat16"):
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
        copies = 2 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) * (dtype == "bfloat16")  # of the matrices
        bytes_per_token = plan.layer_bytes(config.to_dict(), dtype)
        assert sum(kept.values()) - copies == pytest.approx(80 * 3 * bytes_per_token, rel=0.1)


def test_state_of_a_trainer(tiny):
    """Weights, gradients, moments and starting model of a real one, byte for byte."""
    from test_loss import arguments, random_batch

    import methods
    import train_grpo
    from scaling import model as net

    for flags in ("", "--lora 4", "--dtype bfloat16", "--dtype bfloat16 --lora 4"):
        args = arguments("--model", tiny, "--kl-coef", "0.1", "--lr", "0", *flags.split())
        model, reference, optimizer = net.build(args, None, True)
        train_grpo.update(model, reference, optimizer, random_batch(), methods.Method(args, None), args)
        tensors = [*model.parameters(), *(() if reference is model else reference.parameters())]
        tensors += [p for p in model.parameters() if p.requires_grad]  # their gradients
        tensors += [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
        held = sum(t.numel() * t.element_size() for t in tensors)
        how = {"optim": "adamw", "shards": 1, "lora": args.lora, "reference": True}
        assert plan.state_bytes(model.config.to_dict(), args.dtype, how) == held


def test_the_table_in_the_docs_is_the_plan():
    rows = plan.table(plan.MODELS, [4096, 16_384], [1, 4, 8], 80, 1024)
    with open(os.path.join(ROOT, "docs", "scaling.md"), encoding="utf-8") as f:
        assert plan.markdown(rows) in f.read(), "python -m scaling.bench plan prints the new one"


@pytest.mark.parametrize("name, gib, row", [("l1_exact_24gb", 24, "24"), ("l1_exact_80gb_small", 80, ""),
                                            ("l1_exact", 80, "80")])  # fmt: skip
def test_figures_of_recipes_and_readme_are_the_plans(capsys, monkeypatch, name, gib, row):
    monkeypatch.chdir(ROOT)
    words = "plan", "--model", "R1-Distill-1.5B", "--set", f"recipe={name}", f"gpu_gib={gib}"
    [found] = run(capsys, *words)[0]["rows"]
    told = f"{found['peak_gib']:.1f} of {gib} GiB"
    assert found["fits"] and found["peak_gib"] == found["trainer_gib"] + found["engine_gib"]
    with open(os.path.join(ROOT, "recipes", f"{name}.args")) as f:
        recipe = f.read()
    assert name == "l1_exact" or f"{told}, {found['trainer_gib']:.1f} of them the trainer's" in recipe
    assert name == "l1_exact" or " ".join(words[:4]) + f" recipe={name}" in recipe
    if row:
        with open(os.path.join(ROOT, "README.md")) as f:
            assert re.search(rf"^\| \*\*one GPU\*\* of {row} GB .*{told}", f.read(), re.M)


@given(
    st.sampled_from(sorted(plan.MODELS)), st.integers(100, 50_000), st.booleans(), st.sampled_from([24, 80])
)  # fmt: skip
def test_plan_grows_with_the_work_and_keeps_to_the_gpu(name, tokens, recompute, gib):
    config, n = plan.MODELS[name], plan.parameters(plan.MODELS[name])

    def peak(tokens=tokens, **more):
        how = {"optim": "adamw", "shards": 1, "lora": 0, "recompute": recompute, "reference": True} | more
        return plan.trainer_bytes(config, tokens, "bfloat16", how, True)

    assert peak(2 * tokens) >= peak()
    assert peak(optim="adamw8bit") == peak() - 6 * n and peak(reference=False) == peak() - 2 * n
    assert peak(shards=8) < peak() - 10 * n
    if recompute:  # without, many tokens make adapters dearer: they keep their layers' inputs once more
        assert peak(lora=8) < peak()
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
        assert args.micro_tokens >= 5000 and 0 < args.vllm_memory < 1
