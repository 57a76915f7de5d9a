#!/usr/bin/env bash
# The README's table: five seeds of the toy's default, each with a base model of its own; the same with vLLM and with LCPO-Exact.
#   bash studies/toy_seeds.sh                                 about 6 minutes a run on two idle cores; finished runs are not repeated
#   STEPS=2 SEEDS=0 OUT=out/try bash studies/toy_seeds.sh     tries the machinery; the summary goes to OUT as well
# Runs go to out/seeds/, their summary to docs/toy_runs.json.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-out/seeds}" STEPS="${STEPS:-}"

run() {  # NAME SEED FLAGS...
  [ -f "$OUT/$1-$2/eval/results.json" ] || python train_grpo.py "${@:3}" ${STEPS:+--steps $STEPS} --seed "$2" --out "$OUT/$1-$2" --overwrite
}

for seed in ${SEEDS:-0 1 2 3 4}; do
  run peaked "$seed" --sampler hf
  run vllm "$seed" --sampler vllm
  # alpha: the paper's 0.0003 for budgets up to 4000 tokens, scaled to budgets up to 64
  run lcpo "$seed" --sampler hf --reward lcpo_exact --reward-args alpha=0.02 --advantage grpo
done
# Any budget of a range instead of four: one seed, more steps.
run uniform 0 --sampler hf --steps 400 --budgets uniform:16:64
# What the base model can do on the task that RL never sees.
base=$(python -m toy.prepare | python -c 'import json, sys; print(json.load(sys.stdin)["model"])')
[ -f "$OUT/base_unseen/results.json" ] || python evaluate.py --model "$base" --data toy_ood --budgets 16,32,48,64 --n 4 \
  --limit 100 --temperature 1 --top-p 1 --max-tokens 256 --sampler hf --out "$OUT/base_unseen" --overwrite
python - <<'PY'
import glob, json, os

out, runs = os.environ["OUT"], []


def results(path):
    with open(f"{out}/{path}/results.json") as f:
        return json.load(f)["datasets"]


for path in sorted(glob.glob(f"{out}/*/eval/results.json")):
    folder = path.split("/")[-3]
    name, seed = folder.split("-")
    before, after = results(f"{folder}/eval-0"), results(f"{folder}/eval")
    parts = {"before": before["toy-test"], "after": after["toy-test"], "unseen_task": after["toy_ood-test"]}
    with open(f"{out}/{folder}/metrics.jsonl") as f:
        run = {"name": name, "seed": int(seed), "steps": len(f.readlines())}
    for key, part in parts.items():
        cells, mean = part["budgets"], part["mean_trained"]
        run[key] = {"abs_error": mean["abs_error"], "accuracy_64": cells["64"]["accuracy"]}
        run[key]["accuracy"] = mean["accuracy"]
        run[key]["errors"] = {budget: round(cell["abs_error"], 4) for budget, cell in cells.items()}
    runs.append(run)
    errors = f"error {run['before']['abs_error']:.1%} -> {run['after']['abs_error']:.1%}"
    print(f"{name} seed {seed}: {errors}, accuracy at 64 tokens {run['after']['accuracy_64']:.1%}")
base = results("base_unseen")["toy_ood"]["mean"]["accuracy"]
with open(f"{out if os.environ['STEPS'] else 'docs'}/toy_runs.json", "w") as f:
    json.dump({"runs": runs, "base_accuracy_unseen_task": base}, f, indent=1)
PY
