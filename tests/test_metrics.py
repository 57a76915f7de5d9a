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


def summary_of(table: dict, trained=None) -> dict:
    return metrics.jsonable(metrics.summarise(table, trained)[0])


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
    summary = summary_of(table, [16])["toy"]
    cells = summary["budgets"]
    assert list(cells) == ["16", "32", "none"]
    # Lengths 16 16 14 18 20 12; verdicts 11 10 00; the fifth response was cut off.
    expected = {"n": 6, "problems": 3, "accuracy": 0.5, "accuracy_stderr": 0.5 / math.sqrt(3)}
    # Votes of two: right where both or the first are right. Thinking 14 14 12 16 - 10, then 2 tokens.
    expected |= {"truncated": 1 / 6, "maj_at_k": {"2": 2 / 3}, "exceed": 0.0}
    # Errors 0 0 -1/8 1/8 1/4 -1/4. Right ones thought for 14, 14 and 12 of 1000 tokens.
    scores = [1, 1, math.exp(-5 / 8), math.exp(-2 / 8), math.exp(-2 / 4), math.exp(-5 / 4)]
    expected |= {"length_score": 100 * sum(scores) / 6, "overthinking_auc": (3 - 0.04) / 6}
    expected |= {"thinking_length": 13.2, "solution_length": 2.0}
    # Words: 8 8 6 10 13 2 "wait" in 96 tokens. Lengths by problem: 16 16, 14 18, 20 12.
    expected |= {"patterns": {"self_correction": 47000 / 96} | dict.fromkeys(list(metrics.PATTERNS)[1:], 0.0)}
    each = {"std": 2.0, "shortest": 14.0, "longest": 18.0, "cv": (2 / 16 + 4 / 16) / 3}
    expected |= {
        "per_prompt": each,
        "pass_at_k": {"1": 0.5, "2": 2 / 3},
        "mean_length": 16.0,
        "median_length": 16.0,
    }
    expected |= {"length_std": math.sqrt(40 / 6), "signed_error": 0.0, "abs_error": 0.125}
    expected |= {
        "rmse": math.sqrt(40 / 6) / 16,
        "within_10": 1 / 3,
        "over_budget": 1 / 3,
        "over_budget_500": 0.0,
    }
    expected["length_quantiles"] = {"0.05": 12.5, "0.25": 14.5, "0.5": 16.0, "0.75": 17.5, "0.95": 19.5}
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
    same(summary["mean_trained"]["abs_error"], 0.125)
    # Requested +-8 around 24; produced +-12 around 28, and within the first budget a variance of 40/6 more.
    same(summary["correlation"], 96 / math.sqrt(64 * (144 + 10 / 3)))
    same(summary["accuracy_by_log_length"]["slope_ln"], 0.5 / math.log(40 / 16))


def test_what_is_not_known_is_null():
    rows = [sample(budget=None, mode=None, length=None, finish_reason=None, correct=c) for c in (True, False)]
    cell = summary_of(table_of(rows))["s"]["budgets"]["none"]
    assert cell["accuracy"] == 0.5 and cell["n"] == 2 and cell["problems"] == 1
    assert cell["accuracy_stderr"] is None  # one problem
    assert cell["mean_length"] is cell["length_quantiles"] is cell["truncated"] is cell["abs_error"] is None
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
    results = summary_of(table_of(rows), [5])
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


def test_area_under_the_curve():
    # Over the logarithm: from 0.2 at 100 to 0.4 at 1000 the mean height is 0.3, whatever the order.
    same(metrics.area_under_curve([1000, 100], [0.4, 0.2]), {"area": 0.3, "low": 100.0, "high": 1000.0})
    # 0.2 up to 10 and then up to 0.6 at 100: (0.2 + 0.4) / 2; only its second half: 0.4.
    same(metrics.area_under_curve([1, 10, 100], [0.2, 0.2, 0.6])["area"], 0.3)
    same(metrics.area_under_curve([1, 10, 100], [0.2, 0.2, 0.6], 10, 100)["area"], 0.4)
    # A range that the curve does not reach has no area.
    assert math.isnan(metrics.area_under_curve([10, 100], [0, 1], 5, 50)["area"])
    assert math.isnan(metrics.area_under_curve([10, 10], [0, 1])["area"])


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


def test_castillo():
    found = metrics.castillo([100, 110, 90, 105, 95, 100, 120, 80, 100, 100])
    same(found["std"], math.sqrt(105))
    same(
        [found[k] for k in ("mean", "median", "p25", "shortest", "longest")],
        [100.0, 100.0, 96.25, 80.0, 120.0],
    )


def test_reasoning_words():
    text = "Wait, so we HAVE waited. Let me check; what if, however... In summary: so"
    # wait, let me check (not also "let"), however | what if | - | so, in summary, so. "waited" is no "wait".
    assert metrics.pattern_counts(text) == [3, 1, 1, 3]
    rows = [sample(id=0, response=text, length=100), sample(id=1, response="wait", length=300)]
    rates = summary_of(table_of(rows))["s"]["budgets"]["10"]["patterns"]
    same(rates, {"self_correction": 10.0, "exploration": 2.5, "context": 2.5, "conclusion": 7.5})


def test_exceed():
    rows = [sample(id=i, length=n) for i, n in enumerate([3999, 4000, 4001, 9000])]
    same(summary_of(table_of(rows))["s"]["budgets"]["10"]["exceed"], 0.5)


def test_length_score_of_lifebench():
    # 80, 100 and 150 for 100: 20% below costs exp(-1), 50% above costs exp(-1), a hit is 100.
    found = metrics.length_score([80, 100, 150], 100)
    same(found, {"deviation": 70 / 3, "score": (200 * math.exp(-1) + 100) / 3})
    # At most 100: what is below is no fault, and the deviations keep their signs.
    found = metrics.length_score([80, 100, 150], 100, "max")
    same(found, {"deviation": 10.0, "score": (200 + 100 * math.exp(-1)) / 3})
    for mode in ("exact", "max"):
        rows = [sample(id=i, length=n, budget=100, mode=mode) for i, n in enumerate([80, 100, 150])]
        cell = summary_of(table_of(rows))["s"]["budgets"]["100"]
        same(cell["length_score"], metrics.length_score([80, 100, 150], 100, mode)["score"])
        assert cell["ci"]["length_score"][0] < cell["length_score"] < cell["ci"]["length_score"][1]


def test_overthinking_auc_of_optimal_thinking_bench():
    # Right after 250 of 1000 tokens: 0.75; right after 1500: 0; wrong: 0. By its definition, too: the share
    # of answers that are right within t tokens, averaged over t.
    thinking, correct = [250, 1500, 10], [1, 1, 0]
    same(metrics.overthinking_auc(correct, thinking), {"auc": 0.25})
    within = [np.mean([c * (n < t) for c, n in zip(correct, thinking, strict=True)]) for t in range(1, 1001)]
    same(float(np.mean(within)), 0.25)
    rows = [sample(id=i, length=2000, thinking_length=t, correct=bool(c))
            for i, (t, c) in enumerate(zip(thinking, correct, strict=True))]  # fmt: skip
    same(summary_of(table_of(rows))["s"]["budgets"]["10"]["overthinking_auc"], 0.25)
    # Thinking that is not told apart counts whole.
    cell = summary_of(table_of([sample(length=400)]))["s"]["budgets"]["10"]
    same(cell["overthinking_auc"], 0.6)


def test_buckets_of_a_learning_curve_are_few_and_cover_the_range():
    assert metrics.budget_buckets([32, 16, 16, 64]) == {"16": (16, 16), "32": (32, 32), "64": (64, 64)}
    buckets = metrics.budget_buckets(range(100, 4001))
    assert list(buckets) == ["100-879", "880-1659", "1660-2440", "2441-3220", "3221-4000"]
    assert sum(high - low + 1 for low, high in buckets.values()) == 3901
    assert metrics.budget_buckets([1, 2, 3, 4, 5, 6]) == {
        "1-1": (1, 1), "2-2": (2, 2), "3-4": (3, 4), "5-5": (5, 5), "6-6": (6, 6)
    }  # fmt: skip
    assert metrics.budget_buckets([]) == {}


# ------------------------------------------------------------------------------------------------------------
# Intervals


def test_draws_hold_as_many_problems_as_there_are():
    blocks = list(metrics.resamples(7, 50, seed=3))
    weights = np.concatenate(blocks)
    assert weights.shape == (50, 7) and (weights.sum(1) == 7).all() and len(np.unique(weights, axis=0)) > 30
    assert (np.concatenate(list(metrics.resamples(7, 50, seed=3))) == weights).all()
    # A set of 30 million problems would not fit as one block; of 3 million five draws do at a time.
    assert next(metrics.resamples(3_000_000, 6)).shape[0] == 5


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


def test_quantile_intervals_and_correlation():
    rng = np.random.default_rng(1)
    draws = [(i, b, int(n)) for b in (100, 200) for i, n in enumerate(rng.normal(b, 20, 300))]
    rows = [sample(id=i, budget=b, length=n) for i, b, n in draws]
    found = summary_of(table_of(rows))["s"]
    # The median of 300 normal draws: +- 1.96 * 1.2533 * 20 / sqrt(300).
    low, high = found["budgets"]["100"]["ci"]["median_length"]
    assert abs((high - low) / 2 - 2.84) < 0.9 and low <= found["budgets"]["100"]["median_length"] <= high
    assert found["correlation_ci"][0] < found["correlation"] < found["correlation_ci"][1]
    assert found["correlation_ci"][1] - found["correlation_ci"][0] < 0.03
    fit = found["accuracy_by_log_length"]
    assert fit["slope_ln"] == 0 and fit["area"] == 1 and fit["ci"]["area"] == [1, 1]


def test_mean_over_sets_weighs_the_sets_alike():
    rows = [sample(source="a", id=i, correct=True, length=10) for i in range(9)]
    rows += [sample(source="b", id=i, correct=False, length=20) for i in range(3)]
    rows += [sample(source="b", id=i, budget=99, length=20) for i in range(3)]
    mean = metrics.mean_over_sets(*metrics.summarise(table_of(rows)))
    assert set(mean) == {"10"}  # the budget that both have
    same([mean["10"][k] for k in ("accuracy", "mean_length", "n")], [0.5, 15.0, 12])
    assert metrics.mean_over_sets(*metrics.summarise(table_of(rows[:9]))) == {}


def test_records_by_problem_add_up_to_the_figures():
    table = table_of(evaluate.read_samples(str(SAMPLES)))
    cells = summary_of(table)["toy"]["budgets"]
    for budget, key in ((16, "16"), (32, "32"), (None, "none")):
        records = [r for r in metrics.problem_records(table) if r["budget"] == budget]
        assert [r["id"] for r in records] == ["p0", "p1", "p2"]
        for name in ("accuracy", "mean_length", "abs_error", "truncated", "thinking_length"):
            pairs = [r["figures"][name] for r in records if name in r["figures"]]
            total = sum(t for t, _ in pairs) / sum(b for _, b in pairs) if pairs else None
            same(total, cells[key][name])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.integers(1, 12))
def test_a_vote_of_one_is_the_average_and_a_unanimous_vote_is_sure(votes, k):
    answers, right = [a for a, _ in votes], [int(a == 0) for a, _ in votes]
    assert metrics.majority_at_k(answers, right, 1) == pytest.approx(np.mean(right))
    if k <= len(votes):
        assert metrics.majority_at_k([0] * len(votes), [1] * len(votes), k) == 1
