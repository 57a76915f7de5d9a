"""Checkpoints: a Hugging Face folder plus trainer_state.pt; there completely or not at all.

OUT/args.json                    the flags of the run, for --resume
OUT/metrics.jsonl                one line per step
OUT/checkpoint-STEP/             model and tokenizer, as transformers and vLLM load them
OUT/checkpoint-STEP/trainer_state.pt     step, optimizer, memory of the method, generator of torch
"""

import json
import os
import shutil

from data import BadInput


def save_checkpoint(folder: str, step: int, model, tokenizer, optimizer, memory: dict, keep: int) -> None:
    """Write OUT/checkpoint-STEP under a temporary name, flush it to disk, rename it; delete older ones."""
    import torch

    out, temporary = os.path.dirname(folder), folder.replace("checkpoint-", ".writing-")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    # Samples and prompts are drawn from (seed, step) alone; the generator is kept for models with dropout.
    state = {"step": step, "optimizer": optimizer.state_dict(), "memory": memory}
    state["torch_rng"] = torch.get_rng_state()
    torch.save(state, os.path.join(temporary, "trainer_state.pt"))
    # A rename may survive a power cut that the data does not: the checkpoint would look whole and be empty.
    for name in [*os.listdir(temporary), ""]:  # every file, then the folder itself
        handle = os.open(os.path.join(temporary, name), os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(os.path.join(out, f"checkpoint-{old}"))


def checkpoints(out: str) -> list[int]:
    """Steps of the complete checkpoints in `out`, ascending."""
    names = [n.removeprefix("checkpoint-") for n in os.listdir(out) if n.startswith("checkpoint-")]
    return sorted(int(n) for n in names if n.isdigit())


def load_state(folder: str) -> dict:
    """trainer_state.pt of a checkpoint; no code in it is ever run. BadInput when it is missing or damaged."""
    import pickle

    import torch

    try:
        state = torch.load(os.path.join(folder, "trainer_state.pt"), weights_only=True)
        return {key: state[key] for key in ("step", "optimizer", "memory", "torch_rng")}
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise BadInput(
            f"--resume: {folder} is damaged ({type(error).__name__}: {str(error).splitlines()[0][:80]}); "
            f"delete it to go on from the one before, or start again with --overwrite"
        ) from None


def newest_checkpoint(args) -> str | None:
    """The folder that --resume goes on from; None for a fresh run."""
    if not args.resume:
        return None
    steps = checkpoints(args.out)
    if not steps:
        raise BadInput(f"--resume: --out ({args.out}) holds no complete checkpoint: start with --overwrite")
    return os.path.join(args.out, f"checkpoint-{steps[-1]}")


def open_run(args, start: int) -> None:
    """Prepare --out: --overwrite deletes an old run, --resume drops its metrics from step `start` on."""
    if args.overwrite and os.path.exists(os.path.join(args.out, "args.json")):
        shutil.rmtree(args.out)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "args.json"), "w") as f:
        json.dump(vars(args) | {"resume": False, "overwrite": False}, f, indent=1)
    # Steps after the checkpoint will be taken again: without this they would stand in the file twice.
    path = os.path.join(args.out, "metrics.jsonl")
    if os.path.exists(path):
        with open(path) as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] < start]
        with open(path, "w") as f:
            f.writelines(lines)
