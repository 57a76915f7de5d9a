"""What a run tells: the metrics of a step, metrics.jsonl, the lines on the screen.

OUT/metrics.jsonl gets one line per step. Neither a closed screen nor a full disk ends the run: lines that
could not be written are kept and written with the next one that can.
"""

import contextlib
import json
import os
import sys
import time

import numpy as np

from evaluation.metrics import jsonable


def length_metrics(rollouts: dict) -> dict:
    """Length and its errors over the batch, and per requested budget (or per quarter of their range)."""
    length, budget = rollouts["length"].astype(float), rollouts["budget"]
    out = {
        "length": length.mean(),
        "length_p95": np.quantile(length, 0.95),
        "truncated": rollouts["truncated"].mean(),
    }
    # Signed errors of over- and undershoot cancel in their mean, so the absolute ones are logged beside them.
    have = ~np.isnan(budget)
    if not have.any():
        return out
    asked, got = budget[have][:, None], length[have]
    error = (got - asked) / asked
    out |= {"signed_error": error.mean(), "abs_error": np.abs(error).mean()}
    out |= {
        "within_10": (np.abs(error) <= 0.1).mean(),
        "over_budget": (error > 0).mean(),
        "error_by_budget": {},
    }
    values = np.unique(asked)
    buckets = {f"{v:g}": asked[:, 0] == v for v in values}
    if len(values) > 8:  # four buckets of equal width between the least and the greatest budget of this batch
        edges = np.linspace(values[0], values[-1] + 1, 5).astype(int)
        pairs = list(zip(edges, edges[1:], strict=False))
        buckets = {f"{a}-{b - 1}": (asked[:, 0] >= a) & (asked[:, 0] < b) for a, b in pairs}
    for name, rows in buckets.items():
        if rows.any():
            e = error[rows]
            cell = {"signed": e.mean(), "abs": np.abs(e).mean(), "length": got[rows].mean()}
            out["error_by_budget"][name] = cell
    return out


def step_metrics(
    step: int, rollouts: dict, total: np.ndarray, parts: dict, trained: dict, seconds: dict
) -> dict:
    """All that metrics.jsonl holds of a step; `trained` is what update() and the others measured."""
    m = {"step": step, "reward": total.mean(), "reward_std": total.std(-1).mean()}
    m |= {f"reward_{name}": part.mean() for name, part in parts.items()}
    m |= {"accuracy": rollouts["correct"].mean(), **length_metrics(rollouts)}
    m |= {"zero_variance": (np.ptp(total, -1) < 1e-9).mean(), **trained}
    m |= {f"seconds_{name}": value for name, value in seconds.items()}
    m["tokens_per_second"] = rollouts["length"].sum() / sum(seconds.values())
    m["overhead"] = 1 - (seconds["sample"] + seconds["train"]) / sum(seconds.values())
    return m | {"peak_gib": peak_memory()}


def peak_memory() -> float:
    """Most memory this process ever held, GiB: of the GPU where there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ------------------------------------------------------------------------------------------------------------
# Where it is told


def make_log(args, state) -> tuple:
    """(tqdm bar or None, function that prints a line): bar on a terminal, lines elsewhere, one rank only."""
    from tqdm import tqdm

    if not state.is_main_process:
        return None, lambda text: None
    bar = tqdm(total=args.steps, dynamic_ncols=True) if sys.stderr.isatty() else None
    return bar, bar.write if bar else say


def say(text: str) -> None:
    """A line on standard output; a run goes on when nobody listens any more."""
    # `| head` has gone, or the disk behind it is full (then the buffer keeps the line), or it was closed.
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def let_go_of_the_screen() -> None:
    """What cannot be printed at the end is dropped: the interpreter would make an error of it."""
    try:
        if sys.stdout:  # None where it was closed before the start
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_metrics(m: dict, out: str, unwritten: list[str]) -> str | None:
    """Append a step, and those in `unwritten`, to metrics.jsonl; the reason if that failed (kept then)."""
    unwritten.append(json.dumps(jsonable(m), allow_nan=False) + "\n")
    try:
        # Unbuffered, and cut back after a failure: half a line in the middle would damage the file.
        with open(os.path.join(out, "metrics.jsonl"), "ab", buffering=0) as f:
            end = f.seek(0, os.SEEK_END)
            data = "".join(unwritten).encode()
            try:
                if f.write(data) < len(data):
                    raise OSError("No space left on device")
            except OSError:
                with contextlib.suppress(OSError):
                    f.truncate(end)
                raise
    except OSError as error:
        return error.strerror or str(error)
    unwritten.clear()
    return None


def tell(m: dict, args, unwritten: list[str], bar, log) -> None:
    """A step into metrics.jsonl and onto the screen; a failure to write is told when it begins and ends."""
    late = len(unwritten)
    reason = write_metrics(m, args.out, unwritten)
    if reason and not late:
        log(f"warning: metrics.jsonl cannot be written ({reason}): training goes on, its lines are kept")
    elif late and not reason:
        log(f"metrics.jsonl can be written again: {late} lines were late")
    show_step(m, args, bar, log)


def show_step(m: dict, args, bar, log) -> None:
    """A step's line on the screen, or on the bar of a terminal."""
    error = f"  error {m['abs_error']:6.1%}" if "abs_error" in m else ""
    text = f"reward {m['reward']:+.3f}  accuracy {m['accuracy']:.2f}  length {m['length']:.1f}{error}"
    if bar is not None:
        bar.set_postfix_str(text)
        bar.update(m["step"] + 1 - bar.n)
        return
    if time.monotonic() < show_step.quiet_until and m["step"] + 1 < args.steps:
        return
    show_step.quiet_until = time.monotonic() + args.log_seconds
    seconds = sum(value for name, value in m.items() if name.startswith("seconds_"))
    mfu = f"  mfu {m['train_mfu']:.0%}" if "train_mfu" in m else ""
    log(
        f"step {m['step'] + 1:4d}/{args.steps}  {text}  cut {m['truncated']:.2f}  "
        f"entropy {m['entropy']:.2f}  grad {m['grad_norm']:.2f}  gap {m['logp_gap_max']:.0e}  "
        f"{seconds:.1f} s  overhead {m['overhead']:.0%}{mfu}"
    )


show_step.quiet_until = 0.0  # of time.monotonic


def show_samples(groups: list, rows: list[dict], total: np.ndarray, log) -> None:
    """Three decoded responses of the first step and what they earned: most mistakes can be seen here."""
    for row, group, line in list(zip(rows, groups, total, strict=True))[:3]:
        r, text = group[0], group[0]["text"]
        text = text if len(text) < 500 else text[:300] + " [...] " + text[-150:]
        verdict = ("right" if r["correct"] else "wrong") + (" (cut off)" if r["truncated"] else "")
        log(f"  prompt    {row['prompt']!r}\n  response  {text!r}")
        log(
            f"  answer    {row['answer']!r}: {verdict}; {r['length']} tokens, budget {row.get('budget')}, "
            f"reward {line[0]:.3f}\n"
        )
