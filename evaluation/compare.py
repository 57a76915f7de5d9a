"""Finished evaluations side by side: differences on the same problems, violins on the same axes.

    python -m evaluation.compare before=out/toy/eval-0 after=out/toy/eval --out out/toy/compare
    python -m evaluation.compare out/baselines/* trained=out/eval --out out/both

Differences are to the first one. The bootstrap is paired: every draw takes the same problems for all models,
so that a problem that is hard for all of them widens no difference. A run without any budget (the baseline
"none") stands beside the others at every budget.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

import numpy as np

import data
from data import BadInput
from evaluation import metrics, plots, report
from evaluation.samples import check_writable, read_samples, write_json

COMPARED = {"accuracy": "accuracy", "mean_length": "length", "abs_error": "abs error", "over_budget": "over"}


def read_evaluation(folder: str, texts: dict) -> dict:
    """{data set: {budget: {problem id: {figure: (top, bottom)}}}} of an evaluation's problems.jsonl.

    `texts` {(data set, id): checksum} collects the problems of all evaluations: one id, one text.
    """
    path, found = os.path.join(folder, "problems.jsonl"), {}
    if not os.path.exists(path):
        way_out = "evaluate.py --samples FILE --out NEW makes one from saved samples"
        raise BadInput(f"{folder}: it holds no problems.jsonl; {way_out}")
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
                raise BadInput(f"{folder}: {told}; evaluate with the same --seed and data")
    return found


def name_models(specs: list[str]) -> dict[str, str]:
    """{label: folder} of "label=folder", or of folders, which get the end of their path that is their own."""
    models, plain = {}, [os.path.normpath(s) for s in specs if "=" not in s or os.path.isdir(s)]
    for spec in specs:
        label, _, folder = ("", "", spec) if os.path.isdir(spec) else spec.rpartition("=")
        if not os.path.isdir(folder):
            raise BadInput(f"{spec}: no such folder; name finished evaluations, or LABEL=FOLDER")
        parts = os.path.normpath(folder).split(os.sep)
        # The shortest ending that no other folder has: out/a/eval and out/b/eval are a/eval and b/eval.
        ends = (os.sep.join(parts[-k:]) for k in range(1, len(parts) + 1))
        label = label or next((e for e in ends if sum(p.endswith(e) for p in plain) == 1), folder)
        if label in models:
            raise BadInput(f"the command names {label!r} twice: give labels of your own, LABEL=FOLDER")
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
    """{"budgets": {budget: {"problems", "figures", "difference"}}} of one data set."""
    budgets = {}
    # A run without any budget was asked the same whatever the others were: it stands beside each of them.
    alone = [set(s) == {"none"} for s in sets]
    for budget in dict.fromkeys(b for s in sets for b in s) if alone[0] else sets[0]:
        cells = [s.get(budget) or (s["none"] if a else None) for s, a in zip(sets, alone, strict=True)]
        there = [i for i, cell in enumerate(cells) if cell]
        if len(there) < 2:
            continue
        rows, names = [cells[i] for i in there], [labels[i] for i in there]
        ids = sorted({i for row in rows for i in row}, key=str)
        figures, drawn = paired(rows, ids, seed)
        found = {"problems": len(set.intersection(*map(set, rows)))}
        found["figures"] = dict(zip(names, figures, strict=True))
        budgets[budget] = found | {"difference": differences(names, figures, drawn)}
    return {"budgets": budgets}


def table_rows(part: dict) -> list[list[str]]:
    """The table of one data set: a line per budget and model, differences to the first in brackets."""
    head = (text for name in COMPARED.values() for text in (name, "difference [95%]"))
    rows = [["budget", "problems", "model", *head]]
    for budget, cell in part["budgets"].items():
        for label, figures in cell["figures"].items():
            row = [budget, str(cell["problems"]), label]
            for key in COMPARED:
                form = "{:.1f}" if key == "mean_length" else "{:.1%}"
                gap = cell["difference"].get(label, {}).get(key)
                signed = form.replace(":", ":+")
                told = report.with_interval(gap["value"], gap["ci"], signed) if gap else ""
                row += [report.number(figures[key], form), told]
            rows.append(row)
    return rows


def read_lengths(folder: str) -> dict:
    """{data set: {budget: lengths}} of the samples in an evaluation's folder; {} where there are none."""
    found, path = {}, os.path.join(folder, "samples.jsonl")
    for sample in read_samples(path) if os.path.exists(path) else ():
        if sample["length"] is not None:
            found.setdefault(sample["source"], {}).setdefault(sample["budget"], []).append(sample["length"])
    return {name: {b: np.array(x) for b, x in metrics.in_order(s).items()} for name, s in found.items()}


def compare(specs: list[str], out: str, seed: int = 0, log: Callable = print) -> dict:
    """Compare finished evaluations; compare.json, pictures and report.html go to `out`."""
    models = name_models(specs)
    if len(models) < 2:
        raise BadInput("to compare takes two finished evaluations or more")
    labels, texts = list(models), {}
    found = [read_evaluation(folder, texts) for folder in models.values()]
    names = [name for name in found[0] if all(name in f for f in found)]
    parts = {name: compare_set(labels, [f[name] for f in found], seed) for name in names}
    parts = {name: part for name, part in parts.items() if part["budgets"]}
    if not parts:
        sets = "; ".join(f"{label}: {', '.join(f)}" for label, f in zip(labels, found, strict=True))
        raise BadInput(f"no data set and budget is in all of them ({sets})")
    result, curves, sections = metrics.jsonable({"models": models, "datasets": parts}), {}, []
    os.makedirs(out, exist_ok=True)
    for name, part in result["datasets"].items():
        for label in labels:
            own = {b: cell["figures"].get(label) for b, cell in part["budgets"].items()}
            curves.setdefault(label, {})[name] = {b: figures for b, figures in own.items() if figures}
    side = plots.draw_side_by_side({label: read_lengths(folder) for label, folder in models.items()}, out)
    for name, part in result["datasets"].items():
        summary = report.summary_rows({label: curves[label][name] for label in labels})
        rows = table_rows(part)
        text = f"{report.plain_table(rows)}\n\n{report.plain_table(summary)}"
        log(f"\n{name}: differences are to {labels[0]}, on the same problems\n{text}")
        sections.append({"title": name, "notes": [], "tables": [summary, rows], "pictures": []})
    pictures = [*side, *plots.draw_models(curves, out)]
    sections.insert(0, {"title": "Lengths, accuracy", "notes": [], "tables": [], "pictures": pictures})
    result["pictures"] = [os.path.basename(p) for p in pictures]
    report.write(os.path.join(out, "report.html"), " / ".join(labels), models, sections, [])
    path = os.path.join(out, "compare.json")
    write_json(path, result)
    log(f"compare: figures in {path}, all of it in {os.path.join(out, 'report.html')}")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    about = "Finished evaluations against each other: paired differences, violins on the same axes."
    usage = "python -m evaluation.compare FOLDER FOLDER ... --out FOLDER [--seed N]"
    parser = argparse.ArgumentParser("-m evaluation.compare", usage, about, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="evaluations: FOLDER or LABEL=FOLDER")
    parser.add_argument("--out", required=True, help="folder for table, pictures and report")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    try:
        args = data.one_line_errors(parser).parse_args(argv)
        check_writable(args.out)
        held = [f for f in ("results.json", "samples.jsonl") if os.path.exists(os.path.join(args.out, f))]
        if held:
            raise BadInput(f"--out {args.out} holds an evaluation ({held[0]}): name another folder")
        compare(args.folders, args.out, args.seed)
    except BadInput as error:
        print(f"evaluation.compare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
