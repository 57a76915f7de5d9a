"""The study behind studies/study.sh: its runs; study_report.py makes pictures and docs/study.md of them.

    python -m studies.study names [--quick]     the runs that docs/study.json lacks, one a line, as NAME:SEED
    python -m studies.study run NAME:SEED       one run; its figures become a line of $DOCS/study.json

$OUT (default out/study) holds models and samples, $DOCS (default docs) the figures. A run that study.json
already holds is not repeated, so the study goes on where it stopped, on any machine.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np

from data import write_rows
from toy import prepare
from toy.task import digits_of, problems

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT, DOCS = os.environ.get("OUT") or "out/study", os.environ.get("DOCS") or "docs"
STEPS = os.environ.get("STEPS")  # for all runs: tries the machinery
SENSE = {k: prepare.WARMUP[k] for k in ("write", "of")}  # of the default base model
# Every run: the toy's default but for its flags, on the base model of its seed, evaluated afterwards.
TRAIN = "@recipes/toy.args --sampler hf --save-every 0 --eval-every 0"
INSIDE = [16, 19, 23, 25, 28, 33, 37, 42, 46, 51, 55, 64]
ASKED = [*INSIDE, 80, 96, 128, 256]  # beyond: 1.25, 1.5, 2 and 4 times the largest trained budget
LCPO = "--advantage grpo --reward lcpo_exact --reward-args"
# Not divided by the group's deviation: else easy problems, where only length differs, outvote the answers.
MAX = "--lr 2e-4 --advantage dr_grpo --reward"
SAMPLED = "--n 2 --limit 100 --temperature 1 --top-p 1 --sampler hf"
GENTLE = "--lr 1e-4 --kl-coef 0.02"  # so that RL forgets less of what a warm start taught
ENDING = 3  # tokens from `</think>` on, which s1 and truncation put on top of the budget


def made(flags: str = "", seeds: int = 1, **more) -> dict:
    """One experiment: flags beside TRAIN; how many seeds."""
    return {"flags": flags, "seeds": seeds, "steps": 250, "trained": [16, 64]} | more


RUNS = {
    # The base model as it is, and what can be done to it without training.
    "base": made(seeds=3, kind="base"),
    "decoding": made(seeds=3, kind="decoding"),
    # The default; the same from base models that never learned what a number means, or of nothing but waits.
    "exact": made(seeds=3),
    "no_sense": made(seeds=3, warmup={"write": 0.0}),
    "sense_of_waits": made(warmup={"of": "wait"}),
    # Max from the base model; its additive ablation; as L1 trains it, from Exact with both kinds of prompt.
    "max": made(f"{MAX} lcpo_max --mode max --reward-args alpha=0.01", 3, modes=["max"]),
    "max_added": made(f"{MAX} lcpo_max --mode max --reward-args alpha=0.01 additive=true", modes=["max"]),
    "max_from_exact": made(f"{MAX} lcpo_dual --mode both --reward-args alpha_exact=0.02 alpha_max=0.01",
                           start="exact", modes=["max", "exact"]),
    # An answer against the length: no cap, summed, multiplied; L1's reward with three alphas.
    "uncapped": made("--reward peaked_exact", 3),
    "summed": made("--advantage grpo", 3),
    "multiplied": made("--advantage grpo --reward multiplied --reward-args tau=6", 3, idea="multiplied"),
    "alpha_0.005": made(f"{LCPO} alpha=0.005", 3),
    "alpha_0.02": made(f"{LCPO} alpha=0.02", 3),
    "alpha_0.1": made(f"{LCPO} alpha=0.1", 3),
    # Beyond the range: a warm start on own responses, behind a number, with reminders, or both; then RL.
    "warm": made(kind="supervised"),
    "warm_rl": made(GENTLE, start="warm", steps=30),
    "remind_warm": made(kind="supervised", idea="remind"),
    "remind_count_warm": made(kind="supervised", idea="remind_count"),
    "remind_only_warm": made(seeds=3, kind="supervised", idea="remind_only"),
    "remind_only_warm64": made(kind="supervised", idea="remind_only", cap=64),
    "remind_only": made(f"--method reminders {GENTLE}", 3, start="remind_only_warm", idea="remind_only",
                        steps=30),
    "remind_only_more": made("--method reminders", start="remind_only_warm", idea="remind_only", steps=100),
}  # fmt: skip


# 1,000 problems of each task, 24 samples each; the right ones are taught, asked for by their own lengths.
WARM_START = "--problems 2000 --samples 24 --right --epochs 3 --batch 64 --lr 1e-3 --wording tulu"
QUICK = "base decoding exact no_sense max max_added uncapped remind_only_warm remind_only".split()


def wanted(quick: bool) -> list[tuple[str, int]]:
    """(name, seed) of the runs: all first seeds come first, a run after the one it starts from."""
    names = QUICK if quick else list(RUNS)
    return [(n, s) for s in range(1 if quick else 3) for n in names if s < RUNS[n]["seeds"]]


def flags_of(name: str, seed: int) -> list[str]:
    """The training flags of a run; a later one overrides an earlier one."""
    return shlex.split(f"{TRAIN} {RUNS[name]['flags']} --steps {steps(name)} --seed {seed}")


def steps(name: str) -> int:
    """Training steps of a run."""
    return int(STEPS or RUNS[name]["steps"])


def read() -> dict[tuple, dict]:
    """{(name, seed): record} of $DOCS/study.json, one record a line."""
    path = os.path.join(DOCS, "study.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return {(r["name"], r["seed"]): r for r in json.load(f)}


def add(record: dict) -> None:
    """Put a record into study.json, in the study's order; another run may do so at the same time."""
    os.makedirs(DOCS, exist_ok=True)
    os.makedirs(OUT, exist_ok=True)
    path = os.path.join(DOCS, "study.json")
    with open(os.path.join(OUT, "study.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = read() | {(record["name"], record["seed"]): record}
        order = [records[key] for key in wanted(False) if key in records]
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write("[\n" + ",\n".join(json.dumps(r) for r in order) + "\n]\n")
        os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------------------------------
# One run


def command(log, *words: str) -> None:
    """Run a script of the project with its output in `log`; CalledProcessError where it fails."""
    subprocess.run([sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def script(name: str, idea: str | None) -> list[str]:
    """The words that run train_grpo or evaluate, with an idea put in."""
    return ["-m", "studies.ideas", idea, name] if idea else [f"{name}.py"]


def train(name: str, seed: int, log) -> str:
    """Folder of a run's model; it and what it starts from are trained where they are not yet."""
    run, folder, toy = RUNS[name], os.path.join(OUT, f"{name}-{seed}"), prepare.prepare(seed)
    if run.get("kind") == "base":
        return toy["model"]
    start = train(run["start"], seed, log) if run.get("start") else toy["model"]
    os.makedirs(folder, exist_ok=True)
    with open(folder + ".lock", "w") as lock:  # a run that starts from this one waits until it is there
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.get("kind") == "supervised":
            model, words = os.path.join(folder, "model"), ["-m", "studies.warm_start", start]
            both = [problems(t, "train", 1000, seed) for t in ("toy", "toy_ood")]
            write_rows([row for pair in zip(*both, strict=True) for row in pair], f"{folder}/problems.jsonl")
            words += [model, "--data", f"{folder}/problems.jsonl", "--seed", str(seed), *WARM_START.split()]
            words += ["--cap", str(run.get("cap", 160))]
            words += ["--idea", run["idea"]] if run.get("idea") else []
        else:
            model = os.path.join(folder, f"checkpoint-{steps(name)}")
            words = [*script("train_grpo", run.get("idea")), *flags_of(name, seed)]
            words += ["--model", start, "--data", toy["data"], "--out", folder, "--overwrite"]
        if not os.path.exists(os.path.join(model, "model.safetensors")):
            command(log, *words)
    return model


def evaluate(name: str, seed: int, mode: str, model: str, log) -> str:
    """Sweep the budgets over the trained task and the one that RL never saw; the folder of the results."""
    run, out = RUNS[name], os.path.join(OUT, f"{name}-{seed}", f"eval_{mode}")
    asked = ",".join(map(str, ASKED)) + (",none" if run.get("kind") == "base" else "")
    low, high = run["trained"]
    words = f"--data toy,toy_ood --budgets {asked} {SAMPLED} --mode {mode} --wording tulu --max-tokens 300 "
    words += f"--require-think --seed {seed} --trained-budgets uniform:{low}:{high} --overwrite"
    told = ["--model", model, "--out", out, *words.split()]
    command(log, *script("evaluate", run.get("idea")), *told)
    return out


def decode(seed: int, log) -> dict:
    """The base model under s1's budget forcing, truncation and scaled stops: {method: {data set: cells}}."""
    found = {}
    for methods, less in (("s1,truncate", ENDING), ("stop_scale", 0)):
        out = os.path.join(OUT, f"decoding-{seed}", methods.split(",")[0])
        asked = ",".join(str(b - less) for b in INSIDE)
        words = f"-m evaluation.baselines sweep --data toy --budgets {asked} --methods {methods}".split()
        if not os.path.exists(os.path.join(out, methods.split(",")[-1], "results.json")):
            shutil.rmtree(out, ignore_errors=True)
            words += [*SAMPLED.split(), "--seed", str(seed), "--model", prepare.prepare(seed)["model"]]
            command(log, *words, "--out", out)
        found |= {m: cells(os.path.join(out, m), less) for m in methods.split(",")}
    return found


KEYS = "n accuracy mean_length signed_error abs_error over_budget".split()


def cells(folder: str, less: int = 0) -> dict:
    """{data set: {budget: figures}} of one evaluation; `less`: how many tokens of a budget it was asked for.

    "within": right, and at most 1.1 times as long as the budget. "head": share of the steps behind the first
    that are taken in the head. "sizes": {digits of the problem: [responses, mean length, accuracy]}.
    """
    with open(os.path.join(folder, "results.json"), encoding="utf-8") as f:
        sets = json.load(f)["datasets"]
    with open(os.path.join(folder, "samples.jsonl"), encoding="utf-8") as f:
        samples = [json.loads(line) for line in f]
    out = {}
    for name, part in sets.items():
        out[name] = {}
        for b, c in part["budgets"].items():
            asked = None if b == "none" else int(b) + less
            mine = [s for s in samples if s["source"] == name and str(s["budget"] or "none") == b]
            cell = {k: rounded(c[k]) for k in KEYS}
            if asked:
                errors = np.array([s["length"] / asked - 1 for s in mine])
                cell |= {"signed_error": rounded(errors.mean()), "abs_error": rounded(abs(errors).mean())}
                cell["over_budget"] = rounded((errors > 0).mean())
                cell["within"] = rounded(np.mean([s["correct"] and s["length"] <= 1.1 * asked for s in mine]))
            taken = re.findall(r"[b-k] (\+\d )?=\d", " ".join(s["response"] for s in mine))
            cell["head"] = rounded(np.mean([not full for full in taken])) if taken else None
            by_size = {}
            for s in mine:
                by_size.setdefault(len(digits_of(s["problem"])), []).append((s["length"], s["correct"]))
            cell["sizes"] = {n: [len(v), *map(rounded, np.mean(v, 0))] for n, v in sorted(by_size.items())}
            out[name][str(asked or "none")] = cell
    return out


def rounded(value: float | None) -> float | None:
    """Four decimals: a response in 10,000."""
    return None if value is None else round(float(value), 4)


def correlation(folder: str, low: int, high: int) -> float | None:
    """Pearson's, of asked and produced length over all responses of the trained task at trained budgets."""
    with open(os.path.join(folder, "samples.jsonl"), encoding="utf-8") as f:
        samples = [
            s for s in map(json.loads, f) if s["source"] == "toy" and low <= (s["budget"] or 0) <= high
        ]
    asked, lengths = ([s[key] for s in samples] for key in ("budget", "length"))
    return rounded(np.corrcoef(asked, lengths)[0, 1]) if min(len({*asked}), len({*lengths})) > 1 else None


def curve(folder: str) -> dict:
    """The learning curve, means of five steps: {"error", "accuracy", "length"}, and the step of the onset."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    out = {}
    for ours, theirs in {"error": "abs_error", "accuracy": "accuracy", "length": "length"}.items():
        values = np.array([m[theirs] for m in lines], dtype=float)
        out[ours] = [rounded(v) for v in values[: len(values) // 5 * 5].reshape(-1, 5).mean(1)]
    errors = np.array([m["abs_error"] for m in lines], dtype=float)
    # The onset: ten steps in a row are off by less than a fifth on average.
    low = [errors[i : i + 10].mean() < 0.2 for i in range(len(errors) - 9)]
    out["onset"] = low.index(True) if True in low else None
    return out


def run(name: str, seed: int) -> None:
    """Train and evaluate one run; its figures go to study.json, a line to the screen."""
    folder, spec, began = os.path.join(OUT, f"{name}-{seed}"), RUNS[name], time.monotonic()
    os.makedirs(folder, exist_ok=True)
    record = {"name": name, "seed": seed, "trained": spec["trained"], "steps": steps(name)}
    prepare.WARMUP |= SENSE | spec.get("warmup", {})
    with open(folder + ".log", "a") as log:
        if spec.get("kind") == "decoding":
            record["cells"] = decode(seed, log)
        else:
            model, record["cells"] = train(name, seed, log), {}
            for mode in spec.get("modes", ["exact"]):
                out = evaluate(name, seed, mode, model, log)
                record["cells"][mode] = cells(out)
                record |= {f"correlation_{mode}": correlation(out, *spec["trained"])}
    if os.path.exists(os.path.join(folder, "metrics.jsonl")):
        record |= {"flags": shlex.join(flags_of(name, seed)), **curve(folder)}
    add(record)
    inside = [c for c in next(iter(record["cells"].values()))["toy"].values() if c["abs_error"] is not None]
    error, right = (np.mean([c[key] for c in inside]) for key in ("abs_error", "accuracy"))
    took = (time.monotonic() - began) / 60
    figures = f"error {error:.1%} over all budgets, accuracy {right:.1%}, {took:.1f} min"
    print(f"{name}:{seed}: {figures}", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        sys.exit(print(__doc__))
    os.makedirs(OUT, exist_ok=True)
    done = read()
    if words and words[0] == "names":
        print("\n".join(f"{n}:{s}" for n, s in wanted("--quick" in words) if (n, s) not in done))
    elif len(words) == 2 and words[0] == "run" and words[1] in {f"{n}:{s}" for n, s in wanted(False)}:
        run_name, _, run_seed = words[1].partition(":")
        try:
            run(run_name, int(run_seed))
        except subprocess.CalledProcessError as failure:
            where = f"see {OUT}/{run_name}-{run_seed}.log"
            sys.exit(f"{words[1]}: FAILED with code {failure.returncode}, {where}")
    else:
        sys.exit(__doc__)
