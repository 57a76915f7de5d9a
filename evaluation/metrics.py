"""The figures of an evaluation. First pure functions of numbers, one per metric; then samples -> figures.

Lengths and budgets are in tokens unless a name says otherwise, shares run from 0 to 1, nan means "no such
figure". Confidence intervals are 95% percentile bootstraps over PROBLEMS: the responses to one problem are
no independent evidence. All that is resampled is a ratio of two sums over problems (right answers / answers,
tokens / responses ...), so one matrix product gives every figure of every resample.
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

QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]
DRAWS = 1000  # bootstrap resamples; fewer for more than 20,000 problems
CROWD = 16  # pictures and tables of more budgets than this show groups of them
EXCEED = 4000  # tokens: the limit of GDPO's "Exceed" (2601.05242)
OVERTHINKING = 1000  # tokens of thinking at which a right answer is worth nothing (2508.13141)
# Words that mark reasoning, by group. The L1 paper has these groups and "Alternatively"; its lists stand in a
# figure's image only, so the rest is a stand-in: compare models with each other, not with its numbers.
PATTERNS = {
    "self_correction": "wait,hold on,let me check,verify,actually,mistake,recheck,hmm,not sure,but,however",
    "exploration": "alternatively,another,maybe,perhaps,what if,try",
    "context": "given,we have,let,suppose,recall,first",
    "conclusion": "therefore,thus,so,hence,final answer,conclude,in summary",
}
PATTERN = "|".join(f"(?P<{k}>{'|'.join(v.split(','))})" for k, v in PATTERNS.items())
PATTERN = re.compile(rf"\b(?:{PATTERN})\b")

# ------------------------------------------------------------------------------------------------------------
# 1. Metrics: pure functions of numbers


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
    total = ((y - y.mean()) ** 2).sum()
    r2 = 1 - ((y - intercept - slope * x) ** 2).sum() / total if total else math.nan
    return {"slope_ln": slope, "slope_log10": slope * math.log(10), "intercept": intercept, "r2": r2}


def area_under_curve(
    tokens: ArrayLike, accuracy: ArrayLike, low: float | None = None, high: float | None = None
) -> dict:
    """Mean height of the accuracy-length curve over the LOGARITHM of the tokens from `low` to `high`.

    Points are joined by straight lines; the ends default to the shortest and the longest point. An area in
    [0, 1] that does not grow with the range; models are compared over a range that all of them reach.
    """
    order = np.argsort(tokens, kind="stable")
    x, y = np.log(np.asarray(tokens, float)[order]), np.asarray(accuracy, float)[order]
    ends = math.log(low) if low else x[0], math.log(high) if high else x[-1]
    if not x[0] - 1e-9 <= ends[0] < ends[1] <= x[-1] + 1e-9:
        return {"area": math.nan, "low": math.nan, "high": math.nan}
    inside = x[(x > ends[0]) & (x < ends[1])]
    at = np.concatenate([ends[:1], inside, ends[1:]])
    area = np.trapezoid(np.interp(at, x, y), at) / (ends[1] - ends[0])
    return {"area": area, "low": math.exp(ends[0]), "high": math.exp(ends[1])}


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


def trimmed_quantiles(values: ArrayLike, probs: ArrayLike = QUANTILES) -> list[float]:
    """Quantiles with linear interpolation; the outer two of the default are where the violins are cut."""
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


def castillo(lengths: ArrayLike) -> dict:
    """Statistics of the lengths of one prompt's responses, as CASTILLO stores them (arXiv 2505.16881).

    Its kind of standard deviation is not stated; here the population's (divided by n).
    """
    x = np.asarray(lengths, float)
    names, at = ("p25", "median", "p75", "p99"), [0.25, 0.5, 0.75, 0.99]
    quantiles = dict(zip(names, np.quantile(x, at), strict=True))
    return {"mean": x.mean(), "std": x.std(), **quantiles, "shortest": x.min(), "longest": x.max()}


def pattern_counts(text: str) -> list[int]:
    """How often each group of PATTERNS occurs in a text, whole words, in any case."""
    # Found in lower case: a search that ignores case takes four times as long.
    found = Counter(match.lastgroup for match in PATTERN.finditer(text.lower()))
    return [found[group] for group in PATTERNS]


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


def length_controlled_winrate(
    len_baseline: ArrayLike, len_model: ArrayLike, gamma: ArrayLike,
    theta: float, phi: float, psi: float, std: float,
) -> dict:  # fmt: skip
    """Win rates in percent under AlpacaEval's model, as it is and with its length term left out.

    P(model preferred) = sigmoid(theta + phi tanh((len_baseline - len_model) / std) + psi gamma), lengths in
    characters, gamma the difficulty of the instruction; the means are over instructions.
    """
    gap = np.tanh((np.asarray(len_baseline, float) - np.asarray(len_model, float)) / std)
    logit = theta + psi * np.asarray(gamma, float)
    raw, controlled = (1 / (1 + np.exp(-x)) for x in (logit + phi * gap, logit))
    return {"raw": 100 * raw.mean(), "lc": 100 * controlled.mean()}


def length_score(length: ArrayLike, budget: ArrayLike, mode: str = "exact") -> dict:
    """LIFEBench's (2505.16234) length deviation in percent and length score from 0 to 100, means of both.

    With d = (length - budget) / budget the score is 100 exp(5 d) below the budget and 100 exp(-2 d) above it;
    mode "max" ("at most"): 100 up to the budget. The deviation is absolute for "exact", signed for "max".
    """
    # d is the paper's fraction; the authors' published script multiplies it by 100 before the exponential.
    d = (np.asarray(length, float) - np.asarray(budget, float)) / np.asarray(budget, float)
    score = 100 * np.exp(np.where(d < 0, 0 if mode == "max" else 5 * d, -2 * d))
    return {"deviation": 100 * (d if mode == "max" else np.abs(d)).mean(), "score": score.mean()}


def overthinking_auc(correct: ArrayLike, thinking: ArrayLike, limit: int = OVERTHINKING) -> dict:
    """OptimalThinkingBench's AUC_OAA (2508.13141): the share of right answers that thought for fewer than t
    tokens, averaged over t from 0 to `limit`; that is, the mean of correct * (1 - thinking / limit), from 0.
    """
    left = 1 - np.minimum(np.asarray(thinking, float) / limit, 1)
    return {"auc": (np.asarray(correct, float) * left).mean()}


METRICS = (length_error, over_budget, within10, log_linear_fit, area_under_curve, pass_at_k, majority_at_k)
METRICS += (trimmed_quantiles, standard_error, correlation, castillo, ruler_pm_fm, yapscore, yapindex)
METRICS += (length_controlled_winrate, length_score, overthinking_auc)
METRICS = {function.__name__: function for function in METRICS}

# ------------------------------------------------------------------------------------------------------------
# 2. Bootstrap over problems


def resamples(problems: int, draws: int | None = None, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each problem occurs in each bootstrap draw: float32 blocks [some draws, problems]."""
    rng = np.random.default_rng(seed)
    draws = draws or int(np.clip(2e7 / problems, 100, DRAWS))
    block = max(1, 2**24 // problems)  # 64 MB: a set of a million problems must fit, too
    for at in range(0, draws, block):
        rows = min(block, draws - at)
        drawn = rng.integers(0, problems, (rows, problems), dtype=np.int32)
        drawn = drawn + np.arange(rows)[:, None] * problems
        yield np.bincount(drawn.ravel(), minlength=rows * problems).reshape(rows, -1).astype(np.float32)


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
    names = list(columns)
    top, bottom = (np.stack([columns[name][i] for name in names], 1).astype(np.float32) for i in (0, 1))
    drawn = [ratio(weights @ top, weights @ bottom) for weights in resamples(len(top), seed=seed)]
    return dict(zip(names, np.concatenate(drawn).T, strict=True))


# ------------------------------------------------------------------------------------------------------------
# 3. Samples -> table. It keeps a few numbers per sample and no text, since a file of generations may be
# larger than the memory: {data set: {"ids": {problem id: row}, "texts", "modes", "cells": {budget: columns}}}

NUMBERS = ("problem", "budget", "at_most", "correct", "length", "truncated", "thinking", "answer", *PATTERNS)


def new_cell() -> dict:
    """Empty columns of the samples at one budget; -1 stands for "not known"."""
    return {key: array("q" if key == "answer" else "i") for key in NUMBERS}


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


def add(table: dict, sample: dict, think_end: str = "</think>") -> None:
    """Append one sample to the table."""
    empty = {"ids": {}, "texts": {}, "modes": set(), "cells": {}}
    part = table.setdefault(sample["source"], empty)
    budget, length, finish = sample["budget"], sample["length"], sample["finish_reason"]
    text, thinking = sample.get("response"), sample.get("thinking_length")
    cell = part["cells"].setdefault(budget, new_cell())
    part["texts"].setdefault(sample["id"], zlib.crc32(str(sample.get("problem")).encode()))
    cell["problem"].append(part["ids"].setdefault(sample["id"], len(part["ids"])))
    cell["correct"].append(bool(sample["correct"]))
    # The budget stands in every row, too: groups of many budgets are drawn as one (see pool).
    cell["budget"].append(-1 if budget is None else budget)
    cell["at_most"].append(sample.get("mode") == "max")
    cell["length"].append(-1 if length is None else length)
    cell["truncated"].append(-1 if finish is None else finish == "length")
    cell["thinking"].append(-1 if thinking is None or length is None else thinking)
    known = isinstance(text, str)
    answer = spoken_answer(sample, think_end) if known else None
    cell["answer"].append(-1 if answer is None else zlib.crc32(answer.encode(errors="replace")))
    # A rate is per token: without a length a count of words says nothing.
    for key, n in zip(PATTERNS, pattern_counts(text) if known and length else [-1] * 4, strict=True):
        cell[key].append(n)
    if sample.get("mode"):
        part["modes"].add(sample["mode"])


# ------------------------------------------------------------------------------------------------------------
# 4. Table -> figures


def known_lengths(cell: dict) -> np.ndarray:
    """Lengths (tokens) of the samples whose length is known."""
    length = np.array(cell["length"])
    return length[length >= 0]


def columns_of(cell: dict, problems: int) -> dict[str, tuple]:
    """{figure: (top [problems], bottom [problems])}: the figure is sum(top) / sum(bottom)."""
    c = {key: np.array(cell[key]) for key in NUMBERS}
    length, budget, known = c["length"], c["budget"], c["length"] >= 0
    asked, error = known & (budget > 0), (length - budget) / np.maximum(budget, 1)

    def sums(values, where):
        count = np.bincount(c["problem"][where], minlength=problems)
        return np.bincount(c["problem"], np.where(where, values, 0), problems), count

    out = {"accuracy": sums(c["correct"], known | True), "mean_length": sums(length, known)}
    out |= {"signed_error": sums(error, asked), "abs_error": sums(np.abs(error), asked)}
    out |= {"rmse": sums(error**2, asked), "within_10": sums(10 * np.abs(length - budget) <= budget, asked)}
    out |= {"over_budget": sums(length > budget, asked)}
    out |= {"over_budget_500": sums(length > budget + 500, asked), "exceed": sums(length > EXCEED, known)}
    out |= {"truncated": sums(c["truncated"] == 1, c["truncated"] >= 0)}
    thought = c["thinking"] >= 0
    out |= {"thinking_length": sums(c["thinking"], thought)}
    out |= {"solution_length": sums(length - c["thinking"], thought)}
    rises = np.where(c["at_most"] == 1, 0, 5 * error)
    out |= {"length_score": sums(100 * np.exp(np.where(error < 0, rises, -2 * error)), asked)}
    spent = np.minimum(np.where(thought, c["thinking"], length) / OVERTHINKING, 1)
    out |= {"overthinking_auc": sums(c["correct"] * (1 - spent), known)}
    for key in PATTERNS:
        where = c[key] >= 0
        out[key] = 1000 * sums(c[key], where)[0], sums(length, where)[0]
    return out | vote_columns(c, problems)


def vote_columns(c: dict, problems: int) -> dict[str, tuple]:
    """pass@k and maj@k for k = 1, 2, 4 ... and the fewest samples that any problem has; per problem."""
    present, row, n = np.unique(c["problem"], return_inverse=True, return_counts=True)
    right, most = np.bincount(row, c["correct"]).astype(int), int(n.min())
    order = np.argsort(row, kind="stable")
    answers = [a if a >= 0 else None for a in c["answer"][order].tolist()]
    correct, ends = c["correct"][order].tolist(), np.cumsum(n).tolist()
    out, one = {}, np.bincount(present, minlength=problems)

    def spread(values):
        return np.bincount(present, values, problems), one

    for k in sorted({2**i for i in range(most.bit_length())} | {most}):
        counts = zip(n.tolist(), right.tolist(), strict=True)
        out[f"pass@{k}"] = spread([pass_one(a, b, k) for a, b in counts])
        if (c["answer"] >= 0).any() and k > 1:
            pairs = zip([0, *ends], ends, strict=False)
            out[f"maj@{k}"] = spread([majority_at_k(answers[a:b], correct[a:b], k) for a, b in pairs])
    return out


def by_problem(cell: dict) -> dict[int, np.ndarray]:
    """The known lengths of one cell, problem by problem."""
    length, problem = np.array(cell["length"]), np.array(cell["problem"])
    keep = np.argsort(problem, kind="stable")
    keep = keep[length[keep] >= 0]
    if not len(keep):
        return {}
    rows, starts = np.unique(problem[keep], return_index=True)
    return dict(zip(rows.tolist(), np.split(length[keep], starts[1:]), strict=True))


def quantile_replicas(cell: dict, problems: int, seed: int) -> dict[str, np.ndarray]:
    """Median, 5% and 95% quantile of the lengths in 200 draws, to the nearest of 256 quantiles of all."""
    length = known_lengths(cell)
    grid = np.unique(np.quantile(length, np.linspace(0, 1, 256)))
    problem = np.array(cell["problem"])[np.array(cell["length"]) >= 0]
    flat = problem * len(grid) + np.minimum(np.searchsorted(grid, length), len(grid) - 1)
    counts = np.bincount(flat, minlength=problems * len(grid)).reshape(problems, -1).astype(np.float32)
    # Another seed than the other figures': 200 draws of their own, so that these stay cheap.
    drawn = np.concatenate([w @ counts for w in resamples(problems, 200, seed)]).cumsum(1)
    shares = ratio(drawn, drawn[:, -1:])
    names = {"median_length": 0.5, "length_q05": 0.05, "length_q95": 0.95}
    return {name: grid[np.argmax(shares >= q - 1e-6, 1)] for name, q in names.items()}


FIGURES = ("accuracy", "mean_length", "signed_error", "abs_error", "rmse", "within_10", "over_budget")
FIGURES += ("over_budget_500", "exceed", "truncated", "thinking_length", "solution_length")
FIGURES += ("length_score", "overthinking_auc")


def summarise_cell(cell: dict, problems: int, seed: int | None = None) -> tuple:
    """(all figures of one cell, their bootstrap draws); nan where a figure has no meaning or is not known."""
    columns = columns_of(cell, problems)
    value = {name: float(ratio(top.sum(), bottom.sum())) for name, (top, bottom) in columns.items()}
    value["rmse"] = math.sqrt(value["rmse"])
    right, n = columns["accuracy"]
    length, groups = known_lengths(cell), by_problem(cell)
    out = {"n": len(cell["correct"]), "problems": int((n > 0).sum())}
    out |= {name: value[name] for name in FIGURES}
    out["accuracy_stderr"] = standard_error((right / np.maximum(n, 1))[n > 0])
    for kind in ("pass", "maj"):
        found = {name[len(kind) + 1 :]: v for name, v in value.items() if name.startswith(f"{kind}@")}
        out |= {f"{kind}_at_k": found} if found else {}
    out |= dict.fromkeys(("median_length", "length_std", "length_quantiles"), math.nan)
    if len(length):
        out |= {"median_length": np.median(length), "length_std": length.std()}
        out["length_quantiles"] = dict(zip(map(str, QUANTILES), trimmed_quantiles(length), strict=True))
    if any(np.isfinite(value[key]) for key in PATTERNS):
        out["patterns"] = {key: value[key] for key in PATTERNS}  # per 1,000 tokens
    each = [castillo(x) for x in groups.values() if len(x) > 1] if len(groups) < len(length) else []
    if each:  # what one prompt's lengths look like, on average over the prompts
        out["per_prompt"] = {key: np.mean([e[key] for e in each]) for key in ("std", "shortest", "longest")}
        out["per_prompt"]["cv"] = np.mean([e["std"] / e["mean"] for e in each if e["mean"]] or [math.nan])
    drawn = {}
    if seed is not None and out["problems"] > 1:
        drawn = bootstrap(columns, seed)
        drawn["rmse"] = np.sqrt(drawn["rmse"])
        quantiles = quantile_replicas(cell, problems, seed) if len(length) else {}
        intervals = {name: interval(x) for name, x in (drawn | quantiles).items()}
        out["ci"] = {name: ends for name, ends in intervals.items() if np.isfinite(ends).all()}
    return out, drawn


def mean_of(cells: list[dict], drawn: list[dict] = ()) -> dict:
    """Means over cells, each weighing the same; nan where one of them has no such figure."""
    # A budget of which more samples were saved must not outvote the rest.
    out = {key: np.mean([cell[key] for cell in cells]) if cells else math.nan for key in FIGURES}
    if drawn and all(drawn):
        with np.errstate(invalid="ignore"):
            replicas = {key: np.mean([d[key] for d in drawn], 0) for key in FIGURES if np.isfinite(out[key])}
        out["ci"] = {key: interval(x) for key, x in replicas.items()}
    return out


def in_order(cells: dict) -> dict:
    """The cells by budget, smallest first, the run without a budget (None) last."""
    return dict(sorted(cells.items(), key=lambda item: item[0] or math.inf))


def pool(cells: dict) -> dict:
    """The cells that are shown: many budgets (a uniform draw) become ten groups, each at its median."""
    asked = sorted(b for b in cells if b is not None)
    if len(asked) <= CROWD:
        return in_order(cells)
    pooled = {None: cells[None]} if None in cells else {}
    for group in np.array_split(asked, 10):
        cell = pooled[int(np.median(group))] = new_cell()
        for budget in group.tolist():
            for key in cell:
                cell[key].extend(cells[budget][key])
    return in_order(pooled)


def control(cells: dict, problems: int, seed: int) -> tuple[float, list[float]]:
    """(correlation of requested and produced length over all samples, its interval)."""
    asked = [b for b in cells if b is not None]
    produced = [np.array(cells[b]["length"]) for b in asked]
    problem = [np.array(cells[b]["problem"]) for b in asked]
    requested = [np.full(len(y), b) for y, b in zip(produced, asked, strict=True)]
    x, y, row = (np.concatenate(v) if v else np.zeros(0, int) for v in (requested, produced, problem))
    x, y, row = (v[y >= 0] for v in (x, y, row))
    value = correlation(x, y)
    if math.isnan(value) or problems < 2:
        return value, [math.nan, math.nan]
    # Centred and scaled first: these sums are taken in single precision.
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    moments = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    count = np.bincount(row, minlength=problems)
    m = bootstrap({key: (np.bincount(row, v, problems), count) for key, v in moments.items()}, seed)
    spread = np.sqrt(np.maximum((m["xx"] - m["x"] ** 2) * (m["yy"] - m["y"] ** 2), 0))
    return value, interval(ratio(m["xy"] - m["x"] * m["y"], spread))


def curve(points: list[tuple], drawn: list[dict] = ()) -> dict:
    """Slope, R^2 and area of accuracy against log length; `points`: (mean length, accuracy) per budget."""
    tokens, accuracy = zip(*points, strict=True) if points else ((), ())
    out = log_linear_fit(tokens, accuracy)
    out |= area_under_curve(tokens, accuracy) if len(points) > 1 else {"area": math.nan}
    if len(points) > 1 and all(drawn):
        draws = zip(*([zip(d["mean_length"], d["accuracy"], strict=True) for d in drawn]), strict=True)
        fits = [zip(*draw, strict=True) for draw in draws]
        fits = [(x, y) for x, y in fits if min(x) > 0]
        slopes = [log_linear_fit(x, y) for x, y in fits]
        out["ci"] = {key: interval([s[key] for s in slopes]) for key in ("slope_ln", "slope_log10", "r2")}
        out["ci"]["area"] = interval([area_under_curve(x, y)["area"] for x, y in fits])
    return out


def summarise(table: dict, trained: list[int] | None = None, seed: int = 0) -> tuple[dict, dict]:
    """({data set: {"budgets": {"512": figures, "none": figures}, "mean", ...}}, {data set: {budget: draws}}).

    Budgets beyond 64 (a uniform draw) get no intervals of their own.
    """
    datasets, draws = {}, {}
    for at, (name, part) in enumerate(table.items()):
        cells, problems = in_order(part["cells"]), len(part["ids"])
        # One seed for all budgets of a set: their draws hold the same problems, so differences are paired.
        own = seed + at if len(cells) <= 64 else None
        both = {b: summarise_cell(cell, problems, own) for b, cell in cells.items()}
        figures, drawn = ({b: pair[i] for b, pair in both.items()} for i in (0, 1))
        asked = [b for b in cells if b is not None]
        known = [b for b in asked if b in (trained or [])]
        # Lengths above 0 have a logarithm; the comparison is false for nan as well.
        on_curve = [b for b in asked if figures[b]["mean_length"] > 0]
        points = [(figures[b]["mean_length"], figures[b]["accuracy"]) for b in on_curve]
        value, ends = control(cells, problems, seed + at)
        datasets[name] = {
            "mode": " and ".join(sorted(part["modes"])) or None,
            "budgets": {"none" if b is None else str(b): c for b, c in figures.items()},
            "mean": mean_of([figures[b] for b in asked], [drawn[b] for b in asked]),
            "mean_trained": mean_of([figures[b] for b in known], [drawn[b] for b in known]),
            "correlation": value,
            "correlation_ci": ends,
            "accuracy_by_log_length": curve(points, [drawn[b] for b in on_curve]),
        }
        draws[name] = drawn
    return datasets, draws


def mean_over_sets(datasets: dict, draws: dict) -> dict:
    """{"512": means over the data sets}, for the budgets that all of them have; {} for a single set."""
    out = {}
    for budget in next(iter(draws.values())) if len(datasets) > 1 else ():
        if all(budget in d for d in draws.values()):
            key = "none" if budget is None else str(budget)
            cells = [part["budgets"][key] for part in datasets.values()]
            # Large sets have fewer draws: as many are taken of each as the shortest has.
            least = min(len(d[budget].get("accuracy", ())) for d in draws.values())
            rows = [{k: v[:least] for k, v in d[budget].items()} for d in draws.values()]
            out[key] = mean_of(cells, rows) | {"n": sum(cell["n"] for cell in cells)}
    return out


def problem_records(table: dict) -> Iterator[dict]:
    """Per data set, budget and problem: the sums behind every figure and CASTILLO's length statistics.

    What a comparison pairs: {"source", "id", "text" (a checksum of the problem), "budget", "figures":
    {name: [top, bottom]}, "length": statistics}.
    """
    for name, part in table.items():
        ids = list(part["ids"])
        for budget, cell in in_order(part["cells"]).items():
            columns, groups = columns_of(cell, len(ids)), by_problem(cell)
            # Plain lists: numpy is slow element by element.
            lists = {k: (t.tolist(), b.tolist()) for k, (t, b) in columns.items()}
            for row in np.unique(np.array(cell["problem"])).tolist():
                record = {"source": name, "id": ids[row], "text": part["texts"][ids[row]], "budget": budget}
                record["figures"] = {k: [t[row], b[row]] for k, (t, b) in lists.items() if b[row]}
                many = len(groups.get(row, ())) > 1  # one length has no spread
                yield record | ({"length": castillo(groups[row])} if many else {})


def budget_buckets(budgets: list[int], most: int = 5) -> dict[str, tuple[int, int]]:
    """{name: (least, greatest)} in tokens: each budget of a few, else `most` ranges of equal width.

    Made once per run from the budgets of all its rows, so that a learning curve keeps its names.
    """
    values = sorted({int(b) for b in budgets})
    if len(values) <= most:
        return {str(v): (v, v) for v in values}
    edges = np.linspace(values[0], values[-1] + 1, most + 1).round().astype(int).tolist()
    return {f"{a}-{b - 1}": (a, b - 1) for a, b in zip(edges, edges[1:], strict=False) if a < b}


def jsonable(value: object) -> object:
    """The same value for json: numpy scalars become Python numbers, nan and infinity become null."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
