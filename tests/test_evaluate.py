"""evaluate.py: metrics on numbers worked out by hand, then saved samples and real sampling."""

import gzip
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import toy
from data import BadInput
from sampler import load_sampler

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
SAMPLES = DATA / "samples_small.jsonl"
GOLDEN = DATA / "golden.json"
COMPARISONS = {
    "ruler_pm_fm",
    "yapscore",
    "yapindex",
    "length_controlled_winrate",
}  # need fields no sample has


def golden_metrics() -> list[dict]:
    cases = json.loads(GOLDEN.read_text())["cases"]
    return [c for c in cases if c["kind"] == "metric" and c["name"] not in COMPARISONS]


def same(got, expected, tol=1e-6) -> None:
    """Equal in structure and, number by number, within tol * max(1, |expected|)."""
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for key in expected:
            same(got[key], expected[key], tol)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            same(g, e, tol)
    elif isinstance(expected, float):
        assert got is not None and abs(got - expected) <= tol * max(1, abs(expected)), (got, expected)
    else:
        assert got == expected


def write(path: Path, rows: list) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def sample(**fields) -> dict:
    row = {
        "id": "a",
        "sample": 0,
        "source": "s",
        "problem": "1+1",
        "answer": "2",
        "kind": "math",
        "prompt": "1+1",
    }
    row |= {
        "budget": 10,
        "mode": "exact",
        "response": "2",
        "length": 9,
        "finish_reason": "stop",
        "correct": True,
    }
    return row | fields


def table_of(rows: list[dict], count: str = "response") -> dict:
    table = {}
    for row in rows:
        evaluate.add(table, row, count)
    return table


def run(*args) -> int:
    return evaluate.main([str(a) for a in args])


def read(out) -> dict:
    def refuse(text):
        raise AssertionError(f"{text} in results.json")

    return json.loads((Path(out) / "results.json").read_text(), parse_constant=refuse)


# ------------------------------------------------------------------------------------------------------------
# Metrics


def test_length_error_shows_what_the_signed_mean_hides():
    error = evaluate.length_error([1100, 900, 1300], 1000)
    same(error, {"signed": 0.1, "mean_abs": 0.5 / 3, "rmse": math.sqrt(0.11 / 3)})
    same(evaluate.length_error([5, 15], 10), {"signed": 0.0, "mean_abs": 0.5, "rmse": 0.5})
    # With one budget per sample every error is relative to its own.
    same(evaluate.length_error([5, 30], [10, 20]), {"signed": 0.0, "mean_abs": 0.5, "rmse": 0.5})


def test_shares_at_their_borders():
    same(evaluate.over_budget([1000, 1001, 1500, 1501], 1000), {"hard": 0.75, "soft500": 0.25})
    same(evaluate.within10([900, 1100, 899, 1101], 1000), {"share": 0.5})
    same(evaluate.within10([9, 11, 8], 10), {"share": 2 / 3})


def test_log_linear_fit():
    # Accuracy 0.1 at e and 0.3 at e^2: slope 0.2 a factor e, intercept -0.1, a perfect line.
    fit = evaluate.log_linear_fit([math.e, math.e**2], [0.1, 0.3])
    same(fit, {"slope_ln": 0.2, "slope_log10": 0.2 * math.log(10), "intercept": -0.1, "r2": 1.0})
    assert all(math.isnan(v) for v in evaluate.log_linear_fit([100, 100], [0.1, 0.2]).values())
    assert all(math.isnan(v) for v in evaluate.log_linear_fit([], []).values())
    flat = evaluate.log_linear_fit([10, 100], [0.5, 0.5])
    assert flat["slope_ln"] == 0 and math.isnan(flat["r2"])


def test_pass_at_k():
    # 4 samples, 1 right, 2 drawn: 1 - C(3,2)/C(4,2) = 1/2; 3 right: certain.
    same(evaluate.pass_at_k([4, 4, 4], [0, 1, 3], 2), {"per_problem": [0.0, 0.5, 1.0], "mean": 0.5})


def test_quantiles_errors_and_correlation():
    same(evaluate.trimmed_quantiles(list(range(101))), [5.0, 25.0, 50.0, 75.0, 95.0])
    same(evaluate.standard_error([1.0, 0.5, 0.0]), 0.5 / math.sqrt(3))
    same(evaluate.correlation([1, 2, 3], [2, 4, 6]), 1.0)
    same(evaluate.correlation([1, 2, 3], [1, 2, 1]), 0.0)
    assert math.isnan(evaluate.standard_error([1.0]))
    assert math.isnan(evaluate.correlation([5, 5], [1, 2])) and math.isnan(evaluate.correlation([], []))


@pytest.mark.parametrize("case", golden_metrics(), ids=lambda c: f"{c['name']} {c['note']}")
def test_golden(case):
    got = evaluate.METRICS[case["name"]](**case["batch"], **case["params"])
    same(evaluate.jsonable(got), case["expected"], case["tol"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(1, 4000))
def test_errors_are_ordered(lengths, budget):
    error, over = evaluate.length_error(lengths, budget), evaluate.over_budget(lengths, budget)
    assert abs(error["signed"]) <= error["mean_abs"] + 1e-12 <= error["rmse"] + 1e-9
    assert 0 <= over["soft500"] <= over["hard"] <= 1
    share = evaluate.within10(lengths, budget)["share"]
    assert share <= 1 and (share < 1 or error["mean_abs"] <= 0.1 + 1e-12)


# ------------------------------------------------------------------------------------------------------------
# Samples -> results


def test_summary_of_the_small_file():
    table = table_of(evaluate.read_samples(str(SAMPLES)))
    summary = evaluate.summarise(table, [16])["toy"]
    cells = summary["budgets"]
    assert list(cells) == ["16", "32", "none"]
    # Lengths 16 16 14 18 20 12; verdicts 11 10 00; the fifth response was cut off.
    expected = {
        "n": 6,
        "problems": 3,
        "accuracy": 0.5,
        "accuracy_stderr": 0.5 / math.sqrt(3),
        "truncated": 1 / 6,
    }
    expected |= {"pass_at_k": {"1": 0.5, "2": 2 / 3}, "mean_length": 16.0, "median_length": 16.0}
    expected |= {"length_std": math.sqrt(40 / 6), "signed_error": 0.0, "abs_error": 0.125}
    expected |= {
        "rmse": math.sqrt(40 / 6) / 16,
        "within_10": 1 / 3,
        "over_budget": 1 / 3,
        "over_budget_500": 0.0,
    }
    expected["length_quantiles"] = {"0.05": 12.5, "0.25": 14.5, "0.5": 16.0, "0.75": 17.5, "0.95": 19.5}
    same(cells["16"], expected)
    assert cells["32"]["accuracy"] == 1 and cells["32"]["abs_error"] == 0.25 == cells["32"]["signed_error"]
    assert cells["none"]["mean_length"] == 26 and cells["none"]["abs_error"] is None
    assert cells["none"]["over_budget"] is None and cells["none"]["within_10"] is None
    # Budgets weigh the same in the means; the run without a budget is no part of them.
    same(summary["mean"]["abs_error"], (0.125 + 0.25) / 2)
    same(summary["mean"]["accuracy"], 0.75)
    same(summary["mean_trained"]["abs_error"], 0.125)
    # Requested +-8 around 24; produced +-12 around 28, and within the first budget a variance of 40/6 more.
    same(summary["correlation"], 96 / math.sqrt(64 * (144 + 10 / 3)))
    same(summary["accuracy_by_log_length"]["slope_ln"], 0.5 / math.log(40 / 16))


def test_thinking_tokens_can_count_instead():
    rows = list(evaluate.read_samples(str(SAMPLES)))
    summary = evaluate.summarise(table_of(rows, "thinking"))["toy"]
    # Two tokens less each, but for the response that was cut off while thinking.
    same(summary["budgets"]["16"]["mean_length"], 16 - 2 * 5 / 6)
    same(summary["budgets"]["32"]["mean_length"], 38.0)


def test_what_is_not_known_is_null():
    rows = [sample(budget=None, mode=None, length=None, finish_reason=None, correct=c) for c in (True, False)]
    cell = evaluate.summarise(table_of(rows))["s"]["budgets"]["none"]
    assert cell["accuracy"] == 0.5 and cell["n"] == 2 and cell["problems"] == 1
    assert cell["accuracy_stderr"] is None  # one problem
    assert cell["mean_length"] is cell["length_quantiles"] is cell["truncated"] is cell["abs_error"] is None
    # A sample of unknown length leaves the figures of the others alone.
    rows = [sample(length=12), sample(length=None, finish_reason=None)]
    cell = evaluate.summarise(table_of(rows))["s"]["budgets"]["10"]
    same([cell["mean_length"], cell["abs_error"], cell["truncated"]], [12.0, 0.2, 0.0])


rows_strategy = st.lists(
    st.builds(
        sample,
        id=st.integers(0, 3),
        source=st.sampled_from(["a", "b"]),
        budget=st.sampled_from([None, 5, 100]),
        length=st.none() | st.integers(0, 300),
        finish_reason=st.sampled_from([None, "stop", "length"]),
        correct=st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(rows_strategy)
def test_any_samples_give_valid_json_and_the_plain_averages(rows):
    results = evaluate.summarise(table_of(rows), [5])
    json.dumps(results, allow_nan=False)
    for name in {r["source"] for r in rows}:
        for budget in {r["budget"] for r in rows if r["source"] == name}:
            own = [r for r in rows if (r["source"], r["budget"]) == (name, budget)]
            cell = results[name]["budgets"]["none" if budget is None else str(budget)]
            same(cell["accuracy"], float(np.mean([r["correct"] for r in own])))
            same(cell["pass_at_k"]["1"], float(np.mean([v for v in per_problem(own).values()])))
            lengths = [r["length"] for r in own if r["length"] is not None]
            assert (cell["mean_length"] is None) == (not lengths)
            if lengths and budget:
                same(cell["abs_error"], float(np.mean([abs(n - budget) / budget for n in lengths])))


def per_problem(rows: list[dict]) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row["correct"])
    return {key: np.mean(values) for key, values in groups.items()}


def test_reading_keeps_no_text(tmp_path):
    # 40 MB of responses: what stays in memory is a few numbers each.
    long = write(tmp_path / "long.jsonl", [sample(id=i, response="x" * 20_000) for i in range(2000)])
    tracemalloc.start()
    table = table_of(evaluate.read_samples(long))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table["s"]["cells"][10]["length"]) == 2000 and peak < 3e6


# ------------------------------------------------------------------------------------------------------------
# The command on saved samples


def test_command_rebuilds_from_samples(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "evaluate.py",
        "--samples",
        str(SAMPLES),
        "--out",
        str(out),
        "--trained-budgets",
        "16,32",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = read(out)
    assert results["trained_budgets"] == [16, 32] and results["samples"] == str(SAMPLES)
    assert results["pictures"] == ["violins.png", "accuracy.png", "error.png"]
    for name in results["pictures"]:
        image = (out / name).read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 10_000
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["16", "6", "50.0%", "28.9%", "16.0", "0.0%", "12.5%", "33.3%", "33.3%", "16.7%"] in lines
    assert str(out / "violins.png") in done.stdout
    assert sorted(os.listdir(out)) == ["accuracy.png", "error.png", "results.json", "violins.png"]


def test_gzip_and_unknown_lengths_and_several_sets(tmp_path):
    rows = [sample(id=i, source=s, budget=b) for i in range(3) for s in ("one", "two/x") for b in (10, 20)]
    rows += [sample(source="old", budget=None, mode=None, length=None, finish_reason=None)]
    path = write(tmp_path / "s.jsonl.gz", rows)
    assert run("--samples", path, "--out", tmp_path / "out") == 0
    results = read(tmp_path / "out")
    assert set(results["datasets"]) == {"one", "two/x", "old"}
    assert {f"{kind}_two_x.png" for kind in ("violins", "accuracy", "error")} <= set(results["pictures"])
    assert not any("old" in name for name in results["pictures"])  # no lengths, nothing to draw
    # An evaluation that replaces it leaves none of its pictures behind.
    assert run("--samples", SAMPLES, "--out", tmp_path / "out", "--overwrite") == 0
    assert not list((tmp_path / "out").glob("*_two_x.png"))


def test_many_budgets_are_shown_in_groups(tmp_path, capsys):
    rows = [sample(id=b, budget=b, length=b + 1) for b in range(100, 160)]
    assert run("--samples", write(tmp_path / "s.jsonl", rows), "--out", tmp_path / "out") == 0
    assert len(read(tmp_path / "out")["datasets"]["s"]["budgets"]) == 60
    shown = [line for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    assert len(shown) == 10
    pooled = evaluate.pool(table_of(rows)["s"]["cells"])
    assert sum(len(cell["length"]) for cell in pooled.values()) == 60


def test_regrade_checks_the_answers_and_keeps_the_disagreements(tmp_path):
    assert run("--samples", SAMPLES, "--regrade", "--out", tmp_path / "out") == 0
    results = read(tmp_path / "out")
    assert results["verify"]["checked"] == 18 and results["verify"]["changed"] == 1
    # The one stored verdict that is wrong: a right answer of the run without a budget.
    same(results["datasets"]["toy"]["budgets"]["none"]["accuracy"], 4 / 6)
    same(results["datasets"]["toy"]["budgets"]["16"]["accuracy"], 0.5)
    (row,) = [json.loads(line) for line in open(tmp_path / "out" / "disagreements.jsonl")]
    assert (row["id"], row["budget"], row["correct"], row["regraded"]) == ("p2", None, False, True)
    # Verdicts that are missing are made.
    rows = [sample(correct=None), sample(id="b", response=r"so \boxed{3}", correct=None)]
    assert run("--samples", write(tmp_path / "s.jsonl", rows), "--regrade", "--out", tmp_path / "new") == 0
    assert read(tmp_path / "new")["datasets"]["s"]["budgets"]["10"]["accuracy"] == 0.5


def bad_samples(tmp_path: Path) -> dict:
    def file(name, *rows):
        return write(tmp_path / name, rows)

    lengthless, textless = ({k: v for k, v in sample().items() if k != key} for key in ("length", "response"))
    nan = '{"id": 1, "source": "s", "budget": 5, "length": NaN, "finish_reason": null, "correct": true}'
    (tmp_path / "fake.jsonl.gz").write_text("not gzip")
    return {
        "no such file": ["--samples", tmp_path / "nope.jsonl"],
        "holds no samples": ["--samples", file("empty.jsonl")],
        "line 2 is no JSON": ["--samples", file("broken.jsonl", sample(), '{"id": 1')],
        "line 1: it is a list": ["--samples", file("list.jsonl", "[1]")],
        "no field length": ["--samples", file("missing.jsonl", lengthless)],
        "budget is 0": ["--samples", file("zero.jsonl", sample(budget=0))],
        "length is nan": ["--samples", file("nan.jsonl", nan)],
        "correct is None": ["--samples", file("ungraded.jsonl", sample(correct=None))],
        "no field response": ["--regrade", "--samples", file("textless.jsonl", textless)],
        "cannot be read": ["--samples", tmp_path / "fake.jsonl.gz"],
    }


def test_bad_samples_are_refused_in_one_line(tmp_path, capsys):
    for words, args in bad_samples(tmp_path).items():
        assert run(*args, "--out", tmp_path / "out") == 2, words
        error = capsys.readouterr().err
        assert error.startswith("evaluate.py: error: ") and error.count("\n") == 1 and words in error, error
        assert not (tmp_path / "out").exists(), words


BAD_FLAGS = {
    "not both or neither": [],
    "not both": ["--samples", SAMPLES, "--model", "m"],
    "leave out --data": ["--samples", SAMPLES, "--data", "toy"],
    "leave out --limit": ["--samples", SAMPLES, "--limit", "3"],
    "--regrade needs --samples": ["--model", "m", "--data", "toy", "--budgets", "8", "--regrade"],
    "--data is missing": ["--model", "m", "--budgets", "8"],
    "--budgets is missing": ["--model", "m", "--data", "toy"],
    "'abc' is no budget": ["--model", "m", "--data", "toy", "--budgets", "8,abc"],
    "'0' is no budget": ["--model", "m", "--data", "toy", "--budgets", "0"],
    "'-5' is no budget": ["--model", "m", "--data", "toy", "--budgets=-5"],
    "'' is no budget": ["--model", "m", "--data", "toy", "--budgets", "8,"],
    "--n (0)": ["--model", "m", "--data", "toy", "--budgets", "8", "--n", "0"],
    "--limit (-1)": ["--model", "m", "--data", "toy", "--budgets", "8", "--limit", "-1"],
    "--max-tokens (0)": ["--model", "m", "--data", "toy", "--budgets", "8", "--max-tokens", "0"],
    "--top-p (0.0)": ["--model", "m", "--data", "toy", "--budgets", "8", "--top-p", "0"],
    "--temperature (nan)": ["--model", "m", "--data", "toy", "--budgets", "8", "--temperature", "nan"],
    "token counts only": ["--samples", SAMPLES, "--trained-budgets", "none"],
    "names 'toy' twice": ["--model", "m", "--data", "toy,toy", "--budgets", "8"],
    "no_such_file.jsonl": ["--model", "m", "--data", "no_such_file.jsonl", "--budgets", "8"],
    "./no_model": ["--model", "./no_model", "--data", "toy", "--budgets", "8"],
}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(words, tmp_path, capsys):
    assert run(*BAD_FLAGS[words], "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: error: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_not_written_over(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--samples", SAMPLES, "--out", out) == 0
    before = (out / "results.json").read_bytes()
    assert run("--samples", SAMPLES, "--out", out) == 2
    assert "holds an evaluation" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    # Generations cost hours: figures of other samples never move in beside them.
    (out / "samples.jsonl").write_bytes(SAMPLES.read_bytes())
    assert run("--samples", SAMPLES, "--out", out, "--overwrite") == 2
    assert run("--samples", out / "samples.jsonl", "--out", out, "--overwrite") == 0
    assert (out / "samples.jsonl").read_bytes() == SAMPLES.read_bytes()
    assert run("--samples", SAMPLES, "--out", SAMPLES) == 2


def test_help_is_quick_and_loads_no_library():
    code = "import sys, evaluate\ntry: evaluate.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'matplotlib', 'math_verify') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------
# Sampling with a real model: the toy's architecture and tokenizer, random weights


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tokenizer = toy.make_tokenizer()
    toy.make_model(tokenizer, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_plan_fits_prompt_and_response_into_the_context(model_folder):
    tokenizer = toy.make_tokenizer()
    problems = toy.problems("toy", "test", 3)
    requests = list(evaluate.plan(problems, [None, 16, 300], "exact", "tulu", tokenizer, 512))
    assert [r["budget"] for r in requests] == [None] * 3 + [16] * 3 + [300] * 3
    assert "Think for 16 tokens." in requests[3]["prompt"] and "Think" not in requests[0]["prompt"]
    assert all(r["max_tokens"] == 32 for r in requests[3:6])  # twice the budget
    for r in (*requests[:3], *requests[6:]):  # 8192 and 600 give way to the context
        assert r["max_tokens"] == 512 - len(r["ids"])
    in_max = list(evaluate.plan(problems, [16], "max", "tulu", tokenizer, 512, max_tokens=50))
    assert all(r["max_tokens"] == 50 and "up to 16" in r["prompt"] for r in in_max)
    for budget, cap in ((512, None), (16, 512), (64, 32)):
        with pytest.raises(BadInput, match="context of 512|below the budget"):
            list(evaluate.plan(problems, [budget], "exact", "tulu", tokenizer, 512, cap))


def test_sampling_in_process(model_folder, tmp_path):
    sampler = load_sampler(model_folder, "hf")
    problems = toy.problems("toy", "test", 3) + toy.problems("toy_ood", "test", 2)
    lines, what = [], (sampler, problems, [None, 8, 12], "exact", 2)
    options = {"wording": "tulu", "temperature": 1.0, "top_p": 1.0, "max_tokens": 24, "log": lines.append}
    options |= {"trained_budgets": [8], "model": model_folder}
    results = evaluate.evaluate(*what, str(tmp_path / "a"), **options)
    assert results == read(tmp_path / "a") and set(results["datasets"]) == {"toy", "toy_ood"}
    assert results["versions"]["torch"] and results["sampler"] == "hf" and results["verify"]["checked"] == 30
    assert any("30/30 samples" in line for line in lines)
    rows = [json.loads(line) for line in open(tmp_path / "a" / "samples.jsonl")]
    assert len(rows) == (3 + 2) * 3 * 2
    for row in rows:
        ids = sampler.tokenizer.encode(row["response"], add_special_tokens=False)
        # The end token counts, is part of no text, and is absent where the response was cut off.
        assert row["length"] == len(ids) + (row["finish_reason"] == "stop") <= 24
        assert "<eos>" not in row["response"] and (row["mode"] == "exact") == (row["budget"] is not None)
        assert ("thinking_length" in row) == ("</think>" in row["response"])
        assert not (row["correct"] and row["finish_reason"] == "length")
    # The same seed samples the same, and the saved samples alone give the same figures and pictures.
    assert evaluate.evaluate(*what, str(tmp_path / "b"), **options) == results
    assert run("--samples", tmp_path / "a" / "samples.jsonl", "--out", tmp_path / "c") == 0
    rebuilt = read(tmp_path / "c")
    assert rebuilt.pop("samples") and rebuilt.pop("versions") and results.pop("versions")
    assert rebuilt == results
    for name in results["pictures"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_samples_are_on_disk_after_every_batch(model_folder, tmp_path, monkeypatch):
    sampler = load_sampler(model_folder, "hf")
    monkeypatch.setattr(evaluate, "BATCH", 4)
    assert run("--samples", SAMPLES, "--out", tmp_path) == 0
    path, seen = tmp_path / "samples.jsonl", []

    def log(line):
        seen.append(path.read_text().count("\n"))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        problems = toy.problems("toy", "test", 6)
        evaluate.evaluate(
            sampler, problems, [8], "exact", 2, str(tmp_path), wording="tulu", max_tokens=16, log=log
        )
    # What the folder held of an earlier evaluation does not pass for the figures of this one.
    assert seen == [4, 8] and not (tmp_path / "results.json").exists()
    assert run("--samples", path, "--out", tmp_path / "rest") == 0


def test_command_samples_a_model(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    problems = write(tmp_path / "own.jsonl", [{"problem": "add 1 2 3", "answer": "6", "source": "elsewhere"}])
    command = [
        "--model",
        model_folder,
        "--data",
        f"toy,{problems}",
        "--budgets",
        "16,8",
        "--mode",
        "max",
        "--n",
        "2",
    ]
    command += [
        "--wording",
        "tulu",
        "--sampler",
        "hf",
        "--limit",
        "2",
        "--max-tokens",
        "20",
        "--out",
        str(out),
    ]
    code = subprocess.run(
        [sys.executable, "evaluate.py", *command], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert code.returncode == 0, code.stderr
    results = read(out)
    # A set goes by the name it was asked for, whatever its rows say about their origin.
    assert (
        set(results["datasets"]) == {"toy", "own"}
        and results["mode"] == "max"
        and results["model"] == model_folder
    )
    assert list(results["datasets"]["toy"]["budgets"]) == ["8", "16"]
    assert results["datasets"]["toy"]["budgets"]["8"]["n"] == 4
    assert len(open(out / "samples.jsonl").readlines()) == (2 + 1) * 2 * 2
    # Refusals that need the model's tokenizer and context, still before its weights.
    rest = ["--model", model_folder, "--data", "toy", "--out", tmp_path / "b"]
    assert run(*rest, "--budgets", "600") == 2 and "context of 512" in capsys.readouterr().err
    assert run(*rest, "--budgets", "8", "--max-tokens", "600") == 2
    assert run(*rest, "--budgets", "64", "--max-tokens", "32") == 2
    os.remove(os.path.join(model_folder, "tokenizer.json"))
    assert run(*rest, "--budgets", "8") == 2 and "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
