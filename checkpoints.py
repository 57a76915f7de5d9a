"""Checkpoints: a Hugging Face folder plus trainer_state.pt; there completely or not at all.

OUT/args.json                    the flags of the run, for --resume
OUT/metrics.jsonl                one line per step
OUT/checkpoint-STEP/             model and tokenizer, as transformers and vLLM load them
OUT/checkpoint-STEP/trainer_state.pt     step, optimizer, memory of the method, generator of torch
OUT/checkpoint-STEP/checksums.json       size and CRC-32 of every other file; the running mean of the reward
OUT/damaged-STEP-...             a checkpoint that --resume could not use

Kept are the newest --keep of them and the best: the one whose running mean of the training reward
(faults.watch, some ten steps) was the highest when it was saved.
"""

import json
import os
import shutil
import time
import zlib

from data import BadInput
from evaluate import write_json


def save_checkpoint(
    folder: str, state: dict, model, tokenizer, keep: int, reward: float, whole: dict | None = None
) -> None:
    """Write OUT/checkpoint-STEP under a temporary name, flush it to disk, rename it; delete older ones.

    `whole` are the weights of a model with adapters or shards, {name: tensor}; None: the model's own.
    OSError, RuntimeError (torch) or SafetensorError when the disk does not take it; nothing stays then.
    """
    import torch

    out, temporary = os.path.dirname(folder), folder.replace("checkpoint-", ".writing-")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        # No parents are made: where a mount has vanished, its empty mount point must not be filled.
        os.mkdir(temporary)
        model.save_pretrained(temporary, state_dict=whole)
        tokenizer.save_pretrained(temporary)
        # Samples and prompts are drawn from (seed, step) alone; the generator is for models with dropout.
        state = state | {"torch_rng": torch.get_rng_state()}
        torch.save(state, os.path.join(temporary, "trainer_state.pt"))
        sums = {name: file_sum(os.path.join(temporary, name)) for name in sorted(os.listdir(temporary))}
        write_json(os.path.join(temporary, "checksums.json"), {"reward": reward, "files": sums})
        # A rename may survive a power cut that the data does not: it would look whole and be empty.
        flush(*(os.path.join(temporary, name) for name in sums), temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        flush(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it would be in the way of the next try
        raise
    for step in superfluous(out, keep):
        shutil.rmtree(os.path.join(out, f"checkpoint-{step}"), ignore_errors=True)


def flush(*paths: str) -> None:
    """Waits until files or folders are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def file_sum(path: str) -> list[int]:
    """[size in bytes, CRC-32] of a file."""
    size, crc = 0, 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def checkpoints(out: str) -> list[int]:
    """Steps of the complete checkpoints in `out`, ascending."""
    names = os.listdir(out) if os.path.isdir(out) else []
    names = [n.removeprefix("checkpoint-") for n in names if n.startswith("checkpoint-")]
    return sorted(int(n) for n in names if n.isdigit())


def best_checkpoint(out: str) -> int | None:
    """The step whose running mean of the reward was the highest; None without checkpoints."""
    rewards = {}
    for step in checkpoints(out):
        try:
            with open(os.path.join(out, f"checkpoint-{step}", "checksums.json")) as f:
                rewards[step] = float(json.load(f)["reward"])
        except (OSError, ValueError, TypeError, KeyError):
            continue  # damaged: nothing is known of it
    return max(rewards, key=rewards.get, default=None)


def best(out: str) -> str:
    """Where the best checkpoint is, for the last line of a run."""
    step = best_checkpoint(out)
    return "no checkpoint" if step is None else f"best mean reward: {os.path.join(out, f'checkpoint-{step}')}"


def superfluous(out: str, keep: int) -> list[int]:
    """Steps of the checkpoints that are neither among the newest `keep` nor the best."""
    return [step for step in checkpoints(out)[:-keep] if step != best_checkpoint(out)]


def holds_run(out: str) -> bool:
    """Whether a run, or what is left of one, is in `out`."""
    return os.path.exists(os.path.join(out, "args.json")) or bool(checkpoints(out))


# ------------------------------------------------------------------------------------------------------------
# Resuming


def load_state(folder: str) -> dict:
    """trainer_state.pt of a checkpoint; no code in it is ever run. BadInput where anything is damaged."""
    import pickle

    import torch

    try:
        with open(os.path.join(folder, "checksums.json")) as f:
            sums = json.load(f)["files"]
        for name, wanted in sums.items():
            if file_sum(os.path.join(folder, os.path.basename(name))) != wanted:
                raise ValueError(f"{name} is not as it was written")
        state = torch.load(os.path.join(folder, "trainer_state.pt"), weights_only=True)
        return {key: state[key] for key in ("step", "optimizer", "adapter", "memory", "torch_rng", "run")}
    except (OSError, EOFError, KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = error
    except pickle.UnpicklingError:  # also a file that wanted to run code
        reason = "trainer_state.pt holds more than tensors and numbers"
    raise BadInput(f"{os.path.basename(folder)} is damaged ({str(reason).splitlines()[0][:120]})")


def newest_state(args, log=print) -> tuple[str | None, dict | None]:
    """(folder, state) that --resume goes on from: the newest that is whole. (None, None) for a fresh run."""
    if not args.resume:
        return None, None
    told = []
    for step in reversed(checkpoints(args.out)):
        folder = os.path.join(args.out, f"checkpoint-{step}")
        try:
            state = load_state(folder)
        except BadInput as error:
            told.append(str(error))
            continue
        for text in told:
            log(f"warning: --resume: {text}: it is skipped")
        return folder, state
    # A run that was killed before (or while) its first checkpoint was written has lost nothing else.
    steps = [step for step, _ in metric_lines(os.path.join(args.out, "metrics.jsonl"))]
    due = [step for step in steps[:-1] if is_due(step + 1, args)]
    if told or due:
        told = "; ".join(told) or f"step {due[-1] + 1} was logged, but its checkpoint is gone"
        raise BadInput(
            f"--resume: --out ({args.out}) holds no whole checkpoint: {told}; start with --overwrite"
        )
    log("warning: --resume: the run ended before its first checkpoint: it starts again at step 1")
    return None, None


def is_due(done: int, args) -> bool:
    """Whether a checkpoint is written after `done` steps; before an evaluation always, it may take long."""
    return any(every and done % every == 0 for every in (args.save_every, args.eval_every))


def metric_lines(path: str) -> list[tuple[int, str]]:
    """(step, line) of every whole line of metrics.jsonl; [] where there is no such file."""
    found = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:  # a crash may have torn the last line, a full disk one before
                    found.append((int(json.loads(line)["step"]), line.rstrip("\n") + "\n"))
                except (ValueError, TypeError, KeyError):
                    continue
    return found


def open_run(args, start: int) -> None:
    """Prepare --out: --overwrite deletes an old run, --resume drops what lies after step `start`."""
    path = os.path.join(args.out, "metrics.jsonl")
    try:
        if args.overwrite and holds_run(args.out):
            shutil.rmtree(args.out)
        os.makedirs(args.out, exist_ok=True)
        for name in os.listdir(args.out):
            if name.startswith(".writing-"):  # of a run that was killed while it saved
                shutil.rmtree(os.path.join(args.out, name), ignore_errors=True)
        for step in checkpoints(args.out):
            if step > start:  # damaged: as one of the newest it would push out a whole one
                name = os.path.join(args.out, f"checkpoint-{step}")
                os.rename(name, os.path.join(args.out, f"damaged-{step}-{time.time_ns()}"))
        # Steps after the checkpoint will be taken again: without this they would stand in the file twice.
        lines = [line for step, line in metric_lines(path) if step < start]
        if os.path.exists(path):
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                f.writelines(lines)
            os.replace(path + ".tmp", path)
        write_json(os.path.join(args.out, "args.json"), vars(args) | {"resume": False, "overwrite": False})
    except OSError as error:
        raise BadInput(f"--out ({args.out}) cannot be written: {error.strerror}; name another") from None
