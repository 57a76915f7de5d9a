"""The study: its page says what its figures say, its ideas do what they claim, its runs run and go on."""

import json
import os
import re
import sys

import numpy as np
import pytest
import sampler
import torch
from conftest import ROOT
from sampler import load_model, load_sampler

import data
import methods
import rewards
from toy import task as toy

sys.path.insert(0, os.path.join(ROOT, "studies"))

import supervised

from studies import ideas, study, study_report

DOCS = os.path.join(ROOT, "docs")
with open(os.path.join(ROOT, "studies", "study_text.md"), encoding="utf-8") as f:
    TEXT = f.read()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy base model of 40 batches: it knows the form, not much more."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy.WARMUP, "batches", 40)
        return toy.make_base(str(folder), log=lambda _: None)


# The page ---------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_committed_figures():
    study_report.load(DOCS)
    with open(os.path.join(DOCS, "study.md"), encoding="utf-8") as f:
        assert f.read() == study_report.page()
        page = study_report.page()
    assert "@@" not in page
    for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.M):  # a cell under every heading
        assert len({line.count(" | ") for line in block.splitlines() if "---" not in line}) == 1, block


def test_no_result_is_typed_by_hand():
    """Outside of {{ ... }} only settings and, in quotations, what others published stand as numbers."""
    own = re.sub(r"\{\{.+?\}\}", "", TEXT, flags=re.S)
    own = "\n".join(line for line in own.splitlines() if not line.startswith(("> ", "    ")))
    assert not re.findall(r"\d+(?:\.\d+)? ?%|\d percent", own)
    # Decimals that are left are settings: alpha, arXiv numbers, multiples of the largest budget.
    settings = r"alpha[ =_]\S+|\d{4}\.\d{4,5}|1\.5 times|0\.0003|0\.02|0\.5M|trl==\S+"
    assert not re.findall(r"\d+\.\d+", re.sub(settings, "", own))


def test_figures_are_means_over_budgets_then_over_seeds(monkeypatch):
    cells = {"16": {"abs_error": 0.1}, "48": {"abs_error": 0.3}, "96": {"abs_error": 0.9}, "none": {}}
    other = {"16": {"abs_error": 0.2}, "48": {"abs_error": 0.6}}
    records = {("x", s): {"name": "x", "seed": s, "trained": [16, 48], "cells": {"exact": {"toy": c}}}
               for s, c in enumerate([cells, other])}  # fmt: skip
    monkeypatch.setattr(study_report, "RECORDS", records)
    assert study_report.figures("x", "abs_error") == pytest.approx([0.2, 0.4])
    assert study_report.figures("x", "abs_error", 96) == [0.9]
    assert study_report.error("x") == "30.0% ± 14.1%"  # sqrt((0.1^2 + 0.1^2) / 1)
    assert study_report.error("x", 96) == "90.0%"
    assert study_report.error("y") == "not run"


def test_a_page_of_an_unfinished_study_says_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study_report, "DOCS", str(tmp_path))
    monkeypatch.setattr(study_report, "RECORDS", {})
    committed = study.read(DOCS)
    with open(tmp_path / "study.json", "w") as f:
        json.dump([committed["base", 0], committed["peaked_gdpo", 0]], f)
    monkeypatch.setattr(study_report.load, "__defaults__", (str(tmp_path),))
    study_report.main()
    assert "not run" in (tmp_path / "study.md").read_text()
    pictures = set(re.findall(r"\((study_\w+\.png)\)", TEXT))
    assert len(pictures) >= 8
    for name in pictures:  # all of them are drawn, and all of them are committed
        assert (tmp_path / name).stat().st_size > 5000 and os.path.exists(os.path.join(DOCS, name))


def test_every_experiment_is_on_the_page_or_feeds_a_picture():
    used = TEXT + open(study_report.__file__, encoding="utf-8").read()
    assert not [name for name in study.RUNS if f'"{name}"' not in used and f"'{name}'" not in used]


# The runs ---------------------------------------------------------------------------------------------------


def test_order_of_the_runs():
    full, quick = study.wanted(False), study.wanted(True)
    assert len(set(full)) == len(full) and set(quick) < set(full) and {s for _, s in quick} == {0}
    for name, seed in full:
        start = study.RUNS[name].get("start")
        assert not start or full.index((start, seed)) < full.index((name, seed))
        assert not start or name not in dict(quick) or start in dict(quick)
    for name in ("peaked_gdpo", "peaked_sum", "lcpo_gdpo", "lcpo_sum", "l1_max", "decoding"):  # the headlines
        assert study.RUNS[name]["seeds"] == 3


def test_two_steps_of_a_run_and_its_record(base, tmp_path, monkeypatch, script):
    """The real scripts with an idea put in; afterwards study.json says that there is nothing to do."""
    os.symlink(base, tmp_path / os.path.basename(base))
    monkeypatch.chdir(ROOT)
    for name, value in {"OUT": str(tmp_path), "DOCS": str(tmp_path / "docs"), "STEPS": "2"}.items():
        monkeypatch.setattr(study, name, value)
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(study, "SAMPLED", study.SAMPLED.replace("--n 4 --limit 100", "--n 2 --limit 10"))
    monkeypatch.setattr(study.read, "__defaults__", (str(tmp_path / "docs"),))
    small = " --prompts-per-step 4 --group-size 4 --limit 8"
    run = study.RUNS["remind"] | {"asked": [16, 72], "flags": study.RUNS["remind"]["flags"] + small}
    monkeypatch.setitem(study.RUNS, "remind", run)
    study.run("remind", 0)
    [record] = json.loads((tmp_path / "docs" / "study.json").read_text())
    assert record["name"] == "remind" and set(record["cells"]["exact"]["toy_ood"]) == {"16", "72"}
    assert record["cells"]["exact"]["toy"]["72"]["n"] == 20 and record["onset"] is None
    left = script("studies/study.py", "names").stdout.split()
    assert "remind:0" not in left and "tally:0" in left


def test_share_of_the_length_term(tmp_path):
    """Two responses a prompt: lengths 16 and 26 for 16, one of them right."""
    with open(tmp_path / "samples.jsonl", "w") as f:
        for length, correct in ((16, 1), (26, 0)):
            sample = {"id": "a", "source": "toy", "budget": 16, "length": length, "correct": correct}
            f.write(json.dumps(sample) + "\n")
    found = study.length_shares(str(tmp_path), 16, 48)
    # Of two values the variance is a quarter of their distance squared: 0.2 and 1 tokens' worth for lcpo.
    assert found["length_share_lcpo_exact"] == pytest.approx(0.04 / 1.04, abs=1e-4)
    far = (1 - np.exp(-10 / 6)) ** 2
    assert found["length_share_peaked_exact"] == pytest.approx(far / (far + 1), abs=1e-4)


# The ideas --------------------------------------------------------------------------------------------------


def test_wordings():
    assert ideas.relative(72) == "Think for 150 maximum tokens."
    assert ideas.tally(16) == "Think for up up up up tokens."
    assert [ideas.mlt(n) for n in (1, 47, 500)] == ["<MLT:8>", "<MLT:48>", "<MLT:96>"]


def test_rewards_beyond_the_trained_range():
    rollouts = {
        "budget": [48, 72],
        "length": np.array([[48, 42], [56, 50]]),
        "correct": np.array([[1, 0], [0, 1]]),
    }
    rollouts["truncated"] = np.array([[0, 0], [1, 0]])
    free = ideas.length_beyond(rollouts, parts=True)
    assert free["correct"].tolist() == [[1, 0], [0, 0]]  # the right answer to 72 earns nothing
    assert free["length"][0].tolist() == pytest.approx([1, np.exp(-1)])
    cut = ideas.censored(rollouts, parts=True)
    assert cut["length"][1].tolist() == pytest.approx([1, np.exp(-22 / 6)])  # cut at 56: not too short
    assert ideas.censored(rollouts)[0].tolist() == pytest.approx([2, np.exp(-1)])


def test_reminders_tell_what_is_left(base, monkeypatch):
    """After 8 tokens, and after each 8 more of its own; the numbers are right and no loss falls on them."""
    monkeypatch.setattr(sampler.HFSampler, "generate", ideas.with_reminders(sampler.HFSampler.generate))
    hf = load_sampler(base, "hf")
    asked = data.budget_prompt("add 1 2 3", 72, "exact", wording="tulu")
    seen = []
    [group] = hf.generate([data.encode_prompt(hf.tokenizer, asked)], 16, 60, seed=1,
                          finished=lambda i, g: seen.append((i, len(g))))  # fmt: skip
    assert seen == [(0, 16)] and any(len(r["ids"]) > 30 for r in group)
    marks = {hf.tokenizer.convert_tokens_to_ids(f"##{d}") for d in range(10)}
    for r in group:
        assert len(r["ids"]) == len(r["logps"]) <= 60
        places = r.get("untrained", [])
        for first, second in zip(places[::2], places[1::2], strict=True):
            assert second == first + 1 and {r["ids"][first], r["ids"][second]} <= marks
            digits = hf.tokenizer.convert_ids_to_tokens([r["ids"][first], r["ids"][second]])
            assert int("".join(d[2:] for d in digits)) == 72 - (second + 1)
        assert places[::2] == list(range(8, 8 + 10 * (len(places) // 2), 10))


def test_capped_reminders_name_nothing_larger_than_was_trained(base, monkeypatch):
    tokenizer = data.load_tokenizer(base)
    prompts = [data.encode_prompt(tokenizer, f"add 1 2 3\nThink for {n} tokens.") for n in (72, 48)]
    assert ideas.rename(prompts[0], 72, 48, tokenizer) == prompts[1]
    told = []
    for length in (8, 18, 28, 38, 58, 68):
        r = {
            "budget": 72,
            "most": 48,
            "cap": 96,
            "ids": [0] * length,
            "logps": [0.0] * length,
            "untrained": [],
        }
        ideas.remind(r, tokenizer)
        told.append(tokenizer.decode(r["ids"][length:]).replace("#", "").replace(" ", ""))
    assert told == ["48", "48", "42", "32", "12", "02"]


def test_an_offset_of_all_positions_changes_nothing(base):
    """Why it is not among the ideas: rotary embeddings see distances only."""
    model, ids = load_model(base).eval(), torch.arange(3, 23)[None]
    shifted = torch.arange(20)[None] + 77
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, model(ids, position_ids=shifted).logits, atol=1e-4)


def test_the_cut_of_unfinished_responses(monkeypatch):
    monkeypatch.setattr(methods, "response_cap", lambda row, args, memory: row["cap"])
    monkeypatch.setitem(rewards.REWARDS, "censored", None)
    ideas.add_reward("censored", ideas.censored, 56)
    assert [methods.response_cap({"cap": cap}, None, {}) for cap in (40, 96)] == [40, 56]
    assert rewards.REWARDS["censored"] is ideas.censored


@pytest.mark.parametrize("idea", ["none", "mlt"])
def test_supervised_training_on_own_traces(idea, base, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "budget_prompt", data.budget_prompt)  # put back what an idea replaces
    monkeypatch.setattr(supervised, "BATCH", 2)
    supervised.main([base, str(tmp_path / "m"), "--idea", idea, "--problems", "12"])
    told = json.loads((tmp_path / "m" / "supervised.json").read_text())
    assert told["answers"] > 1 and told["steps"] == 3 * told["answers"] // 2
    model = load_sampler(str(tmp_path / "m"), "hf")
    prompt = data.budget_prompt("add 1 2 3", 16, "exact", wording="tulu")
    asked = data.encode_prompt(model.tokenizer, prompt)
    assert (model.tokenizer.convert_tokens_to_ids("<MLT:16>") in asked) == (idea == "mlt")
    assert model.tokenizer.unk_token_id not in asked and len(model.generate([asked], 1, 5)[0]) == 1
