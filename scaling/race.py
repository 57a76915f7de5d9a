"""Processes that take turns (A B A B ...), one for each variant of a comparison, and what each one weighs.

A machine that slows down slows all variants down alike; peak memory is that of one variant only.
"""

import multiprocessing
import os
import time
from collections.abc import Callable

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def race(workers: dict[str, Callable], s: dict, folder: str) -> dict:
    """Turns A B A B ... of the variants; {variant: last report, "seconds": median, "all": every turn's}.

    `workers`: {variant: function(variant, s, folder, pipe)}, which answers what it receives by a report.
    """
    spawn, turns = multiprocessing.get_context("spawn"), {v: [] for v in workers}
    pipes, processes = {}, []
    try:
        for v, worker in workers.items():
            pipes[v], theirs = spawn.Pipe()
            processes.append(spawn.Process(target=run_worker, args=(worker, v, s, folder, theirs)))
            processes[-1].start()
            theirs.close()  # or the end of the process would not be seen
        for _ in range(1 + s["rounds"]):
            for v, pipe in pipes.items():
                pipe.send("go")
                turns[v].append(pipe.recv())
    except (EOFError, ConnectionError):  # its traceback is on stderr
        raise SystemExit(f"scaling.bench: error: {workers[v].__name__} {v} died") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    # In its first turn a worker loads, allocates and warms up: it does not count.
    times = {v: [f["seconds"] for f in found[1:]] for v, found in turns.items()}
    return {v: turns[v][-1] | {"seconds": float(np.median(times[v])), "all": times[v]} for v in workers}


def run_worker(worker: Callable, *setting) -> None:
    os.dup2(2, 1)  # stdout is the parent's: what libraries print goes to stderr
    worker(*setting)


def timed(work: Callable, pipe, **extra) -> None:
    """A worker's loop: does `work()` in every turn and sends seconds and peak memory (see `memory`)."""
    while pipe.recv():
        before = clock()
        found = work()
        pipe.send({"seconds": clock() - before, "peak": memory("VmHWM")} | extra | found)


def clock() -> float:
    """Seconds, after all that was started on the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(name: str) -> int:
    """Bytes held now (name VmRSS) or at most so far (VmHWM): allocated on the GPU, or resident on Linux."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))


def print_table(head: list, rows: list[list]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    table = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *rest in table:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]))
