"""The loop of train_grpo.py: what is trained, what is sampled, real runs from rows to the last table."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import FREEZE, ROOT, TOY, lines, timeless

import data
import methods
import train_grpo
from rewards import ADVANTAGES, REWARDS
from scaling import model as net
from toy import prepare, task
from toy.hf_sampler import HFSampler

DATA = os.path.join(ROOT, "tests", "data")
MATH = os.path.join(DATA, "math_train_small.jsonl.gz")
MODEL = os.path.join(FREEZE, "model")
SMALL = ["--budgets", "bucket:8,16", "--max-tokens", "24", "--prompts-per-step", "4", "--group-size", "4"]
SMALL += ["--lr", "1e-3", "--sampler", "hf"]


def arguments(*words):
    args = train_grpo.build_parser().parse_args(["--dtype", "float32", *words])
    args.reward_args = args.advantage_args = args.method_args = {}
    return args


def load(path=MODEL, **options):
    return net.load_model(path, arguments(), **options)


def random_batch(n=7, seed=0, vocab=66, longest=30):
    rng = np.random.default_rng(seed)
    batch = []
    for _ in range(n):
        ids = rng.integers(5, vocab, rng.integers(1, longest)).astype(np.int32)
        prompt = rng.integers(5, vocab, rng.integers(3, 12)).tolist()
        logps = np.full(len(ids), -4, np.float32)
        batch.append({"prompt_ids": prompt, "ids": ids, "logps": logps, "advantage": float(rng.normal())})
    return batch


def gradient(batch, *flags, start=None, reference=None):
    """(the change of all weights by a step of plain gradient descent, what update() tells)"""
    model, args = copy.deepcopy(start) if start else load(), arguments(*flags)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = methods.Method(args, None)
    stats = train_grpo.update(model, reference, optimizer, copy.deepcopy(batch), method, args)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before, stats


# What is trained --------------------------------------------------------------------------------------------


def test_the_end_token_is_trained_when_it_is_also_the_padding(tiny_pad_is_eos):
    """A batch in which nothing but one end token has an advantage, beside a longer, padded-to response."""
    tokenizer = data.load_tokenizer(tiny_pad_is_eos)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end = tokenizer.eos_token_id
    short = {"ids": np.array([7, end], np.int32), "advantage": np.array([0, 1], np.float32)}
    long = {"ids": np.full(9, 8, np.int32), "advantage": 0.0}
    batch = [r | {"prompt_ids": [5, 6], "logps": np.zeros(len(r["ids"]), np.float32)} for r in (short, long)]
    model = load(tiny_pad_is_eos)
    before = model.get_output_embeddings().weight.detach().clone()
    args = arguments("--tis-cap", "0")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = train_grpo.update(model, None, optimizer, batch, methods.Method(args, None), args)
    moved = (model.get_output_embeddings().weight - before).norm(dim=1)
    assert stats["grad_norm"] > 0 and moved[end] == moved.max() > 0


def test_a_mask_goes_by_place():
    """Tokens that a method masks have no loss and no weight, whatever they are; the others keep theirs."""
    batch = random_batch(3)
    cut = copy.deepcopy(batch)
    for r in cut:
        keep = max(1, len(r["ids"]) // 2)
        r |= {k: r[k][:keep] for k in ("ids", "logps")}
    for r, c in zip(batch, cut, strict=True):
        r["mask"] = (np.arange(len(r["ids"])) < len(c["ids"])).astype(np.float32)
    (a, stats_a), (b, stats_b) = gradient(batch), gradient(cut)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for name in ("loss", "entropy", "logp_gap"):
        assert stats_a[name] == pytest.approx(stats_b[name], rel=1e-5)


def test_an_advantage_of_one_number_is_one_for_every_token():
    batch = random_batch()
    spread = [r | {"advantage": np.full(len(r["ids"]), r["advantage"], np.float32)} for r in batch]
    (a, _), (b, _) = gradient(batch), gradient(spread)
    assert torch.equal(a, b) and a.abs().sum() > 0
    for r in spread:
        r["advantage"][::2] = 0
    assert not torch.allclose(gradient(spread)[0], a)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_weights_of_tokens_are_fixed_before_the_batch_is_split(reduction):
    """Also per-token advantages and masks: micro-batches of any size give the same gradient."""
    batch, rng = random_batch(9), np.random.default_rng(0)
    for r in batch[::2]:
        r["advantage"] = rng.normal(size=len(r["ids"])).astype(np.float32)
        r["mask"] = (rng.random(len(r["ids"])) < 0.7).astype(np.float32)
    flags = ["--loss-reduction", reduction, "--tis-cap", "0", "--micro-tokens"]
    whole, stats = gradient(batch, *flags, "100000")
    for tokens in ("60", "1"):
        split, again = gradient(batch, *flags, tokens)
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)
        assert (
            again["loss"] == pytest.approx(stats["loss"], abs=1e-6) and again["padding"] <= stats["padding"]
        )


def test_later_minibatches_compare_with_the_policy_that_sampled():
    """Two minibatches are two updates; the second one's old log-probs are those of before the first."""
    batch, args = (
        random_batch(8),
        arguments("--minibatches", "2", "--clip-low", "0.01", "--clip-high", "0.01"),
    )
    once, stats = gradient(batch, "--minibatches", "2", "--clip-low", "0.01", "--clip-high", "0.01")
    model, second = load(), copy.deepcopy(batch[4:])
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    for r in second:
        r |= {"mask": np.ones(len(r["ids"]), np.float32), "weight": 0.0}
    train_grpo.add_logps(model, second, "old_logps", args)
    args.minibatches = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for part in (copy.deepcopy(batch[:4]), second):
        last = train_grpo.update(model, None, optimizer, part, methods.Method(args, None), args)
    torch.testing.assert_close(
        torch.cat([p.detach().flatten() for p in model.parameters()]) - start, once, rtol=1e-5, atol=1e-7
    )
    assert last["clip_fraction"] > 0 and 0 < stats["clip_fraction"] < last["clip_fraction"]


def test_kl_is_that_to_the_starting_model():
    """By hand from a plain forward pass of each model, over minibatches and micro-batches."""
    reference, batch = load(frozen=True), random_batch()
    model = load()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    kl, tokens = 0.0, sum(len(r["ids"]) for r in batch)
    for r in batch:
        ids, first = torch.tensor([[*r["prompt_ids"], *r["ids"]]]), len(r["prompt_ids"]) - 1
        with torch.no_grad():
            both = [m(ids).logits[0, first:-1].log_softmax(-1) for m in (model, reference)]
        d = (both[0] - both[1]).gather(-1, torch.tensor(r["ids"]).long()[:, None])
        kl += (torch.expm1(-d) + d).clamp(max=10).sum().item()  # a token's share is bounded
    args = arguments("--kl-coef", "0.5", "--micro-tokens", "60", "--minibatches", "2")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    stats = train_grpo.update(model, reference, optimizer, batch, methods.Method(args, None), args)
    assert stats["kl"] == pytest.approx(kl / tokens, rel=1e-4) and kl / tokens > 1e-3


def test_learning_rate_by_hand():
    args = arguments("--lr", "1", "--warmup-steps", "2", "--steps", "6", "--lr-schedule", "linear")
    assert [train_grpo.learning_rate(t, args) for t in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    args = arguments("--lr", "1", "--steps", "4", "--lr-schedule", "cosine")
    assert train_grpo.learning_rate(2, args) == pytest.approx(0.5)


# Rows, responses, verdicts ----------------------------------------------------------------------------------


def test_rows_cover_every_epoch_once():
    rows = [{"id": i} for i in range(10)]
    drawn = [row for step in range(5) for row in train_grpo.draw_rows(rows, 4 * step, 4, 3)]
    ids = [row["id"] for row in drawn]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10)) and ids[:10] != ids[10:]
    assert [row["position"] for row in drawn] == list(range(20))
    assert [row["id"] for row in train_grpo.draw_rows(rows, 0, 10, 4)] != ids[:10]


def test_a_response_that_was_cut_off_is_wrong():
    """Also when the right answer stands in it; and one without the end of thinking, where that is asked."""
    tokenizer = data.load_tokenizer(MODEL)
    row = {"answer": "6", "kind": "math", "choices": None}
    texts = ["6 +5 =1 </think> 6", "6 +5 =1 </think> 5", "6 =6 wait 6"]
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    group = [{"ids": np.array([*ids, 1], np.int32), "truncated": 0} for ids in answers]
    group += [{"ids": np.array(answers[0], np.int32), "truncated": 1}]
    found = {}
    for flags in ([], ["--require-think"]):
        train_grpo.check([group], [row], tokenizer, arguments(*flags))
        found[len(flags)] = [r["correct"] for r in group]
    assert found == {0: [1, 0, 1, 0], 1: [1, 0, 0, 0]}
    assert [r["length"] for r in group] == [len(r["ids"]) for r in group]  # the end token counts
    assert [r["text"] for r in group] == [*texts, texts[0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_hf_sampler(temperature):
    """The same seed gives the same responses; their log-probs are those of the loss; caps are kept."""
    model, tokenizer = load(), data.load_tokenizer(MODEL)
    sampler = HFSampler(model, tokenizer, [1], 64)
    prompts = [[5, 6, 7], [8, 9], [10] * 9]
    made = sampler.generate(prompts, 3, [20, 4, 12], temperature, seed=1)
    again, other = (sampler.generate(prompts, 3, [20, 4, 12], temperature, seed=s) for s in (1, 2))
    flat = [[r["ids"].tolist() for group in run for r in group] for run in (made, again, other)]
    assert flat[0] == flat[1] != flat[2] and [len(group) for group in made] == [3, 3, 3]
    args = arguments("--temperature", str(temperature))
    for prompt, group, cap in zip(prompts, made, [20, 4, 12], strict=True):
        for r in group:
            assert len(r["ids"]) == len(r["logps"]) <= cap and (r["ids"][-1] == 1) != r["truncated"]
            r |= {"prompt_ids": prompt, "advantage": 0.0, "weight": 0.0}
            r["mask"] = np.ones(len(r["ids"]), np.float32)
        train_grpo.add_logps(model, group, "again", args)
        for r in group:
            np.testing.assert_allclose(r["again"], r["logps"], atol=1e-4)


def test_the_sampler_ignores_the_models_generation_settings(tmp_path):
    """A repetition penalty would sample from another distribution than the one that is trained."""
    shutil.copytree(MODEL, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    changed = {"repetition_penalty": 5.0, "do_sample": True, "top_k": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    responses = []
    for folder in (MODEL, str(tmp_path / "model")):
        sampler = HFSampler(load(folder), data.load_tokenizer(folder), [1], 64)
        responses.append(sampler.generate([[5, 6, 7]], 2, [40], 1.0, seed=3)[0])
    for a, b in zip(*responses, strict=True):
        assert a["ids"].tolist() == b["ids"].tolist()


def test_toy_world():
    assert task.solve("add", [7, 3, 9]) == [7, 0, 9] and task.solve("max", [7, 3, 9]) == [7, 7, 9]
    rng, problem = np.random.default_rng(0), "add a +7 b +3 c +9"
    assert task.digits_of(problem) == [7, 3, 9]
    plain = "a +7 =7 b +3 =0 c +9 =9"
    assert task.trace(problem, 0, rng, in_head=0, give_up=0) == f"{plain} </think> 9"
    assert task.trace(problem, 0, rng, in_head=1, give_up=0) == "a +7 =7 b =0 c =9 </think> 9"
    long = task.trace(problem, 40, rng, in_head=0, give_up=0)
    assert len(long.split()) >= 51 and long.startswith(f"{plain} wait") and long.endswith("</think> 9")
    tokenizer = task.make_tokenizer()
    for word in ("add", "max"):
        text = task.trace(task.draw(word, rng), 40, rng)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    train, test = ({p["problem"] for p in task.problems("toy", split, 500)} for split in ("train", "test"))
    assert not train & test
    sizes = [len(task.digits_of(p)) for p in train]
    assert (min(sizes), max(sizes)) == task.SIZES, "two to eleven digits"
    for n, full, least in ((2, 9, 8), (11, 36, 26)):  # tokens of a whole chain, the end's included
        text = "add " + " ".join(f"{name} +1" for name in task.NAMES[:n])
        chains = [task.trace(text, 0, rng, in_head=h, give_up=0) for h in (0, 1)]
        assert [len(chain.split()) + 1 for chain in chains] == [full, least]


def test_toy_chains_in_the_head_err_and_are_mended_by_thinking_longer():
    """A wrong step is carried to the end; a re-check of all mends it. Who gives up has a result too early."""
    rng, rows = np.random.default_rng(0), task.problems("toy", "train", 400)
    wrong = task.trace("add a +7 b +8 c +1", 0, rng, in_head=1, give_up=0)
    assert wrong == "a +7 =7 b =6 c =7 </think> 7", "7 + 8 is 5: large digits are too much for it"
    assert task.trace("max a +7 b +8 c +1", 0, rng, in_head=1, give_up=0).endswith("b =8 c =8 </think> 8")

    def right(extra, **options):
        texts = [task.trace(row["problem"], extra, rng, **options) for row in rows]
        return np.mean([text.split()[-1] == row["answer"] for text, row in zip(texts, rows, strict=True)])

    assert right(0, in_head=0, give_up=0) == 1 and right(0, in_head=0, give_up=1) < 0.4
    assert right(0, in_head=1, give_up=0) < 0.7 < 0.8 < right(70, in_head=1, give_up=0)


def test_ctrl_c_while_the_toy_is_made_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CACHE", str(tmp_path / "cache"))

    def make(path):
        os.makedirs(path)
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="base-seed0 was made; the next start"):
        prepare.keep("base-seed0", make)
    [folder] = os.listdir(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache" / folder) == []


def test_budgets_that_replace_those_of_the_rows_are_told(tmp_path, capsys):
    rows = str(tmp_path / "rows.jsonl")
    data.main([f"{FREEZE}/rows.jsonl", "--budgets", "fixed:20", "--wording", "tulu", "--out", rows])
    for source, told in ((rows, True), (f"{FREEZE}/rows.jsonl", False)):
        train_grpo.main(
            [*TOY, "--data", source, "--steps", "1", "--out", str(tmp_path / "run"), "--overwrite"]
        )
        assert ("--budgets draws anew" in capsys.readouterr().out) == told


def test_groups_that_teach_nothing_are_replaced(tmp_path):
    """--dynamic-sampling: more is sampled than is kept, and in every group that is kept something differs."""
    flags = [
        *TOY,
        "--dynamic-sampling",
        "reward",
        "--reward",
        "gdpo_conditioned",
        "--reward-args",
        "limit=30",
    ]
    train_grpo.main([*flags, "--steps", "3", "--out", str(tmp_path / "run")])
    steps = lines(tmp_path / "run")
    assert max(m["sampled_groups"] for m in steps) > 4 and all(m["kept_groups"] <= 4 for m in steps)
    assert all(m["zero_variance"] == 0 for m in steps if m["kept_groups"])
    state = torch.load(tmp_path / "run" / "checkpoint-3" / "trainer_state.pt", weights_only=True)
    assert state["position"] == sum(m["sampled_groups"] for m in steps)


def test_rewards_see_budgets_and_missing_ones_are_nan():
    args = arguments("--reward", "lcpo_exact", "--group-size", "2")
    group = [{"correct": 1, "length": n, "truncated": 0, "text": "", "ids": []} for n in (8, 16)]
    rows = [{"budget": 8, "mode": "exact"}, {"budget": None, "mode": None}]
    method = methods.Method(args, None)
    rollouts, total, parts, advantage = train_grpo.reward_and_advantage([group, group], rows, method, args, 0)
    assert rollouts["budget"][0] == 8 and np.isnan(rollouts["budget"][1])
    assert total.shape == advantage.shape == (2, 2) and all(part.shape == (2, 2) for part in parts.values())
    np.testing.assert_allclose(total[0], REWARDS["lcpo_exact"](rollouts)[0])
    np.testing.assert_allclose(advantage[0], ADVANTAGES["grpo"](total, rollouts)[0])


# The real script --------------------------------------------------------------------------------------------


def same_weights(a, b):
    with open(a / "model.safetensors", "rb") as one, open(b / "model.safetensors", "rb") as two:
        return one.read() == two.read()


def test_resume_after_kill_is_exact(script, tmp_path):
    """4 steps are 2, a kill -9 and 2 more: bit for bit, minibatches included."""
    common = [*TOY, "--save-every", "2", "--minibatches", "2", "--steps", "4"]
    train_grpo.main([*common, "--out", str(tmp_path / "whole")])
    killed = [sys.executable, "train_grpo.py", *common, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not os.path.exists(tmp_path / "killed" / "checkpoint-2"):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint before the end"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(tmp_path / "killed" / "checkpoint-4"), "killed too late to test anything"
    script("train_grpo.py", "--resume", "--out", tmp_path / "killed")
    for step in (2, 4):
        assert same_weights(*(tmp_path / name / f"checkpoint-{step}" for name in ("whole", "killed")))
    assert (
        timeless(tmp_path / "whole") == timeless(tmp_path / "killed") and len(lines(tmp_path / "whole")) == 4
    )


def test_two_processes_train_and_evaluate(script, tmp_path):
    """torchrun, a KL, an evaluation that both processes share."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [*TOY, "--steps", "2", "--kl-coef", "0.01", "--eval-data", f"{FREEZE}/rows.jsonl"]
    done = script(*launch, "train_grpo.py", *flags, "--eval-every", "2", "--out", tmp_path / "out")
    assert "2 x cpu" in done.stdout and "error before -> after" in done.stdout
    first, second = lines(tmp_path / "out")
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 0
    for name in ("eval-0", "eval"):
        with open(tmp_path / "out" / name / "results.json") as f:
            assert json.load(f)["datasets"]["rows"]["budgets"]["16"]["n"] == 24
        with open(tmp_path / "out" / name / "samples.jsonl") as f:
            assert len(list(f)) == 48  # twelve problems, two budgets, two responses each


def test_toy_from_nothing_to_evaluation(monkeypatch, tmp_path, capsys):
    """`python train_grpo.py`, with a base model that was hardly taught and ten test problems."""
    monkeypatch.setitem(prepare.WARMUP, "batches", 3)
    monkeypatch.setattr(prepare, "TESTED", 5)
    monkeypatch.setattr(prepare, "CACHE", str(tmp_path / "cache"))
    flags = ["--steps", "2", "--group-size", "4", "--budgets", "bucket:20,40", "--eval-budgets", "20,40"]
    train_grpo.main([*flags, "--prompts-per-step", "4", "--out", str(tmp_path / "toy")])
    out = capsys.readouterr().out
    assert "step    2/2" in out and "gold" in out  # three responses of the first step are shown
    assert all(f"{name}-test " in out for name in ("toy", "toy_ood")) and "error before -> after" in out
    assert out.splitlines()[-1].endswith(str(tmp_path / "toy" / "eval"))
    with open(tmp_path / "toy" / "eval" / "results.json") as f:
        results = json.load(f)
    assert set(results["datasets"]) == {"toy-test", "toy_ood-test"}
    assert set(results["datasets"]["toy-test"]["budgets"]) == {"20", "40"}
    assert results["trained_budgets"] == [20, 40]
    line = lines(tmp_path / "toy")[0]
    assert {"reward_correct", "reward_length", "error_by_budget", "zero_variance", "lr"} <= set(line)
    assert line["lr"] == pytest.approx(4e-5)  # the rate that was used: first step of ten of warm-up
    assert {k for k in line if k.startswith("seconds_")} == {
        f"seconds_{k}" for k in ("sample", "train", "sync")
    }


def test_evaluations_during_training(tmp_path, capsys):
    """Before, in between and at the end; they ask as the rows did; a finished run evaluates its end again."""
    held_out = f"{FREEZE}/rows.jsonl"
    flags = [*TOY, "--steps", "3", "--mode", "max", "--reward", "lcpo_max", "--advantage", "grpo"]
    flags += ["--eval-data", held_out, "--eval-every", "2", "--eval-budgets", "8,16", "--save-every", "2"]
    train_grpo.main([*flags, "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if "->" in line]
    assert len(table) == 3 and [line.split()[:2] for line in table[1:]] == [["rows", "8"], ["rows", "16"]]
    assert {"eval-0", "eval-2", "eval"} <= set(os.listdir(tmp_path / "run"))
    with open(tmp_path / "run" / "eval" / "samples.jsonl") as f:
        prompts = {json.loads(line)["prompt"].splitlines()[-1] for line in f}
    assert prompts == {"Think for up to 8 tokens.", "Think for up to 16 tokens."}
    shutil.rmtree(tmp_path / "run" / "eval")
    train_grpo.main(["--resume", "--out", str(tmp_path / "run")])  # killed in its last evaluation
    assert os.path.exists(tmp_path / "run" / "eval" / "results.json") and len(lines(tmp_path / "run")) == 3
    for name in ("eval", "eval-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / "run" / name)
    train_grpo.main(["--resume", "--out", str(tmp_path / "run")])  # stopped after step 2, before it evaluated
    assert {"eval-2", "eval"} <= set(os.listdir(tmp_path / "run")) and len(lines(tmp_path / "run")) == 3
    # Gone on with for one more step: another model at the end, and none of the old one's figures for it.
    old = os.stat(tmp_path / "run" / "eval" / "samples.jsonl").st_mtime_ns
    train_grpo.main(["--resume", "--steps", "4", "--out", str(tmp_path / "run")])
    assert os.stat(tmp_path / "run" / "eval" / "samples.jsonl").st_mtime_ns > old


def test_rows_that_say_how_they_ask(tmp_path):
    """Rows of data.py hold their sentence; an evaluation in another one is refused, before --out is made."""
    rows = str(tmp_path / "rows.jsonl")
    common = ["--budgets", "bucket:16,32", "--mode", "exact", "--wording", "tulu", "--out", rows]
    assert data.main([f"{FREEZE}/rows.jsonl", *common]) == 0
    flags = [
        "--model",
        MODEL,
        "--data",
        rows,
        "--max-tokens",
        "48",
        "--steps",
        "1",
        "--prompts-per-step",
        "2",
    ]
    flags += [
        "--group-size",
        "2",
        "--sampler",
        "hf",
        "--eval-data",
        f"{FREEZE}/rows.jsonl",
        "--eval-every",
        "1",
    ]
    flags += ["--out", str(tmp_path / "run")]
    with pytest.raises(data.BadInput, match="--wording l1 is not how --data asks.*Think for"):
        train_grpo.main(flags)
    assert not os.path.exists(tmp_path / "run")
    train_grpo.main([*flags, "--wording", "tulu"])
    assert os.path.exists(tmp_path / "run" / "eval" / "results.json")


def test_every_switch_of_the_update_at_once(tmp_path):
    flags = [*TOY, "--steps", "2", "--dtype", "bfloat16", "--gradient-checkpointing", "--kl-coef", "0.01"]
    flags += ["--minibatches", "2", "--ratio", "sequence", "--loss-reduction", "constant", "--optim", "adamw"]
    flags += ["--reward", "lcpo_dual", "--mode", "both", "--advantage", "rloo", "--lr-schedule", "cosine"]
    train_grpo.main([*flags, "--overlong-filter", "--weight-decay", "0.1", "--out", str(tmp_path / "out")])
    first, second = lines(tmp_path / "out")
    assert 0 < first["kl"] < 1 and second["lr"] < first["lr"]
    assert 1e-5 < second["logp_gap"] < 0.1  # bf16 against the sampler: the gap is there, and it is logged


@pytest.mark.parametrize("flags", ["", "--lora 4"])
def test_adam_of_eight_bits(tmp_path, flags):
    """bitsandbytes: 4 steps are 2 and a resumed 2, and it learns."""
    pytest.importorskip("bitsandbytes")
    common = [*TOY, "--optim", "adamw8bit", "--steps", "4", "--save-every", "2", *flags.split()]
    train_grpo.main([*common, "--out", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    train_grpo.main(["--resume", "--out", str(tmp_path / "cut")])
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")
    assert same_weights(*(tmp_path / name / "checkpoint-4" for name in ("whole", "cut")))
    assert not same_weights(*(tmp_path / "whole" / f"checkpoint-{step}" for step in (2, 4)))


def test_a_sampler_without_the_trainers_weights_stops_the_run(tmp_path, monkeypatch):
    """A copy that is filled once, and then no more: the gap of the log-probs shows it at the next batch."""
    real = HFSampler.load

    def load_once(self, model):
        if not hasattr(self, "filled"):
            self.filled = True
            real(self, copy.deepcopy(model))

    monkeypatch.setattr(HFSampler, "load", load_once)
    with pytest.raises(SystemExit, match="step 2: the sampler lacks the trainer's weights: .* apart"):
        train_grpo.main([*TOY, "--steps", "3", "--out", str(tmp_path / "run")])
    assert [m["step"] for m in lines(tmp_path / "run")] == [0]
    assert lines(tmp_path / "run")[0]["logp_gap"] < 1e-5


def test_the_sampler_that_auto_takes(monkeypatch, tmp_path):
    assert train_grpo.pick_sampler("auto") == train_grpo.pick_sampler("hf") == "hf"  # no CUDA here
    monkeypatch.setattr(train_grpo, "DEVICE", torch.device("cuda:0"))
    has_vllm = train_grpo.importlib.util.find_spec("vllm") is not None
    assert train_grpo.pick_sampler("auto") == ("vllm" if has_vllm else "hf")
    # A driver that torch cannot use must not end in a night of training on the CPU.
    monkeypatch.setattr(train_grpo, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "nvidia-smi", 0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(data.BadInput, match="torch sees no GPU.*CUDA 13.0.*--sampler hf"):
        train_grpo.pick_sampler("auto")
    assert train_grpo.pick_sampler("hf") == "hf"


@pytest.mark.slow
def test_toy_learns_to_follow_budgets(script, tmp_path):
    script("train_grpo.py", "--out", tmp_path / "toy", timeout=1500)
    with open(tmp_path / "toy" / "eval" / "results.json") as f:
        budgets = json.load(f)["datasets"]["toy-test"]["budgets"]
    assert np.mean([budgets[b]["abs_error"] for b in ("16", "32", "48", "64")]) <= 0.10
    assert budgets["64"]["accuracy"] >= 0.9


@pytest.mark.parametrize("kind, drop", [("Llama", "attention_dropout"), ("GPT2", "resid_pdrop")])
def test_no_dropout_in_training(tmp_path, kind, drop):
    """A sampler knows none: with it, the trainer's log-probs would not be those of what was sampled."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes, **ends, **{drop: 0.5})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, ids = load(str(tmp_path)), torch.arange(18)[None]
    assert model.training and torch.equal(model(ids).logits, model(ids).logits)


def test_no_dropout_in_a_nested_config(tmp_path):
    """A language model that brings eyes has its own configuration inside another one."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20, "attention_dropout": 0.5}
    text |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    eyes = sizes | {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, ids = load(str(tmp_path)), torch.arange(18)[None]
    assert model.training and torch.equal(model(ids).logits, model(ids).logits)
