"""Reminders: where they come, what they count, in training, in evaluation and behind a real server."""

import argparse
import importlib.util
import re

import numpy as np
import pytest
from conftest import lines
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serving import NEEDED, PAGE, serving

import data
from data import BadInput
from evaluation.engines import open_sampler
from integrations.remind import Reminded
from methods.reminders import Reminders
from studies import ideas, warm_start
from toy import prepare, task

ARGS = argparse.Namespace(think_end="</think>", temperature=1.0, group_size=2, max_tokens=96)
PROBLEM = "add a +7 b +3 c +9"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy base model of 40 batches: it knows the form, not much more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.WARMUP, "batches", 40)
        patch.setattr(prepare, "CACHE", str(tmp_path_factory.mktemp("cache")))
        yield prepare.prepare(log=lambda text: None)


def method(**options):
    return Reminders(ARGS, task.make_tokenizer(), **options)


def test_places_of_the_marks():
    tokenizer, marks = task.make_tokenizer(), method().marks
    told = {place: tokenizer.decode(ids) for place, ids in marks(64).items()}
    assert told == {8 * i: f"<{i}/8>" for i in range(1, 8)}
    # Of 16 tokens an eighth is 2: a mark comes 4 tokens after the last one's end.
    assert {p: tokenizer.decode(ids) for p, ids in marks(16).items()} == {4: "<2/8>", 10: "<5/8>"}
    assert marks(None) == {} and marks(4) == {}
    counted = method(form=ideas.COUNT).marks(80)
    assert tokenizer.convert_ids_to_tokens(counted[10]) == ["used", "##1", "##0", "left", "##7", "##0"]
    with pytest.raises(BadInput, match="--method-args form=kept {left}"):
        method(form="kept {left}")


@pytest.mark.parametrize("budget", [16, 37, 64, 128, None])
def test_marks_stand_where_they_should_and_have_no_loss(base, budget):
    hf = open_sampler(base["model"], "hf", 400)
    prompt = data.encode_prompt(hf.tokenizer, data.budget_prompt(PROBLEM, budget, "exact", wording="tulu"))
    reminders = Reminders(ARGS, hf.tokenizer)
    row = {"prompt": data.budget_prompt(PROBLEM, budget, "exact", wording="tulu"), "budget": budget}
    [asked] = reminders.requests(row)
    assert asked["prompt_ids"] == prompt and asked["cap"] == min([96, *reminders.marks(budget)])
    [group] = hf.generate([prompt], 32, [asked["cap"]], 1.0, 1)
    group = [r | {"prompt_ids": prompt, **asked["tags"]} for r in group]
    reminders.complete([group], hf, 1)
    marks, seen = reminders.marks(budget), 0
    for r in group:
        ids, n = r["ids"].tolist(), len(r["ids"])
        assert n == len(r["logps"]) <= 96 and r["truncated"] == (ids[-1] not in hf.stop_ids)
        assert not r["truncated"] or n == 96
        forced = np.flatnonzero(r.get("mask", np.ones(n)) == 0).tolist()
        assert np.flatnonzero(np.isnan(r["logps"])).tolist() == forced
        end = ids.index(reminders.end[0]) if reminders.end[0] in ids else n
        # Every mark before the answer, none in it.
        assert forced == [p for p in marks if p < min(n, end + 1)]
        assert all(ids[p] == marks[p][0] for p in forced)
        seen += len(forced)
    assert bool(marks) == bool(seen)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["wait", "=3", "+4", "a"]), min_size=5, max_size=90))
def test_a_lesson_holds_the_marks_of_its_own_length(words):
    tokenizer, reminders = task.make_tokenizer(), method()
    ids = tokenizer.encode(" ".join([*words, "</think>", "3", "<eos>"]))
    out, mask = warm_start.with_marks(ids, reminders)
    assert [i for i, m in zip(out, mask, strict=True) if m] == ids
    where = [p for p, m in enumerate(mask) if not m]
    # Now and then no budget has exactly this length; then the marks are those of one a token or two longer.
    told = [reminders.marks(len(out) + more) for more in range(3)]
    end = out.index(reminders.end[0])
    assert where in [[p for p in marks if p <= end] for marks in told], (where, told)
    assert (
        warm_start.lesson({"problem": PROBLEM, "kind": "math", "ids": ids}, tokenizer, "tulu", reminders)[
            "ids"
        ].tolist()
        == out
    )


def test_two_steps_of_training(base, script, tmp_path):
    flags = "--method reminders --budgets fixed:64 --wording tulu --sampler hf --steps 2 --max-tokens 96"
    flags += " --prompts-per-step 4 --group-size 4 --limit 8 --lr 1e-4 --reward peaked_exact --advantage gdpo"
    words = ["--model", base["model"], "--data", base["data"], "--out", tmp_path / "r"]
    script("train_grpo.py", *words, *flags.split())
    for m in lines(tmp_path / "r"):
        assert m["grad_norm"] > 0 and abs(m["logp_gap"]) < 1e-3


@pytest.mark.vllm
@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="no vLLM server installed")
def test_a_served_model_is_reminded_as_in_this_process(base, tmp_path):
    hf = open_sampler(base["model"], "hf", 400)
    prompt = data.encode_prompt(hf.tokenizer, PROBLEM)
    asked = {"ids": prompt, "budget": 40, "max_tokens": 80}
    [[mine]] = Reminded(hf, hf.tokenizer).respond([asked], 1, 0.0, 1.0, 0)
    code = re.search(r"<!-- remind -->\n```python\n(.+?)```", PAGE, re.S)[1]
    with serving(base["model"], tmp_path / "log", hard_caps=False) as url:
        page: dict = {}
        code = code.replace("http://localhost:8000/v1", url).replace(
            "out/study/remind_only-0/checkpoint-30", base["model"]
        )
        exec(compile(code, "remind", "exec"), page)
        found = page["ask_reminded"](PROBLEM, 40, temperature=0.0)
    assert found == (mine["response"], mine["length"]) and "<1/8>" in mine["response"]
