"""metrics.py: every figure on numbers worked out by hand; intervals, votes and tables as properties."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import same
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from evaluation import metrics

SAMPLES = Path(__file__).parent / "data" / "samples_small.jsonl"


def sample(**fields) -> dict:
    row = {"id": "a", "sample": 0, "source": "s", "problem": "1+1", "answer": "2", "kind": "math"}
    row |= {"prompt": "1+1", "budget": 10, "mode": "exact", "response": "2", "length": 9}
    return row | {"finish_reason": "stop", "correct": True} | fields


def table_of(rows) -> dict:
    table = {}
    for row in rows:
        metrics.add(table, row)
    return table


def summary_of(table: dict) -> dict:
    return metrics.jsonable(metrics.summarise(table)[0])


# ------------------------------------------------------------------------------------------------------------
# Metrics


def test_length_error_shows_what_the_signed_mean_hides():
    error = metrics.length_error([1100, 900, 1300], 1000)
    same(error, {"signed": 0.1, "mean_abs": 0.5 / 3, "rmse": math.sqrt(0.11 / 3)})
    same(metrics.length_error([5, 15], 10), {"signed": 0.0, "mean_abs": 0.5, "rmse": 0.5})
    # With one budget per sample every error is relative to its own.
    same(metrics.length_error([5, 30], [10, 20]), {"signed": 0.0, "mean_abs": 0.5, "rmse": 0.5})


def test_shares_at_their_borders():
    same(metrics.over_budget([1000, 1001, 1500, 1501], 1000), {"hard": 0.75, "soft500": 0.25})
    same(metrics.within10([900, 1100, 899, 1101], 1000), {"share": 0.5})
    same(metrics.within10([9, 11, 8], 10), {"share": 2 / 3})


def test_log_linear_fit():
    # Accuracy 0.1 at e and 0.3 at e^2: slope 0.2 a factor e, intercept -0.1, a perfect line.
    fit = metrics.log_linear_fit([math.e, math.e**2], [0.1, 0.3])
    same(fit, {"slope_ln": 0.2, "slope_log10": 0.2 * math.log(10), "intercept": -0.1, "r2": 1.0})
    assert all(math.isnan(v) for v in metrics.log_linear_fit([100, 100], [0.1, 0.2]).values())
    assert all(math.isnan(v) for v in metrics.log_linear_fit([], []).values())
    flat = metrics.log_linear_fit([10, 100], [0.5, 0.5])
    assert flat["slope_ln"] == 0 and math.isnan(flat["r2"])


def test_pass_at_k():
    # 4 samples, 1 right, 2 drawn: 1 - C(3,2)/C(4,2) = 1/2; 3 right: certain.
    same(metrics.pass_at_k([4, 4, 4], [0, 1, 3], 2), {"per_problem": [0.0, 0.5, 1.0], "mean": 0.5})


def test_quantiles_errors_and_correlation():
    same(metrics.trimmed_quantiles(list(range(101))), [5.0, 25.0, 50.0, 75.0, 95.0])
    same(metrics.standard_error([1.0, 0.5, 0.0]), 0.5 / math.sqrt(3))
    same(metrics.correlation([1, 2, 3], [2, 4, 6]), 1.0)
    same(metrics.correlation([1, 2, 3], [1, 2, 1]), 0.0)
    assert math.isnan(metrics.standard_error([1.0]))
    assert math.isnan(metrics.correlation([5, 5], [1, 2])) and math.isnan(metrics.correlation([], []))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(1, 4000))
def test_errors_are_ordered(lengths, budget):
    error, over = metrics.length_error(lengths, budget), metrics.over_budget(lengths, budget)
    assert abs(error["signed"]) <= error["mean_abs"] + 1e-12 <= error["rmse"] + 1e-9
    assert 0 <= over["soft500"] <= over["hard"] <= 1
    share = metrics.within10(lengths, budget)["share"]
    assert share <= 1 and (share < 1 or error["mean_abs"] <= 0.1 + 1e-12)


# ------------------------------------------------------------------------------------------------------------
# Samples -> results


def test_summary_of_the_small_file():
    table = table_of(evaluate.read_samples(str(SAMPLES)))
    summary = summary_of(table)["toy"]
    cells = summary["budgets"]
    assert list(cells) == ["16", "32", "none"]
    # Lengths 16 16 14 18 20 12; verdicts 11 10 00; the fifth response was cut off.
    expected = {"n": 6, "problems": 3, "accuracy": 0.5, "accuracy_stderr": 0.5 / math.sqrt(3)}
    # Votes of two: right where both or the first are right. Thinking 14 14 12 16 - 10.
    expected |= {"truncated": 1 / 6, "maj_at_k": {"2": 2 / 3}}
    # Errors 0 0 -1/8 1/8 1/4 -1/4. Right ones thought for 14, 14 and 12 of 1000 tokens.
    scores = [1, 1, math.exp(-5 / 8), math.exp(-2 / 8), math.exp(-2 / 4), math.exp(-5 / 4)]
    expected |= {"length_score": 100 * sum(scores) / 6, "overthinking_auc": (3 - 0.04) / 6}
    expected |= {"thinking_length": 13.2, "pass_at_k": {"1": 0.5, "2": 2 / 3}, "mean_length": 16.0}
    expected |= {"median_length": 16.0, "signed_error": 0.0, "abs_error": 0.125, "within_10": 1 / 3}
    expected |= {"over_budget": 1 / 3, "over_budget_500": 0.0}
    intervals = cells["16"].pop("ci")
    same(cells["16"], expected)
    assert all(low <= high for low, high in intervals.values())
    assert intervals["accuracy"][0] == 0 and intervals["accuracy"][1] == 1  # three problems: 1, 1/2 and 0
    assert cells["32"]["accuracy"] == 1 and cells["32"]["abs_error"] == 0.25 == cells["32"]["signed_error"]
    assert cells["none"]["mean_length"] == 26 and cells["none"]["abs_error"] is None
    assert cells["none"]["over_budget"] is None and cells["none"]["within_10"] is None
    # Budgets weigh the same in the means; the run without a budget is no part of them.
    same(summary["mean"]["abs_error"], (0.125 + 0.25) / 2)
    same(summary["mean"]["accuracy"], 0.75)
    # Requested +-8 around 24; produced +-12 around 28, and within the first budget a variance of 40/6 more.
    same(summary["correlation"], 96 / math.sqrt(64 * (144 + 10 / 3)))
    same(summary["accuracy_by_log_length"]["slope_ln"], 0.5 / math.log(40 / 16))


def test_what_is_not_known_is_null():
    rows = [sample(budget=None, mode=None, length=None, finish_reason=None, correct=c) for c in (True, False)]
    cell = summary_of(table_of(rows))["s"]["budgets"]["none"]
    assert cell["accuracy"] == 0.5 and cell["n"] == 2 and cell["problems"] == 1
    assert cell["accuracy_stderr"] is None  # one problem
    assert cell["mean_length"] is cell["median_length"] is cell["truncated"] is cell["abs_error"] is None
    # A sample of unknown length leaves the figures of the others alone.
    rows = [sample(length=12), sample(length=None, finish_reason=None)]
    cell = summary_of(table_of(rows))["s"]["budgets"]["10"]
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
    results = summary_of(table_of(rows))
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


# ------------------------------------------------------------------------------------------------------------
# Further metrics


def test_majority():
    # a a b | b b a | c: blocks of 3: a wins (right), b wins (its first appearance there: wrong).
    assert metrics.majority_at_k(list("aabbbac"), [1, 1, 0, 0, 0, 1, 0], 3) == 0.5
    assert metrics.majority_at_k(["b", "a"], [0, 1], 2) == 0  # a tie: the first one
    assert metrics.majority_at_k([None, None, "a"], [0, 0, 1], 3) == 1  # two abstain
    assert metrics.majority_at_k([None, None], [0, 0], 2) == 0


def test_votes_go_by_the_answer():
    def key(response, finish="stop", kind="math"):
        return metrics.spoken_answer(sample(response=response, finish_reason=finish, kind=kind))

    assert key("x </think> so \\boxed{ 1/2 }.") == key("\\boxed{1/2}") == key("hm\n$1/2$.") == "1/2"
    assert key("\\boxed{1/2}") != key("\\boxed{0.5}")
    assert key("\\boxed{(C)}", kind="choice") == key("The answer is C.", kind="choice") == "C"
    assert key("") is key("\\boxed{1}", "length") is key("no letter here", kind="choice") is None
    ended = sample(response="\\boxed{3} [/THINK] 7")
    assert metrics.spoken_answer(ended, "[/THINK]") == "7" and metrics.spoken_answer(ended) == "3"


def test_length_score_of_lifebench():
    # 80, 100 and 150 for 100: 20% below costs exp(-1), 50% above costs exp(-1), a hit is 100.
    found = metrics.length_score([80, 100, 150], 100)
    same(found.tolist(), [100 * math.exp(-1), 100.0, 100 * math.exp(-1)])
    # At most 100: what is below is no fault.
    found = metrics.length_score([80, 100, 150], 100, True)
    same(found.tolist(), [100.0, 100.0, 100 * math.exp(-1)])
    for mode in ("exact", "max"):
        rows = [sample(id=i, length=n, budget=100, mode=mode) for i, n in enumerate([80, 100, 150])]
        cell = summary_of(table_of(rows))["s"]["budgets"]["100"]
        same(cell["length_score"], metrics.length_score([80, 100, 150], 100, mode == "max").mean())
        assert cell["ci"]["length_score"][0] < cell["length_score"] < cell["ci"]["length_score"][1]


def test_overthinking_auc_of_optimal_thinking_bench():
    # Right after 250 of 1000 tokens: 0.75; right after 1500: 0; wrong: 0. By its definition, too: the share
    # of answers that are right within t tokens, averaged over t.
    thinking, correct = [250, 1500, 10], [1, 1, 0]
    same(metrics.overthinking(correct, thinking).tolist(), [0.75, 0.0, 0.0])
    within = [np.mean([c * (n < t) for c, n in zip(correct, thinking, strict=True)]) for t in range(1, 1001)]
    same(float(np.mean(within)), 0.25)
    rows = [sample(id=i, length=2000, thinking_length=t, correct=bool(c))
            for i, (t, c) in enumerate(zip(thinking, correct, strict=True))]  # fmt: skip
    same(summary_of(table_of(rows))["s"]["budgets"]["10"]["overthinking_auc"], 0.25)
    # Thinking that is not told apart counts whole.
    cell = summary_of(table_of([sample(length=400)]))["s"]["budgets"]["10"]
    same(cell["overthinking_auc"], 0.6)


# ------------------------------------------------------------------------------------------------------------
# Intervals


def test_draws_hold_as_many_problems_as_there_are():
    weights = np.array(list(metrics.resamples(7, 50, seed=3)))
    assert weights.shape == (50, 7) and (weights.sum(1) == 7).all() and len(np.unique(weights, axis=0)) > 30
    assert (np.array(list(metrics.resamples(7, 50, seed=3))) == weights).all()


def test_interval_of_a_mean_is_the_textbook_one():
    # 400 problems, one answer each, 30% right: 0.3 +- 1.96 sqrt(0.3 * 0.7 / 400).
    right = (np.arange(400) < 120).astype(float)
    low, high = metrics.interval(metrics.bootstrap({"a": (right, np.ones(400))}, 0)["a"])
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert abs(low - (0.3 - half)) < 0.006 and abs(high - (0.3 + half)) < 0.006


def test_responses_to_one_problem_are_not_independent():
    # 16 equal responses to each of 50 problems: the interval is that of 50 problems, not of 800 answers.
    rows = [sample(id=i, sample=k, correct=i < 25, length=10) for i in range(50) for k in range(16)]
    low, high = summary_of(table_of(rows))["s"]["budgets"]["10"]["ci"]["accuracy"]
    assert 0.2 < high - low < 0.34  # 2 * 1.96 * sqrt(0.25 / 50) = 0.277; over answers it would be 0.07


def test_mean_over_sets_weighs_the_sets_alike():
    rows = [sample(source="a", id=i, correct=True, length=10) for i in range(9)]
    rows += [sample(source="b", id=i, correct=False, length=20) for i in range(3)]
    rows += [sample(source="b", id=i, budget=99, length=20) for i in range(3)]
    mean = metrics.mean_over_sets(*metrics.summarise(table_of(rows)))
    assert set(mean) == {"10"}  # the budget that both have
    same([mean["10"][k] for k in ("accuracy", "mean_length", "n")], [0.5, 15.0, 12])
    assert metrics.mean_over_sets(*metrics.summarise(table_of(rows[:9]))) == {}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.integers(1, 12))
def test_a_vote_of_one_is_the_average_and_a_unanimous_vote_is_sure(votes, k):
    answers, right = [a for a, _ in votes], [int(a == 0) for a, _ in votes]
    assert metrics.majority_at_k(answers, right, 1) == pytest.approx(np.mean(right))
    if k <= len(votes):
        assert metrics.majority_at_k([0] * len(votes), [1] * len(votes), k) == 1
