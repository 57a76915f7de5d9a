#!/usr/bin/env bash
# The README's table: five seeds, each with a base model of its own, of the toy's default; the same with vLLM, and with LCPO-Exact
# and plain GRPO.  bash studies/toy_seeds.sh    about 6 minutes a run on two idle cores; finished runs are not repeated
# Results go to out/seeds/, and their summary to docs/toy_runs.json.
set -euo pipefail
cd "$(dirname "$0")/.."
for name in peaked vllm lcpo; do
  for seed in 0 1 2 3 4; do
    case $name in
      peaked) flags="--sampler hf" ;;
      # alpha: the paper's 0.0003 for budgets up to 4000 tokens, scaled to budgets up to 64
      lcpo) flags="--sampler hf --reward lcpo_exact --reward-args alpha=0.02 --advantage grpo" ;;
      vllm) flags="--sampler vllm" ;;
    esac
    [ -f out/seeds/$name-$seed/eval/results.json ] && continue
    python train_grpo.py $flags --seed $seed --out out/seeds/$name-$seed --overwrite
  done
done
# Any budget of a range instead of four: one seed, more steps.
[ -f out/seeds/uniform-0/eval/results.json ] || python train_grpo.py --sampler hf --budgets uniform:16:64 --steps 400 \
  --out out/seeds/uniform-0 --overwrite
# What the base model can do on the task that RL never sees.
[ -f out/seeds/base_unseen/results.json ] || python evaluate.py --model out/seeds/toy_base_v2_seed0 --data toy_ood \
  --budgets 16,32,48,64 --n 4 --limit 100 --temperature 1 --top-p 1 --max-tokens 256 --sampler hf --out out/seeds/base_unseen
python - <<'PY'
import glob, json, os

runs = []
for path in sorted(glob.glob("out/seeds/*/eval/results.json")):
    folder = os.path.dirname(os.path.dirname(path))
    after = json.load(open(path))["datasets"]
    before = json.load(open(os.path.join(folder, "eval_base", "results.json")))["datasets"]["toy"]
    lines = [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))]
    name, seed = os.path.basename(folder).split("-")
    run = {"name": name, "seed": int(seed), "steps": len(lines)}
    for key, part in (("before", before), ("after", after["toy"]), ("unseen_task", after["toy_ood"])):
        cells = part["budgets"]
        largest = cells["64"]["accuracy"]
        run[key] = {"abs_error": part["mean_trained"]["abs_error"], "accuracy_64": largest}
        run[key]["accuracy"] = part["mean_trained"]["accuracy"]
        run[key]["errors"] = {budget: round(cell["abs_error"], 4) for budget, cell in cells.items()}
    runs.append(run)
base = json.load(open("out/seeds/base_unseen/results.json"))["datasets"]["toy_ood"]["mean"]["accuracy"]
with open("docs/toy_runs.json", "w") as f:
    json.dump({"runs": runs, "base_accuracy_unseen_task": base}, f, indent=1)
for r in runs:
    errors = f"error {r['before']['abs_error']:.1%} -> {r['after']['abs_error']:.1%}"
    print(f"{r['name']} seed {r['seed']}: {errors}, accuracy at 64 tokens {r['after']['accuracy_64']:.1%}")
PY
