import argparse
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rollouts
import sampler as samplers
import torch
import update as updates
import weights
from conftest import ROOT, TIMES
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import train_grpo
from data import load_tokenizer
from scaling import plan
from toy import task as toy

DATA = os.path.join(ROOT, "tests", "data")
SMALL = (
    "--budgets bucket:8,16 --max-tokens 24 --prompts-per-step 4 --group-size 4 --lr 1e-3 --sampler hf".split()
)


def arguments(*words):
    return train_grpo.build_parser().parse_args(list(words))


def random_batch(n=7, seed=0, vocab=600):
    rng = np.random.default_rng(seed)
    batch = []
    for _ in range(n):
        ids = rng.integers(5, vocab, rng.integers(1, 30)).tolist()
        prompt = rng.integers(5, vocab, rng.integers(3, 12)).tolist()
        response = {"prompt_ids": prompt, "ids": ids, "logps": [-6.0] * len(ids)}
        batch.append(response | {"advantage": float(rng.normal()), "weight": 0.1})
    return batch


def weights_after_update(model, batch, args, **options):
    """Weights after plain gradient descent with step 1: their change IS the gradient."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = updates.update(model, None, optimizer, copy.deepcopy(batch), args, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), stats


# What is trained --------------------------------------------------------------------------------------------


def test_end_token_is_trained_when_pad_is_eos(tiny_pad_is_eos):
    tokenizer, model = load_tokenizer(tiny_pad_is_eos), samplers.load_model(tiny_pad_is_eos)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short = {"prompt_ids": [5, 6], "ids": [7, tokenizer.eos_token_id], "logps": [0.0, 0.0]}
    long = {"prompt_ids": [5, 6, 7], "ids": [8] * 9, "logps": [0.0] * 9}
    batch = [r | {"advantage": 1.0, "weight": 1.0} for r in (short, long)]
    t = updates.to_tensors(batch, "cpu")
    assert t["target"].tolist() == [7, tokenizer.eos_token_id] + [8] * 9
    # and its log-prob is pushed up: its row of the head has a gradient
    logp, _ = updates.model_logps(model, t, arguments())
    logp[1].backward()
    assert model.get_output_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_logps_equal_a_plain_forward_pass_and_change_no_input(tiny):
    model, batch = samplers.load_model(tiny), random_batch()
    t = updates.to_tensors(batch, "cpu")
    before = {k: v.clone() for k, v in t.items()}
    for temperature in ("1.0", "0.6"):
        got, _ = updates.model_logps(model, t, arguments("--temperature", temperature))
        want = []
        for r in batch:  # one response at a time, nothing padded
            logits = model(torch.tensor([r["prompt_ids"] + r["ids"]])).logits[0] / float(temperature)
            logp = logits.log_softmax(-1)[len(r["prompt_ids"]) - 1 : -1]
            want.append(logp.gather(-1, torch.tensor(r["ids"])[:, None])[:, 0])
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in t.items())


def test_more_padding_changes_nothing(tiny):
    model, t = samplers.load_model(tiny), updates.to_tensors(random_batch(), "cpu")
    want, _ = updates.model_logps(model, t, arguments())
    t["ids"] = torch.cat([t["ids"], torch.full((len(t["ids"]), 13), 3)], 1)
    got, _ = updates.model_logps(model, t, arguments())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_update_does_not_depend_on_micro_batches(tiny, reduction):
    model, batch = samplers.load_model(tiny), random_batch()
    flags = ["--loss-reduction", reduction, "--grad-clip", "1e9"]
    whole, stats = weights_after_update(model, batch, arguments("--micro-tokens", "100000", *flags))
    for tokens in ("60", "1"):
        split, split_stats = weights_after_update(model, batch, arguments("--micro-tokens", tokens, *flags))
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
        assert split_stats["loss"] == pytest.approx(stats["loss"], abs=1e-6)
        assert split_stats["padding"] <= stats["padding"]


def five_updates(path, flags, state) -> dict:
    """{"losses" of five steps, "weights" after them, "again": the weights of a resumed trainer}."""
    args = arguments("--minibatches", "2", "--lr", "1e-3", "--micro-tokens", "64", *flags)
    made = argparse.Namespace(path=path, folder=None, reference=None)
    train_grpo.build_model(made, args, state)
    losses, options = [], {"rank": state.process_index, "processes": state.num_processes}
    for k in range(5):
        # The last batch has fewer responses than there are processes: one of them has none of its own.
        batch = random_batch(1 if k == 4 else 7, seed=k)
        stats = updates.update(made.model, None, made.optimizer, batch, args, **options)
        losses.append(stats["loss"])
    trained = weights.trained_state(made.model, made.optimizer)
    again = argparse.Namespace(path=path, folder=None, reference=None)
    train_grpo.build_model(again, args, state)
    weights.load_trained_state(again.model, again.optimizer, trained)
    both = [dict(weights.whole_weights(m.model)) for m in (made, again)]
    if not args.lora:
        both[1] = None  # the weights lie beside the trainer's state
    moments = [weights.trained_state(m.model, m.optimizer)["optimizer"]["state"] for m in (made, again)]
    for i, entry in moments[0].items():
        assert all(torch.equal(value, moments[1][i][key]) for key, value in entry.items())
    return {"losses": losses, "weights": both[0], "again": both[1]}


@pytest.mark.parametrize("flags", ["", "--fsdp", "--lora 4", "--fsdp --lora 4 --gradient-checkpointing"])
def test_two_processes_learn_what_one_does(tiny, script, tmp_path, flags):
    """Over five optimizer steps: losses to 1e-5, weights; plain, sharded (FSDP2) and with adapters."""
    alone = argparse.Namespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    one = five_updates(tiny, flags.replace("--fsdp", "").split(), alone)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script(
        *launch, os.path.join(ROOT, "tests", "two_processes.py"), tiny, tmp_path / "out.pt", *flags.split()
    )
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    assert two["processes"] == 2 and min(map(abs, one["losses"])) > 0
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-6)
    plain = dict(samplers.load_model(tiny).named_parameters())
    assert set(two["weights"]) == set(one["weights"]) == set(plain)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-4)
        assert two["again"] is None or torch.equal(two["again"][name], two["weights"][name])
    moved = {name for name, p in plain.items() if not torch.equal(p, one["weights"][name])}
    assert moved == set(plain) or (moved and "lora" in flags and not any("embed" in name for name in moved))


# The starting model -----------------------------------------------------------------------------------------


def test_kl_is_that_to_the_starting_model(tiny):
    """By hand from a plain forward pass of each model, over minibatches and micro-batches."""
    reference, batch = samplers.load_model(tiny).eval(), random_batch()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    kl, tokens = 0.0, sum(len(r["ids"]) for r in batch)
    for r in batch:
        ids, first = torch.tensor([r["prompt_ids"] + r["ids"]]), len(r["prompt_ids"]) - 1
        with torch.no_grad():
            both = [m(ids).logits[0, first:-1].log_softmax(-1) for m in (model, reference)]
        d = (both[0] - both[1]).gather(-1, torch.tensor(r["ids"])[:, None])
        kl += (torch.expm1(-d) + d).sum().item()
    args = arguments("--kl-coef", "0.5", "--micro-tokens", "60", "--minibatches", "2", "--lr", "1e-9")
    stats = updates.update(model, reference, updates.make_optimizer(model, args), batch, args)
    assert stats["kl"] == pytest.approx(kl / tokens, rel=1e-4) and kl / tokens > 1e-3


def test_the_starting_model_visits_the_device(tiny):
    model = samplers.load_model(tiny).eval()
    homes = {name: t.data_ptr() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(KeyError), weights.as_reference(model, "meta") as there:
        assert {t.device.type for t in (*there.parameters(), *there.buffers())} == {"meta"}
        assert tied and there.get_output_embeddings().weight is there.get_input_embeddings().weight
        raise KeyError  # whatever happens there, it comes home, and nothing was copied back
    assert homes == {n: t.data_ptr() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def test_adapters_left_out_are_the_starting_model(tiny):
    """No second model beside adapters; with them on again training goes on where it was."""
    plain, model, batch = samplers.load_model(tiny), samplers.load_model(tiny).train(), random_batch()
    weights.add_lora(model, 4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    logps = {}
    for name in ("adapted", "again"):
        updates.add_logps(model, batch, arguments(), "cpu")
        logps[name] = [r["old_logps"] for r in batch]
        with weights.as_reference(model, "cpu") as starting:
            assert not starting.training
            updates.add_logps(starting, batch, arguments(), "cpu", "ref_logps")
    updates.add_logps(plain, batch, arguments(), "cpu")
    assert [r["ref_logps"] for r in batch] == [r["old_logps"] for r in batch] != logps["adapted"]
    assert logps["adapted"] == logps["again"] and model.training
    state = argparse.Namespace(device=torch.device("cpu"))
    made = argparse.Namespace(path=tiny, folder=None, reference=None)
    train_grpo.build_model(made, arguments("--lora", "4", "--kl-coef", "0.1"), state)
    assert made.reference is made.model


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 400), st.integers(1, 5))
def test_shares_and_micro_batches_lose_nothing(n, limit, processes):
    batch = random_batch(n, seed=n)
    shares = [updates.share_of(batch, rank, processes) for rank in range(processes)]
    assert sorted(id(r) for share in shares for r in share) == sorted(map(id, batch))
    parts = updates.micro_batches(batch, limit)
    assert sorted(id(r) for part in parts for r in part) == sorted(map(id, batch))
    for part in parts:
        assert len(part) == 1 or len(part) * max(map(updates.total_length, part)) <= limit


def test_training_speed_by_hand(tiny):
    """2 layers of width 64, 2 heads, keys and values of 32, MLP of 128, 600 words; 2 + 3 tokens."""
    model, r = samplers.load_model(tiny), {"prompt_ids": [5, 6], "ids": [7, 8, 9]}
    head, attention = 64 * 600 * 3, 2 * 64 * 5**2
    linear = 2 * 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + head

    def flops(words="", reference=None):
        found = updates.training_speed(model, reference, [r], arguments(*words.split()), 2.0)
        return found["train_tflops"] * 2e12

    assert flops() == pytest.approx(6 * (linear + attention))
    assert flops(reference=model) == pytest.approx(8 * (linear + attention))
    # Of two minibatches the second one's old log-probs are computed first: half of a forward pass.
    assert flops("--minibatches 2") == pytest.approx(7 * (linear + attention))
    assert flops("--lora 4") == pytest.approx(4 * linear + 6 * attention)
    model.config.num_experts = 4
    assert updates.training_speed(model, None, [r], arguments(), 2.0) == {}


def test_learning_rate_by_hand():
    args = arguments("--lr", "1", "--warmup-steps", "2", "--steps", "6", "--lr-schedule", "linear")
    assert [updates.learning_rate(t, args) for t in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    args = arguments("--lr", "1", "--steps", "4", "--lr-schedule", "cosine")
    assert updates.learning_rate(2, args) == pytest.approx(0.5)


# Weights in bfloat16 ----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), st.integers(0, 9))
def test_rounding_at_random_hits_the_neighbours(value, seed):
    x = torch.full((500,), value)
    got = updates.round_at_random(x, torch.Generator().manual_seed(seed)).float()
    step = torch.tensor(value).bfloat16().float().abs() * 2**-7 + 1e-38  # at least the space between two
    assert ((got - x).abs() <= step).all() and len(got.unique()) <= 2
    assert torch.equal(updates.round_at_random(got, torch.Generator().manual_seed(1)).float(), got)


def test_rounding_at_random_is_right_in_the_mean():
    """1 + k / 1024 lies k eighths of the way from 1 to its next bfloat16, 1 + 1 / 128; the sign is free."""
    for k in range(9):
        for sign in (1, -1):
            x = torch.full((40_000,), sign * (1 + k / 1024))
            up = updates.round_at_random(x, torch.Generator().manual_seed(k)).float().abs() > 1
            assert up.float().mean().item() == pytest.approx(k / 8, abs=0.01)
    infinite = torch.tensor([math.inf, -math.inf])
    assert torch.equal(updates.round_at_random(infinite, torch.Generator()).float(), infinite)


def small_steps(dtype, step, count=200, size=4000):
    """Mean move of weights of 1 under AdamW with lr 1e-5 and a constant gradient: 1e-5 a step, relative."""
    p = torch.nn.Parameter(torch.ones(size, dtype=dtype))
    optimizer = torch.optim.AdamW([p], lr=1e-5, weight_decay=0.0, fused=True)
    for _ in range(count):
        p.grad = torch.full_like(p, 0.25)
        step(optimizer)
    assert p.dtype == dtype
    return (1 - p.float()).mean().item(), optimizer.state[p]


def test_bfloat16_weights_follow_the_float32_ones():
    """200 updates of 1e-5 relative, each far below what bfloat16 can tell apart (4e-3)."""
    exact, _ = small_steps(torch.float32, lambda optimizer: optimizer.step())
    lost, _ = small_steps(torch.bfloat16, lambda optimizer: optimizer.step())
    ours, state = small_steps(torch.bfloat16, lambda optimizer: updates.optimizer_step(optimizer, 3))
    assert exact == pytest.approx(2e-3, rel=0.01) and lost == 0
    assert ours == pytest.approx(exact, rel=0.1)  # a weight moves by 2^-8 with odds of 1/2: +- 3%
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32 and int(state["step"]) == 200
    again, _ = small_steps(torch.bfloat16, lambda optimizer: updates.optimizer_step(optimizer, 3))
    other, _ = small_steps(torch.bfloat16, lambda optimizer: updates.optimizer_step(optimizer, 4))
    assert again == ours != other


def test_bfloat16_learns_and_resumes_exactly(tiny, tmp_path):
    """3 steps equal 2 and a resumed one, bit for bit; half the bytes; the memory check learns nothing."""
    common = ["--model", tiny, "--data", os.path.join(DATA, "math_train_small.jsonl.gz"), *SMALL]
    common += ["--dtype", "bfloat16", "--param-dtype", "bfloat16", "--save-every", "2", "--steps", "3"]
    common += ["--minibatches", "2"]
    assert train_grpo.main([*common, "--check-memory", "--out", str(tmp_path / "whole")]) == 0
    assert train_grpo.main([*common, "--out", str(tmp_path / "cut")]) == 0
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3")
    assert train_grpo.main(["--resume", "--out", str(tmp_path / "cut")]) == 0
    assert [timeless(m) for m in lines(tmp_path / "whole")] == [timeless(m) for m in lines(tmp_path / "cut")]
    end, again = (dict(samplers.load_model(str(tmp_path / name / "checkpoint-3"), dtype="bfloat16")
                       .named_parameters()) for name in ("whole", "cut"))  # fmt: skip
    start = dict(samplers.load_model(tiny, dtype="bfloat16").named_parameters())
    assert all(torch.equal(p, again[name]) and not torch.equal(p, start[name]) for name, p in end.items())
    sizes = [os.path.getsize(os.path.join(f, "model.safetensors"))
             for f in (tiny, tmp_path / "whole" / "checkpoint-3")]  # fmt: skip
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)


def test_bytes_of_bfloat16_weights_and_adapters(tiny):
    """2 a parameter and 2 of gradient, 8 of moments; beside adapters, which learn in float32, 2."""
    state = argparse.Namespace(device=torch.device("cpu"))
    flags = ["--dtype", "bfloat16", "--param-dtype", "bfloat16"]
    found = {}
    for name, more in {"full": [], "lora": ["--lora", "4"]}.items():
        made = argparse.Namespace(path=tiny, folder=None, reference=None)
        args = arguments(*flags, *more)
        train_grpo.build_model(made, args, state)
        batch = random_batch()
        updates.backward(made.model, batch, args, "cpu", dict.fromkeys(updates.SUMMED, torch.zeros(())))
        gradients = sum(p.grad.nbytes for p in made.model.parameters() if p.grad is not None)
        updates.optimizer_step(made.optimizer, 0)
        moments = [v for e in made.optimizer.state.values() for k, v in e.items() if k != "step"]
        held = sum(p.nbytes for p in made.model.parameters()) + gradients + sum(v.nbytes for v in moments)
        c = made.model.config.to_dict()
        found[name] = held / plan.state_bytes(c, "adamw", lora=args.lora, param_dtype="bfloat16")
    assert found == {"full": 1, "lora": 1}


# Data and samples -------------------------------------------------------------------------------------------


def test_rows_cover_every_epoch_once():
    rows = [{"id": i} for i in range(10)]
    args = arguments("--prompts-per-step", "4", "--seed", "3")
    ids = [row["id"] for step in range(5) for row in rollouts.draw_rows(rows, args, 4 * step, 4, {})]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10)) and ids[:10] != ids[10:]


def test_resampled_budgets_differ_between_epochs_only():
    args = arguments("--data", "toy", "--budgets", "uniform:8:60", "--wording", "tulu", "--resample-budgets")
    args.max_tokens = 64
    rows = train_grpo.load_rows(args)[:8]
    args.prompts_per_step = 8
    draw = [
        sorted((r["id"], r["budget"]) for r in rollouts.draw_rows(rows, args, 8 * step, 8, {}))
        for step in (0, 1, 1)
    ]
    assert draw[0] != draw[1] == draw[2]
    assert all(
        f"Think for {r['budget']} tokens." in r["prompt"] for r in rollouts.draw_rows(rows, args, 8, 8, {})
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_hf_sampler(tiny, temperature):
    sampler = samplers.load_sampler(tiny, "hf")
    prompts = [[5, 6, 7], [8, 9], [10] * 9]
    made = sampler.generate(prompts, 3, [20, 4, 12], temperature, seed=1)
    assert made == sampler.generate(prompts, 3, [20, 4, 12], temperature, seed=1)
    assert made != sampler.generate(prompts, 3, [20, 4, 12], temperature, seed=2)
    for prompt, group, cap in zip(prompts, made, [20, 4, 12], strict=True):
        assert len(group) == 3
        for r in group:
            assert len(r["ids"]) == len(r["logps"]) <= cap
            assert (r["ids"][-1] in sampler.stop_ids) == (r["finish_reason"] == "stop")
            t = updates.to_tensors([r | {"prompt_ids": prompt, "advantage": 0.0, "weight": 0.0}], "cpu")
            with torch.no_grad():
                logp, _ = updates.model_logps(sampler.model, t, arguments("--temperature", str(temperature)))
            torch.testing.assert_close(torch.tensor(r["logps"]), logp, rtol=1e-4, atol=1e-5)


def test_toy_world():
    assert toy.solve("add", [7, 3, 9]) == [7, 0, 9] and toy.solve("max", [7, 3, 9]) == [7, 7, 9]
    rng = np.random.default_rng(0)
    assert toy.trace("add 7 3 9", 0, rng) == "7 +3 =0 +9 =9 </think> 9"
    assert len(toy.trace("add 7 3 9", 20, rng).split()) >= 27
    tokenizer = toy.make_tokenizer()
    text = toy.trace("max 7 3 9", 40, rng)
    assert tokenizer.decode(
        tokenizer.encode(text)
    ) == text and tokenizer.unk_token_id not in tokenizer.encode(text)
    train, test = ({p["problem"] for p in toy.problems("toy", split, 500)} for split in ("train", "test"))
    assert not train & test


# The real script --------------------------------------------------------------------------------------------


def lines(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def timeless(line):
    return {k: v for k, v in line.items() if not k.startswith(TIMES)}


def test_resume_after_kill_is_exact(tiny, script, tmp_path):
    common = ["--model", tiny, "--data", os.path.join(DATA, "math_train_small.jsonl.gz"), *SMALL]
    common += ["--save-every", "2", "--minibatches", "2", "--resample-budgets", "--steps", "4"]
    script("train_grpo.py", *common, "--out", tmp_path / "whole")
    killed = [sys.executable, "train_grpo.py", *common, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not os.path.exists(tmp_path / "killed" / "checkpoint-2"):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint before the end"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(tmp_path / "killed" / "checkpoint-4"), "killed too late to test anything"
    script("train_grpo.py", "--resume", "--out", tmp_path / "killed", *common[:4])
    for step in (2, 4):
        with open(tmp_path / "whole" / f"checkpoint-{step}" / "model.safetensors", "rb") as a:
            with open(tmp_path / "killed" / f"checkpoint-{step}" / "model.safetensors", "rb") as b:
                assert a.read() == b.read()
    whole, resumed = lines(tmp_path / "whole"), lines(tmp_path / "killed")
    assert [timeless(m) for m in whole] == [timeless(m) for m in resumed] and len(whole) == 4


def test_two_processes_run_the_script(tiny, script, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "no"]
    flags = [
        "--model",
        tiny,
        "--data",
        os.path.join(DATA, "math_train_small.jsonl.gz"),
        *SMALL,
        "--steps",
        "2",
    ]
    flags += [
        "--eval-data",
        os.path.join(DATA, "math500_small.jsonl"),
        "--eval-every",
        "2",
        "--eval-limit",
        "5",
    ]
    done = script(*launch, "train_grpo.py", *flags, "--kl-coef", "0.01", "--out", tmp_path / "out")
    assert "2 process(es)" in done.stdout and len(lines(tmp_path / "out")) == 2
    assert (
        lines(tmp_path / "out")[0]["kl"] == pytest.approx(0, abs=1e-6)
        and lines(tmp_path / "out")[1]["kl"] > 0
    )
    with open(tmp_path / "out" / "eval-2" / "results.json") as f:
        results = json.load(f)
    assert results["datasets"]["math500_small"]["budgets"]["8"]["n"] == 5
    with open(tmp_path / "out" / "eval-2" / "samples.jsonl") as f:
        assert len(list(f)) == 10


def test_sharded_adapters_are_saved_whole_and_resumed(tiny, script, tmp_path):
    """Two processes, --fsdp and --lora: 3 steps equal 2 and a resumed one; what is saved is a plain model."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "no"]
    flags = ["--model", tiny, "--data", os.path.join(DATA, "math_train_small.jsonl.gz"), *SMALL]
    flags += ["--fsdp", "--lora", "2", "--kl-coef", "0.01", "--save-every", "2", "--steps", "3"]
    script(*launch, "train_grpo.py", *flags, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3")
    script(*launch, "train_grpo.py", "--resume", "--out", tmp_path / "cut")
    whole, resumed = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    assert [timeless(m) for m in whole] == [timeless(m) for m in resumed] and len(whole) == 3
    assert whole[2]["kl"] > 0 and max(m["logp_gap_max"] for m in whole) < 1e-4
    models = [samplers.load_model(str(tmp_path / name / "checkpoint-3")) for name in ("whole", "cut")]
    start = samplers.load_model(tiny)
    for name, p in start.named_parameters():
        a, b = (dict(model.named_parameters())[name] for model in models)
        assert torch.equal(a, b) and torch.equal(a, p) != name.endswith("proj.weight")
    assert models[0].config.architectures == start.config.architectures


def test_toy_from_nothing_to_evaluation(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(toy.WARMUP, "batches", 3)
    monkeypatch.setattr(toy, "ASKED", [16, 64])
    monkeypatch.setattr(toy, "TESTED", 5)
    flags = ["--steps", "2", "--group-size", "4", "--budgets", "bucket:20,40"]
    assert train_grpo.main([*flags, "--out", str(tmp_path / "toy")]) == 0
    out = capsys.readouterr().out
    assert "step    2/2" in out and "answer" in out and "mean error" in out.splitlines()[-2]
    assert (
        os.path.getsize(out.splitlines()[-1].removeprefix("look at ")) > 5000
    )  # it says where the pictures are
    with open(tmp_path / "toy" / "eval" / "results.json") as f:
        results = json.load(f)
    assert set(results["datasets"]) == {"toy", "toy_ood"} and results["trained_budgets"] == [20, 40]
    assert set(results["datasets"]["toy"]["budgets"]) == {"16", "20", "40", "64"}
    line = lines(tmp_path / "toy")[0]
    assert {"reward_correct", "reward_length", "error_by_budget", "zero_variance", "lr", "peak_gib"} <= set(
        line
    )
    times = {k: v for k, v in line.items() if k.startswith("seconds_")}
    assert set(times) == {f"seconds_{part}" for part in "sample verify train sync rest".split()}
    useful = line["seconds_sample"] + line["seconds_train"]
    assert line["overhead"] == pytest.approx(1 - useful / sum(times.values())) and 0 < line["overhead"] < 1
    assert line["train_tflops"] > 0 and "train_mfu" not in line  # a CPU's peak is not known
    assert line["lr"] == pytest.approx(3e-5)  # the rate that was used: first step of ten of warm-up


def test_evaluation_asks_as_the_rows_did(tiny, tmp_path):
    """Rows made by data.py say how they ask; the flags of the trainer need not repeat it."""
    rows = str(tmp_path / "rows.jsonl")
    small = os.path.join(DATA, "math_train_small.jsonl.gz")
    assert (
        data.main([small, "--budgets", "bucket:4,8", "--mode", "max", "--wording", "tulu", "--out", rows])
        == 0
    )
    flags = ["--model", tiny, "--data", rows, "--max-tokens", "8", "--steps", "1", "--prompts-per-step", "2"]
    flags += ["--group-size", "2", "--sampler", "hf", "--reward", "lcpo_max", "--out", str(tmp_path / "out")]
    flags += [
        "--eval-data",
        os.path.join(DATA, "math500_small.jsonl"),
        "--eval-every",
        "1",
        "--eval-limit",
        "1",
    ]
    assert train_grpo.main(flags) == 0
    with open(tmp_path / "out" / "eval-1" / "samples.jsonl") as f:
        prompts = [json.loads(line)["prompt"] for line in f]
    assert [p.splitlines()[-1] for p in prompts] == [f"Think for up to {b} tokens." for b in (4, 8)]


def test_sampler_ignores_the_models_generation_settings(tiny, tmp_path):
    """A repetition penalty would sample from another distribution than the one that is trained."""
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    settings_ = json.loads(path.read_text()) | {"repetition_penalty": 5.0, "do_sample": True, "top_k": 3}
    path.write_text(json.dumps(settings_))
    plain, penalised = (samplers.load_sampler(str(p), "hf") for p in (tiny, tmp_path / "model"))
    want = plain.generate([[5, 6, 7]], 2, 40, seed=3)
    assert penalised.generate([[5, 6, 7]], 2, 40, seed=3) == want


def test_every_switch_of_the_update_at_once(tiny, tmp_path):
    flags = [
        "--model",
        tiny,
        "--data",
        os.path.join(DATA, "math_train_small.jsonl.gz"),
        *SMALL,
        "--steps",
        "2",
    ]
    flags += ["--dtype", "bfloat16", "--gradient-checkpointing", "--kl-coef", "0.01", "--minibatches", "2"]
    flags += ["--offload-reference"]
    flags += [
        "--ratio",
        "sequence",
        "--loss-reduction",
        "constant",
        "--reward",
        "lcpo_dual",
        "--mode",
        "both",
    ]
    flags += ["--advantage", "rloo", "--resample-budgets", "--lr-schedule", "cosine"]
    assert train_grpo.main([*flags, "--out", str(tmp_path / "out")]) == 0
    first, second = lines(tmp_path / "out")
    assert first["kl"] == pytest.approx(0, abs=1e-3) and second["lr"] < first["lr"]
    # bf16 against the float32 sampler: the gap is there, and it is logged
    assert 1e-5 < second["logp_gap_max"] < 0.5


@pytest.mark.slow
def test_toy_learns_to_follow_budgets(script, tmp_path):
    script("train_grpo.py", "--out", tmp_path / "toy", timeout=1500)
    with open(tmp_path / "toy" / "eval" / "results.json") as f:
        part = json.load(f)["datasets"]["toy"]
    assert part["mean_trained"]["abs_error"] <= 0.10 and part["budgets"]["64"]["accuracy"] >= 0.9


# Memory -----------------------------------------------------------------------------------------------------


def test_the_memory_check_learns_nothing(tiny, tmp_path):
    common = ["--model", tiny, "--data", os.path.join(DATA, "math_train_small.jsonl.gz"), *SMALL]
    for name, flags in {"checked": ["--check-memory"], "plain": ["--no-check-memory"]}.items():
        assert train_grpo.main([*common, *flags, "--steps", "2", "--out", str(tmp_path / name)]) == 0
    a, b = ([timeless(m) for m in lines(tmp_path / name)] for name in ("checked", "plain"))
    assert a == b


LITTLE = """
import resource, sys, train_grpo
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
sys.exit(train_grpo.main(sys.argv[1:]))
"""


def test_too_large_an_update_is_told_before_training(tiny, script, tmp_path):
    flags = ["--model", tiny, "--data", os.path.join(DATA, "math_train_small.jsonl.gz"), *SMALL]
    flags += ["--check-memory", "--micro-tokens", "20000000", "--steps", "1", "--out", tmp_path / "out"]
    done = script("-c", LITTLE, *flags, check=False)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "--micro-tokens (20000000) does not fit" in last and "--gradient-checkpointing" in last
    assert "Traceback" not in done.stderr
