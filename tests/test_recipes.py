"""Every recipe: it parses, it names its source, and in its frozen run (test_freeze.py) its method acts."""

import json
import os
import re
import shlex

import pytest
from conftest import ROOT

import data
import methods
import rewards
import train_grpo
from studies import zoo

RUNS = zoo.runs() | {name: zoo.toy_flags(zoo.recipe(name)) for name in zoo.CARDS}
RECIPES = [name for name in RUNS if name not in zoo.EXTRA]

# What a method adds to metrics.jsonl: the proof that more of it runs than its reward.
MEMORY, GROUPS = ["history_known", "history_length"], ["kept_groups", "sampled_groups", "sampled_accuracy"]
SHOWS = {
    "hapo": MEMORY, "hapo_linear": MEMORY, "palu": ["palu_budget"], "curriculum": ["scheduled_budget"],
    "curriculum_band": ["scheduled_budget"], "laser_d": ["laser_easy", "laser_medium", "laser_hard"],
    "laser_de": ["laser_easy", "laser_medium", "laser_hard"], "o1_pruner": ["ref_accuracy", "ref_length"],
    "adaptthink": ["no_think_accuracy", "think_accuracy", "no_think_length", "think_length", "ref_accuracy"],
    "crf": ["conciseness"], "dot": ["dot_cut", "dot_threshold", "dot_lost", *GROUPS], "dler": [*GROUPS, "kl"],
    "da_dler": GROUPS, "dapo": GROUPS, "gdpo": GROUPS, "drpo": ["drpo_kl"], "elastic": ["forced_share"],
    "hbpo": ["length_by_subgroup", "reward_by_subgroup"], "tldr": ["length_by_level"],
    "adaptive_deep": ["short_accuracy", "long_accuracy", "short_length", "long_length"],
    "toggle": ["toggle_limited", "toggle_over", "toggle_budget"], "grlc": ["think_length", "answer_length"],
    "brpo": ["accuracy_by_budget"], "effort": ["length_by_level"],
}  # fmt: skip
# The parts of a method that its toy line must share with its recipe; sizes and constants differ.
SAME = """reward advantage method ratio clip_low clip_high dual_clip loss_reduction overlong_filter kl_coef
    kl_estimator dynamic_sampling""".split()


# Words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_and_its_toy_line_are_one_method(name, tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # recipes name other recipes from the root
    flags = ["--model", tiny, "--data", "rows.jsonl", "--out", str(tmp_path / "out")]
    full = train_grpo.parse_args([f"@recipes/{name}.args", *flags])
    small = train_grpo.parse_args([*RUNS[name], "--out", str(tmp_path / "toy")])
    assert {k: getattr(full, k) for k in SAME} == {k: getattr(small, k) for k in SAME}
    # the constants of the reward that the toy scales are written out in the recipe as well
    assert set(small.reward_args) <= set(full.reward_args)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_where_it_comes_from(name):
    text = zoo.recipe(name)
    assert re.search(r"[0-9]{4}\.[0-9]{5}|AI2 blog|repository|Reward Model", text), "a paper or a repository"
    assert re.search(r"[Rr]ead in|second-hand|RECONSTRUCTION|authors' training script|AI2 blog", text)
    assert f"@recipes/{name}.args" in text
    [command] = re.findall(r"^#   python data\.py (.+)", text, re.M)
    made = data.parse_args(shlex.split(command))  # a flag that data.py lacks is an error
    rows = re.findall(r"^--data (\S+)", text, re.M)  # none where another recipe is continued
    assert data.parse_budgets(made.budgets) and (rows == [made.out] or (not rows and "\n@recipes/" in text))
    # its own output, and never that of another recipe
    assert re.findall(r"^--out (\S+)", text, re.M) == [f"out/{name}"]


def test_every_reward_and_advantage_has_a_run():
    parsed = [train_grpo.parse_args([*flags, "--out", "out/none"]) for flags in RUNS.values()]
    others = {"dot_threshold", "peaked_capped"}  # of another method; the toy's default
    assert {a.reward for a in parsed} == set(rewards.REWARDS) - others
    assert {a.method for a in parsed} == {"plain", *methods.names()} - {"reminders"}  # studies/study.py
    assert {a.advantage for a in parsed} == set(rewards.ADVANTAGES)
    assert {a.ratio for a in parsed} == {"token", "sequence", "cispo"}


# Steps ------------------------------------------------------------------------------------------------------

with open(os.path.join(ROOT, "tests", "data", "freeze", "metrics.json"), encoding="utf-8") as f:
    FROZEN = {name: run["steps"] for name, run in json.load(f)["runs"].items()}


@pytest.mark.parametrize("name", RECIPES)
def test_its_method_acts_in_the_frozen_run(name):
    first, last = FROZEN[name]
    assert {*SHOWS.get(name, ())} <= {*last} & {*zoo.OWN}
    assert all(m["grad_norm"] > 0 and m["zero_variance"] < 1 for m in (first, last))
    if "kept_groups" in last:  # groups were replaced
        assert all(m["kept_groups"] == 6 < m["sampled_groups"] for m in (first, last))
    moves = {
        "hapo": "history_known", "hapo_linear": "history_known", "palu": "palu_budget",
        "laser_d": "laser_easy", "laser_de": "laser_easy",
        "curriculum": "scheduled_budget", "curriculum_band": "scheduled_budget", "toggle": "toggle_limited",
        "brpo": "accuracy_by_budget",
    }  # fmt: skip
    if name in moves:
        assert first[moves[name]] != last[moves[name]]
    if name == "dot":
        assert last["dot_cut"] >= last["dot_lost"] > 0
    if name in ("thinkprune", "dler", "da_dler"):
        assert first["truncated"] > 0 and first["length"] < (32 if name == "thinkprune" else 40)
    if name == "elastic":
        assert last["forced_share"] > 0.5 and last["length"] <= 33
    if name == "toggle":  # a step with budgets, in which some pay, and a step without
        assert first["toggle_over"] > 0 == last["toggle_over"] == last["toggle_limited"]
        assert first["reward"] < first["accuracy"] and last["reward"] == last["accuracy"]
    if name == "grlc":
        assert first["think_length"] + first["answer_length"] == first["length"]
        assert first["reward_think"] != 0 != first["reward_answer"]
    if (
        name == "brpo"
    ):  # the accuracy is the mean over the budgets, and no response is as long as the thinking was
        assert sum(last["accuracy_by_budget"].values()) / 2 == pytest.approx(last["accuracy"])
        assert last["length"] <= 24 + 1 + 4
    if name == "drpo":
        assert last["drpo_kl"] > 0
    parts = {
        "hbpo": last.get("length_by_subgroup", {}).values(), "tldr": last.get("length_by_level", {}).values(),
        "effort": last.get("length_by_level", {}).values(),
        "adaptthink": [last.get("no_think_length"), last.get("think_length")],
        "adaptive_deep": [last.get("short_length"), last.get("long_length")],
    }  # fmt: skip
    if name in parts:  # parts of equal size: their mean is the batch's
        assert len(parts[name]) in (2, 3, 4) and sum(parts[name]) / len(parts[name]) == pytest.approx(
            last["length"]
        )
