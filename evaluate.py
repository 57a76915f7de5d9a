"""Does the model think for as many tokens as it was asked to, and is it still right?

    python evaluate.py --model DIR --data math500 --budgets 512,1024,2048,3600 --n 16 --out out/eval
    python evaluate.py --samples out/eval/samples.jsonl --out out/again           no model needed

For every budget the prompt is rebuilt from the problem, n responses are sampled, checked, and appended to
samples.jsonl as they come. Then follow results.json (accuracy, signed and absolute length error, shares
within 10% and over the budget ...), a table and three pictures per data set; samples.jsonl alone is enough to
make them again. Training calls evaluate() with its own sampler. Left out: other engines, baselines.
"""

import argparse
import gzip
import importlib.metadata
import itertools
import json
import math
import os
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

import data
import plots
import rewards
import toy
from data import BadInput

QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]
BATCH = 1024  # responses sampled between two writes of samples.jsonl: what a crash can lose
OPEN_CAP = 8192  # response cap in tokens where no exact budget sets one (L1's choice)
CROWD = 16  # pictures and tables of more budgets than this show groups of them
# The fields of a sample that results need.
NEEDED = ("id", "source", "budget", "length", "finish_reason", "correct")

# ------------------------------------------------------------------------------------------------------------
# Metrics: pure functions of numbers. Lengths and budgets in tokens, shares from 0 to 1.


def length_error(length, budget) -> dict:
    """Mean, mean absolute and root mean square of (length - budget) / budget; one budget or one each."""
    budget = np.asarray(budget, float)
    error = (np.asarray(length, float) - budget) / budget
    # In the signed mean over- and undershoot cancel: published "3% errors" are of this kind.
    return {"signed": error.mean(), "mean_abs": np.abs(error).mean(), "rmse": np.sqrt((error**2).mean())}


def over_budget(length, budget) -> dict:
    """Shares longer than the budget ("hard") and longer by more than 500 tokens ("soft500"), as in L1."""
    excess = np.asarray(length) - np.asarray(budget)
    return {"hard": (excess > 0).mean(), "soft500": (excess > 500).mean()}


def within10(length, budget) -> dict:
    """Share of lengths at most 10% away from the budget; in integers, so that exactly 10% is inside."""
    return {"share": (10 * np.abs(np.asarray(length) - budget) <= np.asarray(budget)).mean()}


def log_linear_fit(tokens, accuracy) -> dict:
    """Least squares accuracy = intercept + slope * log(tokens), both bases; nan without two token counts."""
    x, y = np.log(np.asarray(tokens, float)), np.asarray(accuracy, float)
    if len(x) < 2 or np.ptp(x) == 0:
        return dict.fromkeys(("slope_ln", "slope_log10", "intercept", "r2"), math.nan)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    intercept = y.mean() - slope * x.mean()
    total = ((y - y.mean()) ** 2).sum()
    r2 = 1 - ((y - intercept - slope * x) ** 2).sum() / total if total else math.nan
    return {"slope_ln": slope, "slope_log10": slope * math.log(10), "intercept": intercept, "r2": r2}


def pass_at_k(n, c, k) -> dict:
    """Unbiased pass@k, 1 - C(n-c, k) / C(n, k), of problems with c right among n samples; k <= every n."""
    each = [1 - math.comb(ni - ci, k) / math.comb(ni, k) for ni, ci in zip(n, c, strict=True)]
    return {"per_problem": each, "mean": sum(each) / len(each)}


def trimmed_quantiles(values, probs=QUANTILES) -> list[float]:
    """Quantiles with linear interpolation; the outer two of the default are where the violins are cut."""
    return np.quantile(np.asarray(values, float), probs).tolist()


def standard_error(means) -> float:
    """Standard error of the mean over problems (ddof 1); nan for a single problem."""
    # Not over responses: those of one problem are no independent evidence.
    return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def correlation(requested, produced) -> float:
    """Pearson correlation of requested and produced length; nan where one of them does not vary."""
    x, y = np.asarray(requested, float), np.asarray(produced, float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


METRICS = (length_error, over_budget, within10, log_linear_fit, pass_at_k, trimmed_quantiles, standard_error)
METRICS = {function.__name__: function for function in (*METRICS, correlation)}

# ------------------------------------------------------------------------------------------------------------
# Samples -> table -> results. The table keeps five numbers per sample and no text, since a file of
# generations may be larger than the memory:
#     {data set: {"ids": {problem id: row}, "modes": set, "cells": {budget or None: columns}}}


def new_cell() -> dict:
    """Empty columns of the samples at one budget; -1 stands for "not known"."""
    return {key: array("q") for key in ("problem", "budget", "correct", "length", "truncated")}


def add(table: dict, sample: dict, count: str = "response") -> None:
    """Append one sample; `count` "thinking" takes the tokens up to `</think>` where they are known."""
    part = table.setdefault(sample["source"], {"ids": {}, "modes": set(), "cells": {}})
    budget, length, finish = sample["budget"], sample["length"], sample["finish_reason"]
    if count == "thinking" and sample.get("thinking_length") is not None:
        length = sample["thinking_length"]
    cell = part["cells"].setdefault(budget, new_cell())
    cell["problem"].append(part["ids"].setdefault(sample["id"], len(part["ids"])))
    cell["correct"].append(bool(sample["correct"]))
    # The budget stands in every row, too: groups of many budgets are drawn as one (see pool).
    cell["budget"].append(-1 if budget is None else budget)
    cell["length"].append(-1 if length is None else length)
    cell["truncated"].append(-1 if finish is None else finish == "length")
    if sample.get("mode"):
        part["modes"].add(sample["mode"])


def known_lengths(cell: dict) -> np.ndarray:
    """Lengths (tokens) of the samples whose length is known."""
    length = np.array(cell["length"])
    return length[length >= 0]


def summarise_cell(cell: dict) -> dict:
    """All figures of one cell; nan where a figure has no meaning or its numbers are not known."""
    problem, correct, truncated = (np.array(cell[key]) for key in ("problem", "correct", "truncated"))
    # Right answers and samples of every problem that occurs here (a problem may lack at some budgets).
    _, row, n = np.unique(problem, return_inverse=True, return_counts=True)
    right = np.bincount(row, weights=correct).astype(int)
    most = int(n.min())  # pass@k is known up to the fewest samples that any problem has
    ks = sorted({2**i for i in range(most.bit_length())} | {most})
    length, budget = known_lengths(cell), np.array(cell["budget"])[np.array(cell["length"]) >= 0]
    finished = truncated[truncated >= 0]
    out = {
        "n": len(correct),
        "problems": len(n),
        "accuracy": correct.mean(),
        "accuracy_stderr": standard_error(right / n),
        "pass_at_k": {str(k): pass_at_k(n.tolist(), right.tolist(), k)["mean"] for k in ks},
        "truncated": finished.mean() if len(finished) else math.nan,
        **dict.fromkeys(("mean_length", "median_length", "length_std", "length_quantiles"), math.nan),
        **dict.fromkeys(("signed_error", "abs_error", "rmse", "within_10"), math.nan),
        **dict.fromkeys(("over_budget", "over_budget_500"), math.nan),
    }
    if len(length):
        out |= {"mean_length": length.mean(), "median_length": np.median(length), "length_std": length.std()}
        out["length_quantiles"] = dict(zip(map(str, QUANTILES), trimmed_quantiles(length), strict=True))
    if len(length) and budget[0] > 0:
        error, over = length_error(length, budget), over_budget(length, budget)
        out |= {"signed_error": error["signed"], "abs_error": error["mean_abs"], "rmse": error["rmse"]}
        out |= {"over_budget": over["hard"], "over_budget_500": over["soft500"]}
        out["within_10"] = within10(length, budget)["share"]
    return out


def mean_of(cells: list[dict]) -> dict:
    """Means over budgets, each budget weighing the same; nan where one of them has no such figure."""
    # A budget of which more samples were saved must not outvote the rest.
    keys = ("accuracy", "mean_length", "signed_error", "abs_error", "rmse")
    keys += ("within_10", "over_budget", "over_budget_500", "truncated")
    return {key: np.mean([cell[key] for cell in cells]) if cells else math.nan for key in keys}


def jsonable(value):
    """The same value for json: numpy scalars become Python numbers, nan and infinity become null."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def summarise(table: dict, trained_budgets: list[int] | None = None) -> dict:
    """{data set: {"budgets": {"512": figures, "none": figures}, "mean", "mean_trained", ...}}, for json."""
    datasets = {}
    for name, part in table.items():
        cells = {b: summarise_cell(cell) for b, cell in in_order(part["cells"]).items()}
        asked = [b for b in cells if b is not None]
        # The correlation is over all samples with a budget, not over the means of the budgets.
        produced = [known_lengths(part["cells"][b]) for b in asked]
        requested = [np.full(len(x), b) for x, b in zip(produced, asked, strict=True)]
        # Lengths above 0 have a logarithm; the comparison is false for nan as well.
        fit = [(c["mean_length"], c["accuracy"]) for b, c in cells.items() if b and c["mean_length"] > 0]
        datasets[name] = {
            "mode": " and ".join(sorted(part["modes"])) or None,
            "budgets": {"none" if b is None else str(b): c for b, c in cells.items()},
            "mean": mean_of([cells[b] for b in asked]),
            "mean_trained": mean_of([cells[b] for b in asked if b in (trained_budgets or [])]),
            "correlation": correlation(*map(np.concatenate, (requested, produced))) if asked else None,
            "accuracy_by_log_length": log_linear_fit([x for x, _ in fit], [y for _, y in fit]),
        }
    return jsonable(datasets)


# ------------------------------------------------------------------------------------------------------------
# Reading samples


def check_sample(sample, need: tuple) -> dict:
    """The sample, token counts as int; BadInput (without the line's number) if it breaks the contract."""
    if not isinstance(sample, dict):
        raise BadInput(f"it is a {type(sample).__name__}, not an object with the fields {', '.join(need)}")
    missing = [key for key in need if key not in sample]
    if missing:
        raise BadInput(f"no field {', '.join(missing)}; a sample needs {', '.join(need)} (null: not known)")
    for key, least in (("budget", 1), ("length", 0), ("thinking_length", 0)):
        value = sample.get(key)
        if value is None:
            continue
        # nan and infinity, which Python's json reads, fail the comparison with their own whole part.
        if type(value) not in (int, float) or value != value // 1 or value < least:
            raise BadInput(f"{key} is {value!r}; it must be null or a whole number of tokens from {least}")
        sample[key] = int(value)
    if not isinstance(sample["id"], (str, int)) or not isinstance(sample["source"], str):
        raise BadInput("id must be a string or a whole number, and source a string")
    if "correct" in need and sample["correct"] not in (0, 1):
        raise BadInput(f"correct is {sample['correct']!r}, not true or false; --regrade checks it anew")
    if "response" in need and not (isinstance(sample["response"], str) and sample["answer"] is not None):
        raise BadInput("response must be a string and answer a string or a list of strings")
    if sample.get("kind") not in (None, "math", "choice"):
        raise BadInput(f"kind is {sample['kind']!r}; it must be math or choice")
    return sample


def read_samples(path: str, regrade: bool = False) -> Iterator[dict]:
    """Samples of a JSONL file, plain or gzipped, one at a time; BadInput names the line that is wrong."""
    # To be checked again, a sample needs its text and its gold answer in place of a verdict.
    need, sample = (*NEEDED[:-1], "response", "answer") if regrade else NEEDED, None
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            for at, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    sample = check_sample(json.loads(line), need)
                except BadInput as error:
                    raise BadInput(f"--samples {path}, line {at}: {error}") from None
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"--samples {path}, line {at} is no JSON ({error}): delete it") from None
                yield sample
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInput(f"--samples {path} cannot be read ({error}): give a .jsonl(.gz) file") from None
    if sample is None:
        raise BadInput(f"--samples {path} holds no samples: give a file that evaluate.py wrote")


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` items, without holding more than one of them."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


# ------------------------------------------------------------------------------------------------------------
# Sampling


def plan(
    problems: list[dict], budgets: list, mode: str, wording: str, tokenizer, context: int, max_tokens=None
) -> Iterator[dict]:
    """One request per budget and problem: {"problem", "budget", "prompt", "ids", "max_tokens"}.

    `context` and `max_tokens` in tokens; BadInput where prompt and response do not fit into the context.
    """
    largest = max((b for b in budgets if b), default=0)
    if max_tokens and largest > max_tokens and mode == "exact":
        raise BadInput(f"--max-tokens ({max_tokens}) is below the budget {largest}: raise it or leave it out")
    for budget in budgets:
        # Twice the budget leaves room to see by how much a response misses it.
        cap = max_tokens or (2 * budget if budget and mode == "exact" else max(OPEN_CAP, budget or 0))
        for problem in problems:
            asked_as = mode if budget else None
            prompt = data.budget_prompt(problem["problem"], budget, asked_as, problem["kind"], wording)
            ids = np.array(data.encode_prompt(tokenizer, prompt), np.int32)  # an eighth of a list's memory
            room = context - len(ids)
            # A default cap gives way to the context; a budget or a cap that was asked for does not.
            wanted = max(1, budget or 0, max_tokens or 0)
            if wanted > room:
                what = f"prompt {problem['id']} ({len(ids)} tokens) and a response of {wanted}"
                way_out = "lower --budgets or --max-tokens, or drop long problems"
                raise BadInput(f"{what} exceed the model's context of {context}: {way_out}")
            request = {"problem": problem, "budget": budget, "prompt": prompt, "ids": ids}
            yield request | {"max_tokens": min(cap, room)}


def to_samples(request: dict, completions: list, mode: str, tokenizer, think_end: list) -> Iterator:
    """The completions of one request as samples of the Sample contract, not yet graded."""
    problem, budget = request["problem"], request["budget"]
    for i, completion in enumerate(completions):
        ids, finish = list(completion["ids"]), completion["finish_reason"]
        # Only the end token is left out: in many tokenizers `</think>` is a special token, too.
        response = tokenizer.decode(ids[:-1] if finish == "stop" else ids, skip_special_tokens=False)
        sample = {"id": problem["id"], "sample": i, "source": problem["source"]}
        sample |= {key: problem[key] for key in ("problem", "answer", "kind")}
        sample |= {"prompt": request["prompt"], "budget": budget, "mode": mode if budget else None}
        sample |= {"response": response, "length": rewards.response_length(ids), "finish_reason": finish}
        if "</think>" in response:
            sample["thinking_length"] = rewards.response_length(ids, "thinking", think_end)
        if problem.get("choices"):
            sample["choices"] = problem["choices"]
        yield sample


def grade(samples: list[dict], require_think: bool) -> dict:
    """Set `correct` of every sample; the checker's counts (timeouts, parse failures ...).

    A response that was cut off is wrong, as in training: what stands in its middle is not checked.
    """
    whole = [s for s in samples if s["finish_reason"] != "length"]
    verdicts, counts = rewards.check_answers(
        [s["response"] for s in whole], [s["answer"] for s in whole],
        [s.get("kind") or "math" for s in whole], [s.get("choices") for s in whole], require_think,
    )  # fmt: skip
    verdicts = iter(verdicts)
    for sample in samples:
        sample["correct"] = sample["finish_reason"] != "length" and bool(next(verdicts))
    return counts | {"checked": len(samples)}


def evaluate(
    sampler, problems: list[dict], budgets: list[int | None], mode: str, n: int, out: str, *,
    wording: str = "l1", temperature: float = 0.6, top_p: float = 0.95, max_tokens: int | None = None,
    seed: int = 0, count: str = "response", require_think: bool = False,
    trained_budgets: list[int] | None = None, model: str | None = None, log: Callable = print, state=None,
) -> dict:  # fmt: skip
    """Sample n responses per problem and budget (None: no budget); samples, results and pictures go to `out`.

    Returns the results. Data sets are told apart by the problems' `source`. What `out` held is written over.
    With `state` (accelerate's PartialState) its processes share the work; the first one writes and returns.
    """
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    tokenizer, table, verify, done, start = sampler.tokenizer, {}, {}, 0, time.monotonic()
    think_end = tokenizer.encode("</think>", add_special_tokens=False)
    # The whole plan comes first: what does not fit is found before an hour of sampling, not after it.
    requests = list(plan(problems, budgets, mode, wording, tokenizer, sampler.max_model_len, max_tokens))
    if rank == 0:
        os.makedirs(out, exist_ok=True)
        clear(out)
    # A batch is sampled, checked, written and counted before the next one starts.
    with open(os.path.join(out, "samples.jsonl") if rank == 0 else os.devnull, "w", encoding="utf-8") as f:
        for at, batch in enumerate(batches(requests, max(1, BATCH // n))):
            own = batch[rank::processes]
            ids, caps = [r["ids"].tolist() for r in own], [r["max_tokens"] for r in own]
            # No two batches and no two processes draw with the same seed.
            batch_seed = (seed * 1_000_003 + at) * processes + rank
            found = sampler.generate(ids, n, caps, temperature, top_p, batch_seed) if own else []
            pairs = zip(own, found, strict=True)
            samples = [s for r, c in pairs for s in to_samples(r, c, mode, tokenizer, think_end)]
            counts = [grade(samples, require_think)]
            if processes > 1:
                samples, counts = gather(samples), gather(counts)
            verify = sum_counts([verify, *counts])
            for sample in samples:
                f.write(json.dumps(sample, ensure_ascii=False) + "\n")
                add(table, sample, count)
            f.flush()
            done += len(samples)
            log(f"evaluate: {done}/{len(requests) * n} samples, {time.monotonic() - start:.0f} s")
    about = {"model": model, "mode": mode, "wording": wording, "trained_budgets": trained_budgets}
    about |= {"seed": seed, "n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    about |= {"sampler": sampler.name, "count": count, "require_think": require_think, "verify": verify}
    return finish(table, about, out, log) if rank == 0 else {}


def gather(items: list) -> list:
    """The items of all processes, in the order of the processes."""
    from accelerate.utils import gather_object

    return gather_object(items)


def sum_counts(counts: list[dict]) -> dict:
    """Counters added up, name by name."""
    return {key: sum(c.get(key, 0) for c in counts) for key in sorted({k for c in counts for k in c})}


# ------------------------------------------------------------------------------------------------------------
# Results on disk and on the screen


def read_results(path: str) -> dict:
    """The results of a finished evaluation; {} where there is none, BadInput where the file is broken."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is no results file of evaluate.py ({error}): move it away") from None


def clear(out: str) -> None:
    """Remove an earlier evaluation's results and pictures, which would pass for those of the new samples."""
    pictures = read_results(os.path.join(out, "results.json")).get("pictures", [])
    for name in (*pictures, "results.json"):
        path = os.path.join(out, os.path.basename(name))
        if os.path.exists(path):
            os.remove(path)


def finish(table: dict, about: dict, out: str, log: Callable = print) -> dict:
    """Summarise, draw, write results.json to `out`, print the tables; returns the results."""
    os.makedirs(out, exist_ok=True)
    path, trained = os.path.join(out, "results.json"), about.get("trained_budgets")
    # The libraries that took part: another version of the answer checker may judge otherwise.
    versions = {"python": sys.version.split()[0], "math-verify": importlib.metadata.version("math-verify")}
    used = [name for name in ("numpy", "torch", "transformers", "vllm") if name in sys.modules]
    versions |= {name: sys.modules[name].__version__ for name in used}
    results = jsonable(about) | {"versions": versions, "datasets": summarise(table, trained)}
    clear(out)
    shown = {}  # what tables and pictures need of each data set
    for name, part in table.items():
        cells = pool(part["cells"])
        shown[name] = {"problems": len(part["ids"]), "mode": results["datasets"][name]["mode"]}
        shown[name]["figures"] = {b: summarise_cell(cell) for b, cell in cells.items()}
        shown[name]["lengths"] = {b: known_lengths(cell) for b, cell in cells.items()}
    pictures = plots.draw(shown, out, trained, about.get("model"))
    results["pictures"] = [os.path.basename(p) for p in pictures]
    # Written beside its place, fsynced and renamed: nobody ever reads half a file.
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)
    for name, part in shown.items():
        log(format_table(name, part, results["datasets"][name]))
    log(f"evaluate: figures in {path}")
    log(f"evaluate: pictures in {', '.join(pictures) or 'no file, as no lengths are known'}")
    return results


def format_table(name: str, part: dict, summary: dict) -> str:
    """The table of one data set: a line per budget (or group of many), then the means over budgets."""
    columns = {"accuracy": "accuracy", "+-": "accuracy_stderr", "length": "mean_length"}
    columns |= {"signed": "signed_error", "abs error": "abs_error", "within 10%": "within_10"}
    columns |= {"over": "over_budget", "cut off": "truncated"}
    # As json has them: what is not known is None here, like in the means below.
    lines = {"none" if b is None else str(b): jsonable(figures) for b, figures in part["figures"].items()}
    for label, key in (("mean", "mean"), ("mean, trained", "mean_trained")):
        if len(lines) > 1 and summary[key]["abs_error"] is not None:
            lines[label] = summary[key]
    rows = [["budget", "n", *columns]]
    for label, figures in lines.items():
        values = [(key, figures.get(key)) for key in columns.values()]
        texts = ["-" if v is None else f"{v:.1f}" if k == "mean_length" else f"{v:.1%}" for k, v in values]
        rows.append([label, str(figures.get("n", "")), *texts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = f"\n{name}: {part['problems']} problems, mode {summary['mode'] or 'none'}"
    if summary["correlation"] is not None:
        text += f", correlation of requested and produced length {summary['correlation']:.3f}"
    return "\n".join([text, *("  ".join(map(str.rjust, row, widths)) for row in rows)])


# ------------------------------------------------------------------------------------------------------------
# Command line


def evaluate_samples(args: argparse.Namespace) -> dict:
    """Results and pictures from saved samples; --regrade checks again and writes disagreements.jsonl."""
    path, out, regrade, table, verify = args.samples, args.out, args.regrade, {}, {"changed": 0}
    about = {"model": None, "trained_budgets": None, "count": "response"}
    if os.path.basename(path) == "samples.jsonl":
        # Beside the samples lies what their run knew and no sample tells: model, settings, trained budgets.
        beside = read_results(os.path.join(os.path.dirname(path), "results.json"))
        about |= {k: v for k, v in beside.items() if k not in ("datasets", "pictures", "versions")}
    about |= {k: v for k, v in vars(args).items() if k in ("samples", "count", "trained_budgets") and v}
    require_think = args.require_think or bool(about.get("require_think"))
    if regrade:
        # Once through the whole file first: a broken line is found before anything is written.
        sum(1 for _ in read_samples(path, regrade))
        os.makedirs(out, exist_ok=True)
    kept = os.path.join(out, "disagreements.jsonl") if regrade else os.devnull
    with open(kept, "w", encoding="utf-8") as f:
        # Batch by batch: the file may be far larger than the memory.
        for batch in batches(read_samples(path, regrade), BATCH):
            stored = [s.get("correct") for s in batch]
            verify = sum_counts([verify, grade(batch, require_think)]) if regrade else verify
            for sample, old in zip(batch, stored, strict=True):
                add(table, sample, about["count"])
                if old is not None and bool(old) != sample["correct"]:
                    verify["changed"] += 1
                    f.write(json.dumps(sample | {"correct": old, "regraded": sample["correct"]}) + "\n")
    if regrade:
        about |= {"require_think": require_think, "verify": verify}
    return finish(table, about, out)


def budget_list(text: str, flag: str = "--budgets") -> list[int | None]:
    """ "none,512,1024" -> [None, 512, 1024], each once, in the order given; BadInput on anything else."""
    budgets = []
    for word in map(str.strip, text.split(",")):
        if word != "none" and not (re.fullmatch("[0-9]{1,9}", word) and int(word) > 0):
            raise BadInput(f"{flag} {text!r}: {word!r} is no budget; give token counts above 0: 512,1024")
        budgets.append(None if word == "none" else int(word))
    return list(dict.fromkeys(budgets))


def load_data(names: str, limit: int | None, seed: int) -> list[dict]:
    """Problems of the sets in "math500,FILE,toy"; `source` becomes the set's name (of a FILE its stem)."""
    problems = []
    for spec in map(str.strip, names.split(",")):
        # The test split: the toy's training problems are never asked here.
        if spec in toy.TASKS:
            found = toy.problems(spec, "test", limit or 200, seed)
        else:
            found = data.load_problems(spec, limit=limit)
        name = re.sub(r"\.(jsonl?|csv|parquet)(\.gz)?$", "", os.path.basename(spec.rstrip("/")))
        if name in {problem["source"] for problem in problems}:
            raise BadInput(f"--data {names!r} names {name!r} twice; results go by name, so rename a file")
        ids = Counter()
        for problem in found:
            # Two halves of one set may both number their problems from 0: equal ids would be one problem.
            ids[problem["id"]] += 1
            again = f"-{ids[problem['id']]}" if ids[problem["id"]] > 1 else ""
            problems.append(problem | {"source": name, "id": f"{problem['id']}{again}"})
    return problems


def check_out(args: argparse.Namespace) -> None:
    """BadInput if --out holds another evaluation. Saved generations are never written over by --samples."""
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise BadInput(f"--out {args.out} is a file: name a folder")
    # samples.jsonl alone is what a run leaves that was stopped half-way.
    held = [f for f in ("results.json", "samples.jsonl") if os.path.exists(os.path.join(args.out, f))]
    if held and not args.overwrite:
        raise BadInput(f"--out {args.out} holds an evaluation ({held[0]}): name another, or --overwrite it")
    own = os.path.join(args.out, "samples.jsonl")
    if args.samples and os.path.exists(own) and not os.path.samefile(own, args.samples):
        raise BadInput(f"--out {args.out} holds samples of another evaluation: name another folder")


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a file or a model is opened; turn the budgets into lists."""
    if (args.model is None) == (args.samples is None):
        raise BadInput("give either --model (to sample) or --samples (saved responses), not both or neither")
    if args.samples and not os.path.isfile(args.samples):
        raise BadInput(f"--samples {args.samples}: no such file; give the samples.jsonl of an evaluation")
    for flag in ("--data", "--budgets", "--limit", "--max-tokens", "--wording"):
        if args.samples and getattr(args, flag[2:].replace("-", "_")) is not None:
            raise BadInput(f"--samples brings its own problems and responses: leave out {flag}")
    if args.model and not args.data:
        raise BadInput("--data is missing: name a preset, a file of problems, toy or toy_ood")
    if args.model and args.mode != "none" and not args.budgets:
        raise BadInput("--budgets is missing: give token counts, as in --budgets 512,1024, or --mode none")
    if args.regrade and not args.samples:
        raise BadInput("--regrade needs --samples: the answers of a --model are checked in any case")
    for flag, least in (("--n", 1), ("--limit", 1), ("--max-tokens", 1), ("--seed", 0)):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and value < least:
            raise BadInput(f"{flag} ({value}) must be {least} or more")
    # Written so that nan, which compares false with everything, is refused as well.
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise BadInput(f"--temperature ({args.temperature}) is from 0, --top-p ({args.top_p}) in (0, 1]")
    if args.trained_budgets:
        # A distribution stands for its range: the pictures need the smallest and the largest only.
        spec = args.trained_budgets
        listed = data.parse_budgets(spec)["values"] if ":" in spec else budget_list(spec, "--trained-budgets")
        if None in listed:
            raise BadInput(f"--trained-budgets {spec!r}: give token counts only")
        args.trained_budgets = listed
    args.budgets = budget_list(args.budgets) if args.budgets else [None]
    if args.mode == "none" and args.budgets != [None]:
        print("evaluate: --mode none states no budget, so --budgets is left aside: one run without any")
        args.budgets = [None]
    check_out(args)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "Sweep token budgets over a model and data sets, or rebuild all figures from saved samples."
    parser = argparse.ArgumentParser(prog="evaluate.py", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="model folder or hub id")
    add("--data", help="data sets, comma-separated: presets, hub ids, files of problems, toy, toy_ood")
    add("--budgets", help="tokens, comma-separated: 512,1024; none among them: also a run without a budget")
    add("--mode", choices=("exact", "max", "none"), default="exact", help="how the budget is asked for")
    add("--n", type=int, default=1, help="samples per problem and budget (L1: 16)")
    add("--out", required=True, help="folder for samples.jsonl, results.json and the pictures")
    add("--samples", help="saved samples (.jsonl, .jsonl.gz) in place of a model")
    add("--regrade", action="store_true", help="with --samples: check the answers anew")
    add("--wording", choices=("l1", "tulu"), help="the budget sentence (default l1; the toy's tasks: tulu)")
    add("--temperature", type=float, default=0.6, help="of sampling; 0 is greedy")
    add("--top-p", type=float, default=0.95, help="share of the probability that is kept in sampling")
    add("--max-tokens", type=int, help="response cap, tokens (default: exact 2 x budget, else 8192)")
    add("--sampler", choices=("auto", "vllm", "hf"), default="auto", help="auto: vllm on CUDA if installed")
    add("--seed", type=int, default=0, help="seed of the sampling and of the toy's problems")
    add("--limit", type=int, help="problems per data set (default all; 200 of the toy's)")
    add("--count", choices=("response", "thinking"), help="tokens that count: all (default) or to </think>")
    add("--require-think", action="store_true", help="an answer without </think> is wrong")
    add("--trained-budgets", help="tokens trained on, for the pictures: 512,1024 or uniform:100:4000")
    add("--overwrite", action="store_true", help="replace the evaluation that --out holds")
    return data.one_line_errors(parser).parse_args(argv)


def evaluate_model(args: argparse.Namespace) -> dict:
    """Check all that can be checked without the weights, then load the sampler and sweep the budgets."""
    problems = load_data(args.data, args.limit, args.seed)
    # Every budget that does not fit, every missing file is found now: weights take minutes to load.
    is_toy = {p["source"] for p in problems} <= set(toy.TASKS)  # its tokenizer knows one wording
    wording, tokenizer = args.wording or ("tulu" if is_toy else "l1"), data.load_tokenizer(args.model)
    from transformers import AutoConfig

    try:
        context = AutoConfig.from_pretrained(args.model).max_position_embeddings
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {args.model} has no usable config.json: {data.first_line(error)}") from None
    requests = plan(problems, args.budgets, args.mode, wording, tokenizer, context, args.max_tokens)
    # Every prompt is encoded twice for this: what does not fit is refused before the weights are loaded.
    longest = max(len(r["ids"]) + r["max_tokens"] for r in requests)
    from sampler import load_sampler

    # No longer than needed: an engine sets memory aside for max_model_len.
    sampler = load_sampler(args.model, args.sampler, longest, args.seed)
    return evaluate(
        sampler, problems, args.budgets, args.mode, args.n, args.out, wording=wording,
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed,
        count=args.count or "response", require_think=args.require_think, model=args.model,
        trained_budgets=args.trained_budgets,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        check_args(args)
        evaluate_model(args) if args.model else evaluate_samples(args)
    except BadInput as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
