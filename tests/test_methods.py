"""What each method does: numbers by hand, its hooks on small batches, short runs. See test_freeze.py, too."""

import copy
import json
import math
import os
import shlex
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, TIMES
from hypothesis import given, settings
from hypothesis import strategies as st

import methods
import train_grpo
from data import BadInput, encode_prompt, load_tokenizer
from methods import brpo, drpo, laser_d, palu
from methods.curriculum import Curriculum
from methods.thinkprune import ThinkPrune
from rewards import ADVANTAGES, REWARDS
from scaling import model as net
from toy.hf_sampler import HFSampler
from toy.task import make_tokenizer

MATH = os.path.join(ROOT, "tests", "data", "math_train_small.jsonl.gz")
TOY = os.path.join(ROOT, "tests", "data", "freeze")  # a small taught model and a few rows
HALF = math.log(0.5)


def flags(*words):
    return train_grpo.parse_args(["--model", "owner/name", "--data", MATH, "--out", "/nowhere/run", *words])


def made(*words, tokenizer=None):
    """The method of some flags, as a run has it."""
    args = flags(*words)
    return methods.make(args, tokenizer, REWARDS[args.reward], ADVANTAGES[args.advantage])


def responses(*pairs):
    return [{"length": n, "correct": c, "truncated": 0} for n, c in pairs]


# Controllers, by hand ---------------------------------------------------------------------------------------


def test_budget_schedules():
    words = ["--reward", "curriculum_band", "--method", "curriculum"]
    m = made(*words)
    assert [m.budget(t) for t in (0, 149, 150, 300, 450)] == [256, 256, 179, 125, 87]
    assert m.reward_inputs([], [], 150) == {"constants": {"b0": 179, "gamma": 1.0}}
    m = made(*words, "--method-args", "schedule=linear", "start=100", "end=20", "steps=4")
    assert [m.budget(t) for t in range(6)] == [100, 80, 60, 40, 20, 20]
    m = made(*words, "--method-args", "schedule=exponential", "start=64", "end=4", "steps=4")
    assert [m.budget(t) for t in range(6)] == [64, 32, 16, 8, 4, 4]
    row = {"problem": "1 + 1?", "kind": "math", "budget": 7, "mode": "exact", "prompt": "x"}
    new = m.row(row, 2)
    assert new["budget"] == 16 and new["prompt"].endswith("Think for 16 tokens.") and row["budget"] == 7
    assert made("--reward", "lcpo_exact", "--method", "curriculum").reward_inputs([], [], 0) == {}
    # Without the method the reward has a schedule of its own, which reads the step.
    assert type(made("--reward", "curriculum_band")) is methods.Method


def test_palu_budget():
    lengths, right = [400, 500, 600, 700, 800], [1] * 5
    assert palu.next_budget(2000, right, lengths, 4096) == 1800  # less by Q_1.0 - Q_0.5 = 800 - 600
    assert palu.next_budget(2000, [1, 1, 1, 0, 0], lengths, 4096) == 4096  # 3/5 < 0.8
    assert palu.next_budget(50, right, lengths, 4096) == 1
    # only right lengths count: 400, 500, 600, 700, half way between 500 and 600
    assert palu.next_budget(2000, [1, 1, 1, 1, 0], lengths, 4096) == 2000 - (700 - 550)


def test_palu_cuts_at_the_budget_of_the_prompt(tiny):
    m = made("--reward", "palu", "--method", "palu", "--max-tokens", "100", tokenizer=load_tokenizer(tiny))
    row = {"id": "a", "prompt": "1 + 1?"}
    assert m.requests(row)[0]["cap"] == 100
    m.learn([responses((20, 1), (40, 1), (60, 1))], [row])
    assert m.state == {"budget": {"a": 80}} and m.requests(row)[0]["cap"] == 80
    assert m.reward_inputs([], [row, {"id": "b"}], 0)["target"].tolist() == [80, 100]
    m = made("--method", "thinkprune", "--max-tokens", "100", tokenizer=load_tokenizer(tiny))
    assert [m.requests(row | {"budget": b})[0]["cap"] for b in (30, 300)] == [30, 100]


def test_laser_targets():
    # n = 8: m = 5, 2, 1, so coverage must reach 1/5, 1/2, 1 of all responses of the class
    lengths = np.arange(1, 9) * 100  # 100 ... 800, in every class
    right = np.array([[1] * 8, [1] * 4 + [0] * 4, [1] * 2 + [0] * 6])
    got = laser_d.find_targets(right, np.tile(lengths, (3, 1)), 2000, low=100, step=100)
    assert got == {"easy": 200, "medium": 400, "hard": 800}  # 2/8 >= 1/5, 4/8 >= 1/2, 8/8
    got = laser_d.find_targets(right, np.tile(lengths, (3, 1)), 700, low=150, step=300)
    assert got == {"easy": 450, "medium": 450, "hard": 700}
    assert laser_d.find_targets(right[:1], lengths[None], 999, low=100, step=100)["hard"] == 999


def test_laser_asks_its_monitor_set_now_and_then():
    m = made("--reward", "laser_d", "--method", "laser_d", "--method-args", "every=3", "size=4", "samples=2")
    rows, asked = [{"id": i} for i in range(9)], []

    def ask(rows, n, key):
        asked.append(([row["id"] for row in rows], n, key))
        return [responses((1500, 1), (2500, 1)) for _ in rows]

    for step, turn in ((0, 0), (0, 1), (1, 0), (3, 0)):
        m.begin_step(step, turn, [], rows, ask)
    (first, n, key), (again, _, other) = asked
    assert len({*first}) == 4 and first == again and n == 2 and (key, other) == ([0, 0, 2], [3, 0, 2])
    # 2n // 3 = 1: every response of the easy class lies within 3072
    assert m.reward_inputs([], [], 0)["constants"]["targets"] == {"easy": 3072, "medium": 4096, "hard": 4096}


def test_hapo_learns_after_the_rewards():
    least, mean = (made("--reward", "hapo_cosine", "--method", "hapo", *words) for words in (
        [], ["--method-args", "history=mean"]
    ))  # fmt: skip

    def known(m):
        return m.reward_inputs([], [{"id": "p#3"}], 0)["history"][0]

    for m, after, later in ((least, 40, 40), (mean, 60, 60)):
        m.learn([responses((10, 0), (90, 0))], [{"id": "p#3"}])
        assert math.isnan(known(m))
        m.learn([responses((40, 1), (80, 1), (10, 0))], [{"id": "p#3"}])
        assert known(m) == after and m.state == {"history": {"p": [2, 120, 40]}}
        m.learn([responses((60, 1))], [{"id": "p"}])  # copies of a problem share its history
        assert known(m) == later


def test_toggle_budgets_and_phases():
    """The median of the starting model's right lengths 10, 30, 20 is 20; what it cannot solve has none."""
    m = made("--reward", "toggle", "--method", "toggle", "--method-args", "m=2", "rho=50", "samples=4")
    rows = [{"id": "a"}, {"id": "b"}]
    made_of = {"a": responses((10, 1), (30, 1), (20, 1), (99, 0)), "b": responses((5, 0), (6, 0))}
    asked = []

    def ask(rows, n, key, starting):
        asked.append(([row["id"] for row in rows], n, starting))
        return [made_of[row["id"]] for row in rows]

    for step in range(3):  # later policies are not asked: the budget stays
        m.begin_step(step, 0, rows, [], ask)
    assert asked == [(["a", "b"], 4, True)] and m.state == {"reference": {"a": 20.0, "b": None}}
    targets = [m.reward_inputs([], rows, step)["target"] for step in range(6)]
    np.testing.assert_array_equal(targets, [[20, np.nan]] * 2 + [[np.nan] * 2] * 2 + [[20, np.nan]] * 2)
    batch = {
        "correct": [[1, 1], [1, 1]],
        "truncated": [[0, 0]] * 2,
        "length": np.array([[20, 21], [20, 999]]),
    }
    batch |= {"target": targets[0]}
    assert REWARDS["toggle"](batch).tolist() == [[1, 0], [1, 1]]
    found = m.metrics([], batch, None)
    assert found == {"toggle_limited": 0.5, "toggle_over": 0.25, "toggle_budget": 20}
    assert math.isnan(m.metrics([], batch | {"target": targets[2]}, None)["toggle_budget"])


def test_grlc_splits_at_the_first_end_of_thinking(tiny):
    tokenizer = load_tokenizer(tiny)
    m = made("--reward", "grlc", "--method", "grlc", tokenizer=tokenizer)
    [end] = m.end
    groups = [[{"ids": np.array(ids)} for ids in ([9, 9, end, 9, end], [9, 9, 9], [end, 9])]]
    assert m.reward_inputs(groups, [], 0)["think_length"].tolist() == [[3, 3, 1]]


def test_effort_prices(tiny):
    tokenizer, told = (
        load_tokenizer(tiny),
        ["--method-args", 'costs={"low":0.01,"0.9":0.001}', "text=Effort {}."],
    )
    m = made("--reward", "effort", "--method", "effort", *told, tokenizer=tokenizer)
    asked = [m.requests({"prompt": "1 + 1?", "position": k})[0] for k in range(3)]
    assert [q["tags"]["level"] for q in asked] == ["low", "0.9", "low"]
    assert "Effort 0.9." in tokenizer.decode(asked[1]["prompt_ids"])
    fields = m.reward_inputs([[q["tags"]] for q in asked], [], 0)
    assert fields["token_cost"].tolist() == [0.01, 0.001, 0.01]


# BRPO -------------------------------------------------------------------------------------------------------


def test_brpo_advantage_by_hand():
    """Two thoughts, three budgets, p = 1/6, 2/6, 3/6; v = [0, 1, 1], [1, 1, 0]. Returns of the first 5/6,
    5/6, 3/6, of the second 3/6, 2/6, 0; V2 4/6, 7/12, 1/4. V1 at s = 1: v_0 times 5/6; at s = 2: the mean of
    v_0 and v_1, weighed 1 : 2, times 3/6: 1/3 and 1/2. A_s = R - (s V1 + (3 - s) V2) / 3."""
    got = brpo.segment_advantage(np.array([[0.0, 1, 1], [1, 1, 0]]), np.array([1, 2, 3]) / 6)
    first = [5 / 6 - 4 / 6, 5 / 6 - (0 + 2 * 7 / 12) / 3, 3 / 6 - (2 * 1 / 3 + 1 / 4) / 3]
    second = [3 / 6 - 4 / 6, 2 / 6 - (5 / 6 + 2 * 7 / 12) / 3, 0 - (2 * 1 / 2 + 1 / 4) / 3]
    np.testing.assert_allclose(got, [first, second], atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_brpo_advantage_is_the_definition(seed, thoughts, budgets):
    """Term by term, as the paper has it; equal scores everywhere give nothing."""
    rng = np.random.default_rng(seed)
    v, p = rng.random((thoughts, budgets)), rng.random(budgets) + 0.1
    got = brpo.segment_advantage(v, p)
    for g, s in np.ndindex(v.shape):
        returns = [sum(p[j] * v[i, j] for j in range(s, budgets)) for i in range(thoughts)]
        weights = [2.0**j for j in range(s)]
        v1 = sum(w * v[g, j] for j, w in enumerate(weights)) / sum(weights) * sum(p[s:]) if s else 0.0
        base = (s * v1 + (budgets - s) * sum(returns) / thoughts) / budgets
        assert got[g, s] == pytest.approx(returns[g] - base, abs=1e-12)
    np.testing.assert_allclose(brpo.segment_advantage(np.full(v.shape, 0.3), p), 0, atol=1e-12)


def test_brpo_cuts_forces_and_pays_each_token(tiny):
    """A random model: each thought is cut at 8 and 20 tokens, two answers are forced at each; every token of
    it is trained once, forced ones never, and thinking and answer have advantages of their own."""
    words = "--method brpo --method-args budgets=[8,20] weights=[1,3] answers=2 length=6".split()
    group, model, m = sampled(tiny, "--reward", "correct", *words, 'cut="so"', 'ask="x"', n=12)
    [end], trained = m.end, 0
    assert len(group) == 12 and m.p.tolist() == [0.25, 0.75]
    for k, r in enumerate(group):
        budget, stop = m.budgets[k // 2 % 2], r["stop"]
        assert len(r["ids"]) == len(r["logps"]) == len(r["mask"]) == r["length"] and stop <= budget
        forced = m.ask if r["ids"][stop - 1] == end else m.forced
        answer = stop + len(forced)
        assert r["ids"][stop:answer].tolist() == forced and len(r["ids"]) - answer <= 6
        assert not r["mask"][stop:answer].any() and np.isnan(r["logps"][stop:answer]).all()
        assert r["mask"][answer:].all() and r["mask"][: r["start"]].sum() == 0
        assert r["mask"][r["start"] : stop].all() == (k % 2 == 0 or stop == r["start"])
        trained += r["mask"][:stop].sum()
    # the longest cut of each thought, once
    assert trained == sum(r["stop"] for r in group[2::4])
    # what was forced, and what followed, continues the thinking: the trainer sees the same log-probs
    for r, logp in zip(group, logps_of(model, batch_of(group), m.args), strict=True):
        known = ~np.isnan(r["logps"])
        np.testing.assert_allclose(r["logps"][known], logp[known], rtol=1e-4, atol=1e-4)
    # verdicts by hand: the first thought is right at 20 tokens only, in one of its two answers
    for r, c in zip(group, [0, 0, 1, 0, *[0] * 8], strict=True):
        r["correct"] = c
    m.revise([group], [{}])
    paid = brpo.segment_advantage(np.array([[0, 0.5], [0, 0], [0, 0]]), m.p)
    right, wrong = group[2], group[3]
    assert right["paid"][: right["stop"]] == pytest.approx(np.float32(paid[0, 1]))
    same = right["stop"] == group[0]["stop"]  # it ended before the first budget: four answers to one thinking
    mean = 0.25 if same else 0.5
    assert right["paid"][right["stop"] :] == pytest.approx(1 - mean) and wrong["paid"][-1] == -mean
    assert group[0]["paid"][: group[0]["stop"]] == pytest.approx(np.float32(paid[0, 0]))
    m.before_update(model, group, None)
    assert all(r["advantage"] is r["paid"] for r in group)
    assert m.metrics([group], {"correct": np.array([[r["correct"] for r in group]])}, None) == {
        "accuracy_by_budget": {"8": 0.0, "20": pytest.approx(1 / 6)}
    }


def test_brpo_thinking_that_ends_unclosed_is_wrong():
    """One thought ends with </think>, and is asked for an answer; one with the end token, and is lost."""
    tokenizer = make_tokenizer()
    words = "--method brpo --method-args budgets=[3,9] weights=[1,1] answers=1 length=2".split()
    m = made("--reward", "correct", "--group-size", "4", *words, 'cut=""', 'ask=""', tokenizer=tokenizer)
    group = []
    for text in ("9 8 7 </think> 7 <eos>", "9 8 7 6 <eos>"):
        ids = np.array(tokenizer.encode(text), np.int32)
        group.append(
            {"ids": ids, "logps": np.full(len(ids), -1, np.float32), "truncated": 0, "prompt_ids": [5]}
        )

    class Answers:
        def generate(self, prompts, n, caps, temperature, seed):
            self.prompts = [tokenizer.decode(p[1:]) for p in prompts]
            answer = {"ids": np.array(tokenizer.encode("7 <eos>"), np.int32), "truncated": 0}
            return [[answer | {"logps": np.full(2, -2, np.float32)} for _ in range(n)] for _ in prompts]

    sampler = Answers()
    m.complete([group], sampler, 0)
    closed = "9 8 7 </think>"
    assert sampler.prompts == [closed, closed, closed, "9 8 7 6 <eos> </think>"]
    assert [r["truncated"] for r in group] == [0, 0, 0, 1]  # what is truncated is wrong
    assert [(r["start"], r["stop"]) for r in group] == [(0, 3), (3, 4), (0, 3), (3, 5)]
    assert [r["mask"].astype(int).tolist() for r in group] == [
        [1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0, 1, 1]
    ]  # fmt: skip


def test_dot_cuts_and_checks_again():
    tokenizer, row = make_tokenizer(), {"answer": "9", "kind": "math"}
    words = "--method dot --method-args a=1 margin=2 --group-size 4 --require-think"
    m = made(*words.split(), tokenizer=tokenizer)
    short = ["9 </think> 9 <eos>", "9 wait </think> 9 <eos>", "9 </think> 9 <eos>"]
    late = "9 " + "wait " * 12 + "</think> 9 <eos>"  # the answer comes after the cut
    early = "9 </think> 9 " + "wait " * 12 + "<eos>"  # it is still there after the cut

    def group(texts):
        made = []
        for text in texts:
            ids = np.array(tokenizer.encode(text), np.int32)
            made.append({"ids": ids, "logps": np.full(len(ids), -1.0), "length": len(ids), "correct": 1})
            made[-1] |= {"truncated": 0, "text": text}
        return made

    groups = [group([*short, late]), group([*short, early]), group([*short, late])]
    groups[2][0]["correct"] = 0  # not all right: never cut
    m.revise(groups, [row] * 3)
    # lengths 4, 5, 4, 16: mean 7.25, sample std 5.85, cut at floor(13.1) = 13, 3 tokens too many
    assert [r["length"] for r in groups[0]] == [4, 5, 4, 13] == [len(r["logps"]) for r in groups[0]]
    assert groups[0][3]["ids"].tolist() == tokenizer.encode(late)[:13]
    assert [[r["correct"] for r in g] for g in groups[:2]] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert groups[1][3]["dot_cut"] == 1 and [r["length"] for r in groups[2]] == [4, 5, 4, 16]
    assert groups[0][0]["dot_threshold"] == 13 and math.isnan(groups[2][0]["dot_threshold"])
    assert m.metrics(groups, {}, None) == {"dot_threshold": 13, "dot_cut": 2, "dot_lost": 1}


# Requests and forced tokens ---------------------------------------------------------------------------------


def test_requests(tiny):
    tokenizer = load_tokenizer(tiny)
    row, end = {"prompt": "1 + 1?", "id": "a", "position": 0}, tokenizer.encode("</think>")
    plain = encode_prompt(tokenizer, row["prompt"])

    def ask(*words, row=row):
        return made("--group-size", "8", *words, tokenizer=tokenizer).requests(row)

    [one] = ask()
    assert one["prompt_ids"] == plain and one["n"] == 8 and one["cap"] == 4096 and not one["forced"]
    words = ["--method", "hbpo", "--method-args", "budgets=[8,16]", "prefix=At most {}."]
    a, b = ask(*words)
    assert a["prompt_ids"] == plain + tokenizer.encode("At most 8.", add_special_tokens=False)
    assert (a["n"], b["n"], b["tags"]) == (4, 4, {"subgroup_budget": 16})
    a, _ = ask(*words, "in_prompt=true")
    assert a["prompt_ids"] == encode_prompt(tokenizer, row["prompt"] + "\nAt most 8.")
    words = "--reward adaptthink --method adaptthink --method-args think_word=w no_think_tokens=5"
    a, b = ask(*words.split())
    assert a["forced"] == end and a["cap"] == 5 and a["tags"] == {"no_think": 1} and a["n"] == 4
    assert b["forced"] == tokenizer.encode("w") and b["cap"] == 4096
    words = ["--reward", "tldr", "--method", "tldr"]
    asked = [ask(*words, row=row | {"position": k})[0] for k in range(4)]
    assert [q["tags"]["level"] for q in asked] == ["short", "medium", "long", "short"]
    assert "Keep the reasoning short." in tokenizer.decode(asked[0]["prompt_ids"])
    a, b = ask("--reward", "adaptive_deep", "--method", "adaptive_deep")
    assert [q["tags"]["long_mode"] for q in (a, b)] == [0, 1] and a["prompt_ids"] != b["prompt_ids"]


BRPO = "--reward correct --method brpo --group-size 16 --max-tokens 9000 --method-args"
MISTAKES = [
    ("--method hbpo --group-size 6", "multiple of 4"),
    ("--method adaptive_deep --reward adaptive_deep --group-size 5", "even"),
    ("--method adaptthink --reward adaptthink --method-args think_word=hullaballoo", "must be one token"),
    ("--method elastic --max-tokens 2048", "2049 are needed"),
    ("--method dot --group-size 8", "--group-size 11 or more"),
    ("--method curriculum --max-tokens 200", "256 tokens"),
    ("--method curriculum --method-args schedule=stairs", "one of step, linear, exponential"),
    ("--method curriculum --method-args start=0", "must be more than 0"),
    ("--method tldr --reward tldr --method-args texts=short", "a list of three"),
    ("--method hapo --method-args history=max", "min or mean"),
    ("--method laser_d --reward correct", "laser_d or laser_de"),
    ("--method drpo", "--tis-cap 0"),
    ("--method drpo --tis-cap 0 --minibatches 3", "multiple of --minibatches"),
    ("--method crf --reward crf", "model=FOLDER"),
    ("--method toggle --reward toggle --method-args m=0", "m (0) must be 1 or more"),
    ("--method effort --reward effort --method-args costs=low", 'needs costs={"low"'),
    ("--reward correct --method brpo --group-size 20", "--group-size 16 x N"),
    ("--reward correct --method brpo --method-args budgets=[8,16] --group-size 8", "2 weights"),
    ("--reward lcpo_exact --method brpo --group-size 16 --max-tokens 9000", "(lcpo_exact) must be correct"),
    (f"--overlong-filter {BRPO} answers=4", "--overlong-filter not given"),
    (f"{BRPO} budgets=8 weights=[1]", "budgets=8 "),
    (f"{BRPO} budgets=[] weights=[]", "budgets=[] "),
    (f"{BRPO} budgets=[16,8] weights=[1,1]", "budgets=[16, 8] "),
    (f"{BRPO} budgets=[8,8] weights=[1,1]", "budgets=[8, 8] "),
    (f"{BRPO} budgets=[0,8] weights=[1,1]", "budgets=[0, 8] "),
    (f'{BRPO} budgets=["8",16] weights=[1,1]', "budgets=['8', 16] "),
    ("--reward grlc", "give --method grlc"),
    ("--reward toggle", "give --method palu or toggle"),
    ("--reward hapo_cosine", "give --method hapo"),
    ("--reward o1_pruner", "give --method adaptthink or starting_model"),
    ("--method hapo --method-args past=min", "history"),
]


@pytest.mark.parametrize("words, told", MISTAKES)
def test_what_cannot_work_is_told_in_a_line(tiny, words, told):
    with pytest.raises(BadInput) as error:
        made(*words.split(), tokenizer=load_tokenizer(tiny))
    assert told in str(error.value) and "\n" not in str(error.value)


def sampled(tiny, *words, n=6):
    """(a checked group of a random model's responses, the model, the method) of one prompt."""
    tokenizer = load_tokenizer(tiny)
    m = made("--group-size", str(n), "--max-tokens", "40", *words, tokenizer=tokenizer)
    model = net.load_model(tiny, m.args)
    row = {"prompt": "1 + 1?", "id": "a", "answer": "2", "kind": "math"}
    sampler = HFSampler(model, tokenizer, [2], 8192)
    [group], _ = train_grpo.roll_out(sampler, [row], [m.requests(row)], m, tokenizer, m.args, [3])
    return group, model, m


def batch_of(group):
    """Responses as update() has them."""
    for r in group:
        r |= {"advantage": 1.0, "weight": 1.0, "group": 0} | {"mask": np.ones(len(r["ids"]), np.float32)} | r
    return group


def logps_of(model, group, args):
    for r in group:
        train_grpo.add_logps(model, [r], "now", args)
    return [r.pop("now") for r in group]


def test_adaptthink_first_token(tiny):
    words = "--reward adaptthink --method adaptthink --method-args think_word=null"
    group, model, m = sampled(tiny, *words.split())
    [end] = m.end
    assert all(r["ids"][0] == end and math.isnan(r["logps"][0]) for r in group[:3])
    assert all(len(r["ids"]) == len(r["logps"]) <= 40 and "mask" not in r for r in group)
    now, m.first_update = logps_of(model, batch_of(group), m.args), True
    m.before_update(model, group, lambda model, part, name: train_grpo.add_logps(model, part, name, m.args))
    for k, (r, logp) in enumerate(zip(group, now, strict=True)):
        pi = math.exp(logp[0])  # half forced + half of what the policy would do
        want = 0.5 + 0.5 * pi if k < 3 or r["ids"][0] == end else 0.5 * pi
        assert math.exp(r["old_logps"][0]) == pytest.approx(want, rel=1e-5)
        # every later token is as it was sampled; the sampler's numbers carry the same correction
        np.testing.assert_allclose(r["old_logps"][1:], logp[1:], rtol=0, atol=1e-6)
        known = ~np.isnan(r["logps"])
        np.testing.assert_allclose(r["logps"][known], r["old_logps"][known], rtol=1e-4, atol=1e-4)
        assert known.all() == (k >= 3)


def gradient(model, batch, args, method=None):
    """Change of the weights in one update by plain gradient descent of step 1, and update's metrics."""
    model, method = copy.deepcopy(model), method or methods.Method(args, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    m = train_grpo.update(model, None, optimizer, copy.deepcopy(batch), method, args)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before, m


def test_adaptthink_pulls_a_rare_token_up(tiny):
    """A good forced </think>: with a ratio for each token its gradient is pi / 0.5 of what a
    sampled one has; with one for the response, as the authors have it, (pi / 0.5)^(1 / L)."""
    words = "--reward adaptthink --method adaptthink --method-args think_word=w --tis-cap 0"
    tokenizer, forced = load_tokenizer(tiny), {"prompt_ids": [5, 6], "ids": np.array([4, 7, 8, 2], np.int32)}
    forced |= {"logps": np.array([np.nan, -6, -6, -6], np.float32), "advantage": 0.1}
    shares = {}
    for ratio in ("token", "sequence"):
        m = made(*words.split(), "--ratio", ratio, tokenizer=tokenizer)
        model = net.load_model(tiny, m.args)
        m.first_update = True
        got, _ = gradient(model, [forced], m.args, m)
        [logp] = logps_of(model, batch_of([dict(forced)]), m.args)
        size = math.exp((logp[0] - HALF) / (1 if ratio == "token" else 4))
        free, _ = gradient(model, [forced], m.args)  # as if all had been sampled
        if ratio == "sequence":
            torch.testing.assert_close(got, free * size, rtol=1e-3, atol=3e-7)
        else:  # the first token alone is scaled
            rest = dict(forced, mask=np.array([0, 1, 1, 1], np.float32))
            others = gradient(model, [rest], m.args)[0] * 3 / 4  # token_mean divides by 4 there, by 3 here
            torch.testing.assert_close(got - others, (free - others) * size, rtol=1e-2, atol=3e-7)
        assert (got - free).abs().max() > 1e-4  # hundreds of times that
        shares[ratio] = size
    assert shares["token"] < 0.01 < 0.2 < shares["sequence"]  # a token of probability 1/600


@pytest.mark.parametrize("think, solution", [(8, 6), (3, 20)])
def test_elastic_two_budgets(tiny, think, solution):
    words = f"--method elastic --method-args think={think} solution={solution}"
    group, model, m = sampled(tiny, *words.split(), n=12)
    [end], forced = m.end, 0
    for r in group:
        ids = r["ids"].tolist()
        at = ids.index(end) if end in ids else None
        assert len(ids) == len(r["logps"]) == r["length"]
        if at is None:  # it ended inside the thinking
            assert not r["truncated"] and len(ids) <= think
            continue
        assert at <= think and len(ids) - at - 1 <= solution
        if "mask" in r:
            forced += 1
            assert (
                at == think and np.flatnonzero(r["mask"] == 0).tolist() == [at] and math.isnan(r["logps"][at])
            )
        if r["truncated"]:
            assert len(ids) == at + 1 + solution
    assert forced > 6 and m.metrics([group], {}, None) == {"forced_share": forced / 12}
    # the second half continues the first: the trainer sees the same log-probs
    for r, logp in zip(group, logps_of(model, batch_of(group), m.args), strict=True):
        known = ~np.isnan(r["logps"])
        np.testing.assert_allclose(r["logps"][known], logp[known], rtol=1e-4, atol=1e-4)


def test_forced_tokens_are_context_only(tiny):
    """A token without a loss changes no gradient by its advantage, and counts in no mean."""
    args = flags()
    model, rng, batch = net.load_model(tiny, args), np.random.default_rng(0), []
    for n in (4, 9, 1, 6):
        r = {"prompt_ids": rng.integers(5, 600, 5).tolist(), "ids": rng.integers(5, 600, n).astype(np.int32)}
        r |= {"logps": np.full(n, -6, np.float32), "advantage": rng.normal(size=n)}
        batch.append(r | {"mask": np.float32([t != 1 for t in range(n)])})
    whole, m = gradient(model, batch, args)
    for r in batch:
        r["advantage"][1:2] = 1e6
    again, _ = gradient(model, batch, args)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    split, _ = gradient(model, batch, flags("--micro-tokens", "1"))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    t = train_grpo.to_tensors([r | {"weight": 0.5} for r in batch])
    assert t["weight"].sum() == 0.5 * (20 - 3) and m["loss"] != 0


# DRPO -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.0, 1e3]))
def test_drpo_weights_are_the_gradient(seed, questions, kl_coef):
    rng = np.random.default_rng(seed)
    length = torch.tensor(rng.integers(1, 9, 3 * questions))
    row = torch.repeat_interleave(torch.arange(len(length)), length)
    group, correct = (
        torch.arange(questions).repeat_interleave(3),
        torch.tensor(rng.integers(0, 2, len(length))),
    )
    logp = torch.tensor(-rng.random(len(row)), requires_grad=True)
    old, constants = torch.tensor(-rng.random(len(row))), {"tau": 2.0, "l_max": 10, "kl_coef": kl_coef}

    def score_and_kl(logp):
        score = torch.zeros(len(length), dtype=torch.float64).index_add(0, row, logp) / length
        return score, (old - logp).mean()

    score, kl = score_and_kl(logp)
    loss = drpo.objective(score, length, group, correct, kl, **constants)
    want = torch.autograd.grad(loss, logp)[0] if loss.requires_grad else torch.zeros_like(logp)
    value, weights = drpo.token_weights(
        *score_and_kl(logp.detach())[:1], length, group, correct, kl, **constants
    )
    assert value == pytest.approx(loss.item())
    torch.testing.assert_close(weights[row], want, rtol=1e-9, atol=1e-12)


def test_drpo_by_hand():
    """Right answers of 10 and 20 tokens, scores -1, -2; a wrong one, -3. lam l_max = 10 / ln 3: so 3 to 1."""
    numbers = [torch.tensor(x, dtype=torch.float64) for x in ([-1.0, -2.0, -3.0], [10, 20, 5])]
    group, correct, kl = torch.zeros(3), torch.tensor([1, 1, 0]), torch.tensor(0.0)
    loss, w = drpo.token_weights(*numbers, group, correct, kl, lam=0.1, tau=10, l_max=100 / math.log(3))
    assert loss == pytest.approx(-(0.75 * -1 + 0.25 * -2 - -3))
    torch.testing.assert_close(w, torch.tensor([-0.75 / 10, -0.25 / 20, 1 / 5], dtype=torch.float64))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_drpo_update(tiny, minibatches):
    """The loop's loss has DRPO's gradient, however it is split; the gap to the sampler stays what it was."""
    made_of, rng, batch = [], np.random.default_rng(1), []
    words = "--method drpo --method-args l_max=32 kl_coef=1 --tis-cap 0 --group-size 4".split()
    words += ["--minibatches", str(minibatches), "--prompts-per-step", "4"]
    model = net.load_model(tiny, flags())
    for i in range(16):
        n = int(rng.integers(2, 20))
        r = {"prompt_ids": rng.integers(5, 600, 6).tolist(), "ids": rng.integers(5, 600, n).astype(np.int32)}
        r |= {"logps": np.zeros(n, np.float32), "advantage": 0.0, "group": i // 4, "correct": i % 2}
        batch.append(r)
    for r, logp in zip(batch, logps_of(model, batch_of(batch), flags()), strict=True):
        r["logps"] = logp
    for tokens in ("100000", "60", "1"):
        m = made(*words, "--micro-tokens", tokens)
        m.begin_step(0, 0, [], [], None)
        made_of.append((*gradient(model, batch, m.args, m), m.metrics([], {}, None)))
        torch.testing.assert_close(made_of[-1][0], made_of[0][0], rtol=1e-4, atol=1e-5)
        assert (
            made_of[-1][2] == pytest.approx(made_of[0][2], abs=1e-6) and made_of[-1][1]["clip_fraction"] == 0
        )
        assert made_of[-1][1]["logp_gap"] < 1e-5
    assert made_of[0][0].abs().max() > 1e-4 and (made_of[0][2]["drpo_kl"] != 0) == (minibatches == 2)
    if minibatches == 1:  # against autograd through the objective itself, all at once
        live = copy.deepcopy(model)
        logps = []
        for r in batch:
            ids = torch.tensor([[*r["prompt_ids"], *r["ids"].tolist()]])
            logits = live(input_ids=ids).logits[0, len(r["prompt_ids"]) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(r["ids"]).long()[:, None]).mean())
        length, group, correct = (
            torch.tensor(x)
            for x in zip(*((len(r["ids"]), r["group"], r["correct"]) for r in batch), strict=True)
        )
        zero = torch.tensor(0.0)
        drpo.objective(torch.stack(logps), length, group, correct, zero, l_max=32).backward()
        flat = torch.cat([p.grad.flatten() for p in live.parameters()])
        flat *= min(1.0, 1 / flat.norm().item())
        torch.testing.assert_close(made_of[0][0], -flat, rtol=1e-3, atol=1e-5)


# Short real runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """A taught toy model, and four problems."""
    words = "--limit 4 --budgets none --wording tulu --max-tokens 96 --prompts-per-step 4 --group-size 4"
    words += " --lr 1e-3 --sampler hf --require-think --micro-tokens 2048"
    return ["--model", f"{TOY}/model", "--data", f"{TOY}/rows.jsonl", *words.split()]


def lines(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def state_of(out, step):
    return torch.load(os.path.join(out, f"checkpoint-{step}", "trainer_state.pt"), weights_only=True)


def test_memories_over_two_steps(world, tmp_path):
    def run(name, words):
        out = str(tmp_path / name)
        train_grpo.main([*world, *words.split(), "--steps", "2", "--out", out])
        return *lines(out), state_of(out, 2)

    first, second, state = run("hapo", "--reward hapo_linear --method hapo")
    assert first["history_known"] == 0 < second["history_known"] <= len(state["method"]["history"]) / 4
    least = [h[2] for h in state["method"]["history"].values()]
    assert 0 < min(least) <= second["history_length"] and state["position"] == 8
    words = "--reward palu --method palu --method-args c=0.3 tau=0.5"
    first, second, state = run("palu", words)
    assert first["palu_budget"] == 96 > min(state["method"]["budget"].values()) and second["length"] <= 96
    first, second, state = run("o1", "--reward o1_pruner --advantage raw --method starting_model")
    assert len(state["method"]["reference"]) == 4  # each prompt was asked once, not again in the second epoch
    assert first["ref_accuracy"] == second["ref_accuracy"]


class ShrinkingCap(Curriculum, ThinkPrune):
    """row() and constants of the curriculum; the budget is also where responses are cut."""


def test_two_methods_at_once(world, tmp_path, monkeypatch):
    module = types.ModuleType("methods.shrinking_cap")
    module.ShrinkingCap, named = ShrinkingCap, [*methods.names(), "shrinking_cap"]
    monkeypatch.setattr(ShrinkingCap, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, "methods.shrinking_cap", module)
    monkeypatch.setattr(methods, "names", lambda: named)
    words = "--reward curriculum_triangular --method shrinking_cap --method-args start=40 period=1 --steps 2"
    train_grpo.main([*world, *words.split(), "--out", str(tmp_path / "out")])
    first, second = lines(tmp_path / "out")
    assert [m["scheduled_budget"] for m in (first, second)] == [40, 28]
    assert second["over_budget"] == 0 and 0 < second["length"] <= 28


def test_dynamic_sampling_stops_at_its_cap(tiny, tmp_path):
    """A random model is never right: every group is dropped, and the run goes on with what there is."""
    words = "--budgets fixed:8 --max-tokens 8 --steps 2 --prompts-per-step 4 --group-size 2 --sampler hf"
    words = [*words.split(), "--dynamic-sampling", "correct", "--out", str(tmp_path / "out")]
    train_grpo.main(["--model", tiny, "--data", MATH, *words])
    for m in lines(tmp_path / "out"):
        assert (m["kept_groups"], m["sampled_groups"], m["sampled_accuracy"]) == (0, 20, 0)
    assert state_of(tmp_path / "out", 2)["position"] == 40


class Noting(HFSampler):
    """Notes which model each call asks, and every draw."""

    def generate(self, *args, **options):
        self.asked = [*getattr(self, "asked", []), self.model]
        return super().generate(*args, **options)


def test_reference_samples_come_from_the_starting_model(tiny, tmp_path, monkeypatch):
    """At a later step, too: the sampler is lent to the starting model and handed back."""
    made_ones = []
    monkeypatch.setattr(
        "toy.hf_sampler.HFSampler", lambda *args: made_ones.append(Noting(*args)) or made_ones[-1]
    )
    words = "--reward o1_pruner --advantage raw --method starting_model --method-args samples=2 --limit 1"
    words += " --max-tokens 8 --prompts-per-step 1 --group-size 2 --steps 2 --budgets none --sampler hf"
    train_grpo.main(["--model", tiny, "--data", MATH, *words.split(), "--out", str(tmp_path / "out")])
    starting, policy, again = made_ones[0].asked  # in the second step the prompt is known
    assert policy is again is made_ones[0].model and starting is not policy
    fresh = net.load_model(tiny, flags())
    for a, b in zip(starting.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    [(accuracy, length)] = state_of(tmp_path / "out", 2)["method"]["reference"].values()
    assert accuracy == 0 and 1 <= length <= 8


LASER = "--method laser_d --method-args every=3 size=4 samples=3 low=8 step=8"
BRPO_RUN = """--reward correct --method brpo --method-args budgets=[8,24] weights=[1,2] answers=1 length=4
    'cut=""' 'ask=""'"""
ADAPTTHINK = "--method adaptthink --method-args think_word=null samples=2 --ratio sequence"


@pytest.mark.parametrize(
    "words",
    [
        "--reward hapo_cosine --method hapo --dynamic-sampling reward",
        f"--reward adaptthink --advantage raw {ADAPTTHINK}",
        f"--reward laser_d {LASER} --minibatches 2",
        "--reward toggle --method toggle --method-args m=2 samples=2",
        f"{BRPO_RUN} --minibatches 2",
    ],
)
def test_resume_is_exact(world, words, tmp_path):
    words = [*world, *shlex.split(words), "--prompts-per-step", "2"]
    whole, parted = str(tmp_path / "whole"), str(tmp_path / "parted")
    train_grpo.main([*words, "--steps", "4", "--out", whole])
    train_grpo.main([*words, "--steps", "2", "--out", parted])
    train_grpo.main(["--resume", "--steps", "4", "--out", parted])
    timeless = [
        [{k: v for k, v in m.items() if not k.startswith(TIMES)} for m in lines(o)] for o in (whole, parted)
    ]
    assert timeless[0] == timeless[1]
    weights = []
    for out in (whole, parted):
        with open(os.path.join(out, "checkpoint-4", "model.safetensors"), "rb") as f:
            weights.append(f.read())
    states = [state_of(out, 4) for out in (whole, parted)]
    assert weights[0] == weights[1]
    assert [(s["method"], s["position"]) for s in states[:1]] == [
        (s["method"], s["position"]) for s in states[1:]
    ]


def test_draws_differ_between_rounds_and_are_repeatable(tiny):
    tokenizer, m = load_tokenizer(tiny), made("--max-tokens", "8", "--group-size", "2")
    m.tokenizer = tokenizer
    row = {"id": "a", "prompt": "1 + 1?", "answer": "2", "kind": "math", "budget": None}
    sampler, texts = HFSampler(net.load_model(tiny, m.args), tokenizer, [2], 8192), []
    for key in ([1], [1, 1], [1]):
        [group], _ = train_grpo.roll_out(sampler, [row], [m.requests(row)], m, tokenizer, m.args, key)
        texts.append([r["text"] for r in group])
    assert texts[0] == texts[2] != texts[1]
