"""The figures of an evaluation. First pure functions of numbers, one per metric; then samples -> figures.

Lengths and budgets are in tokens, shares run from 0 to 1, nan means "no such figure". Confidence intervals
are 95% percentile bootstraps over PROBLEMS: the responses to one problem are no independent evidence. All
that is resampled is a ratio of two sums over problems (right answers / answers, tokens / responses ...), so
one matrix product gives every figure of a resample.
"""

import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from verifier import boxed_answers

DRAWS = 1000  # bootstrap resamples
OVERTHINKING = 1000  # tokens of thinking at which a right answer is worth nothing (2508.13141)

# ---- 1. Metrics: pure functions of numbers


def length_error(length: ArrayLike, budget: ArrayLike) -> dict:
    """Mean, mean absolute and root mean square of (length - budget) / budget; one budget or one each."""
    budget = np.asarray(budget, float)
    error = (np.asarray(length, float) - budget) / budget
    # In the signed mean over- and undershoot cancel: published "3% errors" are of this kind.
    return {"signed": error.mean(), "mean_abs": np.abs(error).mean(), "rmse": np.sqrt((error**2).mean())}


def over_budget(length: ArrayLike, budget: ArrayLike) -> dict:
    """Shares longer than the budget ("hard") and longer by more than 500 tokens ("soft500"), as in L1."""
    excess = np.asarray(length) - np.asarray(budget)
    return {"hard": (excess > 0).mean(), "soft500": (excess > 500).mean()}


def within10(length: ArrayLike, budget: ArrayLike) -> dict:
    """Share of lengths at most 10% away from the budget; in integers, so that exactly 10% is inside."""
    return {"share": (10 * np.abs(np.asarray(length) - budget) <= np.asarray(budget)).mean()}


def log_linear_fit(tokens: ArrayLike, accuracy: ArrayLike) -> dict:
    """Least squares accuracy = intercept + slope * log(tokens), both bases; nan without two token counts."""
    x, y = np.log(np.asarray(tokens, float)), np.asarray(accuracy, float)
    if len(x) < 2 or np.ptp(x) == 0:
        return dict.fromkeys(("slope_ln", "slope_log10", "intercept", "r2"), math.nan)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    intercept = y.mean() - slope * x.mean()
    r2 = correlation(x, y) ** 2
    return {"slope_ln": slope, "slope_log10": slope * math.log(10), "intercept": intercept, "r2": r2}


@lru_cache(1 << 16)
def pass_one(n: int, c: int, k: int) -> float:
    """Chance that k of n samples hold at least one of the c right ones (arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> dict:
    """Unbiased pass@k, 1 - C(n-c, k) / C(n, k), of problems with c right among n samples; k <= every n."""
    each = [pass_one(ni, ci, k) for ni, ci in zip(n, c, strict=True)]
    return {"per_problem": each, "mean": sum(each) / len(each)}


def winner(answers: list) -> int | None:
    """Place of the first appearance of the most frequent answer; ties go to the first, None abstains."""
    # Counter keeps the order of first appearance and max takes the first of several.
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(max(votes, key=votes.get)) if votes else None


def majority_at_k(answers: list, correct: list, k: int) -> float:
    """maj@k of one problem: the mean over its blocks of k samples in a row (what is left over is unused).

    `correct` is 0 or 1, the verdict of the winner's first appearance; a block without an answer is wrong.
    """
    starts = range(0, len(answers) - k + 1, k)
    won = [(at, winner(answers[at : at + k])) for at in starts]
    return sum(correct[at + i] for at, i in won if i is not None) / len(won)


def trimmed_quantiles(values: ArrayLike, probs: ArrayLike = (0.05, 0.25, 0.5, 0.75, 0.95)) -> list[float]:
    """Quantiles with linear interpolation."""
    return np.quantile(np.asarray(values, float), probs).tolist()


def standard_error(means: ArrayLike) -> float:
    """Standard error of the mean over problems (ddof 1); nan for a single problem."""
    return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def correlation(requested: ArrayLike, produced: ArrayLike) -> float:
    """Pearson correlation of requested and produced length; nan where one of them does not vary."""
    x, y = np.asarray(requested, float), np.asarray(produced, float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


# Target words: (precise range, flexible range), each open on the left and closed on the right.
RULER = {
    10: ((0, 20), (0, 20)), 30: ((20, 40), (20, 40)), 50: ((40, 60), (40, 60)), 80: ((70, 90), (60, 100)),
    150: ((130, 170), (100, 200)), 300: ((280, 320), (200, 400)), 500: ((450, 550), (400, 600)),
    700: ((630, 770), (600, 800)), ">800": ((800, math.inf), (800, math.inf)),
}  # fmt: skip


def ruler_pm_fm(target: list, count: list[int]) -> dict:
    """Ruler's precise and flexible match (arXiv 2409.18943): `count` words, regex \\w+, for `target`."""
    hits = [[int(low < n <= high) for low, high in RULER[t]] for t, n in zip(target, count, strict=True)]
    pm, fm = [h[0] for h in hits], [h[1] for h in hits]
    return {"pm": pm, "fm": fm, "pm_share": np.mean(pm), "fm_share": np.mean(fm)}


def yapscore(chars: ArrayLike, baseline: ArrayLike) -> list[int]:
    """Characters beyond the shortest sufficient answer, never below 0 (YapBench, arXiv 2601.00624)."""
    return np.maximum(0, np.asarray(chars) - np.asarray(baseline)).tolist()


def yapindex(scores: dict[str, list]) -> float:
    """Mean over the categories of the median YapScore of each."""
    return float(np.mean([np.median(values) for values in scores.values()]))


def length_controlled_winrate(len_baseline, len_model, gamma, theta, phi, psi, std) -> dict:
    """Win rates in percent under AlpacaEval's model, as it is and with its length term left out.

    P(model preferred) = sigmoid(theta + phi tanh((len_baseline - len_model) / std) + psi gamma), lengths in
    characters, gamma the difficulty of the instruction; the means are over instructions.
    """
    gap = np.tanh((np.asarray(len_baseline, float) - np.asarray(len_model, float)) / std)
    logit = theta + psi * np.asarray(gamma, float)
    raw, controlled = (1 / (1 + np.exp(-x)) for x in (logit + phi * gap, logit))
    return {"raw": 100 * raw.mean(), "lc": 100 * controlled.mean()}


def length_score(length: ArrayLike, budget: ArrayLike, at_most: ArrayLike = False) -> np.ndarray:
    """LIFEBench's length score (2505.16234), from 0 to 100, of each response.

    With d = (length - budget) / budget: 100 exp(5 d) below the budget and 100 exp(-2 d) above it; where the
    budget is only the most ("at most"), 100 below it.
    """
    # d is the paper's fraction; the authors' published script multiplies it by 100 before the exponential.
    d = (np.asarray(length, float) - np.asarray(budget, float)) / np.asarray(budget, float)
    return 100 * np.exp(np.where(d < 0, np.where(at_most, 0, 5 * d), -2 * d))


def overthinking(correct: ArrayLike, thinking: ArrayLike, limit: int = OVERTHINKING) -> np.ndarray:
    """correct * (1 - thinking / limit), from 0. Its mean is OptimalThinkingBench's AUC_OAA (2508.13141): the
    share of right answers that thought for fewer than t tokens, averaged over t from 0 to `limit`.
    """
    return np.asarray(correct, float) * (1 - np.minimum(np.asarray(thinking, float) / limit, 1))


METRICS = (length_error, over_budget, within10, log_linear_fit, pass_at_k, majority_at_k, trimmed_quantiles)
METRICS += (standard_error, correlation, ruler_pm_fm, yapscore, yapindex, length_controlled_winrate)
METRICS = {function.__name__: function for function in METRICS}  # what tests/data/golden.json calls

# ---- 2. Bootstrap over problems


def resamples(problems: int, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each problem occurs in a bootstrap draw: `draws` arrays [problems] of sum `problems`."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(rng.integers(0, problems, problems), minlength=problems)


def interval(replicas: ArrayLike) -> list[float]:
    """95% percentile interval; draws in which the figure has no meaning are left out."""
    known = np.asarray(replicas, float)
    known = known[np.isfinite(known)]
    return np.quantile(known, [0.025, 0.975]).tolist() if len(known) else [math.nan, math.nan]


def ratio(top: ArrayLike, bottom: ArrayLike) -> np.ndarray:
    """top / bottom; nan, without a warning, where nothing was counted."""
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, math.nan), where=bottom > 0)


def bootstrap(columns: dict[str, tuple], seed: int = 0) -> dict[str, np.ndarray]:
    """{name: (top [P], bottom [P])} over problems -> {name: sum(top) / sum(bottom) in every draw}."""
    top, bottom = (np.stack([pair[i] for pair in columns.values()], 1).astype(float) for i in (0, 1))
    drawn = [ratio(weights @ top, weights @ bottom) for weights in resamples(len(top), seed=seed)]
    return dict(zip(columns, np.transpose(drawn), strict=True))


# ---- 3. Samples -> table. It keeps a few numbers per sample and no text, since a file of generations may be
# larger than the memory: {data set: {"ids": {problem id: row}, "texts", "modes", "cells": {budget: columns}}}


def spoken_answer(sample: dict, think_end: str = "</think>") -> str | None:
    """What a response answers, as a text to compare, for the vote: its last box, else its last line.

    Votes compare text, not mathematics: 1/2 and 0.5 are two answers. A response that was cut off has none.
    """
    text = sample["response"].rpartition(think_end)[2].split("<think>")[0][-4000:]
    boxes = boxed_answers(text)
    text = boxes[0] if boxes else (text.strip().splitlines() or [""])[-1]
    if sample.get("kind") == "choice":
        text = (re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", text) or [""])[-1]
    text = re.sub(r"\\(?:left|right|!|,|;|text|mathrm)(?![a-z])|[\s$]|\.$", "", text).replace("dfrac", "frac")
    return text if text and sample["finish_reason"] != "length" else None


def asked_for(sample: dict) -> int | str | None:
    """Budget in tokens, or the word of an effort."""
    return sample.get("effort") or sample["budget"]


def add(table: dict, sample: dict, think_end: str = "</think>") -> None:
    """Append one sample to the table; -1 stands for what is not known."""
    new = {"ids": {}, "texts": {}, "modes": set(), "ask_by": set(), "cells": {}}
    part = table.setdefault(sample["source"], new)
    length, finish = sample["length"], sample["finish_reason"]
    answer = spoken_answer(sample, think_end) if isinstance(sample.get("response"), str) else None
    row = {
        "problem": part["ids"].setdefault(sample["id"], len(part["ids"])),
        "budget": sample["budget"],
        "at_most": sample.get("mode") == "max",
        "correct": bool(sample["correct"]),
        "length": length,
        "truncated": None if finish is None else finish == "length",
        "thinking": None if length is None else sample.get("thinking_length"),
        "answer": None if answer is None else zlib.crc32(answer.encode(errors="replace")),
    }
    cell = part["cells"].setdefault(asked_for(sample), {key: array("q") for key in row})
    for key, value in row.items():
        cell[key].append(-1 if value is None else value)
    part["texts"].setdefault(sample["id"], zlib.crc32(str(sample.get("problem")).encode()))
    part["modes"] |= {sample["mode"]} if sample.get("mode") else set()
    by_mode = "sentence" if sample.get("mode") else None
    part["ask_by"] |= {sample.get("ask_by") or sample.get("baseline") or by_mode} - {None}


# ---- 4. Table -> figures

FIGURES = ("accuracy", "mean_length", "signed_error", "abs_error", "within_10", "over_budget")
FIGURES += ("over_budget_500", "truncated", "thinking_length", "length_score", "overthinking_auc")


def label(budget: int | str | None) -> str:
    """A budget's name in results.json."""
    return "none" if budget is None else str(budget)


def in_order(cells: dict) -> dict:
    """The cells by budget, smallest first, then efforts, the run without a budget (None) last."""
    return dict(sorted(cells.items(), key=lambda x: x[0] if isinstance(x[0], int) else 2**32 + (not x[0])))


def lengths_of(part: dict) -> dict[int | None, np.ndarray]:
    """{budget: known lengths} of a data set; one without any, or an effort, has no place on a length axis."""
    found = {b: np.array(cell["length"]) for b, cell in in_order(part["cells"]).items()}
    return {b: x[x >= 0] for b, x in found.items() if (x >= 0).any() and not isinstance(b, str)}


def columns_of(cell: dict, problems: int) -> dict[str, tuple]:
    """{figure: (top [problems], bottom [problems])}: the figure is sum(top) / sum(bottom)."""
    c = {key: np.array(values) for key, values in cell.items()}
    length, known, thought, budget = c["length"], c["length"] >= 0, c["thinking"] >= 0, c["budget"]
    asked, budget = known & (budget > 0), np.maximum(budget, 1)
    error, thinking = (length - budget) / budget, np.where(thought, c["thinking"], length)
    values = {
        "accuracy": (c["correct"], np.ones_like(known)),
        "mean_length": (length, known),
        "signed_error": (error, asked),
        "abs_error": (np.abs(error), asked),
        "within_10": (10 * np.abs(length - budget) <= budget, asked),
        "over_budget": (length > budget, asked),
        "over_budget_500": (length > budget + 500, asked),
        "truncated": (c["truncated"] == 1, c["truncated"] >= 0),
        "thinking_length": (thinking, thought),
        "length_score": (length_score(length, budget, c["at_most"] == 1), asked),
        "overthinking_auc": (overthinking(c["correct"], thinking), known),
    }
    sums = {}
    for name, (value, where) in values.items():
        both = np.where(where, value, 0), where
        sums[name] = tuple(np.bincount(c["problem"], weights, problems) for weights in both)
    return sums | vote_columns(c, problems)


def vote_columns(c: dict, problems: int) -> dict[str, tuple]:
    """pass@k and maj@k for k = 1, 2, 4 ... and the fewest samples that any problem has; per problem."""
    groups = {}
    answers = [None if a < 0 else a for a in c["answer"].tolist()]
    for row, *one in zip(c["problem"].tolist(), answers, c["correct"].tolist(), strict=True):
        groups.setdefault(row, []).append(one)
    groups = {row: list(zip(*found, strict=True)) for row, found in groups.items()}
    most = min(len(right) for _, right in groups.values())
    out = {}
    for k in sorted({2**i for i in range(most.bit_length())} | {most}):
        out[f"pass@{k}"] = [pass_one(len(right), sum(right), k) for _, right in groups.values()]
        if k > 1 and any(a is not None for a in answers):
            out[f"maj@{k}"] = [majority_at_k(spoken, right, k) for spoken, right in groups.values()]
    there = np.bincount(list(groups), minlength=problems)
    return {name: (np.bincount(list(groups), each, problems), there) for name, each in out.items()}


def summarise_cell(cell: dict, problems: int, seed: int) -> tuple[dict, dict]:
    """(all figures of one cell, their bootstrap draws); nan where a figure has no meaning or is not known."""
    columns, length = columns_of(cell, problems), np.array(cell["length"])
    value = {name: float(ratio(top.sum(), bottom.sum())) for name, (top, bottom) in columns.items()}
    right, n = columns["accuracy"]
    out = {"n": len(cell["correct"]), "problems": int((n > 0).sum())}
    out |= {name: value[name] for name in FIGURES}
    out["accuracy_stderr"] = standard_error((right / np.maximum(n, 1))[n > 0])
    for kind in ("pass", "maj"):
        found = {name.partition("@")[2]: v for name, v in value.items() if name.startswith(f"{kind}@")}
        out |= {f"{kind}_at_k": found} if found else {}
    out["median_length"] = np.median(length[length >= 0]) if (length >= 0).any() else math.nan
    drawn = bootstrap(columns, seed) if out["problems"] > 1 else {}
    intervals = {name: interval(x) for name, x in drawn.items()}
    out |= {"ci": {k: ends for k, ends in intervals.items() if np.isfinite(ends).all()}} if drawn else {}
    return out, drawn


def mean_of(both: list[tuple[dict, dict]]) -> dict:
    """Means over (figures, draws) of cells, each weighing the same; nan where one of them lacks a figure."""
    # A budget of which more samples were saved must not outvote the rest.
    out = {key: np.mean([c[key] for c, _ in both]) if both else math.nan for key in FIGURES}
    if both and all(drawn for _, drawn in both):
        means = {key: np.mean([d[key] for _, d in both], 0) for key in FIGURES if np.isfinite(out[key])}
        out["ci"] = {key: interval(x) for key, x in means.items()}
    return out


def summarise(table: dict, seed: int = 0) -> tuple[dict, dict]:
    """({data set: {"budgets": {"512": figures, "none": figures}, ...}}, {data set: {"512": draws}})."""
    datasets, draws = {}, {}
    for at, (name, part) in enumerate(table.items()):
        cells, problems = in_order(part["cells"]), len(part["ids"])
        # One seed for all budgets of a set: their draws hold the same problems, so differences are paired.
        both = {b: summarise_cell(cell, problems, seed + at) for b, cell in cells.items()}
        asked = [b for b in cells if isinstance(b, int)]
        pairs = [(b, n) for b, lengths in lengths_of(part).items() if b for n in lengths.tolist()]
        # Lengths above 0 have a logarithm; the comparison is false for nan as well.
        curve = [figures for b, (figures, _) in both.items() if b in asked and figures["mean_length"] > 0]
        points = [[figures[key] for figures in curve] for key in ("mean_length", "accuracy")]
        datasets[name] = {
            "mode": " and ".join(sorted(part["modes"])) or None,
            "ask_by": " and ".join(sorted(part["ask_by"])) or None,
            "problems": problems,
            "budgets": {label(b): figures for b, (figures, _) in both.items()},
            "mean": mean_of([both[b] for b in asked]),
            "correlation": correlation(*zip(*pairs, strict=True)) if pairs else math.nan,
            "accuracy_by_log_length": log_linear_fit(*points),
        }
        draws[name] = {label(b): drawn for b, (_, drawn) in both.items()}
    return datasets, draws


def mean_over_sets(datasets: dict, draws: dict) -> dict:
    """{"512": means over the data sets}, for the budgets that all of them have; {} for a single set."""
    out = {}
    for budget in next(iter(draws.values())) if len(datasets) > 1 else ():
        if all(budget in d for d in draws.values()):
            cells = [part["budgets"][budget] for part in datasets.values()]
            both = list(zip(cells, [d[budget] for d in draws.values()], strict=True))
            out[budget] = mean_of(both) | {"n": sum(cell["n"] for cell in cells)}
    return out


def jsonable(value: object) -> object:
    """The same value for json: numpy scalars become Python numbers, nan and infinity become null."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
