"""The toy study behind studies/zoo.sh: its runs, its table (docs/zoo.md, zoo.json) and its picture (zoo.png).

    python -m studies.zoo names [NAME ...]    the runs, one a line
    python -m studies.zoo run NAME            one run, into $OUT/NAME; a finished one is not repeated
    python -m studies.zoo report              table and picture of docs/zoo.json and the finished runs in $OUT

$OUT (default out/zoo) holds the runs. $STEPS, if set, replaces the steps of every run; the report
then goes to $OUT as well.
"""

import json
import os
import shlex
import subprocess
import sys
import time

import numpy as np

from toy.task import digits_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT, STEPS = os.environ.get("OUT") or "out/zoo", os.environ.get("STEPS") or ""
BUDGETS = ("16", "32", "48", "64")  # what is asked for in the table, whatever budgets a run was trained on
# Runs without a recipe: L1-Max alone, its ablation that the paper warns of, RLOO.
LCPO_MAX = "--mode max --advantage grpo --reward lcpo_max --reward-args alpha=0.02"
EXTRA = {
    "lcpo_max": LCPO_MAX,
    "lcpo_max_additive": LCPO_MAX + " additive=true",
}
# Methods again, for other cards or models: trained by the tests, no runs of their own here.
CARDS = ("l1_exact_24gb", "l1_exact_80gb_small", "smollm2_gsm8k")
EXTRA |= {"rloo": "--budgets none --reward correct --advantage rloo --steps 80"}
# What methods log beyond the common metrics: shown in the table, and asked for by tests/test_recipes.py.
OWN = """
    scheduled_budget kept_groups sampled_groups sampled_accuracy history_length history_known palu_budget
    laser_easy laser_medium laser_hard ref_accuracy ref_length conciseness dot_cut dot_threshold dot_lost
    length_by_subgroup reward_by_subgroup no_think_accuracy think_accuracy no_think_length think_length
    forced_share length_by_level short_accuracy long_accuracy short_length long_length drpo_kl kl
    toggle_limited toggle_over toggle_budget answer_length accuracy_by_budget
""".split()


INTRO = """# The zoo: every recipe on the toy

The method of every recipe, from one base model and one seed: a single run each, so small differences mean
nothing. The flags stand in each recipe's line `# toy:`. 100 new problems of 2 to 11 digits, 2 samples each
(with a budget: 2 to each of the four). A step of a chain stands in full, `b +3 =1`, or is taken in the head,
`b =1`, which saves a token and errs where both digits are 7 or more. With every step in full a chain takes 9
to 36 tokens, 23 on average; with every step in the head 8 to 26, 17 on average. The base model mends errors
when it goes through all once more.

![accuracy against mean length](zoo.png)

How to read it:

- **Nothing presses on the length** (`dr_grpo`, `gspo`, `cispo`, `rloo`; `affectgpt` and `palu` hardly do): as
  long as the base model or longer, and nearly always right. In this world a second look pays.
- **A limit, or the shortest of the right ones** (`dapo`, `dler`, `dot`, `gdpo`, `gfpo`): one chain in full,
  and nothing lost.
- **Shorter than the rest of the group is better** (`kimi`, `shorter_better`, `hapo`, `arora_zanette`,
  `grpo_lambda` ...), or every token costs (`alp`, `effort`): steps in the head as well, and a few answers go.
- Tokens grow with the digits as chains do, in methods that measure how hard a problem is (`alp`, `laser_d`,
  `hapo`, `palu`, `da_dler`) as in those that do not: a problem that needs more tokens gets them anyway. Only
  `laser`, whose bonus is paid up to a fixed length, is tighter on the easy ones than on the hard.
- The AI2 blog's four: with budgets up to 48 (`tulu_exact_4k`) all but the smallest are obeyed, and 64, never
  asked for, is not; with budgets up to 96 (`tulu_exact_8k`) the small ones are not; six buckets
  (`tulu_bucketed`) have the smallest error of the three. Up-to answers (`tulu_upto`) take half of a large
  budget and are right; the blog's collapse does not show.
- `l1_max`, trained with both kinds of prompt, is more exact than L1-Exact with this alpha. `thinkprune`
  writes what a problem needs, whatever is asked. `curriculum` and `curriculum_band` were asked for one length
  at a time, 64, 44, 31, then 21 tokens: no two prompts of a step differ in it, and they do not read it.
- `lcpo_max`, additive or not, writes the shortest chains, right, whatever the maximum; the collapse that L1
  reports of the additive form does not show.
- `longwriter_zero` and `surrogate` pay for length and format only, so the answers go.
- `tldr`, `hbpo` and `adaptive_deep` were trained with a sentence in the prompt that is missing here.
- What L1's alpha, a cap or a product do at small budgets: [study.md](study.md).
"""


def recipe(name: str) -> str:
    """The text of a recipe."""
    with open(os.path.join(ROOT, "recipes", name + ".args"), encoding="utf-8") as f:
        return f.read()


def toy_flags(text: str) -> list[str]:
    """The flags after `# toy:` in a recipe: arguments of train_grpo.main that run its method on the toy."""
    found = [line.removeprefix("# toy:") for line in text.splitlines() if line.startswith("# toy:")]
    if len(found) != 1:
        raise ValueError(f"a recipe has one line that begins with '# toy:', this one has {len(found)}")
    return shlex.split(found[0])


def runs() -> dict[str, list[str]]:
    """{name: flags} of all runs of the study."""
    names = {n[:-5] for n in os.listdir(os.path.join(ROOT, "recipes")) if n.endswith(".args")} - {
        "toy",
        *CARDS,
    }
    extra = {n: shlex.split(flags) for n, flags in EXTRA.items()}
    return {n: toy_flags(recipe(n)) for n in sorted(names)} | extra


def run(name: str) -> int:
    """Train one method from the cached base model; one line on the screen; the exit code of the training."""
    folder = os.path.join(OUT, name)
    if os.path.exists(os.path.join(folder, "eval", "results.json")):
        print(f"{name}: done before", flush=True)
        return 0
    flags = ["--steps", "250", *runs()[name], *(["--steps", STEPS] if STEPS else [])]
    flags += ["--seed", "0", "--sampler", "hf"]
    asked = ",".join(BUDGETS)
    if "--budgets none" in " ".join(flags):
        # One length for all is learned from fewer prompts than one length for each budget.
        flags += [] if "--prompts-per-step" in flags else ["--prompts-per-step", "16"]
        flags += [] if "--group-size" in flags else ["--group-size", "8"]
        asked = asked if "curriculum" in flags else "none"  # asked as it was trained
    flags += ["--eval-budgets", asked]
    began = time.monotonic()
    os.makedirs(OUT, exist_ok=True)
    with open(folder + ".log", "w") as log:
        command = [sys.executable, "train_grpo.py", *flags, "--out", folder, "--overwrite"]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        print(f"{name}: FAILED with code {code}, see {folder}.log", flush=True)
        return code
    m = read_run(name)
    text = f"accuracy {m['accuracy']:.1%}, {m['length']:.1f} tokens (base {m['base']['accuracy']:.1%}, "
    print(f"{name}: {text}{m['base']['length']:.1f}), {(time.monotonic() - began) / 60:.1f} min", flush=True)
    return 0


# ------------------------------------------------------------------------------------------------------------
# Reading


def figures(folder: str) -> dict:
    """Accuracy, length and the rest on the trained task: without a budget, or the mean over BUDGETS.

    "easy", "hard": mean length where the problem has two to four, nine to eleven digits.
    """
    with open(os.path.join(folder, "results.json")) as f:
        cells = json.load(f)["datasets"]["toy-test"]["budgets"]
    with open(os.path.join(folder, "samples.jsonl")) as f:
        samples = [s for s in map(json.loads, f) if s["source"] == "toy-test"]
    asked = ["none"] if "none" in cells else BUDGETS
    names = {"accuracy": "accuracy", "length": "mean_length", "truncated": "truncated", "error": "abs_error"}
    out = {"asked": "none" not in cells, "budgets": sum(b in cells for b in asked)}
    for ours, theirs in names.items():
        values = [cells[b][theirs] for b in asked if b in cells]
        out[ours] = None if None in values else round(float(np.mean(values)), 4)
    if out["asked"]:
        out["lengths"] = [round(cells[b]["mean_length"]) for b in asked if b in cells]
    for name, (low, high) in {"easy": (2, 4), "hard": (9, 11)}.items():
        lengths = [s["length"] for s in samples if low <= len(digits_of(s["problem"])) <= high]
        out[name] = round(float(np.mean(lengths)), 2)
    return out


def read_run(name: str) -> dict:
    """One finished run: its flags, its figures, those of the base model asked alike, its own quantities."""
    folder = os.path.join(OUT, name)
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        lines = f.read().splitlines()
    with open(os.path.join(folder, "args.json")) as f:
        args = json.load(f)
    last, text = json.loads(lines[-1]), "" if name in EXTRA else recipe(name)
    found = {"name": name, "reward": args["reward"], "advantage": args["advantage"], "steps": len(lines)}
    found |= figures(os.path.join(folder, "eval"))
    found["reconstruction"] = text.startswith("# RECONSTRUCTION")
    found["own"] = {key: last[key] for key in OWN if last.get(key) is not None}
    return found | {"base": figures(os.path.join(folder, "eval-0"))}


# ------------------------------------------------------------------------------------------------------------
# The table


def short(value) -> str:
    """A number with three digits, or the numbers of a dict."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {short(v)}" for k, v in value.items())
    return f"{value:.3g}"


def base_of(methods: list[dict]) -> dict:
    """The base model, from a run that asked it for all budgets (ThinkPrune asks for its own only)."""
    return max((m["base"] for m in methods), key=lambda base: base["budgets"])


def table(methods: list[dict]) -> str:
    """Markdown rows, the base model first, the others by mean length."""
    asked = methods[0]["asked"]
    third, tokens = ("length error", "tokens (at each)") if asked else ("cut off", "tokens")
    head = f"run|reward|advantage|steps|accuracy|{tokens}|2-4 digits|9-11 digits|{third}".split("|")
    head.append("its own quantities, last step")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    base = {"name": "**base model**", "reward": "", "advantage": "", "steps": 0, "own": {}}
    for m in [base | base_of(methods), *sorted(methods, key=lambda m: m["length"])]:
        third = m["error"] if asked else m["truncated"]
        own = "; ".join(f"{key} {short(value)}" for key, value in m["own"].items())
        cells = [m["name"] + (" (reconstruction)" if m.get("reconstruction") else ""), m["reward"]]
        each = f" ({', '.join(map(str, m['lengths']))})" if asked else ""
        cells += [m["advantage"], m["steps"], f"{m['accuracy']:.1%}", f"{m['length']:.1f}{each}"]
        cells += [f"{m['easy']:.0f}", f"{m['hard']:.0f}", f"{third:.1%}", own]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def report() -> None:
    """zoo.md, zoo.json and zoo.png of docs/zoo.json, in which the finished runs in OUT replace older ones."""
    docs, found = OUT if STEPS else os.path.join(ROOT, "docs"), {}
    if os.path.exists(os.path.join(docs, "zoo.json")):
        with open(os.path.join(docs, "zoo.json")) as f:
            found = {m["name"]: m for m in json.load(f)}
    done = [n for n in runs() if os.path.exists(os.path.join(OUT, n, "eval", "results.json"))]
    found |= {name: read_run(name) for name in done}
    methods = [found[name] for name in runs() if name in found]
    if not methods:
        sys.exit(f"zoo.py: error: {OUT} holds no finished run: bash studies/zoo.sh makes them")
    kinds = {
        "Asked for 16, 32, 48 and 64 tokens (means over the four)": [m for m in methods if m["asked"]],
        "Asked for no length": [m for m in methods if not m["asked"]],
    }
    kinds = {title: group for title, group in kinds.items() if group}
    text = INTRO
    for title, group in kinds.items():
        text += f"\n## {title}\n\n{table(group)}\n"
    with open(os.path.join(docs, "zoo.md"), "w", encoding="utf-8") as f:
        f.write(text)
    with open(os.path.join(docs, "zoo.json"), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(m) for m in methods) + "\n]\n")
    draw(kinds, os.path.join(docs, "zoo.png"))
    print(f"{len(methods)} of {len(runs())} runs are in {os.path.join(docs, 'zoo.md')}, zoo.json and zoo.png")


# ------------------------------------------------------------------------------------------------------------
# The picture


def overlap(a: tuple, b: tuple) -> bool:
    """Whether two boxes (left, bottom, right, top) share any area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place(points: list, sizes: list, frame: tuple, radius: float = 5) -> list[tuple]:
    """A box for each point's label, as near as it goes: inside the frame, off all points and other labels.

    Points (x, y), label sizes (width, height), frame and boxes (left, bottom, right, top): all in pixels.
    """
    taken, boxes = [(x - radius, y - radius, x + radius, y + radius) for x, y in points], []
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    reach = np.arange(radius, frame[2] - frame[0] + frame[3] - frame[1], radius)
    for (x, y), (w, h) in zip(points, sizes, strict=True):
        for far, angle in ((f, a) for f in reach for a in angles):
            left = x + np.cos(angle) * (far + w / 2) - w / 2
            low = y + np.sin(angle) * (far + h / 2) - h / 2
            box = (left, low, left + w, low + h)
            inside = frame[0] <= left and left + w <= frame[2] and frame[1] <= low and low + h <= frame[3]
            if inside and not any(overlap(box, other) for other in taken):
                break
        else:
            raise ValueError(f"no room for {len(points)} labels in a frame of {frame}")
        taken.append(box)
        boxes.append(box)
    return boxes


def crowd_of(methods: list[dict]) -> list[dict]:
    """The runs that ended in one place, too many to name there: near the median in length and accuracy."""
    length, accuracy = (np.median([m[key] for m in methods]) for key in ("length", "accuracy"))
    near = [m for m in methods if abs(m["length"] - length) < 1 and abs(m["accuracy"] - accuracy) < 0.05]
    return near if len(near) > 8 else []


def draw_panel(fig, ax, methods: list[dict], title: str, crowd: list[dict] = ()) -> None:
    """Accuracy against mean length, each run named beside its point, those of `crowd` only counted."""
    shown = [(m["length"], 100 * m["accuracy"], m["name"], m["reconstruction"]) for m in methods]
    for x, y, _, hollow in shown:
        ax.plot(x, y, "o", ms=6, mfc="white" if hollow else "0.55", mec="black", zorder=3)
    names = {m["name"] for m in crowd}
    shown = [s for s in shown if s[2] not in names]
    if crowd:
        x, y = (np.median([m[key] for m in crowd]) for key in ("length", "accuracy"))
        shown.append((x, 100 * y, f"{len(crowd)} runs: on the right", None))
    if crowd or len(crowd_of(methods)) < len(methods):
        base = base_of(methods)
        shown.append((base["length"], 100 * base["accuracy"], "base model", None))
        ax.plot(*shown[-1][:2], "*", ms=13, color="black", zorder=4)
    ax.set(title=title, xlabel="mean length (tokens)", ylabel="accuracy (%)")
    ax.margins(0.12)
    ax.grid(color="0.92")
    fig.canvas.draw()  # only now the axes know where their points are in pixels
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())
    texts = [ax.text(0, 0, name, fontsize=8, zorder=5) for _, _, name, _ in shown]
    boxes = [t.get_window_extent() for t in texts]
    points, frame = [tuple(ax.transData.transform(s[:2])) for s in shown], ax.get_window_extent()
    sizes = [(b.width + 6, b.height + 4) for b in boxes]
    places = place(points, sizes, (frame.x0, frame.y0, frame.x1, frame.y1), radius=fig.dpi / 11)
    for text, (px, py), (left, low, right, top) in zip(texts, points, places, strict=True):
        x, y = ax.transData.inverted().transform(((left + right) / 2, (low + top) / 2))
        text.set(position=(x, y), ha="center", va="center")
        # From the point to the nearest spot of its label: says whose label it is where they crowd.
        near = np.clip((px, py), (left + 2, low + 2), (right - 2, top - 2))
        ends = ax.transData.inverted().transform([(px, py), near])
        ax.plot(*ends.T, color="0.6", lw=0.7, zorder=1)


def draw(kinds: dict[str, list[dict]], path: str) -> None:
    """One panel per kind of run: accuracy against mean length, the base model as a star; a crowd enlarged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from evaluation.plots import STYLE

    with plt.rc_context(STYLE):
        panels = []
        for title, methods in kinds.items():
            crowd = crowd_of(methods)
            panels.append((methods, title, crowd))
            panels += [(crowd, "The crowd, enlarged", [])] if crowd else []
        fig, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 7), squeeze=False, dpi=110)
        fig.subplots_adjust(left=0.05, right=0.99, bottom=0.1, top=0.94, wspace=0.14)
        for ax, panel in zip(axes[0], panels, strict=True):
            draw_panel(fig, ax, *panel)
        text = "star: the base model, asked alike; hollow: reconstructions of formulas that were not found"
        fig.text(0.5, 0.015, text, ha="center", fontsize=9)
        fig.savefig(path)
        plt.close(fig)


if __name__ == "__main__":
    command, names = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if command == "names" and set(names) <= set(runs()):
        print("\n".join(names or runs()))
    elif command == "run" and len(names) == 1 and names[0] in runs():
        sys.exit(run(names[0]))
    elif command == "report":
        report()
    elif command in ("-h", "--help"):
        print(f"{__doc__}\nruns: {' '.join(runs())}")
    else:
        sys.exit(f"{__doc__}\nruns: {' '.join(runs())}")
