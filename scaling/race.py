"""Processes that take turns (A B A B ...), one for each variant of a comparison, and what each one weighs.

The parent calls race(). A worker takes a turn for every line on stdin and answers with tell(). A machine that
slows down slows all variants down alike; peak memory is that of one variant only.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

answers = sys.stdout


def race(command: str, variants: list[str], s: dict, folder: str) -> dict:
    """Turns A B A B ... of the variants; {variant: last report, "seconds": median, "all": every turn's}."""
    workers, turns, pipe = {}, {v: [] for v in variants}, subprocess.PIPE
    options = {"cwd": os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "text": True}
    try:
        for v in variants:  # error messages go to a file in `folder`
            words = [sys.executable, "-m", "scaling.bench", command, "--worker", v, json.dumps(s), folder]
            with open(os.path.join(folder, f"{v}.log"), "w") as log:
                workers[v] = subprocess.Popen(
                    words, stdin=pipe, stdout=pipe, stderr=log, bufsize=1, **options
                )
        for _ in range(1 + s["rounds"]):
            for v, worker in workers.items():
                worker.stdin.write("go\n")
                if not (line := worker.stdout.readline()):
                    with open(os.path.join(folder, f"{v}.log")) as log:
                        sys.exit(f"scaling.bench: error: {command} {v} died: {log.read().strip()[-300:]}")
                turns[v].append(json.loads(line))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    # In its first turn a worker loads, allocates and warms up: it does not count.
    times = {v: [f["seconds"] for f in found[1:]] for v, found in turns.items()}
    return {v: turns[v][-1] | {"seconds": float(np.median(times[v])), "all": times[v]} for v in variants}


def tell(**report) -> None:
    """The worker's answer to a turn."""
    print(json.dumps(report), file=answers, flush=True)


def timed(work: Callable, device: str, **extra) -> None:
    """A worker's loop: for every turn does `work()` and tells seconds and peak memory (see `memory`)."""
    for _ in sys.stdin:
        before = clock(device)
        found = work() or {}
        tell(**{"seconds": clock(device) - before, "peak": memory(device, "VmHWM")} | extra | found)


def clock(device: str) -> float:
    """Seconds, after all that was started on the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: str, name: str) -> int:
    """Bytes held now (name VmRSS) or at most so far (VmHWM): allocated on the GPU, or resident on Linux."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))


def print_table(head: list, rows: list[list]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for first, *rest in [head, *rows]:
        cells = [str(c).rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        print("  ".join([str(first).ljust(widths[0]), *cells]))
