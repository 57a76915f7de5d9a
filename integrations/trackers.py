"""--log-with wandb|tensorboard|trackio: every step's numbers to a tracker, by accelerate's wrappers."""

import atexit
import os
from collections.abc import Callable


def start(args, step: int = 0) -> Callable[[dict], None]:
    """A function that sends the metrics of a step, from `step` on; closed at the end of the process."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    name, options = os.path.basename(os.path.abspath(args.out)), {}
    if args.log_with == "tensorboard":
        options = {"logging_dir": args.out, "purge_step": step + 1}  # what was sent of these steps is dropped
    elif args.log_with == "wandb":  # a resumed run goes on in the same one
        options = {"name": name, "id": f"{name}-{args.seed}", "resume": "allow", "dir": args.out}
    project = "tensorboard" if args.log_with == "tensorboard" else os.environ.get("WANDB_PROJECT", "nanoL1")
    tracker = LOGGER_TYPE_TO_CLASS[args.log_with](project, **options)
    tracker.start()
    tracker.store_init_configuration({key: str(value) for key, value in vars(args).items()})
    atexit.register(tracker.finish)
    return lambda m: tracker.log(flat({k: v for k, v in m.items() if k != "step"}), step=m["step"] + 1)


def flat(values: dict, prefix: str = "train/") -> dict:
    """{"a": {"b": 1}} -> {"train/a/b": 1.0}; only numbers are kept."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[prefix + key] = float(value)
    return found
