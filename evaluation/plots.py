"""The pictures of an evaluation, from plain numbers to PNG files.

A violin shows the middle 90% of a budget's responses: the shortest and the longest 5% are cut, since one
response that never ends would flatten all others. Figures in results.json always count every response.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

# Told apart by shape and brightness too, so that a greyscale print loses nothing.
DARK, LIGHT, OTHER, GREEN = "#1f3f5f", "#8fb8dc", "#8a4b08", "#4f8a5b"
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= {"axes.titlelocation": "left", "axes.titlesize": 11}


@contextlib.contextmanager
def canvas(path: str, rows: int = 1, columns: int = 1, sharey: bool = True) -> Iterator:
    """One axes, or a list of rows x columns that share their scales; saved to `path` (PNG) at the end."""
    import matplotlib

    matplotlib.use("Agg")  # files only: a training machine has no screen
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE | {"text.parse_math": False}):  # a $ in a name starts no formula
        several, share = rows * columns > 1, {"sharex": True, "sharey": sharey, "layout": "constrained"}
        size = (6 * columns, 4 * rows + rows % 2) if several else (7.5, 5)
        picture, axes = plt.subplots(rows, columns, figsize=size, **share)
        yield list(axes.flat) if several else axes
        # Written beside its place and renamed: a viewer that reloads never sees half a picture.
        picture.savefig(f"{path}.tmp", dpi=120 if several else 150, format="png")
        plt.close(picture)  # pyplot would keep every picture of a long run in memory
    os.replace(f"{path}.tmp", path)


def draw(datasets: dict, lengths: dict, out: str, trained: list[int] | None = None) -> dict[str, list]:
    """Pictures of a results.json's data sets; `lengths`: {data set: {budget: tokens}}. PNG paths by set."""
    paths = {name: [] for name in datasets}
    for name, part in datasets.items():
        figures = {b: c for b, c in part["budgets"].items() if c["mean_length"] is not None}
        asked = set(lengths[name]) - {None}  # without a budget there is still an accuracy at a length
        kinds = [("violins", draw_violins, asked and lengths[name])]
        kinds += [("accuracy", draw_accuracy, figures and {"": figures})]
        kinds += [("error", draw_error, asked and figures)]
        for kind, function, shown in kinds:
            if not shown:
                continue
            paths[name].append(path_of(out, kind, name, datasets))
            with canvas(paths[name][-1]) as ax:
                function(ax, shown, trained)
                ax.set_title(f"{name}: {part['problems']} problems, mode {part['mode'] or 'none'}")
    return paths


def path_of(out: str, kind: str, name: str, names: Sequence[str]) -> str:
    """OUT/KIND.png, or OUT/KIND_NAME.png where there are several data sets."""
    suffix = "" if len(names) == 1 else "_" + re.sub(r"[^\w.-]+", "_", name)
    return os.path.join(out, f"{kind}{suffix}.png")


# ---- Pieces that several pictures share


def plain_ticks(axis, values: Sequence[float]) -> None:
    """Ticks at these values, written as plain numbers whatever the scale (no 2^10)."""
    axis.set_ticks(values, [f"{v:g}" for v in values])
    axis.set_ticks([], minor=True)


def is_trained(budgets: list[int], trained: list[int] | None) -> np.ndarray:
    """Which budgets were trained, to within 5%: of a wide range not every single number was drawn."""
    return np.array([any(abs(b - t) <= 0.05 * b for t in trained or []) for b in budgets], bool)


def error_bar(figures: dict, key: str) -> tuple[float, float]:
    """Distances in % down and up to the ends of the 95% interval; none where there is no interval."""
    value = figures[key]
    low, high = figures.get("ci", {}).get(key, (value, value))
    return max(0.0, 100 * (value - low)), max(0.0, 100 * (high - value))


def legend(ax) -> None:
    """A legend under the axes, where it can hide nothing; lines that share a label are named once."""
    found = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, columnspacing=1.2)
    ax.legend(found.values(), found.keys(), fontsize=8.5, **place)


# ---- Pictures of a model. `lengths`: {budget: lengths}, budget None is the run without one


def draw_violins(ax, lengths: dict, trained: list[int] | None, axis: list[int] | None = None) -> None:
    """Produced against requested length: a violin per budget at its true place, outer 5% cut on each side.

    `axis`: all budgets that the axes are made for, where several pictures share them.
    """
    drawn = [b for b in lengths if b is not None]
    asked = axis or drawn
    cut = {b: np.quantile(lengths[b], [0.05, 0.5, 0.95]) for b in lengths}
    # Budgets that would crowd on linear axes get logarithmic ones; the identity stays a straight line.
    log = len(asked) > 1 and min(np.diff(asked)) < 0.05 * asked[-1]
    to, back = (np.log2, np.exp2) if log else (np.asarray, np.asarray)
    # Violins nearly touch where budgets are closest; a lone one gets a fair share of the axis.
    half = 0.38 * (min(np.diff(to(asked))) if len(asked) > 1 else 0.4 * asked[0])  # of a violin's width
    low, high = float(back(to(asked[0]) - 1.5 * half)), float(back(to(asked[-1]) + 1.5 * half))
    low = low if log else min(0, low)
    line = np.array([low, high])
    if trained:
        ax.axvspan(min(trained), max(trained), color="0.92", zorder=0, label="trained range")
    ax.plot(line, line, color="black", lw=1.2, ls="--", zorder=5, label="exactly as asked")
    ax.plot(line, 0.9 * line, line, 1.1 * line, color="0.45", lw=0.9, ls=":", zorder=3, label="within 10%")
    known = is_trained(drawn, trained) | (not trained)
    for budget, filled in zip(drawn, known, strict=True):
        least, median, most = cut[budget]
        left, right = back(to(budget) - half), back(to(budget) + half)
        kept = lengths[budget][(lengths[budget] >= least) & (lengths[budget] <= most)]
        # Of two different lengths the cut would leave none.
        kept = kept if len(kept) else lengths[budget]
        (body,) = ax.violinplot(kept, [budget], widths=right - left, showextrema=False)["bodies"]
        body.set(facecolor=LIGHT if filled else "white", edgecolor=DARK, lw=1, alpha=1, zorder=4)
        body.set_label(None if filled else "budget not trained")
        ax.plot([left, right], [median, median], color="black", lw=2.4, zorder=6, label="median")
        style = dict(fontsize=9, zorder=7, bbox=dict(fc="white", ec="none", alpha=0.7, pad=0.5))
        above = dict(xytext=(0, 5), textcoords="offset points", ha="center")
        ax.annotate(f"{median:.0f}", (budget, most), **above, **style)
    if None in cut:
        label = f"median without a budget: {cut[None][1]:.0f}"
        ax.axhline(cut[None][1], color=OTHER, lw=1.4, ls="-.", zorder=2, label=label)
    if log:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        plain_ticks(ax.yaxis, asked)
    plain_ticks(ax.xaxis, asked)
    ax.set(xlabel="requested length (tokens)", ylabel="produced length (tokens), middle 90%")
    ax.set_xlim(low, high)
    ends = min(c[0] for c in cut.values()), max(c[2] for c in cut.values())
    ax.set_ylim(min(low, max(0.5, 0.9 * ends[0])) if log else 0, 1.08 * max(ends[1], asked[-1]))
    legend(ax)


def draw_accuracy(ax, models: dict, trained: list[int] | None = None) -> None:
    """Accuracy against mean produced length with 95% intervals over problems; the labels are budgets.

    `models`: {name: {"512": figures, "none": figures}}, the name "" for a picture of one.
    """
    colors, markers, lines = (DARK, OTHER, "0.45", GREEN), "os^vPX*p", ("-", "--", "-.", ":")
    lengths, heights = [], []
    for i, (name, figures) in enumerate(models.items()):
        x = {b: c["mean_length"] for b, c in figures.items()}
        y = {b: 100 * c["accuracy"] for b, c in figures.items()}
        # By length: budgets that are not obeyed would make it a scribble.
        along = sorted((b for b in figures if b != "none"), key=x.get)
        color, marker, prefix = colors[i % 4], markers[i % 8], f"{name}, " if name else ""
        ax.plot([x[b] for b in along], [y[b] for b in along], color=color, lw=1.3, ls=lines[i % 4])
        known = is_trained([int(b) if b.isdigit() else 0 for b in along], trained) | (not trained)
        filled = {b for b, is_one in zip(along, known, strict=True) if is_one}
        groups = {
            (marker, color, name or ("trained budgets" if trained else "budgets")): filled,
            (marker, "white", f"{prefix}other budgets"): set(along) - filled,
            ("D", "white", f"{prefix}no budget"): set(figures) - set(along),
        }
        for (shape, face, told), group in groups.items():
            if group:
                bars = np.transpose([error_bar(figures[b], "accuracy") for b in group])
                style = dict(fmt=shape, ms=7, mfc=face, color=color, capsize=3, zorder=3, label=told)
                ax.errorbar([x[b] for b in group], [y[b] for b in group], bars, **style)
        for k, budget in enumerate(along):
            # Above left and below right in turn: clear of a rising line, and of neighbours.
            place = dict(xytext=(7, -14), ha="left") if k % 2 else dict(xytext=(-6, 6), ha="right")
            ax.annotate(budget, (x[budget], y[budget]), fontsize=9, textcoords="offset points", **place)
        lengths, heights = [*lengths, *x.values()], [*heights, *y.values()]
    if max(lengths) > 8 * min(lengths) > 0:  # far apart: accuracy grows with the logarithm, if at all
        ax.set_xscale("log", base=2)
        low, high = (int(np.log2(f(lengths))) for f in (min, max))
        plain_ticks(ax.xaxis, [2**i for i in range(low, high + 2)])
    ax.set(xlabel="mean produced length (tokens); the labels are budgets", ylabel="accuracy (%)")
    # At least 16 points of accuracy are shown, so that noise does not look like a trend.
    low, high = ax.get_ylim()
    ax.set_ylim(max(-2, min(low, min(heights) - 8)), min(102, max(high, max(heights) + 8)))
    ax.margins(x=0.09)  # room for the labels
    ax.grid(axis="y", color="0.9")
    legend(ax)


def draw_error(ax, figures: dict, trained: list[int] | None) -> None:
    """Mean absolute length error by budget as bars, signed error as marks; both relative to the budget."""
    asked = [b for b in figures if b.isdigit()]
    size, signed = ([100 * figures[b][key] for b in asked] for key in ("abs_error", "signed_error"))
    # Evenly spaced: the size of an error says nothing about the distance between two budgets.
    x = np.arange(len(asked))
    bars = ax.bar(x, size, 0.6, color=LIGHT, edgecolor=DARK, zorder=2, label="mean absolute error")
    # Clear of the diamond, which sits on the bar's end where all responses miss on the same side.
    ax.bar_label(bars, [f"{v:.1f}%" for v in size], padding=7, fontsize=9)
    ax.plot(x, signed, "D", color="black", mfc="white", ms=7, zorder=3, label="mean signed error")
    ax.axhline(0, color="black", lw=0.8)
    ax.axhline(10, color="0.45", lw=1, ls=":", label="10%")
    at = np.flatnonzero(is_trained([int(b) for b in asked], trained))
    if len(at):
        ax.axvspan(at.min() - 0.5, at.max() + 0.5, color="0.92", zorder=0, label="trained range")
    ax.set_xticks(x, asked)
    ax.set(xlabel="requested length (tokens)", ylabel="length error (% of the budget)")
    ax.set_xlim(-0.8, len(asked) - 0.2)
    ax.set_ylim(1.25 * min(0, *signed), 1.2 * max(*size, 10))
    legend(ax)


# ---- Several models


def draw_models(curves: dict, lengths: dict, out: str) -> list[str]:
    """Violins of up to four models on the same axes, and the curves of all, per data set; returns the paths.

    `curves`: {data set: {model: {"512": figures}}}, `lengths`: {data set: {model: {budget: lengths}}}.
    """
    paths = []
    for name, models in curves.items():
        shown = dict([(m, cells) for m, cells in lengths[name].items() if set(cells) - {None}][:4])
        axis = sorted({b for cells in shown.values() for b in cells if b is not None})
        if len(shown) > 1:
            paths.append(path_of(out, "side_by_side", name, curves))
            with canvas(paths[-1], columns=len(shown)) as axes:
                limits = []
                for ax, (model, cells) in zip(axes, shown.items(), strict=True):
                    draw_violins(ax, cells, None, axis)
                    limits.append(ax.get_ylim())
                    ax.set_title(f"{name}: {model}")
                axes[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        known = {m: {b: c for b, c in cells.items() if c["mean_length"] is not None}
                 for m, cells in models.items()}  # fmt: skip
        if any(known.values()):
            paths.append(path_of(out, "models", name, curves))
            with canvas(paths[-1]) as ax:
                draw_accuracy(ax, known)
                ax.set_title(f"{name}: points are budgets, bars 95% intervals")
    return paths
