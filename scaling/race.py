"""Processes that take turns (A B A B ...), one for each variant of a comparison, and what each one weighs.

The parent calls race(). A worker calls be_worker(), takes a turn for every line on stdin and answers with
tell(). A machine that slows down slows all variants down alike; peak memory is that of one variant only.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench.py")
answers = sys.stdout


def start(command: str, variant: str, s: dict, folder: str, env: dict | None = None) -> subprocess.Popen:
    """A worker process for one variant; its error messages go to a file in `folder`."""
    words = [sys.executable, SCRIPT, command, "--worker", variant]
    words += [json.dumps(s), folder]
    with open(os.path.join(folder, f"{variant}.log"), "a") as log:
        worker = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | (env or {}),
        )  # fmt: skip
    worker.name = variant
    return worker


def go(worker: subprocess.Popen) -> None:
    """Lets the worker take its turn."""
    try:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it died: hear() tells why


def hear(worker: subprocess.Popen, folder: str) -> dict:
    """What the worker measured in its turn; {"failed": its last words} where it died."""
    if line := worker.stdout.readline():
        return json.loads(line)
    with open(os.path.join(folder, f"{worker.name}.log")) as log:
        words = [w for w in log.read().splitlines() if w.strip()] or ["no word of why"]
    return {"failed": f"exit code {worker.wait()}: {words[-1]}"}


def race(
    command: str, variants: list, s: dict, folder: str, env: dict | None = None, few: tuple = ()
) -> dict:
    """Turns A B A B ... of the variants; {variant: last report, "seconds": median, "all": every turn's}.

    A variant of several processes is a tuple of names: they take their turn together, the first one reports.
    `env` holds environment variables for single names; the variants in `few` take one counted turn only. A
    worker that dies ends the command, save TRL's other ways (trl_*), which may not fit: {"failed": why}.
    """
    named = [(v,) if isinstance(v, str) else v for v in variants]
    turns, teams, failed = {names[0]: [] for names in named}, [], {}
    try:
        for names in named:
            teams.append([start(command, name, s, folder, (env or {}).get(name)) for name in names])
        for i in range(1 + s["rounds"]):
            for team in [t for t in teams if t[0].name not in failed and (i < 2 or t[0].name not in few)]:
                for worker in team:
                    go(worker)
                found = [hear(worker, folder) for worker in team]
                turns[team[0].name].append(found[0])
                words = [f["failed"] for f in found if "failed" in f]
                failed |= {team[0].name: words[0]} if words else {}
                if any(not name.startswith("trl_") for name in failed):
                    raise SystemExit(f"bench.py: error: {command}: a process died: {failed}")
    finally:
        for worker in sum(teams, []):
            worker.stdin.close()
            worker.wait()
    # In its first turn a worker loads, allocates and warms up: it does not count.
    times = {name: [f["seconds"] for f in found[1:]] for name, found in turns.items() if name not in failed}
    medians = {name: np.median(found, axis=0).tolist() for name, found in times.items()}
    found = {name: turns[name][-1] | {"seconds": medians[name], "all": times[name]} for name in times}
    return found | {name: {"failed": why} for name, why in failed.items()}


def be_worker() -> None:
    """Makes this process a worker: stdout is for its answers, what libraries print goes to stderr."""
    global answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def tell(**report) -> None:
    """The worker's answer to a turn."""
    print(json.dumps(report), file=answers, flush=True)


def timed(work: Callable, device: str, **extra) -> None:
    """A worker's loop: for every turn does `work()` and tells seconds and peak memory (see `peak_bytes`)."""
    for _ in sys.stdin:
        before = clock(device)
        found = work() or {}
        tell(**{"seconds": clock(device) - before, "peak": peak_bytes(device)} | extra | found)


def clock(device: str) -> float:
    """Seconds, after all that was started on the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def pick_device() -> str:
    """cuda where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def status_bytes(name: str) -> int:
    """VmRSS (resident now) or VmHWM (most ever) of this process, bytes."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))
    except OSError:  # no Linux. (There, ru_maxrss would include what the parent held when it started us.)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(device: str) -> int:
    """Most memory so far: allocated on the GPU, or resident, the imported libraries included."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def held_bytes(device: str) -> int:
    """Memory held now; called after the imports it is the part that is not the variant's own."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return status_bytes("VmRSS")


def mib(n: float) -> str:
    """Bytes as MiB."""
    return f"{n / 2**20:,.0f}"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        first, *rest = (str(cell) for cell in row)
        cells = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def machine() -> dict:
    """What the figures were measured on."""
    import torch
    import transformers

    threads = f"{torch.get_num_threads()} CPU threads"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
