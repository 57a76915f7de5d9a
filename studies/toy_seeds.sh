#!/usr/bin/env bash
# The README's table: five seeds of the toy's default, each with a base model of its own.
# And the first of them with vLLM in place of generate(), where it is installed.
#   bash studies/toy_seeds.sh                                 finished runs are not repeated
#   STEPS=2 SEEDS=0 OUT=out/try bash studies/toy_seeds.sh     tries the machinery; the summary goes to OUT
# Runs go to out/seeds/, their summary to docs/toy_runs.json if all of them were asked for.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-out/seeds}" STEPS="${STEPS:-}" ALL=1
[ -z "$STEPS${SEEDS:-}" ] || ALL=

run() {  # NAME SEED FLAGS...
  [ -f "$OUT/$1-$2/eval/results.json" ] || python train_grpo.py "${@:3}" ${STEPS:+--steps $STEPS} --seed "$2" --out "$OUT/$1-$2" --overwrite
}

for seed in ${SEEDS:-0 1 2 3 4}; do run hf "$seed" --sampler hf; done
[ -z "$ALL" ] || ! python -c "import vllm" || run vllm 0 --sampler vllm
python - <<'PY'
import glob, json, os

import numpy as np

out, runs = os.environ["OUT"], []
for path in sorted(glob.glob(f"{out}/*/eval/results.json")):
    folder = path.split("/")[-3]
    with open(f"{out}/{folder}/args.json") as f:
        steps = json.load(f)["steps"]
    run = {"name": folder.split("-")[0], "seed": int(folder.split("-")[1]), "steps": steps}
    for when, name in {"before": "eval-0", "after": "eval"}.items():
        with open(f"{out}/{folder}/{name}/results.json") as f:
            sets = json.load(f)["datasets"]
        for data, part in sets.items():
            figures = ("abs_error", "accuracy", "mean_length")
            cells = {b: [round(c[k], 4) for k in figures] for b, c in part["budgets"].items()}
            inside = {b: c for b, c in cells.items() if 16 <= int(b) <= 64}
            with open(f"{out}/{folder}/{name}/samples.jsonl") as f:
                samples = [s for s in map(json.loads, f) if s["source"] == data and 16 <= s["budget"] <= 64]
            pairs = [s["budget"] for s in samples], [s["length"] for s in samples]
            run[f"{when}_{data}"] = {"cells": cells, "correlation_inside": round(np.corrcoef(*pairs)[0, 1], 4)}
            mean = [sum(c[i] for c in inside.values()) / len(inside) for i in (0, 1)]
            print(f"{folder} {when} {data}: 16 to 64: error {mean[0]:.1%}, accuracy {mean[1]:.1%}")
    runs.append(run)
if len({run["steps"] for run in runs}) > 1:
    raise SystemExit(f"toy_seeds.sh: error: {out} holds runs of several lengths: delete the older ones")
with open(f"{'docs' if os.environ['ALL'] else out}/toy_runs.json", "w") as f:
    json.dump(runs, f, indent=1)
PY
