"""Two steps of every recipe, and several kinds of run, give the numbers that were frozen.

tests/data/freeze/ holds a small taught model, a classifier for CRF, a few rows and metrics.json: what
the first edition of the trainer made of them. In every run its method acts ("acts" says how): something is
cut, forced, replaced, remembered.

    python tests/test_freeze.py NAME ...            the numbers of these runs beside the frozen ones
    python tests/test_freeze.py --freeze NAME ...   these runs are frozen anew
"""

import glob
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # conftest.py does it for pytest
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import train_grpo  # noqa: E402

HOME = "tests/data/freeze"  # from the root: recipes name each other from there
FILE = os.path.join(ROOT, HOME, "metrics.json")
with open(FILE, encoding="utf-8") as f:
    FROZEN = json.load(f)

# The flags of a run NAME or NAME+KIND, later ones win: its recipe, what its line `# toy:` may override,
# that line, what it may not override, FLAGS[NAME], FLAGS[NAME+KIND].
BEFORE = "--budgets bucket:16,32,48,64 --wording tulu --require-think --max-tokens 96 --minibatches 2"
AFTER = f"""--model {HOME}/model --data {HOME}/rows.jsonl --sampler hf --dtype float32 --seed 0 --steps 2
    --prompts-per-step 6 --group-size 4 --micro-tokens 2048 --lr 5e-4 --lr-schedule constant --warmup-steps 0
    --eval-data {HOME}/rows.jsonl --eval-budgets 16 --eval-every 0 --save-every 0"""
FLAGS = {
    # no recipes: the toy's own reward, L1-Max without its exact half
    "peaked_exact": "--reward peaked_exact --advantage gdpo",
    "lcpo_max": "--mode max --reward lcpo_max --reward-args alpha=0.02",
    "lcpo_max_additive": "--mode max --reward lcpo_max --reward-args alpha=0.02 additive=true",
    # six prompts come back in the second step
    "hapo": "--limit 6 --lr 1e-4 --seed 1",
    "hapo_linear": "--limit 6 --lr 1e-4 --seed 1",
    "palu": "--limit 6 --lr 1e-4 --seed 1",
    # constants that act within two steps of small groups
    "gfpo": "--advantage-args k=2 metric=shortest",
    "hbpo": "--group-size 8 --lr 2e-4",
    "crf": f"--method-args model={HOME}/conciseness",
    "laser_d": "--method-args every=1 size=4 samples=2 low=8 step=8 --lr 2e-4",
    "laser_de": "--method-args every=1 size=4 samples=2 low=8 step=8 --lr 2e-4 --seed 1",
    "curriculum": "--method-args start=64 gamma=0.7 period=1",
    "curriculum_band": "--method-args start=64 gamma=0.7 period=1 --seed 1",
    "adaptive_deep": "--reward-args d=0.2 l_max=64 l_cache=24 --seed 1",
    # where rounding would show: smaller steps, or another draw
    "drpo": "--lr 2e-4 --method-args lam=0.1 tau=10 l_max=96 kl_coef=100 kl_delta=0.00001",
    "surrogate": "--lr 1e-4 --seed 2",
    "tulu_upto": "--lr 2e-4 --seed 1",
    "elastic": "--seed 1",
    "shorter_better": "--seed 2",
    "tulu_exact_8k": "--lr 2e-4 --seed 2",
    "adaptthink": "--lr 2e-4 --seed 1",
    "alp": "--lr 1e-4 --seed 1",
    "tldr": "--seed 1",
    "tulu_exact_4k": "--lr 2e-4",
    "tulu_bucketed": "--lr 2e-4",
    "o1_pruner": "--lr 1e-4 --seed 4",
    "kimi": "--lr 1e-4",
    "laser": "--lr 2e-4",
    "dot": "--lr 1e-4 --seed 4",
    "grpo_lead": "--lr 2e-4",
    "gdpo": "--lr 2e-4",
    "affectgpt": "--reward-args k_max=0.8 weight=1",
    "toggle": "--reward-args lam=0.25 --method-args m=1 rho=50 samples=4 --lr 2e-4",
    "brpo": """--group-size 8 --method-args budgets=[8,24] weights=[1,2] answers=2 length=4 'cut=""' 'ask=""'
        --lr 2e-4""",
    "effort": "--lr 2e-4",
    "grlc": "--lr 2e-4",
    # parts of the loss that no toy line has
    "gdpo+overlong_filter": "--overlong-filter --max-tokens 40",
    "gdpo+dual_clip": "--dual-clip 1.05 --minibatches 3 --lr 3e-4 --seed 3",
    "gdpo+rates": "--temperature 0.8 --lr-schedule linear --warmup-steps 1 --weight-decay 0.1",
    # kinds of run; a resumed run is four steps, saved and loaded after two
    "gdpo+two_processes": "--kl-coef 0.01",
    "drpo+two_processes": "",
    "gdpo+resumed": "--kl-coef 0.01 --seed 2",
    "hapo+resumed": "",
    "gdpo+lora": "--lora 4 --kl-coef 0.01 --lr 2e-3",
    "gdpo+fsdp": "--fsdp --kl-coef 0.01",
    "gdpo+vllm": "--sampler vllm --kl-coef 0.01",
}
METRICS = """reward accuracy length truncated signed_error abs_error zero_variance loss grad_norm entropy
    clip_fraction kl kept_groups sampled_groups sampled_accuracy history_known history_length palu_budget
    scheduled_budget laser_easy laser_medium laser_hard ref_accuracy ref_length conciseness dot_cut
    dot_threshold dot_lost drpo_kl forced_share length_by_subgroup reward_by_subgroup length_by_level
    no_think_accuracy think_accuracy no_think_length think_length short_accuracy long_accuracy short_length
    long_length toggle_limited toggle_over toggle_budget answer_length accuracy_by_budget""".split()
RECIPES = sorted(os.path.basename(path)[:-5] for path in glob.glob(os.path.join(ROOT, "recipes", "*.args")))
RECIPES.remove("toy")  # no paper's: what the flags of BEFORE say


def flags_of(name: str) -> list[str]:
    """The command line of a run, without --out."""
    recipe, _, kind = name.partition("+")
    found, line = [], []
    if recipe in RECIPES:
        with open(os.path.join(ROOT, "recipes", recipe + ".args"), encoding="utf-8") as f:
            [line] = [shlex.split(line[7:]) for line in f if line.startswith("# toy:")]
        found = [f"@recipes/{recipe}.args"]
    found += [*shlex.split(BEFORE), *line, *shlex.split(AFTER), *shlex.split(FLAGS.get(recipe, ""))]
    return found + (shlex.split(FLAGS[name]) if kind else [])


def run(name: str, out: str) -> list[dict]:
    """The metrics that are compared, a dict a step, of a run into the folder `out`."""
    flags = [*flags_of(name), "--out", out]
    script = os.path.join(ROOT, "train_grpo.py")
    if name.endswith(("+two_processes", "+fsdp")):
        call([*"-m torch.distributed.run --standalone --nproc_per_node 2".split(), script, *flags])
    elif name.endswith("+vllm"):  # the engine changes the process that it lives in
        call([script, *flags])
    else:
        train_grpo.main(flags)
    if name.endswith("+resumed"):
        train_grpo.main(["--out", out, "--resume", "--steps", "4"])
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
        steps = [json.loads(line) for line in f]
    parts = {k for step in steps for k in step if k.startswith("reward_") and k != "reward_std"}
    return [{k: step[k] for k in [*METRICS, *sorted(parts - {*METRICS})] if k in step} for step in steps]


def call(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def differences(got: object, frozen: object, tol: float = 1e-4, path: str = "") -> list[tuple]:
    """(name, got, frozen) of the numbers that differ by more than `tol` of max(1, |frozen|)."""
    if isinstance(frozen, (dict, list)):
        if type(got) is not type(frozen) or len(got) != len(frozen):
            return [(path, got, frozen)]
        keys = frozen if isinstance(frozen, dict) else range(len(frozen))
        pairs = [
            (got.get(k) if isinstance(got, dict) else got[k], frozen[k], tol, f"{path} {k}") for k in keys
        ]
        return [found for pair in pairs for found in differences(*pair)]
    if got is None or frozen is None:
        return [] if got is frozen else [(path, got, frozen)]
    return [] if abs(got - frozen) <= tol * max(1, abs(frozen)) else [(path, got, frozen)]


@pytest.mark.parametrize("name", [*RECIPES, *(n for n in FLAGS if n not in RECIPES)])
def test_frozen(name, tmp_path, monkeypatch):
    if name.endswith("+vllm") and not importlib.util.find_spec("vllm"):
        pytest.skip("vllm is not installed")
    monkeypatch.chdir(ROOT)
    frozen = FROZEN["runs"][name]
    # "noise": how far repeated runs of the vLLM engine lay apart
    assert not differences(
        run(name, str(tmp_path / "out")), frozen["steps"], 1e-4 + 2 * frozen.get("noise", 0)
    )


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    os.chdir(ROOT)
    for name in [n for n in sys.argv[1:] if n != "--freeze"]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            steps = run(name, os.path.join(folder, "out"))
        frozen = FROZEN["runs"].setdefault(
            name, {"acts": "", "old_flags": shlex.join(flags_of(name)), "steps": []}
        )
        print(name, f"{time.monotonic() - began:.1f} s", differences(steps, frozen["steps"]), sep="\n")
        for step in steps:
            print(json.dumps(step))
        if "--freeze" in sys.argv:
            frozen |= {"old_flags": shlex.join(flags_of(name)), "steps": steps}
    if "--freeze" in sys.argv:
        with open(FILE, "w", encoding="utf-8") as f:
            json.dump(FROZEN, f, indent=1)
            f.write("\n")
