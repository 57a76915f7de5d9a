"""Learning curves of one run or several from their metrics.jsonl, while they train or afterwards, into a PNG.

python -m evaluation.curves out/run                    -> out/run/curves.png
python -m evaluation.curves out/a out/b --out out/ab   -> out/ab/curves.png, a colour for each run
"""

import argparse
import json
import os
import sys
from collections import Counter

import numpy as np

import data
from data import BadInput, first_line
from evaluation import plots
from evaluation.samples import check_writable

COLOURS = ("#1f3f5f", "#8a4b08", "#3a7d44", "#7b3f8c", "#c0392b", "#2a9d8f", "#6b6b6b", "#b8860b")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def read_metrics(folder: str) -> list[dict]:
    """The steps in FOLDER/metrics.jsonl; a last line that is still being written is left out."""
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            lines = [line for line in f if line.endswith("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--watch {folder}: {first_line(error)}: give the --out folder of a training run"
        ) from None
    steps = {}
    for at, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            steps[int(step["step"])] = step  # a step that was taken again counts as it came last
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}, line {at} is no step of a training run ({error})") from None
    if not steps:
        raise BadInput(f"{folder}: no step is finished yet: come back later")
    return [steps[step] for step in sorted(steps)]


def series(steps: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps done, values) of a figure where it is known; "a/b" is the figure b inside a."""
    points = []
    for step in steps:
        value = step
        for key in name.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            points.append((step["step"] + 1, float(value)))
    x, y = np.array(points).reshape(-1, 2).T
    return x, y


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values (fewer at the beginning): no value waits for later ones."""
    sums, width = np.concatenate([[0.0], np.cumsum(values)]), max(1, width)
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def reward_names(steps: list[dict]) -> list[str]:
    """The reward and, where it is a sum, its parts."""
    known = {name for step in steps for name in step if name.startswith("reward_")} - {"reward_std"}
    return ["reward", *sorted(known)] if len(known) > 1 else ["reward"]


def budget_names(runs: dict) -> list[str]:
    """Budgets, or ranges of them, in ascending order; of many that are often asked for, five."""
    steps = [step for steps in runs.values() for step in steps]
    counts = Counter(name for step in steps for name in step.get("error_by_budget") or {})
    often = [b for b, n in counts.items() if 2 * n > max(counts.values())]
    often = sorted(often, key=lambda b: float(b.split("-")[0]))
    at = np.linspace(0, len(often) - 1, min(5, len(often))).round().astype(int)
    return [often[i] for i in at]


def draw_lines(ax, runs: dict, labels: dict, scale: float = 1.0) -> None:
    """Each figure (key of `labels`) of each run: a smoothed line; raw values behind it where one is alone."""
    for i, (run, steps) in enumerate(runs.items()):
        for k, name in enumerate(labels):
            x, y = series(steps, name)
            if not len(x):
                continue
            # One run: a colour for each figure. Several: a colour for each run, figures told by their dashes.
            colour = COLOURS[(i if len(runs) > 1 else k) % len(COLOURS)]
            label = " ".join(filter(None, (run if len(runs) > 1 else "", labels[name])))
            if len(runs) == 1:
                ax.plot(x, scale * y, color=colour, lw=0.8, alpha=0.25)
            line = smooth(scale * y, len(y) // 40)
            width = 1.7 if k else 2.4  # the mean, or the whole reward, comes first
            ax.plot(x, line, color=colour, lw=width, ls=DASHES[k % len(DASHES)], label=label)
            if len(x) == 1:  # a run that has just begun
                ax.plot(x, line, color=colour, marker="o")


def draw(runs: dict[str, list[dict]], path: str) -> None:
    """Reward and its parts, absolute length error by budget, accuracy, length by budget; `runs`: by label."""
    rewards = sorted({n for steps in runs.values() for n in reward_names(steps)})
    budgets, several, many = budget_names(runs), len(runs) > 1, len(runs) > 4
    # The mean comes first. The more runs, the less beside it: two budgets for some runs, none for many.
    budgets = [] if many else budgets[:: max(1, len(budgets) - 1)] if several else budgets
    errors = {"abs_error": "mean"} | {f"error_by_budget/{b}/abs": f"asked for {b}" for b in budgets}
    lengths = {"length": "mean"} | {f"error_by_budget/{b}/length": f"asked for {b}" for b in budgets}
    names = {n: "" if many else n.replace("reward_", "") for n in (["reward"] if many else rewards)}
    titles = "Reward", "Length error, % of the budget", "Accuracy, %", "Tokens in a response"
    with plots.canvas(path, 2, 2, sharey=False) as axes:
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, loc="left", fontsize=11)
            ax.grid(color="0.92")
        reward, error, accuracy, tokens = axes
        draw_lines(reward, runs, names)
        draw_lines(error, runs, errors, 100)
        draw_lines(accuracy, runs, {"accuracy": ""}, 100)
        draw_lines(tokens, runs, lengths)
        if error.lines:  # a beginning that is far off would flatten the rest
            error.set_ylim(0, 1.05 * min(max(error.dataLim.y1, 1), 150))
        else:
            error.text(0.5, 0.5, "no budgets", transform=error.transAxes, ha="center", color="0.5")
        accuracy.set_ylim(0, 102)
        for ax in axes[2:]:
            ax.set_xlabel("steps")
        for ax in axes:
            if ax.get_legend_handles_labels()[1]:
                ax.legend(fontsize=9 if len(ax.lines) < 9 else 7)


def watch(folders: list[str], out: str | None = None) -> str:
    """Draw the curves of these runs, say where each stands; the path of the picture."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    # Folders of the same name go by their paths.
    labels = names if len(set(names)) == len(names) else folders
    runs = {label: read_metrics(folder) for label, folder in zip(labels, folders, strict=True)}
    for label, steps in runs.items():
        last = steps[-1]
        error = last.get("abs_error")
        told = f", length error {error:.1%}" if error is not None else ""
        where = f"step {last['step'] + 1}, reward {last['reward']:+.3f}"
        print(f"{label}: {where}, accuracy {last['accuracy']:.1%}{told}")
    path = os.path.join(out or folders[0], "curves.png")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draw(runs, path)
    print(f"learning curves in {path}")
    return path


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    about = "Learning curves of runs, also of those that still train."
    usage = "python -m evaluation.curves FOLDER ... [--out FOLDER]"
    parser = argparse.ArgumentParser("-m evaluation.curves", usage, about, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="the --out folders of training runs")
    parser.add_argument("--out", help="folder of curves.png (default: the first run's)")
    try:
        args = data.one_line_errors(parser).parse_args(argv)
        check_writable(args.out or args.runs[0])
        watch(args.runs, args.out)
    except BadInput as error:
        print(f"evaluation.curves: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
