"""Learning curves of one run or several from their metrics.jsonl, while they train or afterwards, into a PNG.

python -m evaluation.curves out/run                    -> out/run/curves.png
python -m evaluation.curves out/a out/b --out out/ab   -> out/ab/curves.png, a colour for each run
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from data import BadInput, exit_code, one_line_errors
from evaluation import plots
from evaluation.samples import check_writable, name_folders

COLOURS = ("#1f3f5f", "#8a4b08", "#3a7d44", "#7b3f8c", "#c0392b", "#2a9d8f", "#6b6b6b", "#b8860b")


def read_metrics(folder: str) -> list[dict]:
    """The steps in FOLDER/metrics.jsonl; a last line that is still being written is left out."""
    path = Path(folder, "metrics.jsonl")
    if not path.exists():
        raise BadInput(f"{folder}: no metrics.jsonl in it: give the --out folder of a training run")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    # A step that was taken again counts as it came last.
    steps = {step["step"]: step for step in map(json.loads, lines)}
    if not steps:
        raise BadInput(f"{folder}: no step is finished yet: come back later")
    return [steps[step] for step in sorted(steps)]


def series(steps: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps done, values) of a figure where it is known; "a/b" is the figure b inside a."""
    points = []
    for step in steps:
        value = step
        for key in name.split("/"):
            value = (value or {}).get(key)
        points += [] if value is None else [(step["step"] + 1, float(value))]
    return tuple(np.array(points).reshape(-1, 2).T)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values (fewer at the beginning): no value waits for later ones."""
    return np.array([values[max(0, i - max(1, width)) : i].mean() for i in range(1, len(values) + 1)])


def draw(runs: dict[str, list[dict]], path: str) -> None:
    """Reward, absolute length error, accuracy and length, smoothed; `runs`: {label: steps}.

    A single run shows the parts of its reward and its budgets, too, and the raw values behind the lines.
    """
    panels = {"reward": "Reward", "abs_error": "Length error, % of the budget", "accuracy": "Accuracy, %"}
    panels["length"] = "Tokens in a response"
    (first, *others), details = runs.values(), {key: [] for key in panels}
    if not others:
        parts = {name for step in first for name in step if name.startswith("reward_")} - {"reward_std"}
        budgets = {b for step in first for b in step.get("error_by_budget") or ()}
        budgets = sorted(budgets, key=lambda b: int(b.split("-")[0]))
        details["reward"] = [(name, name.removeprefix("reward_")) for name in sorted(parts)]
        for panel, key in (("abs_error", "abs"), ("length", "length")):
            details[panel] = [(f"error_by_budget/{b}/{key}", f"asked for {b}") for b in budgets]
    with plots.canvas(path, 2, 2, sharey=False) as axes:
        for ax, (key, title) in zip(axes, panels.items(), strict=True):
            named = [(run, steps, key) for run, steps in runs.items()]
            named += [(label, first, name) for name, label in details[key]]
            for i, (label, steps, name) in enumerate(named):
                x, y = series(steps, name)
                y = y * (100 if "%" in title else 1)
                style = dict(color=COLOURS[i % len(COLOURS)], marker="o" if len(x) == 1 else None)
                ax.plot(x, smooth(y, len(y) // 40), lw=1.7, label=label, **style)
                if not others:
                    ax.plot(x, y, lw=0.8, alpha=0.25, **style)
            ax.set_title(title)
            ax.grid(color="0.92")
            ax.legend(fontsize=8)
        # A beginning that is far off would flatten the rest.
        axes[1].set_ylim(0, 1.05 * min(max(axes[1].dataLim.y1, 1), 150))
        axes[2].set_ylim(0, 102)
        for ax in axes[2:]:
            ax.set_xlabel("steps")


@exit_code("evaluation.curves")
def main(argv: list[str] | None = None) -> None:
    """Draw the curves of these runs, say where each stands."""
    parser = argparse.ArgumentParser("-m evaluation.curves", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="--out folders of runs, or LABEL=FOLDER")
    parser.add_argument("--out", help="folder of curves.png (default: the first run's)")
    args = one_line_errors(parser).parse_args(argv)
    named = name_folders(args.runs)
    out = args.out or next(iter(named.values()))
    check_writable(out)
    runs = {label: read_metrics(folder) for label, folder in named.items()}
    for label, steps in runs.items():
        last = steps[-1]
        told = f", length error {last['abs_error']:.1%}" if "abs_error" in last else ""
        told = f"reward {last['reward']:+.3f}, accuracy {last['accuracy']:.1%}{told}"
        print(f"{label}: step {last['step'] + 1}, {told}")
    os.makedirs(out, exist_ok=True)
    draw(runs, f"{out}/curves.png")
    print(f"learning curves in {out}/curves.png")


if __name__ == "__main__":
    sys.exit(main())
