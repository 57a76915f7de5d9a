"""docs/study.md and its pictures, from $DOCS/study.json and docs/smollm2.json: no model, no samples needed.

    python -m studies.study_report

The words are in study_text.md. What stands there in double braces is computed here: no number is typed.
"""

import json
import os
import re
import sys
from collections.abc import Callable

import numpy as np

from studies import study
from studies.study import ROOT

RECORDS = {}  # {(name, seed): record} of study.json; load() fills it
with open(os.path.join(ROOT, "recipes", "toy.args")) as recipe:  # the budgets that the default run draws
    DRAWN = set(map(int, re.search(r"--budgets bucket:(\S+)", recipe.read())[1].split(",")))
SENSE = {"exact": "number sense", "sense_of_waits": "number sense of waits", "no_sense": "no number sense"}
CONTROL = [  # label, experiment, mode or method
    ("Exact", "exact", None),
    ("Max", "max", "max"),
    ("s1 budget forcing", "decoding", "s1"),
    ("truncation", "decoding", "truncate"),
    ("scaled stop tokens", "decoding", "stop_scale"),
]
TRADE = {
    "exact": "GDPO, capped (the default)", "uncapped": "GDPO, no cap", "summed": "summed, capped",
    "multiplied": "multiplied", "alpha_0.005": "L1, alpha 0.005", "alpha_0.02": "L1, alpha 0.02",
    "alpha_0.1": "L1, alpha 0.1",
}  # fmt: skip
BEYOND = {
    "exact": "none (the default)", "warm": "warm start, numbers", "warm_rl": "numbers, and RL",
    "remind_warm": "numbers and reminders",
    "remind_count_warm": "numbers and counting reminders", "remind_only_warm": "reminders only, warm start",
    "remind_only_warm64": "reminders only, warm start to 64",
    "remind_only": "reminders only, and RL", "remind_only_more": "reminders only, and more RL",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Figures


def load() -> None:
    """Read $DOCS/study.json."""
    RECORDS.clear()
    RECORDS.update(study.read())


def seeds(name: str) -> list[dict]:
    """The finished runs of an experiment, a record per seed."""
    return [r for (n, _), r in sorted(RECORDS.items()) if n == name]


def part(record: dict, data: str, mode: str | None) -> dict:
    """{budget: figures} of a run on one task; `mode`: how it was asked (or the method), None: the first."""
    cells = record["cells"]
    return cells[mode or next(iter(cells))].get(data, {})


def figures(name: str, key: str, at="in", data: str = "toy", mode: str | None = None) -> list[float]:
    """One number per seed: `key`, the mean over the budgets `at`.

    `at`: "in" the trained range, those of it that are "drawn" or "held" out, a list of budgets, or one.
    """
    found = []
    for record in seeds(name):
        cells, (low, high) = part(record, data, mode), record["trained"]
        inside = [b for b in cells if b.isdigit() and low <= int(b) <= high]
        drawn = [b for b in inside if int(b) in DRAWN]
        named = {"in": inside, "drawn": drawn, "held": [b for b in inside if b not in drawn]}
        chosen = named.get(at) if isinstance(at, str) else None
        chosen = chosen or list(map(str, at if isinstance(at, list) else [at]))
        values = [cells[b][key] for b in chosen if cells.get(b, {}).get(key) is not None]
        if values:
            found.append(float(np.mean(values)))
    return found


def show(values: list[float], form: Callable[[float], str]) -> str:
    """Mean and standard deviation over seeds; of one seed the number alone; of none: not run."""
    if not values:
        return "not run"
    mean = form(np.mean(values))
    return f"{mean} ± {form(np.std(values, ddof=1))}" if len(values) > 1 else mean


def first(values: list, form: Callable = str) -> str:
    """The first seed's alone, to stand beside an experiment that has no other."""
    return form(values[0]) if values else "not run"


def percent(value: float) -> str:
    """0.123 -> 12.3%."""
    return f"{100 * value:.1f}%"


def tokens(value: float) -> str:
    """A length."""
    return f"{value:.1f}"


def error(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Mean absolute length error relative to the budget."""
    return show(figures(name, "abs_error", at, data, mode), percent)


def accuracy(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Share of right answers."""
    return show(figures(name, "accuracy", at, data, mode), percent)


def length(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Mean length, tokens."""
    return show(figures(name, "mean_length", at, data, mode), tokens)


def within(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Share of right answers that are at most 1.1 budgets long."""
    return show(figures(name, "within", at, data, mode), percent)


def in_head(name: str, at="in") -> str:
    """Share of the steps that are taken in the head, `b =1` for `b +3 =1`."""
    return show(figures(name, "head", at), percent)


def each_worst(name: str, data: str = "toy") -> list[float]:
    """The largest error of a budget of the trained range, of every seed."""
    each = [figures(name, "abs_error", b, data) for b in study.INSIDE]
    return [max(seed) for seed in zip(*each, strict=True)]


def worst(name: str, data: str = "toy") -> str:
    """Their mean and deviation."""
    return show(each_worst(name, data), percent)


def each_length(name: str, at) -> str:
    """Mean length of every seed, tokens."""
    return ", ".join(map(tokens, figures(name, "mean_length", at)))


def by_size(name: str, column: int, sizes, at: list[int], mode: str | None = None) -> list[float]:
    """One number per seed: mean length (column 1) or accuracy (2) of problems with so many digits."""
    found = []
    for record in seeds(name):
        cells = part(record, "toy", mode)
        rows = [cells[str(b)]["sizes"][str(n)] for b in at for n in sizes if str(n) in cells[str(b)]["sizes"]]
        counts = [row[0] for row in rows]
        found.append(float(np.average([row[column] for row in rows], weights=counts)))
    return found


def spends(name: str, at: list[int], mode: str | None = None) -> str:
    """Correlation of a problem's number of digits and the mean length spent on it."""
    sizes = range(2, 12)
    each = np.array([by_size(name, 1, [n], at, mode) for n in sizes])  # [sizes, seeds]
    return show([float(np.corrcoef(sizes, column)[0, 1]) for column in each.T], lambda v: f"{v:.2f}")


def saved(sizes, at: list[int]) -> str:
    """By how much Max is shorter than Exact, asked for the same, on problems with so many digits."""
    pairs = zip(by_size("max", 1, sizes, at, "max"), by_size("exact", 1, sizes, at), strict=False)
    return show([1 - a / b for a, b in pairs], percent)


def field(name: str, key: str, form: Callable = lambda v: f"{v:.2f}") -> str:
    """A number of the record itself: correlation_exact, onset ..."""
    return show([r[key] for r in seeds(name) if r.get(key) is not None], form)


def onset(name: str) -> str:
    """The step of the onset; how many seeds never had one."""
    found = [r["onset"] for r in seeds(name) if "onset" in r]
    if found and not any(f is not None for f in found):
        return "never"
    text = show([f for f in found if f is not None], lambda v: f"{v:.0f}")
    return text + (f" ({found.count(None)} of {len(found)} never)" if None in found else "")


# ------------------------------------------------------------------------------------------------------------
# Tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def real() -> dict:
    """What studies/smollm2.sh left in docs/: {"models": {name: {budget: cell}}, "warm_start", "steps"}."""
    with open(os.path.join(ROOT, "docs", "smollm2.json")) as f:
        return json.load(f)


def real_table() -> str:
    """Mean length, error, share that was cut and right answers of the real model, before and after."""
    names, models = {"base": "as it comes", "warm": "warm start", "rl": "and RL"}, real()["models"]
    form = "{mean_length:.0f}, {abs_error:.0%}, {truncated:.0%}, {accuracy:.0%}"
    rows = [[names[n], *(form.format(**c) for c in cells.values())] for n, cells in models.items()]
    return table(["model: length, error, cut, right", *models["base"]], rows)


def real_cell(name: str, budget: int) -> str:
    """The mean length of the real model's responses to one budget."""
    return tokens(real()["models"][name][str(budget)]["mean_length"])


def real_steps(key: str, which: slice, form: Callable = percent) -> str:
    """The mean over some of RL's steps."""
    return form(np.mean([m[key] for m in real()["steps"][which]]))


def headline() -> str:
    """The default run: error, worst budget, held-out budgets, correlation, accuracy on both tasks."""
    rows = [
        [
            "base, asked for no length",
            "",
            "",
            "",
            "",
            accuracy("base", "none"),
            accuracy("base", "none", "toy_ood"),
        ]
    ]
    for name, label in SENSE.items():
        if not seeds(name):
            continue
        rows.append([f"Exact, {label}", error(name), error(name, "held"), worst(name),
                     field(name, "correlation_exact", lambda v: f"{v:.3f}"), accuracy(name)])  # fmt: skip
        rows[-1].append(f"{accuracy(name, data='toy_ood')}, error {error(name, data='toy_ood')}")
    head = "model|error|never drawn|worst budget|correlation|right|unseen task: right".split("|")
    return table(head, rows)


def control_table(key: str = "within") -> str:
    """What is right and not too long, a row per way to control the length."""
    asked = study.INSIDE
    rows = [[label, *[show(figures(name, key, b, mode=mode)[:3], short) for b in asked]]
            for label, name, mode in CONTROL]  # fmt: skip
    return table(["asked for", *map(str, asked)], rows)


def short(value: float) -> str:
    """0.123 -> 12."""
    return f"{100 * value:.0f}"


def trade_table() -> str:
    """Error and accuracy at small and at large budgets: what a token is worth against an answer."""
    small, large = [b for b in study.INSIDE if b < 30], [b for b in study.INSIDE if b > 30]
    rows = [
        [
            label,
            error(n, small),
            accuracy(n, small),
            within(n, small),
            in_head(n, small),
            error(n, large),
            accuracy(n, large),
        ]
        for n, label in TRADE.items()
    ]
    head = "reward|error, below 30|right|right and not too long|in the head|error, above 30|right".split("|")
    return table(head, rows)


def max_table() -> str:
    """Tokens that Exact and Max spend where the maximum is 64, by the number of digits."""
    sizes = range(2, 12)
    rows = []
    for label, name, mode in (("Exact", "exact", None), ("Max", "max", "max"),
                              ("Max from Exact", "max_from_exact", "max"),
                              ("Max, added", "max_added", None)):  # fmt: skip
        if not seeds(name):
            continue
        each = [show(by_size(name, 1, [n], [64], mode), lambda v: f"{v:.0f}") for n in sizes]
        rows.append([label, *each, accuracy(name, 64, mode=mode)])
    return table(["digits", *map(str, sizes), "right"], rows)


def beyond_table() -> str:
    """What each idea makes of budgets inside and beyond the trained range."""
    head = ["idea", "error inside", "at 96 (1.5 times)", "at 128 (2)", "at 256 (4)"]
    head += ["right inside", "at 96", "at 128", "at 256"]
    rows = []
    for name, label in BEYOND.items():
        if not seeds(name):
            continue
        rows.append([label, error(name), *[error(name, b) for b in (96, 128, 256)]])
        rows[-1] += [accuracy(name), *[accuracy(name, b) for b in (96, 128, 256)]]
    return table(head, rows)


# ------------------------------------------------------------------------------------------------------------
# Pictures


def canvas(columns: int = 1, rows: int = 1, size: tuple = (6.2, 4.4)) -> tuple:
    """(figure, axes [rows, columns]) in the style of plots.py."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from evaluation.plots import STYLE

    plt.rcParams.update(STYLE)
    width, height = size
    fig, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False, layout="constrained"
    )
    return fig, axes


def save(fig, name: str) -> None:
    """$DOCS/study_NAME.png."""
    import matplotlib.pyplot as plt

    fig.savefig(os.path.join(study.DOCS, f"study_{name}.png"), dpi=110)
    plt.close(fig)


COLORS = "#1f3f5f #b5541c #4f8a5b #7a5195 #c9a227 #5f9ea0 0.35 #d45087 #8c6d4a #2e8b57 #b03060".split()
MARKS = "osD^vPX*hd8"


def line(
    ax,
    i: int,
    name: str,
    key: str,
    label: str,
    scale: float = 1,
    against: str | None = None,
    at=None,
    **which,
) -> None:
    """`key` against the budget (or another figure): mean over seeds, bars of one standard deviation."""
    if not seeds(name):
        ax.plot([], [], color=COLORS[i], marker=MARKS[i], ls=":", label=f"{label}: not run")
        return
    cells = part(seeds(name)[0], which.get("data", "toy"), which.get("mode"))
    budgets = [int(b) for b in cells if b.isdigit() and (at is None or int(b) in at)]
    y = [[scale * v for v in figures(name, key, b, **which)] for b in budgets]
    x = [np.mean(figures(name, against, b, **which)) for b in budgets] if against else budgets
    spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in y]
    style = dict(color=COLORS[i], marker=MARKS[i], ms=5, lw=1.4, capsize=2, alpha=0.9)
    order = np.argsort(x)
    ax.errorbar(np.array(x)[order], np.array([np.mean(v) for v in y])[order], np.array(spread)[order],
                label=label, **style)  # fmt: skip


def identity(ax, high: int) -> None:
    """Exactly as asked."""
    ax.plot([0, high], [0, high], color="black", lw=1.1, ls="--", label="exactly as asked", zorder=1)


def below(ax, columns: int = 2) -> None:
    """A legend under the axes."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, fontsize=8.5)


def draw_accuracy() -> None:
    """Right and not too long against the budget; right against the length that was written."""
    fig, axes = canvas(2, 1, (7, 5))
    for i, (label, name, mode) in enumerate(CONTROL):
        line(axes[0, 0], i, name, "within", label, 100, mode=mode, at=study.INSIDE)
        line(axes[0, 1], i, name, "accuracy", label, 100, against="mean_length", mode=mode, at=study.INSIDE)
    if seeds("base"):
        x, y = (np.mean(figures("base", key, "none")) for key in ("mean_length", "accuracy"))
        axes[0, 0].axhline(100 * y, color="black", ls="-.", lw=1.2, label="base, asked for no length")
        axes[0, 1].plot(x, 100 * y, "*", ms=13, color="black", label="base, asked for no length")
    axes[0, 0].set(xlabel="budget (tokens)", ylabel="right, and at most 1.1 budgets long (%)", ylim=(0, 102))
    axes[0, 1].set(xlabel="mean length (tokens)", ylabel="right (%)", ylim=(0, 102))
    below(axes[0, 0], 3)
    save(fig, "accuracy")


def draw_sense() -> None:
    """Training errors with and without number sense, a line per seed."""
    fig, axes = canvas(1, 1, (7, 4))
    for i, (name, label) in enumerate(SENSE.items()):
        for k, record in enumerate(seeds(name)):
            steps = 5 * np.arange(len(record["error"])) + 2.5
            axes[0, 0].plot(steps, 100 * np.array(record["error"]), color=COLORS[i], lw=1.3,
                            label=None if k else label)  # fmt: skip
    axes[0, 0].set(xlabel="step", ylabel="length error in training (%)", ylim=(0, 70))
    below(axes[0, 0])
    save(fig, "sense")


def draw_trade() -> None:
    """Accuracy against length error at the small budgets, a point per reward."""
    fig, axes = canvas(1, 1, (7, 4.6))
    small = [b for b in study.INSIDE if b < 30]
    for i, (name, label) in enumerate(TRADE.items()):
        x, y = (figures(name, key, small) for key in ("abs_error", "accuracy"))
        axes[0, 0].plot(100 * np.array(x), 100 * np.array(y), MARKS[i], color=COLORS[i], ms=8, label=label)
    axes[0, 0].set(xlabel="length error, budgets below 30 (%)", ylabel="right, budgets below 30 (%)")
    below(axes[0, 0], 3)
    save(fig, "trade")


def draw_max() -> None:
    """Tokens spent at a maximum of 64, against the number of digits."""
    fig, axes = canvas(1, 1, (7, 4.6))
    sizes = list(range(2, 12))
    for i, (label, name, mode) in enumerate((("Exact", "exact", None), ("Max", "max", "max"),
                                             ("Max from Exact", "max_from_exact", "max"),
                                             ("Max, added", "max_added", None))):  # fmt: skip
        if seeds(name):
            each = np.array([by_size(name, 1, [n], [64], mode) for n in sizes])
            spread = each.std(1, ddof=1) if each.shape[1] > 1 else None
            axes[0, 0].errorbar(
                sizes, each.mean(1), spread, color=COLORS[i], marker=MARKS[i], capsize=2, label=label
            )
    axes[0, 0].plot(
        sizes, [3 * n + 3 for n in sizes], color="black", ls="--", lw=1.1, label="whole chain in full"
    )
    axes[0, 0].set(xlabel="digits of the problem", ylabel="mean length, asked for 64 (tokens)", ylim=(0, 70))
    below(axes[0, 0])
    save(fig, "max")


def draw_beyond() -> None:
    """Mean produced against requested length, and accuracy, up to four times the largest trained budget."""
    fig, axes = canvas(2, 1, (7, 5))
    identity(axes[0, 0], 256)
    names = [name for name in BEYOND if seeds(name)]
    for ax, key, scale in ((axes[0, 0], "mean_length", 1), (axes[0, 1], "accuracy", 100)):
        ax.axvspan(16, 64, color="0.93", zorder=0)
        for i, name in enumerate(names):
            line(ax, i, name, key, BEYOND[name], scale)
        ax.set(xlabel="requested length (tokens); shaded: trained")
    axes[0, 0].set(ylabel="mean produced length (tokens)", ylim=(0, 280))
    axes[0, 1].set(ylabel="right (%)", ylim=(0, 102))
    below(axes[0, 0])
    save(fig, "beyond")


# ------------------------------------------------------------------------------------------------------------
# The page


def missing() -> str:
    """Which experiments have no seed yet, as a section; nothing where all were run."""
    names = ", ".join(f"`{name}`" for name in study.RUNS if not seeds(name))
    return f"## Set up, not run yet\n\n{names}: `bash studies/study.sh` runs them.\n" if names else ""


def render(text: str) -> str:
    """The words with every {{ expression }} computed; expressions see the functions of this file."""
    return re.sub(r"\{\{(.+?)\}\}", lambda m: str(eval(m[1].strip(), globals())), text, flags=re.S)


def page() -> str:
    """docs/study.md."""
    with open(os.path.join(ROOT, "studies", "study_text.md"), encoding="utf-8") as f:
        return render(f.read())


def main() -> None:
    """Pictures and page of what study.json holds."""
    load()
    if not RECORDS:
        sys.exit(f"study_report.py: error: {study.DOCS} holds no study.json: bash studies/study.sh makes it")
    for draw in (draw_accuracy, draw_sense, draw_trade, draw_max, draw_beyond):
        draw()
    with open(os.path.join(study.DOCS, "study.md"), "w", encoding="utf-8") as f:
        f.write(page())
    todo = [f"{n}:{s}" for n, s in study.wanted(False) if (n, s) not in RECORDS]
    print(f"{len(RECORDS)} runs are in {study.DOCS}/study.md; not run: {' '.join(todo) or 'none'}")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main()
