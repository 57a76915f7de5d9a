"""Experiment trackers: what metrics.jsonl and the evaluations say, in wandb, tensorboard or trackio as well.

    python train_grpo.py ... --log-with tensorboard     event files in OUT/tensorboard
    WANDB_MODE=offline python train_grpo.py ... --log-with wandb     OUT/wandb; `wandb sync` sends it later
    python train_grpo.py ... --log-with trackio         local; `trackio show --project nanoL1`

The classes are accelerate's. A run that is resumed goes on under its name in the tracker (wandb, trackio), or
in its folder (tensorboard). The project is nanoL1, or what WANDB_PROJECT says.
"""

import glob
import importlib.metadata
import os
import uuid
from typing import TYPE_CHECKING

from data import BadInput, first_line
from evaluation import metrics

if TYPE_CHECKING:  # libraries that are loaded late
    from accelerate.tracking import GeneralTracker

TRACKERS = ("none", "wandb", "tensorboard", "trackio")


def check(name: str) -> None:
    """BadInput where the tracker's package is not installed."""
    try:
        # By its metadata: `import wandb` would also find the folder that wandb's offline runs leave behind.
        name == "none" or importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        way_out = f"pip install {name}, or leave it out: metrics.jsonl is written in any case"
        raise BadInput(f"--log-with {name}: the package {name} is not installed: {way_out}") from None


def start(args, start: int) -> "GeneralTracker | None":
    """The tracker of --log-with, started (None for none); `start`: the step from which a run is resumed."""
    if args.log_with == "none":
        return None
    from accelerate import tracking

    project, out = os.environ.get("WANDB_PROJECT", "nanoL1"), os.path.abspath(args.out)
    # A name of its own for every run: two runs of the same --out are two runs, a resumed one is the same.
    path, name = os.path.join(out, "tracker_id"), os.path.basename(out)
    if not os.path.exists(path):
        with open(path, "w") as f:
            f.write(f"{name}-{uuid.uuid4().hex[:8]}")
    with open(path) as f:
        run = f.read()
    if args.log_with == "tensorboard":
        # Steps after the checkpoint are taken again: what the broken run wrote of them is dropped.
        tracker = tracking.TensorBoardTracker("tensorboard", out, purge_step=start + 1 if start else None)
    elif args.log_with == "wandb":
        tracker = tracking.WandBTracker(project, name=name, id=run, resume="allow", dir=out)
    else:
        tracker = tracking.TrackioTracker(project, name=run, resume="allow", embed=False)
    try:
        tracker.start()
    except Exception as error:
        if type(error).__module__.split(".")[0] != args.log_with:
            raise
        way_out = "log in, or set WANDB_MODE=offline" if args.log_with == "wandb" else "or leave it out"
        raise BadInput(f"--log-with {args.log_with}: {first_line(error)}: {way_out}") from None
    if args.log_with != "tensorboard":  # its hparams file knows no lists and no dicts
        tracker.store_init_configuration(vars(args))
    else:
        tracker.log({"flags": "\n".join(f"    {k} {v}" for k, v in vars(args).items())}, step=0)
    return tracker


def flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a/b": 1.0}; only numbers are kept."""
    out = {}
    for key, value in metrics.jsonable(values).items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            out[f"{prefix}{key}"] = float(value)
    return out


def log_step(tracker, m: dict) -> None:
    """One line of metrics.jsonl; the tracker's steps count from 1: the number of steps that are done."""
    if tracker:
        done = m["step"] + 1
        tracker.log(flat({k: v for k, v in m.items() if k != "step"}, "train/"), step=done)


def log_evaluation(tracker, results: dict, folder: str, done: int) -> None:
    """Figures of an evaluation per data set and budget, and its pictures of asked against given length."""
    if not tracker:
        return
    keys = ("accuracy", "mean_length", "abs_error", "signed_error", "within_10", "over_budget", "truncated")
    for name, part in results["datasets"].items():
        cells = {b: {k: cell[k] for k in keys if k in cell} for b, cell in part["budgets"].items()}
        tracker.log(flat(cells, f"eval/{name}/"), step=done)
    for path in sorted(glob.glob(os.path.join(folder, "violins*.png"))):
        name = os.path.basename(path).removesuffix(".png")
        if tracker.name == "wandb":
            tracker.log_images({name: [path]}, step=done)
        elif tracker.name == "trackio":  # accelerate has no pictures for it
            import trackio

            tracker.log({name: trackio.Image(path)}, step=done)
        else:
            import numpy as np
            from PIL import Image

            pixels = np.asarray(Image.open(path).convert("RGB"))[None]
            tracker.log_images({name: pixels}, step=done, dataformats="NHWC")


def finish(tracker) -> None:
    """Whatever is on its way is sent or written."""
    if tracker:
        tracker.finish()
