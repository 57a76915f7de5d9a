"""Schedules, subgroups, memory, dynamic sampling, DOT and DRPO: numbers by hand, then short real runs."""

import json
import math
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import DATA, arguments, lines, random_batch, timeless, weights_after_update

import losses
import methods
import rollouts
import sampler as samplers
import train_grpo
import update as updates
from data import load_tokenizer
from toy import task as toy

MATH = os.path.join(DATA, "math_train_small.jsonl.gz")
ONE = SimpleNamespace(process_index=0, num_processes=1)


def checked(*words):
    """Flags as a run has them: K=V read, rules checked."""
    return train_grpo.parse_args(["--model", "owner/name", "--data", MATH, "--out", "/nowhere/run", *words])


# Controllers, by hand ---------------------------------------------------------------------------------------


def test_budget_schedules():
    flags = ["--reward", "curriculum_band", "--budget-schedule", "step"]
    args = checked(*flags)
    assert [methods.budget_at(t, args) for t in (0, 149, 150, 300, 450)] == [256, 256, 179, 125, 87]
    assert methods.reward_options(150, args, {}) == {"b0": 179, "gamma": 1.0}
    args = checked(*flags[:3], "linear", "--schedule-args", "start=100", "end=20", "steps=4")
    assert [methods.budget_at(t, args) for t in range(6)] == [100, 80, 60, 40, 20, 20]
    args = checked(*flags[:3], "exponential", "--schedule-args", "start=64", "end=4", "steps=4")
    assert [methods.budget_at(t, args) for t in range(6)] == [64, 32, 16, 8, 4, 4]
    row = {"problem": "1 + 1?", "kind": "math", "budget": 7, "mode": "exact", "prompt": "x"}
    [new] = methods.scheduled([row], 2, args)
    assert new["budget"] == 16 and new["prompt"].endswith("Think for 16 tokens.") and row["budget"] == 7


def test_palu_budget():
    lengths, right = [400, 500, 600, 700, 800], [1] * 5
    assert methods.palu_budget(2000, right, lengths, 4096) == 1800  # less by Q_1.0 - Q_0.5 = 800 - 600
    assert methods.palu_budget(2000, [1, 1, 1, 0, 0], lengths, 4096) == 4096  # 3/5 < 0.8
    assert methods.palu_budget(50, right, lengths, 4096) == 1
    # only right lengths count: 400, 500, 600, 700, half way between 500 and 600
    assert methods.palu_budget(2000, [1, 1, 1, 1, 0], lengths, 4096) == 2000 - (700 - 550)


def test_laser_targets():
    # n = 8: m = 5, 2, 1, so coverage must reach 1/5, 1/2, 1 of all responses of the class
    lengths = np.arange(1, 9) * 100  # 100 ... 800, in every class
    right = np.array([[1] * 8, [1] * 4 + [0] * 4, [1] * 2 + [0] * 6])
    got = methods.laser_targets(right, np.tile(lengths, (3, 1)), 2000, low=100, step=100)
    assert got == {"easy": 200, "medium": 400, "hard": 800}  # 2/8 >= 1/5, 4/8 >= 1/2, 8/8
    got = methods.laser_targets(right, np.tile(lengths, (3, 1)), 700, low=150, step=300)
    assert got == {"easy": 450, "medium": 450, "hard": 700}
    assert methods.laser_targets(right[:1], lengths[None], 999, low=100, step=100)["hard"] == 999


def test_history_is_learnt_after_the_rewards():
    args = checked("--reward", "hapo_cosine", "--group-size", "4")
    mean = checked("--reward", "hapo_cosine", "--method-args", "history=mean")
    row, memory = {"id": "p#3"}, {}

    def group(*pairs):
        return [{"length": n, "correct": c, "truncated": 0} for n, c in pairs]

    def h(args):
        return methods.fields([group()], [row], args, memory)["history"][0]

    assert math.isnan(h(args))
    methods.learn([group((10, 0), (90, 0))], [row], args, memory)
    assert math.isnan(h(args))
    methods.learn([group((40, 1), (80, 1), (10, 0))], [row], args, memory)
    assert h(args) == 40 and h(mean) == 60 and memory["history"] == {"p": [2, 120, 40]}
    methods.learn([group((60, 1))], [{"id": "p"}], args, memory)  # copies of a problem share its history
    assert h(args) == 40 and h(mean) == 60


def test_palu_memory_and_cap():
    args, row, memory = checked("--reward", "palu", "--max-tokens", "100"), {"id": "a", "budget": None}, {}
    assert methods.response_cap(row, args, memory) == 100
    group = [{"length": n, "correct": 1, "truncated": 0} for n in (20, 40, 60)]
    methods.learn([group], [row], args, memory)
    assert memory == {"palu": {"a": 80}} and methods.response_cap(row, args, memory) == 80
    cut = checked("--cut-at-budget", "--max-tokens", "100")
    assert methods.response_cap({"id": "a", "budget": 30}, cut, {}) == 30


def test_form_of_answers():
    def well(text, truncated=0, require_think=True):
        return methods.well_formed({"text": text, "truncated": truncated}, require_think)

    assert well(r"so </think> \boxed{3}") and well("7 +3 =0 </think> 0")
    assert not well(r"\boxed{3}") and well(r"\boxed{3}", require_think=False)
    assert not well(r"a </think> b </think> \boxed{3}") and not well("so </think>")
    assert not well("so </think> it is three") and not well(r"so </think> \boxed{3}", truncated=1)
    assert not well(r"so </think> \boxed{}")
    loop = "let us see once more what it is now again "
    assert methods.repetitive("first " * 3 + loop * 4) and not methods.repetitive(loop * 3)
    assert not methods.repetitive(" ".join(map(str, range(100)))) and not methods.repetitive("wait " * 20)
    assert methods.count_labels("hm, well </think> joy, calm,, relief") == 3


def test_informative_groups():
    batch = {"correct": np.array([[1, 1], [1, 0], [0, 0], [1, 1]]), "truncated": np.zeros((4, 2))}
    batch["truncated"][3, 0] = 1
    total = np.array([[0.1, 0.2], [1, 0], [0, 0], [0.5, 0.5]])
    correct, reward = (SimpleNamespace(dynamic_sampling=name) for name in ("correct", "reward"))
    assert methods.informative(batch, total, correct).tolist() == [False, True, False, True]
    assert methods.informative(batch, total, reward).tolist() == [True, True, False, False]


def test_dot_cuts_and_checks_again():
    tokenizer = toy.make_tokenizer()
    args = checked("--dot", "1", "--dot-margin", "2", "--group-size", "4", "--require-think")
    row = {"answer": "9", "kind": "math"}
    short = ["9 </think> 9 <eos>", "9 wait </think> 9 <eos>", "9 </think> 9 <eos>"]
    late = "9 " + "wait " * 12 + "</think> 9 <eos>"  # the answer comes after the cut
    early = "9 </think> 9 " + "9 " * 12 + "<eos>"  # it is still there after the cut

    def group(texts):
        made = []
        for text in texts:
            ids = tokenizer.encode(text)
            made.append({"ids": ids, "logps": [-1.0] * len(ids), "length": len(ids), "correct": 1})
            made[-1] |= {"truncated": 0, "text": text}
        return made

    groups = [group([*short, late]), group([*short, early]), group([*short, late])]
    groups[2][0]["correct"] = 0  # not all right: never cut
    methods.cut_outliers(groups, [row] * 3, tokenizer, args)
    # lengths 4, 5, 4, 16: mean 7.25, sample std 5.85, cut at floor(13.1) = 13, 3 tokens too many
    assert [r["length"] for r in groups[0]] == [4, 5, 4, 13] == [len(r["logps"]) for r in groups[0]]
    assert [r["correct"] for r in groups[0]] == [1, 1, 1, 0] and groups[0][3]["ids"] == tokenizer.encode(
        late
    )[:13]
    assert [r["correct"] for r in groups[1]] == [1, 1, 1, 1] and groups[1][3]["dot_cut"] == 1
    assert [r["length"] for r in groups[2]] == [4, 5, 4, 16]
    assert groups[0][0]["dot_threshold"] == 13 and math.isnan(groups[2][0]["dot_threshold"])


# Forced tokens ----------------------------------------------------------------------------------------------


def test_requests_of_subgroups(tiny):
    tokenizer = load_tokenizer(tiny)
    row, end = {"prompt": "1 + 1?", "id": "a", "budget": None}, tokenizer.encode("</think>")
    plain = methods.encode_prompt(tokenizer, row["prompt"])

    def ask(*words, n=8, row=row):
        args = checked("--group-size", str(n), *words)
        return methods.requests(row, n, tokenizer, args, {})

    [one] = ask()
    assert one["prompt_ids"] == plain and one["n"] == 8 and one["cap"] == 4096 and not one["forced"]
    a, b = ask("--subgroups", "hbpo", "--subgroup-args", "budgets=[8,16]", "prefix=At most {}.")
    assert a["prompt_ids"] == plain + tokenizer.encode("At most 8.", add_special_tokens=False)
    assert (a["n"], b["n"], b["tags"]) == (4, 4, {"subgroup_budget": 16})
    a, _ = ask(
        "--subgroups", "hbpo", "--subgroup-args", "budgets=[8,16]", "prefix=At most {}.", "in_prompt=true"
    )
    assert a["prompt_ids"] == methods.encode_prompt(tokenizer, row["prompt"] + "\nAt most 8.")
    a, b = ask("--subgroups", "adaptthink", "--subgroup-args", "think_word=w", "no_think_tokens=5")
    assert a["forced"] == end and a["cap"] == 5 and a["tags"] == {"no_think": 1}
    assert b["forced"] == tokenizer.encode("w") and b["mix"] == {None: (math.log(0.5), -math.inf)}
    asked = [ask("--subgroups", "levels", row=row | {"position": k})[0] for k in range(4)]
    assert [q["tags"]["level"] for q in asked] == ["short", "medium", "long", "short"]
    assert "Keep the reasoning short." in tokenizer.decode(asked[0]["prompt_ids"])
    a, b = ask("--subgroups", "modes")
    assert [q["tags"]["long_mode"] for q in (a, b)] == [0, 1] and a["prompt_ids"] != b["prompt_ids"]


def sampled(tiny, *words, n=6):
    """Responses of one prompt's group, its prompt and the sampler; the model is random."""
    sampler = samplers.load_sampler(tiny, "hf")
    args = checked("--group-size", str(n), "--max-tokens", "40", *words)
    plan = methods.requests({"prompt": "1 + 1?", "id": "a"}, n, sampler.tokenizer, args, {})
    [group] = methods.sample(sampler, [plan], args.temperature, seed=3)
    return group, sampler, args


def test_adaptthink_first_token(tiny):
    group, sampler, args = sampled(tiny, "--subgroups", "adaptthink", "--subgroup-args", "think_word=null")
    [end] = sampler.tokenizer.encode("</think>")
    quick, slow = group[:3], group[3:]
    assert all(r["ids"][0] == end and math.isnan(r["logps"][0]) for r in quick)
    assert all(len(r["ids"]) == len(r["logps"]) <= 40 and "untrained" not in r for r in group)
    batch = [r | {"advantage": 1.0, "weight": 1.0} for r in group]
    t = updates.to_tensors(batch, "cpu")
    with torch.no_grad():
        logp, _ = updates.model_logps(sampler.model, t, args)
    behaviour = losses.mixture_logp(logp, t["mix_a"], t["mix_b"])
    first = [i for i in range(len(t["row"])) if i == 0 or t["row"][i] != t["row"][i - 1]]
    pi = logp.exp()
    for k, i in enumerate(first):  # half forced + half of what the policy would do
        want = 0.5 + 0.5 * pi[i] if k < 3 or batch[k]["ids"][0] == end else 0.5 * pi[i]
        assert behaviour[i].exp().item() == pytest.approx(want.item(), rel=1e-5)
    # every later token is as it was sampled; the sampler's numbers carry the same correction
    rest = torch.ones(len(logp), dtype=bool)
    rest[first] = False
    torch.testing.assert_close(behaviour[rest], logp[rest], rtol=0, atol=0)
    known = ~t["sampler_logp"].isnan()
    torch.testing.assert_close(t["sampler_logp"][known], behaviour[known], rtol=1e-4, atol=1e-4)
    assert (~known).sum() == 3 and len(slow) == 3


def test_adaptthink_ratio_pulls_a_rare_token_up(tiny):
    """Advantage 1 on a forced token: gradient pi / 0.5 at its logp, not 1 as if it had been sampled."""
    forced = {"prompt_ids": [5, 6], "ids": [4], "logps": [math.nan], "mix": (math.log(0.5), -math.inf)}
    free = {"prompt_ids": [5, 6], "ids": [4], "logps": [-6.4]}
    model, change = samplers.load_model(tiny), []
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for r in (forced, free):
        batch = [r | {"advantage": 1.0, "weight": 1.0}]
        after, stats = weights_after_update(model, batch, arguments("--grad-clip", "1e9", "--tis-cap", "0"))
        change.append(after - before)
    t = updates.to_tensors([forced | {"advantage": 1.0, "weight": 1.0}], "cpu")
    pi = updates.model_logps(model, t, arguments())[0].exp().item()
    torch.testing.assert_close(change[0], change[1] * pi / 0.5, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("think, solution", [(8, 6), (3, 20)])
def test_elastic_two_budgets(tiny, think, solution):
    words = ["--subgroups", "elastic", "--subgroup-args", f"think={think}", f"solution={solution}"]
    group, sampler, args = sampled(tiny, *words, n=12)
    [end] = sampler.tokenizer.encode("</think>")
    forced = 0
    for r in group:
        at = r["ids"].index(end) if end in r["ids"] else None
        assert len(r["ids"]) == len(r["logps"])
        if at is None:  # it ended inside the thinking
            assert r["finish_reason"] == "stop" and len(r["ids"]) <= think
            continue
        assert at <= think and len(r["ids"]) - at - 1 <= solution
        assert r.get("untrained", [at]) == [at]
        if "untrained" in r:
            forced += 1
            assert at == think
        if r["finish_reason"] == "length":
            assert len(r["ids"]) == at + 1 + solution
    assert forced > 6
    t = updates.to_tensors([r | {"advantage": 0.0, "weight": 0.0} for r in group], "cpu")
    assert len(t["target"]) == sum(len(r["ids"]) for r in group) - forced
    with torch.no_grad():  # the second half continues the first: the trainer sees the same log-probs
        logp, _ = updates.model_logps(sampler.model, t, args)
    torch.testing.assert_close(t["sampler_logp"], logp, rtol=1e-4, atol=1e-4)


def test_untrained_tokens_are_context_only(tiny):
    r = {"prompt_ids": [5, 6], "ids": [7, 8, 9, 10], "logps": [-1.0, 0.0, -3.0, -4.0], "untrained": [1]}
    t = updates.to_tensors([r | {"advantage": 1.0, "weight": 0.5}], "cpu")
    assert t["target"].tolist() == [7, 9, 10] and t["column"].tolist() == [1, 3, 4]
    assert t["ids"].tolist() == [[5, 6, 7, 8, 9, 10]] and t["sampler_logp"].tolist() == [-1, -3, -4]
    model, batch = samplers.load_model(tiny), random_batch(4)
    for x in batch:
        x["untrained"] = [0] if len(x["ids"]) > 1 else []
    flags = ["--grad-clip", "1e9", "--minibatches", "2"]
    whole, stats = weights_after_update(model, batch, arguments("--micro-tokens", "100000", *flags))
    split, _ = weights_after_update(model, batch, arguments("--micro-tokens", "1", *flags))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


# DRPO -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.0, 1e3]))
def test_drpo_weights_are_the_gradient(seed, questions, kl_coef):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 3 * questions)
    row = torch.tensor(np.repeat(np.arange(len(lengths)), lengths))
    group = torch.tensor(np.repeat(np.arange(questions), 3))
    correct = torch.tensor(rng.integers(0, 2, len(lengths)))
    logp = torch.tensor(-rng.random(len(row)), requires_grad=True)
    old = torch.tensor(-rng.random(len(row)))
    constants = {"tau": 2.0, "l_max": 10, "kl_coef": kl_coef}
    loss = losses.drpo_loss(logp, old, row, group, correct, **constants)
    [want] = torch.autograd.grad(loss, logp)
    length = losses.row_sum(torch.ones_like(old), row, len(lengths))
    score = losses.row_sum(logp.detach(), row, len(lengths)) / length
    kl = (old - logp.detach()).mean()
    value, weights = losses.drpo_weights(score, length, group, correct, kl, **constants)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(weights[row], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("minibatches, close", [(1, 1e-6), (2, 1e-4)])
def test_drpo_update_does_not_depend_on_micro_batches(tiny, minibatches, close):
    model, batch = samplers.load_model(tiny), random_batch(8)
    for i, r in enumerate(batch):
        r |= {"group": i // 4, "correct": i % 2}
    flags = ["--objective", "drpo", "--grad-clip", "1e9", "--minibatches", str(minibatches)]
    made = []
    for tokens in ("100000", "60", "1"):
        args = arguments("--micro-tokens", tokens, *flags)
        args.objective_args = {"l_max": 32, "kl_coef": 1.0}  # 1000 would blow up the second of two steps
        made.append(weights_after_update(model, batch, args))
        torch.testing.assert_close(made[-1][0], made[0][0], rtol=1e-5, atol=close)
        assert made[-1][1]["loss"] == pytest.approx(made[0][1]["loss"], abs=close)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (made[0][0] - before).abs().max() > 1e-3 and "drpo_kl" in made[0][1]


# Short real runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy base model that is right now and then, four problems, and a flag list that uses them."""
    root, problems = tmp_path_factory.mktemp("toy"), toy.problems("toy", "train", 4)
    with pytest.MonkeyPatch.context() as patch:  # four problems are learnt by heart in seconds
        patch.setattr(toy, "WARMUP", toy.WARMUP | {"batches": 80, "batch_size": 16, "extra": 16})
        patch.setattr(toy, "draw", lambda word, rng: problems[rng.integers(4)]["problem"])
        base = toy.make_base(str(root), log=lambda _: None)
    with open(root / "rows.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in problems)
    flags = "--budgets none --wording tulu --max-tokens 96 --prompts-per-step 4 --group-size 8 --lr 1e-3"
    flags = [*flags.split(), "--sampler", "hf", "--require-think"]
    return ["--model", base, "--data", str(root / "rows.jsonl"), *flags]


HBPO = [
    "--reward",
    "hbpo",
    "--advantage",
    "hbpo",
    "--subgroups",
    "hbpo",
    "--subgroup-args",
    "budgets=[16,48]",
    "prefix=Think for {} tokens.",
]
LASER = "--method-args every=1 size=4 samples=3 low=8 step=8"
RUNS = {
    "hapo": ("--reward hapo_linear", {"history_length", "history_known"}),
    "palu": ("--reward palu --method-args c=0.3 tau=0.5", {"palu_budget"}),
    "hbpo": (HBPO, {"length_by_subgroup", "reward_by_subgroup"}),
    "adaptthink": (
        "--reward adaptthink --advantage raw --subgroups adaptthink --reference-samples 4 "
        "--subgroup-args think_word=null",
        {"think_length", "no_think_length", "no_think_accuracy", "ref_accuracy", "reward_no_think"},
    ),
    "elastic": (
        "--reward correct --subgroups elastic --subgroup-args think=20 solution=4 --overlong-filter",
        {"forced_share"},
    ),
    "laser_d": (f"--reward laser_d {LASER}", {"laser_easy", "laser_hard", "well_formed"}),
    "laser_de": (f"--reward laser_de {LASER}", {"laser_medium", "repetitive", "reward_exploration"}),
    "dot": ("--reward correct --dot 0.5 --dot-margin 1", {"dot_cut", "dot_threshold", "dot_lost"}),
    "drpo": (
        "--reward correct --objective drpo --objective-args l_max=96 --minibatches 2",
        {"drpo_kl", "loss"},
    ),
    "curriculum": (
        "--reward curriculum_triangular --budget-schedule step --schedule-args start=40 period=1 "
        "--cut-at-budget",
        {"scheduled_budget", "abs_error", "well_formed"},
    ),
    "o1_pruner": ("--reward o1_pruner --reference-samples 4 --dual-clip 3", {"ref_length"}),
    "crf": ("--reward crf --conciseness-model toy", {"conciseness"}),
    "tldr": ("--reward tldr --subgroups levels", {"length_by_level"}),
    "adaptive_deep": ("--reward adaptive_deep --subgroups modes", {"short_length", "long_accuracy"}),
    "affectgpt": ("--reward affectgpt", {"labels"}),
    "range": ("--reward longwriter_range --budgets fixed:32 --method-args width=0.2", {"abs_error"}),
    "surrogate": ("--reward surrogate_format_length --reward-args l_max=96", {"well_formed"}),
    "dapo": ("--reward correct --dynamic-sampling correct --refills 2", {"kept_groups", "sampled_groups"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_steps(world, name, tmp_path):
    words, names = RUNS[name]
    words = words.split() if isinstance(words, str) else words
    out = str(tmp_path / "out")
    assert train_grpo.main([*world, *words, "--steps", "2", "--out", out]) == 0
    first, second = lines(out)
    assert names <= set(second), names - set(second)
    assert np.isfinite(second["loss"]) and second["logp_gap_max"] < 1e-3
    state = torch.load(os.path.join(out, "checkpoint-2", "trainer_state.pt"), weights_only=True)
    memory = state["memory"]
    assert memory["position"] == first.get("sampled_groups", 4) + second.get("sampled_groups", 4)
    if name == "hapo":
        assert first["history_known"] == 0 < second["history_known"] <= len(memory["history"]) / 4
        least = [h[2] for h in memory["history"].values()]
        assert 0 < min(least) <= second["history_length"]
    if name == "palu":
        assert first["palu_budget"] == 96 > min(memory["palu"].values())
        assert second["length_p95"] <= 96 and len(memory["palu"]) == 4
    if name == "curriculum":
        assert [m["scheduled_budget"] for m in (first, second)] == [40, 28]
        assert list(second["error_by_budget"]) == ["28"] and second["over_budget"] == 0
    if name in ("adaptthink", "o1_pruner"):
        assert len(memory["reference"]) == 4  # each prompt was asked once, not again in the second epoch
        assert first["ref_accuracy"] == second["ref_accuracy"]
    if name == "hbpo":
        assert set(second["length_by_subgroup"]) == {"16", "48"}
    if name == "elastic":
        assert second["length_p95"] <= 25 and second["forced_share"] > 0


def test_dynamic_sampling_stops_at_its_cap(tiny, tmp_path):
    """A random model is never right: every group is dropped, and the run goes on with what there is."""
    flags = ["--model", tiny, "--data", MATH, "--budgets", "fixed:8", "--max-tokens", "8", "--steps", "2"]
    flags += [
        "--prompts-per-step",
        "4",
        "--group-size",
        "2",
        "--sampler",
        "hf",
        "--out",
        str(tmp_path / "out"),
    ]
    flags += ["--dynamic-sampling", "correct", "--refills", "2"]
    assert train_grpo.main(flags) == 0
    for m in lines(tmp_path / "out"):
        assert (m["kept_groups"], m["sampled_groups"], m["sampled_accuracy"]) == (0, 12, 0)
    state = torch.load(tmp_path / "out" / "checkpoint-2" / "trainer_state.pt", weights_only=True)
    assert state["memory"]["position"] == 24


def test_reference_samples_come_from_the_starting_model(tiny):
    """At a later step, too: the sampler is lent to the starting model and handed back."""
    words = "--max-tokens 8 --reference-samples 2 --prompts-per-step 1 --group-size 2".split()
    row = {"id": "a", "prompt": "1 + 1?", "answer": "2", "kind": "math", "budget": None}
    model, reference, asked = samplers.load_model(tiny), samplers.load_model(tiny), []

    class Noting(samplers.HFSampler):
        def generate(self, prompts, n, *rest, **options):
            asked.append(self.model)
            return super().generate(prompts, n, *rest, **options)

    sampler = Noting(model, load_tokenizer(tiny), [2], 100)
    s = SimpleNamespace(sampler=sampler, memory={}, conciseness=None, clock=0.0, rows=[row], epochs={})
    s.model, s.reference, s.tokenizer, s.seconds = model, reference, sampler.tokenizer, Counter()
    for step in (3, 4):  # the second time the prompt is known
        rollouts.sample_batch(s, checked(*words), ONE, step)
    assert asked == [model, reference, model] and sampler.model is model
    assert list(s.memory["reference"]) == ["a"] and 1 <= s.memory["reference"]["a"][1] <= 8


def test_fewer_responses_than_minibatches(tiny):
    model, args = samplers.load_model(tiny), arguments("--minibatches", "3")
    weights, stats = weights_after_update(model, random_batch(2), args)
    assert torch.isfinite(weights).all() and stats["grad_norm"] > 0
    same, stats = weights_after_update(model, [], args)
    assert stats["loss"] == stats["grad_norm"] == stats["padding"] - 1 == 0
    assert torch.equal(same, torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.mark.parametrize(
    "words",
    [
        "--reward hapo_cosine --dynamic-sampling reward --refills 2",
        "--reward adaptthink --advantage raw --subgroups adaptthink --reference-samples 2 "
        "--subgroup-args think_word=null --budget-schedule linear --schedule-args start=40 end=20 steps=4",
        f"--reward laser_d {LASER.replace('every=1', 'every=3')} --minibatches 2",
    ],
)
def test_resume_is_exact(world, words, tmp_path):
    flags = [*world, *words.split(), "--group-size", "4", "--prompts-per-step", "2"]
    whole, parted = str(tmp_path / "whole"), str(tmp_path / "parted")
    assert train_grpo.main([*flags, "--steps", "4", "--out", whole]) == 0
    assert train_grpo.main([*flags, "--steps", "2", "--out", parted]) == 0
    assert train_grpo.main(["--resume", "--steps", "4", "--out", parted, *world[:2]]) == 0
    assert [timeless(m) for m in lines(whole)] == [timeless(m) for m in lines(parted)]
    states = []
    for out in (whole, parted):
        with open(os.path.join(out, "checkpoint-4", "model.safetensors"), "rb") as f:
            states.append(f.read())
        path = os.path.join(out, "checkpoint-4", "trainer_state.pt")
        states.append(torch.load(path, weights_only=True)["memory"])
    assert states[:2] == states[2:]


def test_draws_differ_between_rounds_and_are_repeatable(tiny):
    args = checked("--max-tokens", "8")
    s = SimpleNamespace(sampler=samplers.load_sampler(tiny, "hf"), memory={}, conciseness=None, clock=0.0)
    s.tokenizer, s.seconds = s.sampler.tokenizer, Counter()
    row = {"id": "a", "prompt": "1 + 1?", "answer": "2", "kind": "math", "budget": None}
    made = [rollouts.roll_out(s, args, ONE, [row], 2, key)[0] for key in ([1], [1, 1], [1])]
    assert made[0] == made[2] != made[1]
