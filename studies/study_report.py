"""docs/study.md and its pictures, from $DOCS/study.json and docs/smollm2.json: no model, no samples needed.

    python -m studies.study_report

The words are in study_text.md. What stands there in double braces is computed here: no number is typed.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np

from studies import study
from studies.study import ROOT, RUNS

RECORDS = {}  # {(name, seed): record} of study.json; load() fills it
CORE = ["lcpo_sum", "lcpo_gdpo", "peaked_sum", "peaked_gdpo"]
BLOG = {"ai2_short": "exact, short range", "ai2_long": "exact, long range", "ai2_bucketed": "bucketed"}
BLOG |= {"ai2_upto": "up to"}
LABELS = BLOG | {
    "lcpo_sum": "L1's reward, summed (GRPO)", "lcpo_gdpo": "L1's reward, GDPO",
    "peaked_sum": "peaked reward, summed (GRPO)", "peaked_gdpo": "peaked reward, GDPO",
    "supervised": "supervised, sentence", "ruler": "supervised, length tokens",
    "relative": "relative wording",
    "tally": "tally marks", "tally_8": "tally marks worth 8", "tally_kl": "these, KL 0.05",
    "remind": "reminders", "remind_capped": "capped reminders",
    "remind_16": "rarer reminders", "remind_16_capped": "rarer reminders, capped",
    "free_beyond": "beyond without answers", "unfinished": "unfinished responses",
}  # fmt: skip
# Those that write the budget in another way, and those that say or show more than a budget.
IDEAS = ["peaked_gdpo", "relative", "tally", "tally_8", "tally_kl"], ["peaked_gdpo", "remind"]
IDEAS[1].extend("remind_capped remind_16 remind_16_capped unfinished free_beyond".split())


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
    """One number per seed: `key`, the mean over the budgets `at`: "in" the trained range, or one budget."""
    found = []
    for record in seeds(name):
        cells = part(record, data, mode)
        low, high = record["trained"]
        inside = [b for b in cells if b.isdigit() and low <= int(b) <= high]
        chosen = inside if at == "in" else [str(at)]
        values = [cells[b][key] for b in chosen if b in cells and cells[b][key] is not None]
        if values:
            found.append(float(np.mean(values)))
    return found


def show(values: list[float], form: Callable[[float], str]) -> str:
    """Mean and standard deviation over seeds; of one seed the number alone; of none: not run."""
    if not values:
        return "not run"
    mean = form(np.mean(values))
    return f"{mean} ± {form(np.std(values, ddof=1))}" if len(values) > 1 else mean


def percent(value: float) -> str:
    """0.123 -> 12.3%."""
    return f"{100 * value:.1f}%"


def tokens(value: float) -> str:
    """A length."""
    return f"{value:.1f}"


def error(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Mean absolute length error relative to the budget."""
    return show(figures(name, "abs_error", at, data, mode), percent)


def signed(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Mean signed length error relative to the budget."""
    return show(figures(name, "signed_error", at, data, mode), percent)


def accuracy(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Share of right answers."""
    return show(figures(name, "accuracy", at, data, mode), percent)


def length(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Mean length, tokens."""
    return show(figures(name, "mean_length", at, data, mode), tokens)


def over(name: str, at="in", data: str = "toy", mode: str | None = None) -> str:
    """Share of responses longer than the budget."""
    return show(figures(name, "over_budget", at, data, mode), percent)


def field(name: str, key: str, form: Callable = lambda v: f"{v:.2f}") -> str:
    """A number of the record itself: correlation_exact, onset, share of the length term ..."""
    return show([r[key] for r in seeds(name) if r.get(key) is not None], form)


def onset(name: str) -> str:
    """The step of the onset; how many seeds never had one."""
    found = [r["onset"] for r in seeds(name) if "onset" in r]
    text = show([f for f in found if f is not None], lambda v: f"{v:.0f}")
    return text + (f" ({found.count(None)} of {len(found)} never)" if None in found else "")


def paired(name: str, other: str, key: str = "abs_error") -> str:
    """How many points of a percent `key` is below that of `other`, seed by seed (same base, same prompts)."""
    common = [s for n, s in RECORDS if n == name and (other, s) in RECORDS]
    if not common:
        return "not run"
    by_seed = {
        n: dict(zip([r["seed"] for r in seeds(n)], figures(n, key), strict=True)) for n in (name, other)
    }
    lower = [100 * (by_seed[other][s] - by_seed[name][s]) for s in common]
    text = show(lower, lambda v: f"{v:.1f}")
    return f"{text} points lower, in {sum(d > 0 for d in lower)} of {len(lower)} seeds"


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


def by_budget(names: list[str], form: Callable = error, budgets=None, **options) -> str:
    """A row per experiment, a column per budget; `form` is error, accuracy, length ..."""
    asked = budgets or RUNS[names[0]]["asked"]
    rows = [[LABELS.get(n, n), *[form(n, b, **options) for b in asked]] for n in names]
    return table(["asked for", *map(str, asked)], rows)


def blog_table() -> str:
    """The blog's four settings: control inside and outside the trained range, on both tasks."""
    head = "setting|trained on|error inside|the same, unseen task|error at 1.5 times the largest".split("|")
    rows = []
    for name, label in BLOG.items():
        mode = RUNS[name].get("modes", ["exact"])[0]
        low, high = RUNS[name]["trained"]
        rows.append([label, f"{low} to {high}", error(name, mode=mode)])
        rows[-1] += [error(name, data="toy_ood", mode=mode), error(name, 3 * high // 2, mode=mode)]
    return table(head, rows)


def core_table() -> str:
    """The two rewards, summed and decoupled: error, correlation, onset, accuracy."""
    head = "reward, advantage|length error|correlation|onset (step)|accuracy|unseen task: error".split("|")
    rows = [
        [LABELS[n], error(n), field(n, "correlation_exact", lambda v: f"{v:.3f}"), onset(n), accuracy(n),
         error(n, data="toy_ood")]
        for n in CORE
    ]  # fmt: skip
    return table(head, rows)


def methods_table() -> str:
    """Accuracy and length of what can be done for a budget."""
    asked = RUNS["decoding"]["asked"][:-1]
    rows = []
    for label, name, mode in METHODS:
        cells = []
        for b in asked:
            if not figures(name, "accuracy", b, mode=mode):
                cells.append("-")
                continue
            cells.append(f"{np.mean(figures(name, 'accuracy', b, mode=mode)):.0%} at "
                         f"{np.mean(figures(name, 'mean_length', b, mode=mode)):.0f}")  # fmt: skip
        rows.append([label, *cells])
    return table(["asked for", *map(str, asked)], rows)


METHODS = [  # label, experiment, mode or method
    ("base", "base", None),
    ("s1 budget forcing", "decoding", "s1"),
    ("hard truncation", "decoding", "truncate"),
    ("L1-Exact", "lcpo_sum", None),
    ("L1-Max, asked as maximum", "l1_max", "max"),
    ("L1-Max, asked exactly", "l1_max", "exact"),
]
ALPHAS = {0.0005: "alpha_0.0005", 0.02: "lcpo_sum", 0.1: "alpha_0.1"}


def alpha_table() -> str:
    """Error, accuracy and onset for each alpha (the first seed only: the others have one)."""
    rows = []
    for alpha, name in ALPHAS.items():
        one = {key: figures(name, key)[:1] for key in ("abs_error", "accuracy", "mean_length")}
        first = [r.get("onset") for r in seeds(name)[:1]]
        rows.append([f"{alpha:g}", show(one["abs_error"], percent), show(one["accuracy"], percent)])
        rows[-1] += [show(one["mean_length"], tokens), "not run" if not first else first[0] or "never"]
    return table(["alpha", "length error", "accuracy", "tokens", "onset (step)"], rows)


def beyond_table() -> str:
    """What each idea makes of budgets inside and beyond the trained range."""
    head = ["idea", "error 16 to 48", "at 64", "at 72 (1.5 times)", "at 96 (2 times)"]
    head += ["accuracy 16 to 48", "at 72", "at 96"]
    rows = []
    for name in [*IDEAS[0], *IDEAS[1][1:]]:
        inside = [figures(name, "abs_error", b) for b in (16, 20, 24, 32, 40, 48)]
        inside = np.mean(inside, 0).tolist() if all(inside) else []
        rows.append([LABELS[name], show(inside, percent), *[error(name, b) for b in (64, 72, 96)]])
        rows[-1] += [accuracy(name), accuracy(name, 72), accuracy(name, 96)]
    rows[0][0] = "none of them"
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
    ax, i: int, name: str, key: str, label: str, scale: float = 1, against: str | None = None, **which
) -> None:
    """`key` against the budget (or another figure): mean over seeds, bars of one standard deviation."""
    if not seeds(name):
        ax.plot([], [], color=COLORS[i], marker=MARKS[i], ls=":", label=f"{label}: not run")
        return
    budgets = [
        int(b) for b in part(seeds(name)[0], which.get("data", "toy"), which.get("mode")) if b.isdigit()
    ]
    y = [[scale * v for v in figures(name, key, b, **which)] for b in budgets]
    x = [np.mean(figures(name, against, b, **which)) for b in budgets] if against else budgets
    spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in y]
    style = dict(color=COLORS[i], marker=MARKS[i], ms=5, lw=1.4, capsize=2, alpha=0.9)
    order = np.argsort(x)
    ax.errorbar(np.array(x)[order], np.array([np.mean(v) for v in y])[order], np.array(spread)[order],
                label=label, **style)  # fmt: skip


def shade(ax, low: int, high: int) -> None:
    """The trained range."""
    ax.axvspan(low, high, color="0.93", zorder=0, label="trained range")


def identity(ax, high: int) -> None:
    """Exactly as asked."""
    ax.plot([0, high], [0, high], color="black", lw=1.1, ls="--", label="exactly as asked", zorder=1)


def below(ax, columns: int = 2) -> None:
    """A legend under the axes."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, fontsize=8.5)


def draw_blog() -> None:
    """Violins of the blog's four settings; the middle 90% of each budget's responses."""
    from evaluation import plots

    fig, axes = canvas(2, 2, (7, 5))
    for ax, (name, label) in zip(axes.flat, BLOG.items(), strict=True):
        spec = RUNS[name]["flags"].split("--budgets ")[1].split()[0]
        ax.set_title(f"{label}: {spec}", loc="left", fontsize=11)
        cells = part(seeds(name)[0], "toy", None) if seeds(name) else {}
        if not cells:
            ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
            continue
        drawn = {int(b): np.repeat([int(n) for n in c["lengths"]], list(c["lengths"].values()))
                 for b, c in cells.items()}  # fmt: skip
        low, high = RUNS[name]["trained"]
        buckets = spec.startswith("bucket:")
        known = [int(b) for b in spec[7:].split(",")] if buckets else [*range(low, high + 1)]
        plots.draw_violins(ax, drawn, known)
    save(fig, "blog")


def draw_tasks() -> None:
    """Accuracy and error against the requested length, on the trained task and on the one RL never saw."""
    fig, axes = canvas(2, 2, (6.4, 4))
    for j, (data, title) in enumerate({"toy": "trained task (add)", "toy_ood": "unseen task (max)"}.items()):
        for i, name in enumerate(BLOG):
            mode = RUNS[name].get("modes", ["exact"])[0]
            line(axes[0, j], i, name, "accuracy", BLOG[name], 100, data=data, mode=mode)
            line(axes[1, j], i, name, "abs_error", BLOG[name], 100, data=data, mode=mode)
        base = figures("base", "accuracy", "none", data)
        if base:
            axes[0, j].axhline(
                100 * np.mean(base), color="black", ls="-.", lw=1.2, label="base, asked for no length"
            )
        axes[0, j].set(title=title, ylabel="accuracy (%)", xlabel="requested length (tokens)", ylim=(0, 103))
        axes[1, j].set(ylabel="mean |length - budget| / budget (%)", xlabel="requested length (tokens)")
        below(axes[0, j])
    save(fig, "tasks")


def draw_l1() -> None:
    """Accuracy against length of L1's models and of what needs no training; errors per budget beside it."""
    fig, axes = canvas(2, 1, (7, 5))
    for i, (label, name, mode) in enumerate(METHODS):
        if name == "base" and seeds(name):  # it has one length, whatever it is asked for
            x, y = (np.mean(figures(name, key, "none")) for key in ("mean_length", "accuracy"))
            axes[0, 0].plot(x, 100 * y, "*", ms=13, color="black", label="base, asked for no length")
            continue
        line(axes[0, 0], i, name, "accuracy", label, 100, against="mean_length", mode=mode)
    axes[0, 0].set(xlabel="mean produced length (tokens)", ylabel="accuracy (%)", ylim=(30, 102))
    below(axes[0, 0])
    shade(axes[0, 1], 16, 48)
    line(axes[0, 1], 0, "lcpo_sum", "abs_error", "L1-Exact, absolute", 100)
    line(axes[0, 1], 1, "lcpo_sum", "signed_error", "L1-Exact, signed", 100)
    line(axes[0, 1], 2, "l1_max", "signed_error", "L1-Max asked as maximum, signed", 100, mode="max")
    axes[0, 1].axhline(0, color="black", lw=0.8)
    axes[0, 1].set(xlabel="requested length (tokens)", ylabel="length error (% of the budget)")
    below(axes[0, 1])
    save(fig, "l1")


def draw_onset() -> None:
    """Training errors of the core runs, a thin line per seed."""
    fig, axes = canvas(2, 2, (6, 3.4))
    for i, (ax, name) in enumerate(zip(axes.flat, CORE, strict=True)):
        for record in seeds(name):
            steps = 5 * np.arange(len(record["error"])) + 2.5
            ax.plot(steps, 100 * np.array(record["error"]), color=COLORS[i], lw=1.3)
            if record["onset"] is not None:
                ax.axvline(record["onset"], color=COLORS[i], lw=0.8, ls=":")
        ax.set_title(LABELS[name], loc="left", fontsize=11)
        ax.set(xlabel="step", ylabel="length error in training (%)", ylim=(0, 70))
    save(fig, "onset")


def draw_gdpo() -> None:
    """Final error and correlation of the core runs, a point per seed."""
    fig, axes = canvas(2, 1, (6, 3.6))
    for i, name in enumerate(CORE):
        for ax, values in (
            (axes[0, 0], [100 * v for v in figures(name, "abs_error")]),
            (axes[0, 1], [r["correlation_exact"] for r in seeds(name)]),
        ):
            ax.plot([i] * len(values), values, MARKS[i], color=COLORS[i], ms=8, alpha=0.8)
            if values:
                ax.plot([i - 0.25, i + 0.25], [np.mean(values)] * 2, color="black", lw=2)
    for ax, text in zip(axes[0], ("length error (%)", "correlation, asked and produced"), strict=True):
        ax.set_xticks(
            range(4), [LABELS[n].replace(", ", "\n").replace(" (GRPO)", "") for n in CORE], fontsize=8.5
        )
        ax.set(ylabel=text, xlim=(-0.6, 3.6))
    axes[0, 0].set_ylim(0)
    save(fig, "gdpo")


def draw_alpha() -> None:
    """Error and accuracy against alpha."""
    fig, axes = canvas(1, 1, (6.4, 4))
    ax = axes[0, 0]
    for key, label, i in (("abs_error", "length error", 0), ("accuracy", "accuracy", 1)):
        found = [(a, 100 * figures(n, key)[0]) for a, n in ALPHAS.items() if figures(n, key)]
        if found:
            ax.plot(*zip(*found, strict=True), color=COLORS[i], marker=MARKS[i], label=label)
    ax.set(xscale="log", xlabel="alpha (reward per token of error)", ylabel="%", ylim=(0, 103))
    ax.set_xticks(list(ALPHAS), [f"{a:g}" for a in ALPHAS])
    below(ax)
    save(fig, "alpha")


def draw_lengths(panels: Sequence[list[str]], file: str, high: int = 100) -> None:
    """Mean produced against requested length."""
    fig, axes = canvas(len(panels), 1, (6.8, 5))
    for ax, names in zip(axes[0], panels, strict=True):
        shade(ax, 16, 48)
        identity(ax, high)
        for i, name in enumerate(names):
            line(ax, i, name, "mean_length", LABELS[name])
        ax.set(xlabel="requested length (tokens)", ylabel="mean produced length (tokens)")
        ax.set(xlim=(10, high), ylim=(0, high))
        below(ax, 3)
    save(fig, file)


# ------------------------------------------------------------------------------------------------------------
# The page


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
    for draw in (draw_blog, draw_tasks, draw_l1, draw_onset, draw_gdpo, draw_alpha):
        draw()
    draw_lengths([["lcpo_sum", "supervised", "ruler"]], "supervised")
    draw_lengths(IDEAS, "beyond")
    with open(os.path.join(study.DOCS, "study.md"), "w", encoding="utf-8") as f:
        f.write(page())
    todo = [f"{n}:{s}" for n, s in study.wanted(False) if (n, s) not in RECORDS]
    print(f"{len(RECORDS)} runs are in {study.DOCS}/study.md; not run: {' '.join(todo) or 'none'}")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main()
