"""One self-contained HTML file: tables, pictures, and a browser of single samples. Needs no network.

write() is given plain tables and paths of pictures; the page holds the pictures themselves, its style and
its script, so that it can be mailed and opened from disk.
"""

import base64
import heapq
import html
import json
import math
import os
import re
import zlib
from collections.abc import Sequence

from evaluation import metrics, plots

SHOWN = 800  # samples in the page's browser: all of some problems, rather than one of each
TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report_page.html")
LONGEST = 20_000  # characters of a response that are shown; what is left out of its middle is said


def number(value: float | None, form: str = "{:.1%}") -> str:
    """A figure as text; "-" where it is not known."""
    return "-" if value is None else form.format(value)


def with_interval(value: float | None, ends: Sequence[float] | None, form: str = "{:.1%}") -> str:
    """ "61.0% [58.2%, 63.9%]"; without the brackets where there is no interval."""
    if value is None or not ends or ends[0] is None:
        return number(value, form)
    return f"{form.format(value)} [{form.format(ends[0])}, {form.format(ends[1])}]"


def plain_table(rows: list[list[str]]) -> str:
    """Rows of texts as lines of aligned columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def pick(kept: list, sample: dict) -> None:
    """Keep the sample if its problem is among those whose checksum is lowest; `kept` is a heap of SHOWN.

    So the page has all responses to some problems, at every budget, whatever the order they come in.
    """
    rank = zlib.crc32(f"{sample['source']} {sample['id']}".encode())
    if not isinstance(sample.get("response"), str) or (len(kept) >= SHOWN and -rank <= kept[0][0]):
        return
    keys = ("id", "sample", "source", "problem", "answer", "prompt", "budget", "mode", "response", "length")
    keys += ("finish_reason", "correct", "thinking_length")
    entry = {key: sample.get(key) for key in keys}
    if len(entry["response"]) > LONGEST:
        cut, half = len(entry["response"]) - LONGEST, LONGEST // 2
        start, end = entry["response"][:half], entry["response"][-half:]
        entry["response"] = f"{start}\n[... {cut} characters left out ...]\n{end}"
    # id() settles the last ties: dicts do not compare.
    item = (-rank, str(sample.get("budget")), sample.get("sample") or 0, id(entry), entry)
    heapq.heappush(kept, item) if len(kept) < SHOWN else heapq.heapreplace(kept, item)


def picked(kept: list, total: int) -> list[dict]:
    """The kept samples of `total`, in the order of data set, problem, budget and sample number."""
    # Of the last problem that found room some may be missing: shown are whole ones.
    ranks = [item[0] for item in kept]
    last = min(ranks) if len(kept) < total and len(set(ranks)) > 1 else None
    rows = [item[-1] for item in kept if item[0] != last]
    return sorted(rows, key=lambda s: (s["source"], str(s["id"]), s["budget"] or 1 << 40, s["sample"] or 0))


def html_cell(text: str) -> str:
    """A text, escaped; an interval stands below its figure, since beside it tables get too wide to read."""
    figure, bracket, rest = html.escape(text).partition(" [")
    return f"{figure}<small>[{rest}</small>" if bracket else figure


def html_table(rows: list[list[str]]) -> str:
    """Rows of texts as an HTML table; the first row is the heading."""
    cells = [list(map(html_cell, row)) for row in rows]
    head = "".join(f"<th>{text}</th>" for text in cells[0])
    body = "\n".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in cells[1:])
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def html_picture(path: str) -> str:
    """A PNG file inside the page."""
    with open(path, "rb") as f:
        encoded = base64.b64encode(f.read()).decode()
    name = html.escape(os.path.basename(path))
    wide = " class=wide" if name.startswith("side_by_side") else ""
    return f'<img{wide} alt="{name}" src="data:image/png;base64,{encoded}">'


def write(path: str, title: str, facts: dict, sections: list, samples: list, total: int = 0) -> None:
    """The page. `facts`: {name: text}; a section: {"title", "notes", "tables", "pictures" (paths)}."""
    told = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    parts = []
    for section in sections:
        # Pictures first: what a reader looks for; behind them the first table, the others folded.
        pictures = "".join(map(html_picture, section["pictures"]))
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in section["notes"])
        first, *others = map(html_table, section["tables"]) if section["tables"] else [""]
        more = f"<details><summary>More figures</summary>{''.join(others)}</details>" if others else ""
        content = f"<div class=pics>{pictures}</div>{first}{notes}{more}"
        parts.append(f"<h2>{html.escape(section['title'])}</h2>{content}")
    with open(TEMPLATE, encoding="utf-8") as f:
        page = f.read()
    if not samples:
        page = re.sub("<!--BROWSER-->.*<!--END-->", "", page, flags=re.S)
    # "<" is written as an escape: no text of a model can end the script element.
    encoded = json.dumps(samples, ensure_ascii=False).replace("<", "\\u003c")
    encoded = encoded.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    which = f"{len(samples)} of {total}: problems at random, whole" if total > len(samples) else "all"
    marks = {"<!--TITLE-->": html.escape(title), "<!--FACTS-->": told, "<!--CONTENT-->": "\n".join(parts)}
    marks |= {"<!--WHICH-->": which, "/*DATA*/[]": encoded}
    # In one pass: what is put in is never searched for marks.
    page = re.sub("|".join(map(re.escape, marks)), lambda match: marks[match[0]], page)
    temporary = f"{path}.tmp"
    # Half a surrogate pair, which a model may write, has no place in UTF-8.
    with open(temporary, "w", encoding="utf-8", errors="replace") as f:
        f.write(page)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------
# The report of one evaluation: {data set: figures} -> tables, notes, pictures

COLUMNS = {"accuracy": "accuracy", "+-": "accuracy_stderr", "length": "mean_length", "signed": "signed_error"}
COLUMNS |= {
    "abs error": "abs_error",
    "within 10%": "within_10",
    "over": "over_budget",
    "cut off": "truncated",
}
# The report's further columns; their figures are numbers of tokens, shares, or rates.
MORE = {"median": "median_length", "thinking": "thinking_length", "solution": "solution_length"}
MORE |= {"rmse": "rmse", "over by 500": "over_budget_500", "exceed": "exceed"}
MORE |= {"LIFEBench score": "length_score", "AUC OAA": "overthinking_auc"}
TOKENS = ("mean_length", "median_length", "thinking_length", "solution_length", "length_score")


def table_rows(lines: dict, columns: dict = COLUMNS, intervals: bool = False) -> list[list[str]]:
    """A heading and one row of texts per budget of {budget: figures}; "-" is what is not known."""
    columns = {k: v for k, v in columns.items() if not (intervals and k == "+-")}
    rows = [["budget", "n", *columns]]
    for label, figures in lines.items():
        row = [label, str(figures.get("n", ""))]
        for key in columns.values():
            form = "{:.1f}" if key in TOKENS else "{:.1%}"
            ends = figures.get("ci", {}).get(key) if intervals else None
            row.append(with_interval(figures.get(key), ends, form))
        rows.append(row)
    return rows


def lines_of(part: dict, summary: dict) -> dict:
    """{label: figures} of a data set's table: a line per budget (or group of many), then the means."""
    # As json has them: what is not known is None here, like in the means below.
    names = {b: "none" if b is None else str(b) for b in part["figures"]}
    lines = {names[b]: metrics.jsonable(figures) for b, figures in part["figures"].items()}
    for label, key in (("mean", "mean"), ("mean, trained", "mean_trained")):
        if len(lines) > 1 and summary[key]["abs_error"] is not None:
            lines[label] = summary[key]
    return lines


def format_table(name: str, part: dict, summary: dict) -> str:
    """The table of one data set, as it is printed."""
    text = f"\n{name}: {part['problems']} problems, mode {summary['mode'] or 'none'}"
    if summary["correlation"] is not None:
        text += f", correlation of requested and produced length {summary['correlation']:.3f}"
    return f"{text}\n{plain_table(table_rows(lines_of(part, summary)))}"


def notes_of(summary: dict) -> list[str]:
    """What a data set's tables have no column for, in sentences."""
    notes, form = ["In brackets: 95% bootstrap intervals over problems."], "{:.3f}"
    if summary["correlation"] is not None:
        told = with_interval(summary["correlation"], summary["correlation_ci"], form)
        notes.append(f"Correlation of requested and produced length: {told}.")
    fit = summary["accuracy_by_log_length"]
    if fit["slope_ln"] is not None:
        keys = ("slope_ln", "slope_log10", "r2")
        texts = [with_interval(fit[k], fit.get("ci", {}).get(k), form) for k in keys]
        told = f"slope {texts[0]} (natural logarithm; {texts[1]} to base 10), R^2 {texts[2]}"
        notes.append(f"Accuracy against the logarithm of the mean length: {told}.")
    if fit.get("area") is not None and fit["high"] > 1.1 * fit["low"]:
        told = with_interval(fit["area"], fit.get("ci", {}).get("area"))
        notes.append(f"Mean accuracy over log length, {fit['low']:.0f} to {fit['high']:.0f} tokens: {told}.")
    return notes


def more_tables(lines: dict) -> list[list[list[str]]]:
    """The report's tables beyond the printed one: more figures, pass@k and maj@k, reasoning words."""
    tables = [table_rows(lines, MORE, True)]
    for kind in ("pass_at_k", "maj_at_k"):
        if found := {b: c[kind] for b, c in lines.items() if len(c.get(kind, ())) > 1}:
            ks = sorted({k for row in found.values() for k in row}, key=int)
            short = kind[:4].rstrip("_")
            rows = [[b, *(with_interval(row.get(k), lines[b].get("ci", {}).get(f"{short}@{k}")) for k in ks)]
                    for b, row in found.items()]  # fmt: skip
            tables.append([["budget", *(f"{short}@{k}" for k in ks)], *rows])
    if found := {b: c["patterns"] for b, c in lines.items() if c.get("patterns")}:
        head = ["budget", *(f"{key.replace('_', ' ')} per 1,000 tokens" for key in metrics.PATTERNS)]
        rows = [[b, *(with_interval(row[k], lines[b].get("ci", {}).get(k), "{:.1f}") for k in row)]
                for b, row in found.items()]  # fmt: skip
        tables.append([head, *rows])
    return tables


def summary_rows(models: dict) -> list[list[str]]:
    """Table of {model: {budget: figures}}: a line per budget, a column per model, accuracy at mean length."""
    budgets = list(dict.fromkeys(b for figures in models.values() for b in figures))
    rows = [["asked for", *models]]
    for budget in sorted(budgets, key=lambda b: math.inf if b == "none" else int(b)):
        cells = [figures.get(budget, {}) for figures in models.values()]
        known = [(c.get("accuracy"), c.get("mean_length")) for c in cells]
        texts = ["" if a is None else f"{a:.1%} at {number(n, '{:.0f}')}" for a, n in known]
        rows.append([budget, *texts])
    return rows


def write_report(results: dict, shown: dict, pictures: list[str], kept: list, out: str) -> None:
    """html: pictures, tables and samples of all data sets, and how they were made."""
    sections, at = [], 0
    for name, part in shown.items():
        summary = results["datasets"][name]
        lines = lines_of(part, summary)
        tables = [table_rows(lines, COLUMNS, True), *more_tables(lines)]
        suffix = "" if len(shown) == 1 else "_" + plots.file_name(name)
        wanted = {f"{kind}{suffix}.png" for kind in plots.PICTURES}
        own = [path for path in pictures if os.path.basename(path) in wanted]
        title = f"{name}: {part['problems']} problems, mode {part['mode'] or 'none'}"
        sections.append({"title": title, "notes": notes_of(summary), "tables": tables, "pictures": own})
        at += sum(cell["n"] for cell in summary["budgets"].values())
    if "mean" in results:
        rows = table_rows(results["mean"]["budgets"], COLUMNS, True)
        sections.append({"title": "Mean of the data sets", "notes": [], "tables": [rows], "pictures": []})
    known = {k: v for k, v in results.items() if k not in ("datasets", "mean", "pictures") and v is not None}
    lists = {k: json.dumps(v, ensure_ascii=False) for k, v in known.items() if isinstance(v, (dict, list))}
    model = os.path.basename(str(results.get("model") or results.get("samples")).rstrip("/"))
    path = os.path.join(out, "report.html")
    write(path, f"{model}: length control", known | lists, sections, picked(kept, at), at)
