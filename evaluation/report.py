"""Tables, and one self-contained HTML file: tables, pictures, a browser of single samples. Needs no network.

The page holds the pictures themselves, its style and its script, so that it can be mailed and opened from
disk.
"""

import base64
import html
import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

SHOWN = 800  # samples in the page's browser: all of some problems, rather than one of each
TEMPLATE = Path(__file__).with_name("report_page.html")
FIELDS = "id sample source problem answer prompt budget mode effort response length finish_reason correct"
LONGEST = 20_000  # characters of a response that are shown; what is left out of its middle is said
COLUMNS = {"accuracy": "accuracy", "+-": "accuracy_stderr", "length": "mean_length"}
COLUMNS |= {"signed": "signed_error", "abs error": "abs_error", "within 10%": "within_10"}
COLUMNS |= {"over": "over_budget", "cut off": "truncated"}
# The report's further columns; pass@k and maj@k follow.
MORE = {"median": "median_length", "thinking": "thinking_length", "over by 500": "over_budget_500"}
MORE |= {"LIFEBench score": "length_score", "AUC OAA": "overthinking_auc"}
TOKENS = ("mean_length", "median_length", "thinking_length", "length_score")
MARKDOWN = {  # heading: figure in results.json, how it is written
    "samples": ("n", "{}"), "accuracy": ("accuracy", "{:.1%}"), "mean length": ("mean_length", "{:.0f}"),
    "of it thinking": ("thinking_length", "{:.0f}"),
    "signed error": ("signed_error", "{:+.1%}"), "absolute error": ("abs_error", "{:.1%}"),
    "within 10%": ("within_10", "{:.1%}"), "over budget": ("over_budget", "{:.1%}"),
    "cut off": ("truncated", "{:.1%}"), "accuracy lost": ("lost", "{:+.1%}"),
}  # fmt: skip
MADE = "model sampler ask_by wording mode n temperature top_p max_tokens seed require_think".split()

# ---- Tables: rows of texts, the first one the heading


def show(value: float | None, ends: Sequence[float] | None = None, form: str = "{:.1%}") -> str:
    """ "61.0% [58.2%, 63.9%]"; no brackets where there is no interval, "-" where nothing is known."""
    if value is None:
        return "-"
    return form.format(value) + (f" [{form.format(ends[0])}, {form.format(ends[1])}]" if ends else "")


def plain_table(rows: list[list[str]]) -> str:
    """Rows of texts as lines of aligned columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def table_rows(lines: dict, columns: dict = COLUMNS, intervals: bool = False) -> list[list[str]]:
    """One row per budget of {budget: figures}; an interval stands in the place of the standard error."""
    columns = {k: v for k, v in columns.items() if not (intervals and k == "+-")}
    rows = [["budget", "n", *columns]]
    for label, figures in lines.items():
        ci = figures.get("ci", {}) if intervals else {}
        forms = {k: "{:.1f}" if k in TOKENS else "{:.1%}" for k in columns.values()}
        texts = [show(figures.get(k), ci.get(k), form) for k, form in forms.items()]
        rows.append([label, str(figures.get("n", "")), *texts])
    return rows


def lines_of(part: dict) -> dict:
    """{label: figures} of a data set's table: a line per budget, then the means; pass@k as figures."""
    lines = {}
    for budget, figures in part["budgets"].items():
        lines[budget] = dict(figures)
        for kind in ("pass", "maj"):
            lines[budget] |= {f"{kind}@{k}": v for k, v in figures.get(f"{kind}_at_k", {}).items()}
    mean = part["mean"] if len(lines) > 1 and part["mean"]["abs_error"] is not None else None
    return lines | ({"mean": mean} if mean else {})


def format_table(name: str, part: dict) -> str:
    """The table of one data set, as it is printed."""
    text = f"\n{name}: {part['problems']} problems, mode {part['mode'] or 'none'}"
    text += f", asked by {part['ask_by']}" if part.get("ask_by") else ""
    if part["correlation"] is not None:
        text += f", correlation of requested and produced length {part['correlation']:.3f}"
    return f"{text}\n{plain_table(table_rows(lines_of(part)))}"


def summary_rows(models: dict) -> list[list[str]]:
    """Table of {model: {budget: figures}}: a line per budget, a column per model, accuracy at mean length."""
    budgets = list(dict.fromkeys(b for figures in models.values() for b in figures))
    rows = [["asked for", *models]]
    for budget in sorted(budgets, key=lambda b: int(b) if b.isdigit() else math.inf):
        cells = [figures.get(budget) for figures in models.values()]
        pairs = [c and (show(c["accuracy"]), show(c["mean_length"], form="{:.0f}")) for c in cells]
        rows.append([budget, *(" at ".join(pair) if pair else "" for pair in pairs)])
    return rows


def markdown_table(results: dict) -> str:
    """Markdown: a line per data set and budget of a results.json, below it the correlations."""
    lines = [f"| data | asked for | {' | '.join(MARKDOWN)} |", "| --- | ---: |" + " ---: |" * len(MARKDOWN)]
    for name, part in (results["datasets"] | {"mean": results.get("mean", {"budgets": {}})}).items():
        free = part["budgets"].get("none")
        for budget, cell in part["budgets"].items():
            lost = free["accuracy"] - cell["accuracy"] if free and cell is not free else None
            known = {key: value for key, value in (cell | {"lost": lost}).items() if value is not None}
            texts = [form.format(known[key]) if key in known else "" for key, form in MARKDOWN.values()]
            lines.append(f"| {name} | {budget} | {' | '.join(texts)} |")
    found = {name: part["correlation"] for name, part in results["datasets"].items()}
    told = ", ".join(f"{name} {show(value, form='{:.3f}')}" for name, value in found.items())
    note = "Lengths in generated tokens, end token included; error: (length - budget) / budget."
    return "\n".join([*lines, "", f"{note} Correlation of requested and produced length: {told}."])


# ---- The page


class Browser:
    """The page's samples: all of some problems, at every budget, whatever the order they come in.

    Of more than SHOWN samples those of the problems with the lowest checksums.
    """

    def __init__(self):
        self.rows, self.below, self.count, self.total = {}, 2**32, 0, 0

    def add(self, sample: dict) -> None:
        rank, self.total = zlib.crc32(f"{sample['source']} {sample['id']}".encode()), self.total + 1
        if not isinstance(sample.get("response"), str) or rank >= self.below:
            return
        entry = {key: sample.get(key) for key in FIELDS.split()}
        if (cut := len(entry["response"]) - LONGEST) > 0:
            start, end = entry["response"][: LONGEST // 2], entry["response"][-LONGEST // 2 :]
            entry["response"] = f"{start}\n[... {cut} characters left out ...]\n{end}"
        self.rows.setdefault(rank, []).append(entry)
        self.count += 1
        if self.count > SHOWN and len(self.rows) > 1:
            self.below = max(self.rows)
            self.count -= len(self.rows.pop(self.below))

    def samples(self) -> list[dict]:
        """In the order of data set, problem, budget and sample number."""
        rows = [entry for entries in self.rows.values() for entry in entries]
        return sorted(rows, key=lambda s: (s["source"], str(s["id"]), s["budget"] or 2**40, s["sample"] or 0))


def html_table(rows: list[list[str]]) -> str:
    """An interval stands below its figure, since beside it tables get too wide to read."""
    cells = [[re.sub(r" (\[.*)", r"<small>\1</small>", html.escape(text)) for text in row] for row in rows]
    head = "".join(f"<th>{text}</th>" for text in cells[0])
    body = "\n".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in cells[1:])
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def html_picture(path: str) -> str:
    """A PNG file inside the page."""
    encoded, name = base64.b64encode(Path(path).read_bytes()).decode(), html.escape(os.path.basename(path))
    wide = " class=wide" if name.startswith("side_by_side") else ""
    return f'<img{wide} alt="{name}" src="data:image/png;base64,{encoded}">'


def write(path: str, title: str, facts: dict, sections: list, samples: list, total: int = 0) -> None:
    """The page. `facts`: {name: text}; a section: (title, note, tables, paths of pictures)."""
    told = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    parts = []
    for heading, note, tables, pictures in sections:
        # Pictures first: what a reader looks for; behind them the first table, the others folded.
        first, *others = [*map(html_table, tables), ""]
        shown = f"<div class=pics>{''.join(map(html_picture, pictures))}</div>{first}"
        parts.append(f"<h2>{html.escape(heading)}</h2>{shown}<p>{html.escape(note)}</p>")
        if any(others):
            parts.append(f"<details><summary>More figures</summary>{''.join(others)}</details>")
    page = TEMPLATE.read_text(encoding="utf-8")
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
    # Half a surrogate pair, which a model may write, has no place in UTF-8.
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def write_report(results: dict, pictures: dict[str, list], browser: Browser, out: str) -> None:
    """OUT/report.html of a results.json; `pictures`: paths by data set. Its protocol adds adherence.md."""
    sections = []
    for name, part in results["datasets"].items():
        lines, note = lines_of(part), "In brackets: 95% bootstrap intervals over problems."
        if part["correlation"] is not None:
            note += f" Correlation of requested and produced length: {part['correlation']:.3f}."
        fit = part["accuracy_by_log_length"]
        if fit["slope_ln"] is not None:
            slope = f"slope {fit['slope_ln']:.3f}, R^2 {show(fit['r2'], form='{:.3f}')}"
            note += f" Accuracy against the natural logarithm of the mean length: {slope}."
        more = MORE | {k: k for figures in lines.values() for k in figures if "@" in k}
        tables = [table_rows(lines, COLUMNS, True), table_rows(lines, more, True)]
        sections.append((name, note, tables, pictures[name]))
    if "mean" in results:
        rows = table_rows(results["mean"]["budgets"], COLUMNS, True)
        sections.append(("Mean of the data sets", "", [rows], []))
    facts = {k: v for k, v in results.items() if k not in ("datasets", "mean", "pictures") and v is not None}
    model = os.path.basename(str(results.get("model") or results.get("samples")).rstrip("/"))
    page = os.path.join(out, "report.html")
    write(page, f"{model}: length control", facts, sections, browser.samples(), browser.total)
    if results.get("protocol") == "adherence":
        made = [f"{key} {results[key]}" for key in MADE if results.get(key) is not None]
        made += [f"{n}: {d['problems']} problems, {d['sha256'][:12]}" for n, d in results["data"].items()]
        made += [f"{name} {version}" for name, version in results["versions"].items()]
        with open(os.path.join(out, "adherence.md"), "w", encoding="utf-8") as f:
            f.write(f"{markdown_table(results)}\n\nMade with: {'; '.join(made)}.\n")
