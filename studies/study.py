"""The study behind studies/study.sh: its runs; study_report.py makes pictures and docs/study.md of them.

    python -m studies.study names [--quick]     the runs that docs/study.json lacks, one a line, as NAME:SEED
    python -m studies.study run NAME:SEED       one run; its figures become a line of $DOCS/study.json

$OUT (default out/study) holds models and samples, $DOCS (default docs) the figures. A run that study.json
already holds is not repeated, so the study goes on where it stopped, on any machine.
"""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np

from rewards import REWARDS
from toy.prepare import prepare

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT, DOCS = os.environ.get("OUT") or "out/study", os.environ.get("DOCS") or "docs"
STEPS = os.environ.get("STEPS")  # for all runs: tries the machinery
# Every run: the settings of the toy's default, on the base model of its seed, evaluated afterwards.
TRAIN = "@recipes/toy.args --sampler hf --save-every 0 --eval-every 0 --budgets uniform:16:48"
# Trained are 16 to 48; 72 and 96 are 1.5 times and twice the largest.
ASKED = [16, 20, 24, 32, 40, 48, 56, 64, 72, 96]
WIDE = [16, 24, 32, 48, 64, 72, 80, 96, 112, 128, 144]  # for runs trained up to 96
LCPO = "--reward lcpo_exact --reward-args alpha=0.02 --advantage"  # the paper's 0.0003, scaled to 48 tokens
PEAKED = "--reward peaked_exact --advantage"
SAMPLED = "--n 4 --limit 100 --temperature 1 --top-p 1 --sampler hf"
# The blog: correct + 1 - |L - N| / 8192, budgets up to 4096 or 8192 tokens; here 96 is its 8192.
TULU = "--advantage grpo --reward-args scale=96 --max-tokens 112 --reward"
FREE = "--budgets uniform:16:96 --advantage gdpo --reward"


def made(flags: str = "", seeds: int = 1, **more) -> dict:
    """One experiment: flags beside TRAIN; how many seeds."""
    common = {"asked": ASKED, "trained": [16, 48], "steps": 200}
    return {"flags": flags, "seeds": seeds} | common | more


def blog(flags: str, **more) -> dict:
    """One of the AI2 blog's settings: a flat reward, a wide range, so more steps until it is learned."""
    return made(
        f"{TULU} {flags}", **{"violins": True, "asked": WIDE, "trained": [16, 96], "steps": 300} | more
    )


RUNS = {
    # The base model as it is, and what can be done to it without training.
    "base": made(seeds=3, kind="base", asked=ASKED + [80, 112, 128, 144]),
    "decoding": made(seeds=3, kind="decoding", asked=[16, 24, 32, 40, 48, 64]),
    # Two rewards, each with its terms summed (GRPO) and normalised one by one (GDPO).
    "peaked_gdpo": made(f"{PEAKED} gdpo", 3),
    "peaked_sum": made(f"{PEAKED} grpo", 3),
    "lcpo_gdpo": made(f"{LCPO} gdpo", 3),
    "lcpo_sum": made(f"{LCPO} grpo", 3),
    # The AI2 blog's four settings.
    "ai2_short": blog("tulu_exact --budgets uniform:16:48", trained=[16, 48]),
    "ai2_long": blog("tulu_exact --budgets uniform:16:96"),
    "ai2_bucketed": blog("tulu_exact --budgets bucket:16,24,48,72,96"),
    "ai2_upto": blog("tulu_upto --budgets uniform:16:96 --mode max", modes=["max"]),
    # L1: Max from Exact with both kinds of prompt, its ablation, more RL, other alphas.
    "l1_max": made(
        "--mode both --reward lcpo_dual --reward-args alpha_exact=0.02 alpha_max=0.02 delta=0.5 "
        "--advantage grpo --lr 1e-4", 3, start="lcpo_sum", modes=["exact", "max"],
    ),
    "max_multiplied": made(
        "--mode max --reward lcpo_max --reward-args alpha=0.02 --advantage grpo --lr 1e-4",
        start="lcpo_sum", modes=["max"],
    ),
    "max_added": made(
        "--mode max --reward lcpo_max --reward-args alpha=0.02 additive=true --advantage grpo --lr 1e-4",
        start="lcpo_sum", modes=["max"],
    ),
    "more_rl": made(f"{LCPO} grpo --lr 1e-4", start="lcpo_sum"),
    "alpha_0.0005": made(f"{LCPO} grpo --reward-args alpha=0.0005"),
    "alpha_0.1": made(f"{LCPO} grpo --reward-args alpha=0.1"),
    # Supervised training on traces that are annotated with their own lengths.
    "supervised": made(kind="supervised"),
    "ruler": made(kind="supervised", idea="mlt"),
    # Ideas against the limit at the largest trained budget; each otherwise as peaked_gdpo.
    "relative": made(f"{PEAKED} gdpo", idea="relative"),
    "tally": made(f"{PEAKED} gdpo", 3, idea="tally"),
    "tally_8": made(f"{PEAKED} gdpo", idea="tally_8"),
    "tally_kl": made(f"{PEAKED} gdpo --kl-coef 0.05", idea="tally_8"),
    "remind": made(f"{PEAKED} gdpo", idea="remind"),
    "remind_capped": made(kind="again", start="remind", idea="remind_capped"),
    "remind_16": made(f"{PEAKED} gdpo", idea="remind_16"),
    "remind_16_capped": made(kind="again", start="remind_16", idea="remind_16_capped"),
    "free_beyond": made(f"{FREE} length_beyond", idea="free_beyond"),
    "unfinished": made(f"{FREE} censored", idea="unfinished"),
}  # fmt: skip


# With one seed each: at least one run for every picture.
# 2,000 problems, 8 samples of each, the right ones three times over, with RL's learning rate: about as many
# responses are learned from as in 200 steps of RL.
WARM_START = "--problems 2000 --samples 8 --right --epochs 3 --batch 64 --lr 3e-4 --cap 96 --wording tulu"
QUICK = "base decoding lcpo_sum lcpo_gdpo peaked_gdpo ai2_short ai2_upto l1_max alpha_0.1 supervised tally"
QUICK = QUICK.split()


def wanted(quick: bool) -> list[tuple[str, int]]:
    """(name, seed) of the runs: all first seeds come first, a run after the one it starts from."""
    names = QUICK if quick else list(RUNS)
    return [(n, s) for s in range(1 if quick else 3) for n in names if s < RUNS[n]["seeds"]]


def flags_of(name: str, seed: int) -> list[str]:
    """The training flags of a run; a later one overrides an earlier one."""
    return shlex.split(f"{TRAIN} --steps {steps(name)} {RUNS[name]['flags']} --seed {seed}")


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
    path = os.path.join(DOCS, "study.json")
    with open(os.path.join(DOCS, ".study.lock"), "w") as lock:
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
    run, folder, toy = RUNS[name], os.path.join(OUT, f"{name}-{seed}"), prepare(seed)
    if run.get("kind") == "base":
        return toy["model"]
    start = train(run["start"], seed, log) if run.get("start") else toy["model"]
    if run.get("kind") == "again":  # another run's model, asked in another way
        return start
    os.makedirs(folder, exist_ok=True)
    with open(folder + ".lock", "w") as lock:  # a run that starts from this one waits until it is there
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.get("kind") == "supervised":
            model, words = os.path.join(folder, "model"), ["-m", "studies.warm_start", start]
            words += [model, "--data", toy["data"], "--seed", str(seed), *WARM_START.split()]
            words += ["--mlt"] if run.get("idea") else []
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
    asked = ",".join(map(str, run["asked"])) + (",none" if run.get("kind") == "base" else "")
    low, high = run["trained"]
    words = f"--data toy,toy_ood --budgets {asked} {SAMPLED} --mode {mode} --wording tulu --max-tokens 200 "
    words += f"--require-think --seed {seed} --trained-budgets uniform:{low}:{high} --overwrite"
    told = ["--model", model, "--out", out, *words.split()]
    command(log, *script("evaluate", run.get("idea")), *told)
    return out


def decode(seed: int, log) -> dict:
    """The base model under s1's budget forcing and under truncation: {method: {data set: cells}}."""
    out = os.path.join(OUT, f"decoding-{seed}", "sweep")
    asked = ",".join(map(str, RUNS["decoding"]["asked"]))
    words = f"-m evaluation.baselines sweep --data toy --budgets {asked} --methods s1,truncate".split()
    if not os.path.exists(os.path.join(out, "truncate", "results.json")):
        shutil.rmtree(out, ignore_errors=True)
        words += [*SAMPLED.split(), "--seed", str(seed), "--model", prepare(seed)["model"], "--out", out]
        command(log, *words)
    return {method: cells(os.path.join(out, method), False) for method in ("s1", "truncate")}


KEYS = "n accuracy mean_length signed_error abs_error within_10 over_budget".split()


def cells(folder: str, violins: bool) -> dict:
    """{data set: {budget: figures}} of one evaluation; `violins`: and how many responses of each length."""
    with open(os.path.join(folder, "results.json"), encoding="utf-8") as f:
        sets = json.load(f)["datasets"]
    out = {}
    for name, part in sets.items():
        out[name] = {b: {k: rounded(c[k]) for k in KEYS} for b, c in part["budgets"].items()}
    if violins:
        with open(os.path.join(folder, "samples.jsonl"), encoding="utf-8") as f:
            for sample in map(json.loads, f):
                cell = out[sample["source"]][str(sample["budget"] or "none")].setdefault("lengths", {})
                cell[str(sample["length"])] = cell.get(str(sample["length"]), 0) + 1
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


def length_shares(folder: str, low: int, high: int) -> dict:
    """The length term's share of the variance within a group, for two rewards: what GRPO sees of it in a sum.

    Of responses to one prompt, mean over prompts; GDPO gives every term the same share, a half.
    """
    groups = {}
    with open(os.path.join(folder, "samples.jsonl"), encoding="utf-8") as f:
        for s in map(json.loads, f):
            if s["source"] == "toy" and low <= (s["budget"] or 0) <= high:
                groups.setdefault((s["id"], s["budget"]), []).append((s["correct"], s["length"]))
    values = np.array(list(groups.values()), dtype=float)  # [prompts, responses, 2]
    rollouts = {"correct": values[..., 0], "length": values[..., 1], "budget": [b for _, b in groups]}
    rollouts["truncated"], shares = np.zeros(values.shape[:2]), {}
    for name, options in {"peaked_exact": {}, "lcpo_exact": {"alpha": 0.02}}.items():
        terms = REWARDS[name](rollouts, parts=True, **options)
        variance = {key: term.var(1).mean() for key, term in terms.items()}
        shares[f"length_share_{name}"] = rounded(variance["length"] / sum(variance.values()))
    return shares


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
    with open(folder + ".log", "a") as log:
        if spec.get("kind") == "decoding":
            record["cells"] = decode(seed, log)
        else:
            model, record["cells"] = train(name, seed, log), {}
            for mode in spec.get("modes", ["exact"]):
                out = evaluate(name, seed, mode, model, log)
                record["cells"][mode] = cells(out, spec.get("violins", False) and seed == 0)
                record |= {f"correlation_{mode}": correlation(out, *spec["trained"])}
                if spec.get("kind") == "base":
                    record |= length_shares(out, *spec["trained"])
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
