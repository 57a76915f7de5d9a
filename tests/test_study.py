"""The studies: pages say what their figures say, ideas do what they claim, runs run and go on."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import methods
import rewards
import train_grpo
from evaluation import engines
from evaluation.engines import open_sampler
from methods import reminders
from studies import ideas, study, study_report, warm_start, zoo
from toy import prepare
from verifier import check_answers

DOCS = os.path.join(ROOT, "docs")
with open(os.path.join(ROOT, "studies", "study_text.md"), encoding="utf-8") as f:
    TEXT = f.read()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy base model of 40 batches: it knows the form, not much more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.WARMUP, "batches", 40)
        patch.setattr(prepare, "CACHE", str(tmp_path_factory.mktemp("cache")))
        yield prepare.prepare(log=lambda text: None)["model"]


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """$DOCS for a study of its own."""
    monkeypatch.setattr(study_report, "RECORDS", {})
    monkeypatch.setattr(study, "DOCS", str(tmp_path / "docs"))
    os.makedirs(study.DOCS)
    return tmp_path / "docs"


@pytest.fixture
def undone(monkeypatch):
    """Puts back what an idea replaces."""
    for owner, name in ((data, "budget_prompt"), (reminders, "FORM"), (engines, "open_sampler")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(rewards, "REWARDS", rewards.Table(rewards.REWARDS))


# The page ---------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_committed_figures(monkeypatch):
    monkeypatch.setattr(study, "DOCS", DOCS)
    study_report.load()
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
    settings = r"alpha[ =_]\S+|\d{4}\.\d{4,5}|1\.[15] (times|budgets)|\+ 0\.5|0\.35M|trl==\S+"
    assert not re.findall(r"\d+\.\d+", re.sub(settings, "", own))


def test_figures_are_means_over_budgets_then_over_seeds(monkeypatch):
    cells = {"16": {"abs_error": 0.1}, "46": {"abs_error": 0.3}, "96": {"abs_error": 0.9}, "none": {}}
    other = {"16": {"abs_error": 0.2}, "46": {"abs_error": 0.6}}
    records = {("x", s): {"name": "x", "seed": s, "trained": [16, 48], "cells": {"exact": {"toy": c}}}
               for s, c in enumerate([cells, other])}  # fmt: skip
    monkeypatch.setattr(study_report, "RECORDS", records)
    assert study_report.figures("x", "abs_error") == pytest.approx([0.2, 0.4])
    assert study_report.figures("x", "abs_error", 96) == [0.9]
    assert study_report.figures("x", "abs_error", "drawn") == [
        0.1,
        0.2,
    ]  # 46 is never drawn by the default run
    assert study_report.figures("x", "abs_error", "held") == [0.3, 0.6]
    assert study_report.figures("x", "abs_error", [46, 96]) == pytest.approx([0.6, 0.6])
    assert study_report.error("x") == "30.0% ± 14.1%"  # sqrt((0.1^2 + 0.1^2) / 1)
    assert study_report.error("x", 96) == "90.0%"
    assert study_report.error("y") == "not run"


def test_a_page_of_an_unfinished_study_says_what_was_not_run(docs):
    with open(os.path.join(DOCS, "study.json")) as f:
        records = [r for r in json.load(f) if (r["name"], r["seed"]) in (("base", 0), ("exact", 0))]
    (docs / "study.json").write_text(json.dumps(records))
    study_report.main()
    assert len(records) == 2 and "not run" in (docs / "study.md").read_text()
    pictures = set(re.findall(r"\((study_\w+\.png)\)", TEXT))
    assert len(pictures) >= 4
    for name in pictures:  # all of them are drawn, and all of them are committed
        assert (docs / name).stat().st_size > 5000 and os.path.exists(os.path.join(DOCS, name))


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
    for name in ("base", "decoding", "exact", "no_sense", "max", "remind_only"):  # the headlines
        assert study.RUNS[name]["seeds"] == 3


def test_two_steps_of_a_run_and_its_record(base, docs, tmp_path, monkeypatch, script):
    """The real scripts with an idea put in; afterwards study.json says that there is nothing to do."""
    monkeypatch.chdir(ROOT)
    for name, value in {"OUT": str(tmp_path), "DOCS": str(docs), "STEPS": "2"}.items():
        monkeypatch.setattr(study, name, value)
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(study, "SAMPLED", study.SAMPLED.replace("--limit 100", "--limit 10"))
    monkeypatch.setattr(study, "ASKED", [16, 96])
    small = " --prompts-per-step 4 --group-size 4 --limit 8"
    run = study.RUNS["multiplied"] | {"flags": study.RUNS["multiplied"]["flags"] + small}
    monkeypatch.setitem(study.RUNS, "multiplied", run)
    study.run("multiplied", 0)
    [record] = json.loads((docs / "study.json").read_text())
    assert record["name"] == "multiplied" and set(record["cells"]["exact"]["toy_ood"]) == {"16", "96"}
    cell = record["cells"]["exact"]["toy"]["96"]
    assert (
        cell["n"] == 20 == sum(n for n, *_ in cell["sizes"].values()) and cell["within"] <= cell["accuracy"]
    )
    assert record["onset"] is None and "--reward multiplied" in record["flags"]
    left = script("-m", "studies.study", "names").stdout.split()
    assert "multiplied:0" not in left and "warm:0" in left


def test_cells_of_an_evaluation(tmp_path):
    """Asked for 13 in place of 16: right answers of 16 and 18 tokens, a wrong one of 12."""
    cell = {
        "n": 3,
        "accuracy": 2 / 3,
        "mean_length": 46 / 3,
        "signed_error": 0,
        "abs_error": 9,
        "over_budget": 9,
    }
    results = {"datasets": {"toy": {"budgets": {"13": cell}}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    rows = [(16, True, "add a +1 b +2"), (18, True, "add a +1 b +2 c +3"), (12, False, "add a +1 b +2")]
    responses = "a +1 =1 b =3", "a =1 b +2 =3 c +3 =6 b =3", "a +1"  # two steps of four in the head
    with open(tmp_path / "samples.jsonl", "w") as f:
        for (length, correct, problem), text in zip(rows, responses, strict=True):
            sample = {"source": "toy", "budget": 13, "length": length, "correct": correct, "problem": problem}
            f.write(json.dumps(sample | {"response": text}) + "\n")
    found = study.cells(str(tmp_path), less=3)["toy"]["16"]
    assert found["abs_error"] == pytest.approx((0 + 2 + 4) / 16 / 3, abs=1e-4)
    assert found["signed_error"] == pytest.approx((0 + 2 - 4) / 16 / 3, abs=1e-4)
    assert found["over_budget"] == 0.3333 == found["within"]  # 18 is more than 1.1 times 16
    assert found["head"] == 0.5
    assert found["sizes"] == {2: [2, 14.0, 0.5], 3: [1, 18.0, 1.0]}


def test_every_run_has_flags_that_the_trainer_knows(base, tmp_path, undone):
    import train_grpo

    ideas.multiplied()
    train_grpo.REWARDS, known = rewards.REWARDS, train_grpo.REWARDS
    try:
        for name in study.RUNS:
            words = ["--model", base, "--data", "rows.jsonl", "--out", str(tmp_path / "out")]
            args = train_grpo.parse_args([*study.flags_of(name, 1), *words])
            assert args.seed == 1 and args.steps == study.RUNS[name]["steps"] and args.sampler == "hf"
            assert args.budgets.startswith("bucket:16,")
    finally:
        train_grpo.REWARDS = known


# The ideas --------------------------------------------------------------------------------------------------


def test_reminders_only_name_no_budget(undone):
    ideas.remind(asked=False)
    assert data.budget_prompt("add", 16, "exact") == "add"


def test_a_multiplied_reward(undone):
    ideas.multiplied()
    rollouts = {"budget": [30], "length": np.array([[30, 36, 30]]), "correct": np.array([[1, 1, 0]])}
    rollouts["truncated"] = np.zeros((1, 3))
    assert rewards.REWARDS["multiplied"](rollouts)[0].tolist() == pytest.approx([1, np.exp(-1), 0])


def test_an_offset_of_all_positions_changes_nothing(base):
    """Why it is not among the ideas: rotary embeddings see distances only."""
    model, ids = open_sampler(base, "hf", 200).model, torch.arange(3, 23)[None]
    shifted = torch.arange(20)[None] + 77
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, model(ids, position_ids=shifted).logits, atol=1e-4)


@pytest.mark.parametrize("idea", [None, "remind"])
def test_a_warm_start_from_own_right_answers(idea, base, tmp_path, undone):
    out, rows = tmp_path / "m", prepare.prepare()["data"]
    small = [*study.WARM_START.split(), "--cap", "64", "--problems", "100", "--batch", "2", "--data", rows]
    assert not warm_start.main([base, str(out), *small, *(["--idea", idea] if idea else [])])
    told = json.loads((out / "warm_start.json").read_text())
    assert told["responses"] > 1 and told["steps"] == 3 * told["responses"] // 2 and told["right"]
    hf = open_sampler(str(out), "hf", 200)
    found = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    texts = [hf.tokenizer.decode(row["ids"][:-1]) for row in found]
    assert all(check_answers(texts, [row["answer"] for row in found], ["math"] * len(found))[0])
    assert max(len(row["ids"]) for row in found) <= 64
    assert told["idea"] == idea and len(hf.generate([[2, 3]], 1, [5], 1.0, 0)[0]) == 1


def test_a_lesson_has_the_gradient_of_the_likelihood(tiny):
    """Against transformers' own loss; what the update reports as the gap is its value."""
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(tiny), data.load_tokenizer(tiny)
    rows = [{"problem": "Add 2 and 2.", "kind": "math", "ids": ids} for ids in ([9, 8, 7, 2], [5, 2])]
    lessons = [warm_start.lesson(row, tokenizer, "l1") for row in rows]
    total = 0.0
    for r in lessons:
        labels = torch.tensor([[-100] * len(r["prompt_ids"]) + r["ids"].tolist()])
        ids = torch.tensor([r["prompt_ids"] + r["ids"].tolist()])
        total = total + model(input_ids=ids, labels=labels).loss * len(r["ids"]) / 6
    total.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    flags = train_grpo.build_parser().parse_args("--tis-cap 0 --dtype float32".split())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    m = train_grpo.update(model, None, optimizer, lessons, methods.Method(flags, tokenizer), flags)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    want = want / max(1.0, want.norm())  # the update's bound
    assert (before - after - want).norm() <= 1e-5 * want.norm()
    assert m["logp_gap"] == pytest.approx(total.item(), rel=1e-5)
    assert "Think for 4 tokens." in tokenizer.decode(lessons[0]["prompt_ids"])


def test_a_warm_start_sees_long_responses_more_often_than_they_are():
    """300 of 3 tokens, 100 of 20, 10 of 40: the last weigh as ten of a hundred."""
    lengths, generator = np.repeat([3, 20, 40], [300, 100, 10]), torch.Generator().manual_seed(0)
    drawn = lengths[warm_start.draw_order(lengths, 21000, generator)]
    assert [(drawn == n).sum() for n in (3, 20, 40)] == pytest.approx([10000, 10000, 1000], rel=0.1)
    assert sorted(warm_start.draw_order(np.array([3, 20, 40, 9]), 8, generator)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_warm_start_goes_on_from_what_was_sampled(base, tmp_path, script):
    """All that ended is taught, right or wrong; a second run samples nothing, and its model is the same."""
    rows, weights = prepare.prepare()["data"], []
    words = "--problems 6 --samples 2 --cap 64 --batch 4 --wording tulu --lr 1e-4".split()
    for name in ("a", "b"):
        out = tmp_path / name
        script("-m", "studies.warm_start", base, out, "--data", rows, *words)
        weights.append((out / "model.safetensors").read_bytes())
        os.makedirs(tmp_path / "b", exist_ok=True)
        shutil.copy(tmp_path / "a" / "responses.jsonl", tmp_path / "b" / "responses.jsonl")
    assert weights[0] == weights[1]
    few = ["--right", "--problems", "1", "--samples", "1"]  # the base is too young to be right at once
    wrong = script("-m", "studies.warm_start", base, tmp_path / "c", "--data", rows, *few, check=False)
    told = "no right response to 1 problems ended within --cap (160): raise it"
    assert wrong.returncode == 2 and told in wrong.stderr


# The zoo ----------------------------------------------------------------------------------------------------


def test_toy_line_is_read_like_a_shell_does():
    assert zoo.toy_flags("# A\n# toy: --a 1 'x=b c'\n--toy 2") == ["--a", "1", "x=b c"]
    with pytest.raises(ValueError, match="has 0"):
        zoo.toy_flags("# no such line")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(50, 550), st.floats(50, 350)), min_size=1, max_size=25))
def test_labels_never_overlap(points):
    boxes = zoo.place(points, [(60, 12)] * len(points), (0, 0, 600, 400))
    dots = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for i, box in enumerate(boxes):
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= 600 and box[3] <= 400
        assert not any(zoo.overlap(box, other) for other in boxes[:i] + dots)


def test_report_of_the_zoo(tmp_path, monkeypatch, capsys):
    """Two runs with figures that a reader can add up; a third, unfinished one is left out."""

    def cell(accuracy, length):
        figures = {"accuracy": accuracy, "mean_length": length, "truncated": 0.25, "abs_error": None}
        return figures | ({} if length is None else {"abs_error": 0.5})

    four = (("16", 0.5, 10), ("32", 0.7, 30), ("48", 0.9, 50), ("64", 0.9, 70))
    asked = {budget: cell(*figures) for budget, *figures in four}
    for name, before, after in (
        ("kimi", {"none": cell(0.6, 50)}, {"none": cell(0.8, 20)}),
        ("l1_exact", asked, {b: cell(0.8, int(b)) for b in (*asked, "128")}),
    ):
        for folder, cells in (("eval-0", before), ("eval", after)):
            os.makedirs(tmp_path / name / folder)
            path = tmp_path / name / folder / "results.json"
            path.write_text(json.dumps({"datasets": {"toy-test": {"budgets": cells}}}))
            sums = [
                ("a +1 b +2", 5),
                ("a +1 b +2 c +3 d +4", 7),
                (" ".join(f"{x} +1" for x in "abcdefghi"), 30),
            ]
            lines = [{"source": "toy-test", "problem": f"add {p}", "length": n} for p, n in sums]
            (tmp_path / name / folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / name / "args.json").write_text(json.dumps({"reward": name, "advantage": "grpo"}))
        (tmp_path / name / "metrics.jsonl").write_text('{"kl": 1}\n{"kl": 0.125, "reward": 3}\n')
    os.makedirs(tmp_path / "dler")
    monkeypatch.setattr(zoo, "OUT", str(tmp_path))
    monkeypatch.setattr(zoo, "STEPS", "2")
    zoo.report()
    text = (tmp_path / "zoo.md").read_text()
    assert "| **base model** |  |  | 0 | 75.0% | 40.0 (10, 30, 50, 70) | 6 | 30 | 50.0% |" in text
    assert (
        "| l1_exact | l1_exact | grpo | 2 | 80.0% | 40.0 (16, 32, 48, 64) | 6 | 30 | 50.0% | kl 0.125 |"
        in text
    )
    assert "| kimi | kimi | grpo | 2 | 80.0% | 20.0 | 6 | 30 | 25.0% | kl 0.125 |" in text
    assert "| dler" not in text
    assert [m["name"] for m in json.loads((tmp_path / "zoo.json").read_text())] == ["kimi", "l1_exact"]
    assert (tmp_path / "zoo.png").stat().st_size > 10_000
    assert "2 of" in capsys.readouterr().out


def test_the_zoo_page_is_that_of_the_committed_figures(tmp_path, monkeypatch):
    """And every run of it is one that can be repeated."""
    shutil.copy(os.path.join(DOCS, "zoo.json"), tmp_path)
    monkeypatch.setattr(zoo, "OUT", str(tmp_path))
    monkeypatch.setattr(zoo, "STEPS", "2")
    zoo.report()
    for name in ("zoo.md", "zoo.json"):
        with open(os.path.join(DOCS, name), encoding="utf-8") as f:
            assert (tmp_path / name).read_text() == f.read()
    names = [m["name"] for m in json.loads((tmp_path / "zoo.json").read_text())]
    assert names == list(zoo.runs())
