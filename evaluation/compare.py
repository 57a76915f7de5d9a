"""Finished evaluations side by side: differences on the same problems, violins on the same axes.

    python -m evaluation.compare before=out/toy/eval-0 after=out/toy/eval --out out/toy/compare
    python -m evaluation.compare out/baselines/* trained=out/eval --out out/both

Differences are to the first one. The bootstrap is paired: every draw takes the same problems for all models,
so that a problem that is hard for all of them widens no difference. A run without any budget (the baseline
"none") stands beside the others at every budget.
"""

import argparse
import os
import sys

from data import BadInput, exit_code, one_line_errors
from evaluate import read_results
from evaluation import metrics, plots, report
from evaluation.samples import check_writable, name_folders, read_samples, write_json

COMPARED = {"accuracy": "accuracy", "mean_length": "length", "abs_error": "abs error", "over_budget": "over"}


def read_table(folder: str) -> dict:
    """metrics.py's table of an evaluation's samples: beside its results, or where these were made from."""
    path = os.path.join(folder, "samples.jsonl")
    if not os.path.exists(path):
        path = read_results(os.path.join(folder, "results.json")).get("samples") or path
    table = {}
    for sample in read_samples(path, flag=folder):
        metrics.add(table, sample)
    return table


def compare_cells(parts: dict, cells: dict) -> dict:
    """{"problems", "figures", "difference" to the first}; `parts`, `cells`: {label: of one data set, budget}.

    On the problems that all of them have; the bootstrap draws are the same for all.
    """
    names = {label: list(part["ids"]) for label, part in parts.items()}
    asked = [{names[label][i] for i in set(cell["problem"])} for label, cell in cells.items()]
    shared = sorted(set.intersection(*asked), key=str)
    figures, drawn = {}, {}
    for label, cell in cells.items():
        rows = [parts[label]["ids"][i] for i in shared]
        columns = metrics.columns_of(cell, len(names[label]))
        columns = {key: [sums[rows] for sums in columns[key]] for key in metrics.FIGURES}
        drawn[label] = metrics.bootstrap(columns) if rows else {}
        figures[label] = {key: float(metrics.ratio(t.sum(), b.sum())) for key, (t, b) in columns.items()}
        figures[label]["ci"] = {key: metrics.interval(x) for key, x in drawn[label].items()}
    first, gaps = next(iter(cells)), {}
    for label in list(cells)[1:] if shared else ():
        both = {key: (figures[label][key] - figures[first][key], drawn[label][key] - drawn[first][key])
                for key in COMPARED}  # fmt: skip
        gaps[label] = {k: {"value": value, "ci": metrics.interval(x)} for k, (value, x) in both.items()}
    return {"problems": len(shared), "figures": figures, "difference": gaps}


def compare_set(parts: dict) -> dict:
    """{budget: what compare_cells found} of one data set; `parts`: {label: its part of the table}."""
    texts = {}
    for label, part in parts.items():
        for key, text in part["texts"].items():
            # Ids of a drawn set are numbers: with another --seed they mean other problems.
            if texts.setdefault(key, text) != text:
                told = f"{label}: {key} is another problem than in the evaluations before it"
                raise BadInput(f"{told}; evaluate with the same --seed and data")
    # A run without any budget was asked the same whatever the others were: it stands beside each of them.
    alone = {label for label, part in parts.items() if set(part["cells"]) == {None}}
    budgets = {b: 0 for label, part in parts.items() if label not in alone for b in part["cells"]}
    out = {}
    for budget in metrics.in_order(budgets or {None: 0}):
        cells = {m: part["cells"].get(None if m in alone else budget) for m, part in parts.items()}
        cells = {label: cell for label, cell in cells.items() if cell}
        if len(cells) > 1 and next(iter(parts)) in cells:
            out[metrics.label(budget)] = compare_cells(parts, cells)
    return out


def table_rows(budgets: dict, ask_by: dict) -> list[list[str]]:
    """The table of one data set: a line per budget and model, differences to the first in brackets."""
    head = (text for name in COMPARED.values() for text in (name, "difference [95%]"))
    rows = [["budget", "problems", "model", "asked by", *head]]
    for budget, cell in budgets.items():
        for label, figures in cell["figures"].items():
            row = [budget, str(cell["problems"]), label, ask_by[label]]
            for key in COMPARED:
                form = "{:.1f}" if key == "mean_length" else "{:.1%}"
                gap = cell["difference"].get(label, {}).get(key)
                told = report.show(gap["value"], gap["ci"], form.replace(":", ":+")) if gap else ""
                row += [report.show(figures[key], form=form), told]
            rows.append(row)
    return rows


@exit_code("evaluation.compare")
def main(argv: list[str] | None = None) -> None:
    """Compare finished evaluations; compare.json, pictures and report.html go to --out."""
    parser = argparse.ArgumentParser("-m evaluation.compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="evaluations: FOLDER or LABEL=FOLDER")
    parser.add_argument("--out", required=True, help="folder for table, pictures and report")
    args = one_line_errors(parser).parse_args(argv)
    check_writable(args.out)
    if os.path.exists(os.path.join(args.out, "results.json")):
        raise BadInput(f"--out {args.out} holds an evaluation: name another folder")
    models = name_folders(args.folders)
    if len(models) < 2:
        raise BadInput("to compare takes two finished evaluations or more")
    tables = {label: read_table(folder) for label, folder in models.items()}
    names = [name for name in next(iter(tables.values())) if all(name in t for t in tables.values())]
    sets = {name: compare_set({label: t[name] for label, t in tables.items()}) for name in names}
    asked = {n: {m: " and ".join(sorted(t[n]["ask_by"])) or "-" for m, t in tables.items()} for n in sets}
    sets = {n: {"ask_by": asked[n], "budgets": budgets} for n, budgets in sets.items() if budgets}
    if not sets:
        held = "; ".join(f"{label}: {', '.join(table)}" for label, table in tables.items())
        raise BadInput(f"no data set and budget is in all of them ({held})")
    result = metrics.jsonable({"models": models, "datasets": sets})
    os.makedirs(args.out, exist_ok=True)
    curves, lengths, sections = {}, {}, []
    for name, part in result["datasets"].items():
        found = {budget: cell["figures"] for budget, cell in part["budgets"].items()}
        curves[name] = {m: {b: cells[m] for b, cells in found.items() if m in cells} for m in models}
        lengths[name] = {label: metrics.lengths_of(table[name]) for label, table in tables.items()}
        summary, rows = report.summary_rows(curves[name]), table_rows(part["budgets"], part["ask_by"])
        text = f"{report.plain_table(rows)}\n\n{report.plain_table(summary)}"
        print(f"\n{name}: differences are to {next(iter(models))}, on the same problems\n{text}")
        sections.append((name, "", [summary, rows], []))
    pictures = plots.draw_models(curves, lengths, args.out)
    sections = [("Lengths, accuracy", "", [], pictures), *sections]
    result["pictures"] = [os.path.basename(p) for p in pictures]
    report.write(os.path.join(args.out, "report.html"), " / ".join(models), models, sections, [])
    write_json(os.path.join(args.out, "compare.json"), result)
    print(f"compare: compare.json, pictures and report.html in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
