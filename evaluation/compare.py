"""Finished evaluations side by side, for evaluate.py --compare: differences on the same problems.

The bootstrap is paired: every draw takes the same problems for all models, so that a problem that is hard
for all of them widens no difference. Differences are to the first model.
"""

import json
import os

import numpy as np

from data import BadInput
from evaluation import metrics, plots, report

COMPARED = {"accuracy": "accuracy", "mean_length": "length", "abs_error": "abs error", "over_budget": "over"}


def read_evaluation(folder: str, texts: dict) -> dict:
    """{data set: {budget: {problem id: {figure: (top, bottom)}}}} of an evaluation's problems.jsonl.

    `texts` {(data set, id): checksum} collects the problems of all evaluations: one id, one text.
    """
    path, found = os.path.join(folder, "problems.jsonl"), {}
    if not os.path.exists(path):
        way_out = "evaluate.py --samples FILE --out NEW makes one from saved samples"
        raise BadInput(f"--compare {folder}: it holds no problems.jsonl; {way_out}")
    with open(path, encoding="utf-8") as f:
        for at, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                budget = "none" if row["budget"] is None else str(row["budget"])
                found.setdefault(row["source"], {}).setdefault(budget, {})[row["id"]] = row["figures"]
                same = texts.setdefault((row["source"], row["id"]), row["text"]) == row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{path}, line {at} is damaged ({error!r}): make it anew") from None
            # Ids of a drawn set are numbers: with another --seed they mean other problems.
            if not same:
                told = f"{row['source']}, {row['id']} is another problem than in the evaluations before it"
                raise BadInput(f"--compare {folder}: {told}; evaluate with the same --seed and data")
    return found


def name_models(specs: list[str]) -> dict[str, str]:
    """{label: folder} of "label=folder", or of folders, which get the end of their path that is their own."""
    models, plain = {}, [os.path.normpath(s) for s in specs if "=" not in s or os.path.isdir(s)]
    for spec in specs:
        label, _, folder = ("", "", spec) if os.path.isdir(spec) else spec.rpartition("=")
        if not os.path.isdir(folder):
            raise BadInput(f"--compare {spec}: no such folder; name finished evaluations, or LABEL=FOLDER")
        parts = os.path.normpath(folder).split(os.sep)
        # The shortest ending that no other folder has: out/a/eval and out/b/eval are a/eval and b/eval.
        ends = (os.sep.join(parts[-k:]) for k in range(1, len(parts) + 1))
        label = label or next((e for e in ends if sum(p.endswith(e) for p in plain) == 1), folder)
        if label in models:
            raise BadInput(f"--compare names {label!r} twice: give labels of your own, LABEL=FOLDER")
        models[label] = folder
    return models


def paired(rows: list[dict], ids: list, seed: int) -> tuple[list[dict], list[dict]]:
    """Figures and bootstrap draws of each model on the problems `ids`, the draws the same for all models.

    `rows`: {problem id: {figure: (top, bottom)}} per model; a problem that one of them lacks counts for none.
    """
    shared = set.intersection(*map(set, rows))
    figures, drawn = [], []
    for row in rows:
        columns = {}
        for key in metrics.FIGURES:
            pairs = [row[i].get(key, (0, 0)) if i in shared else (0, 0) for i in ids]
            columns[key] = tuple(np.array(pairs, float).T)
        value = {key: float(metrics.ratio(t.sum(), b.sum())) for key, (t, b) in columns.items()}
        drawn.append(metrics.bootstrap(columns, seed))
        ends = {key: metrics.interval(x) for key, x in drawn[-1].items()}
        figures.append(value | {"ci": {key: e for key, e in ends.items() if np.isfinite(e).all()}})
    return figures, drawn


def differences(labels: list, figures: list[dict], drawn: list[dict]) -> dict:
    """{label: {figure: {"value", "ci"}}}: each model but the first, minus the first."""
    out = {}
    for label, own, draws in zip(labels[1:], figures[1:], drawn[1:], strict=True):
        gap = {key: draws[key] - drawn[0][key] for key in COMPARED}
        out[label] = {k: {"value": own[k] - figures[0][k], "ci": metrics.interval(gap[k])} for k in COMPARED}
    return out


def compare_set(labels: list, sets: list[dict], seed: int) -> dict:
    """{"budgets": {budget: {"problems", "figures", "difference"}}, "area", "area_difference"} of one set."""
    shared = [b for b in sets[0] if all(b in s for s in sets)]
    ids = sorted({i for s in sets for b in shared for i in s[b]}, key=str)
    budgets, curves = {}, []
    for budget in shared:
        figures, drawn = paired([s[budget] for s in sets], ids, seed)
        both = set.intersection(*(set(s[budget]) for s in sets))
        found = {"problems": len(both), "figures": dict(zip(labels, figures, strict=True))}
        budgets[budget] = found | {"difference": differences(labels, figures, drawn)}
        if budget != "none":
            curves.append((figures, drawn))
    return {"budgets": budgets, **areas(labels, curves)}


def areas(labels: list, curves: list) -> dict:
    """Area under each model's accuracy-length curve over the lengths that all of them reach, and the gaps."""

    def points(i, k=None):  # the curve of model i, or its draw k
        each = [(f[i] if k is None else {key: v[k] for key, v in d[i].items()}) for f, d in curves]
        return [e["mean_length"] for e in each], [e["accuracy"] for e in each]

    spans = [points(i)[0] for i in range(len(labels))]
    if len(curves) < 2 or not all(np.min(s) > 0 for s in spans):
        return {"area": None, "area_difference": None}
    low, high = max(map(min, spans)), min(map(max, spans))
    if high < 1.1 * low:  # too little in common to compare curves
        return {"area": None, "area_difference": None}
    value = [metrics.area_under_curve(*points(i), low, high)["area"] for i in range(len(labels))]
    # In a draw the ends of the curves move a little: np.interp holds the outermost accuracy there.
    draws = len(curves[0][1][0]["accuracy"])
    grid = np.linspace(np.log(low), np.log(high), 65)

    def height(i, k):
        tokens, accuracy = points(i, k)
        order = np.argsort(tokens)
        return np.interp(grid, np.log(np.maximum(tokens, 1))[order], np.array(accuracy)[order]).mean()

    each = np.array([[height(i, k) for k in range(draws)] for i in range(len(labels))])
    gaps = {}
    for label, v, x in zip(labels[1:], value[1:], each[1:], strict=True):
        gaps[label] = {"value": v - value[0], "ci": metrics.interval(x - each[0])}
    about = {"low": low, "high": high, "value": dict(zip(labels, value, strict=True))}
    return {"area": about, "area_difference": gaps}


def table_rows(labels: list, part: dict) -> list[list[str]]:
    """The table of one data set: a line per budget and model, differences to the first in brackets."""
    rows = [
        [
            "budget",
            "problems",
            "model",
            *(t for name in COMPARED.values() for t in (name, "difference [95%]")),
        ]
    ]
    for budget, cell in part["budgets"].items():
        for label in labels:
            row = [budget, str(cell["problems"]), label]
            for key in COMPARED:
                form = "{:.1f}" if key == "mean_length" else "{:.1%}"
                row.append(report.number(cell["figures"][label][key], form))
                gap = cell["difference"].get(label, {}).get(key)
                row.append(
                    report.with_interval(gap["value"], gap["ci"], form.replace(":", ":+")) if gap else ""
                )
            rows.append(row)
    return rows


def area_note(part: dict) -> list[str]:
    """The areas in a sentence; none where the curves share no range of lengths."""
    if not part["area"]:
        return []
    area, form = part["area"], "{:+.1%}"
    told = ", ".join(f"{label} {v:.1%}" for label, v in area["value"].items())
    gaps = part["area_difference"].items()
    gaps = ", ".join(f"{k} {report.with_interval(g['value'], g['ci'], form)}" for k, g in gaps)
    between = f"from {area['low']:.0f} to {area['high']:.0f} tokens"
    return [f"Mean accuracy over log length {between}: {told}; difference {gaps}."]


def compare(specs: list[str], out: str, seed: int = 0, log=print) -> dict:
    """Compare finished evaluations; compare.json, models*.png and report.html go to `out`."""
    models = name_models(specs)
    if len(models) < 2:
        raise BadInput("--compare needs two finished evaluations or more")
    labels, found, texts = list(models), [], {}
    for folder in models.values():
        found.append(read_evaluation(folder, texts))
    names = [name for name in found[0] if all(name in f for f in found)]
    names = [n for n in names if any(all(b in f[n] for f in found) for b in found[0][n])]
    if not names:
        sets = "; ".join(f"{label}: {', '.join(f)}" for label, f in zip(labels, found, strict=True))
        raise BadInput(f"--compare: no data set and budget is in all of them ({sets})")
    datasets = {name: compare_set(labels, [f[name] for f in found], seed) for name in names}
    result, curves, sections = metrics.jsonable({"models": models, "datasets": datasets}), {}, []
    os.makedirs(out, exist_ok=True)
    for name, part in result["datasets"].items():
        rows, notes = table_rows(labels, part), area_note(part)
        text = "\n".join([report.plain_table(rows), *notes])
        log(f"\n{name}: differences are to {labels[0]}, on the same problems\n{text}")
        sections.append({"title": name, "notes": notes, "tables": [rows], "pictures": []})
        for label in labels:
            own = {b: cell["figures"][label] for b, cell in part["budgets"].items()}
            curves.setdefault(label, {})[name] = own
    pictures = plots.draw_models(curves, out)
    sections.append({"title": "Accuracy against length", "notes": [], "tables": [], "pictures": pictures})
    result["pictures"] = [os.path.basename(p) for p in pictures]
    report.write(os.path.join(out, "report.html"), " / ".join(labels), models, sections, [])
    path = os.path.join(out, "compare.json")
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    log(f"compare: figures in {path}, all of it in {os.path.join(out, 'report.html')}")
    return result
