"""Kill a small run again and again, resume it each time, compare its end with that of an undisturbed run.

    python tests/kill_often.py --signal KILL --times 50 --out DIR

Called again with the same --out it goes on, so that fifty may be done in parts. Ends with a line of figures,
or with an error.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

from conftest import TOY, lines, timeless  # noqa: E402

import train_grpo  # noqa: E402

STEPS, SAVE_EVERY = 160, 2
FLAGS = [*TOY, "--prompts-per-step", "2", "--max-tokens", "32", "--method", "hapo", "--reward", "hapo_linear"]
FLAGS += ["--advantage", "grpo", "--lr", "1e-4", "--save-every", str(SAVE_EVERY)]


def command(words: list[str]):
    """The real command line, started."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "train_grpo.py", *words], cwd=os.path.dirname(HERE), **quiet)


class Forked:
    """The same in a forked process: main() without the seconds that imports take."""

    def __init__(self, words: list[str]):
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=(words,))
        self.process.start()
        self.pid = self.process.pid

    def run(self, words):
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        for number in (signal.SIGTERM, signal.SIGINT):  # as in a new process
            signal.signal(number, signal.SIG_DFL)
        train_grpo.main(words)
        os._exit(0)

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode


def steps_taken(out: str) -> int:
    """Steps that metrics.jsonl tells of; its last line may be half written."""
    try:
        with open(os.path.join(out, "metrics.jsonl"), "rb") as f:
            return f.read().count(b"\n")
    except FileNotFoundError:
        return 0


def saved(out: str) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max(train_grpo.checkpoints(out), default=0)


def strike(process, out: str, number: int, rng: random.Random, start: float) -> dict | None:
    """Send the signal at a random moment of the `start` seconds or of the training; None if all is over."""
    began, first = time.monotonic(), steps_taken(out)
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, start))
    else:
        goal = saved(out) + rng.randint(1, 4)  # what came after it is dropped, and taken again
        while process.poll() is None and steps_taken(out) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
    if process.poll() is not None:
        return None
    os.kill(process.pid, number)
    code, taken = process.wait(), steps_taken(out)
    writing = os.path.isdir(out) and any(name.endswith(".tmp") for name in os.listdir(out))
    record = {"code": code, "seconds": time.monotonic() - began, "while_saving": writing}
    return record | {"steps": max(0, taken - first), "lost": max(0, taken - saved(out))}


def torment(out: str, number: int, times: int, launch=command, steps=STEPS, seed=0) -> list[dict]:
    """Break the run in OUT/broken until `times` signals were sent; what each of them hit."""
    broken, journal = os.path.join(out, "broken"), os.path.join(out, "signals.jsonl")
    records = []
    if os.path.exists(journal):
        with open(journal) as f:
            records = [json.loads(line) for line in f]
    while len(records) < times:
        is_there = os.path.exists(os.path.join(broken, "args.json"))
        words = ["--resume"] if is_there else [*FLAGS, "--steps", str(steps)]
        rng = random.Random(f"{seed} {len(records)}")
        record = strike(
            launch([*words, "--out", broken]), broken, number, rng, 5 if launch is command else 0.5
        )
        assert record, f"the run of {steps} steps ended after {len(records)} signals: it is too short"
        assert record["lost"] <= SAVE_EVERY, record
        if number != signal.SIGKILL and record["code"] == 0:  # it was seen after a step: that one is saved
            assert record["lost"] == 0, record
        else:  # killed, or while it loaded, where a signal just ends it
            assert record["code"] in (-number, 128 + number), record
            assert number == signal.SIGKILL or record["steps"] == 0, record
        records.append(record)
        os.makedirs(out, exist_ok=True)
        with open(journal, "a") as f:
            f.write(json.dumps(record) + "\n")
    return records


def compare(out: str, launch=command, steps=STEPS) -> None:
    """Let the broken run end, run an undisturbed one, compare their weights and metrics bit by bit."""
    whole, broken = (os.path.join(out, name) for name in ("whole", "broken"))
    assert launch(["--resume", "--out", broken]).wait() == 0
    assert launch([*FLAGS, "--steps", str(steps), "--out", whole, "--overwrite"]).wait() == 0
    weights = []
    for folder in (whole, broken):
        with open(os.path.join(folder, f"checkpoint-{steps}", "model.safetensors"), "rb") as f:
            weights.append(f.read())
    assert weights[0] == weights[1], "the weights differ"
    assert timeless(whole) == timeless(broken) and len(lines(whole)) == steps, "the metrics differ"


def summary(records: list[dict]) -> str:
    """What the signals hit, in a line."""
    late = [r for r in records if r["steps"]]  # the others were hit while they loaded
    saving, again = sum(r["while_saving"] for r in late), [r["lost"] for r in late]
    return (
        f"{len(records)} signals, {len(records) - len(late)} of them before a first step, {saving} while a "
        f"checkpoint was written; steps taken again: {sum(again)} in all, at most {max(again)} after one (a "
        f"checkpoint every {SAVE_EVERY}); {sum(r['seconds'] for r in records):.0f} s. At the end weights "
        f"and metrics are those of an undisturbed run, bit for bit"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--part", action="store_true", help="stop after --times, compare another time")
    args = parser.parse_args()
    found = torment(args.out, getattr(signal, "SIG" + args.signal), args.times)
    if not args.part:
        compare(args.out)
        print(summary(found))
