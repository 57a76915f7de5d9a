#!/usr/bin/env bash
# Several GPUs: bash tests/gpu/check_multi.sh [N ...]     (default: 2, and 8 where there are 8). On a CPU: gloo.
# N processes learn what one does: plain, sharded (FSDP2), with adapters; what is saved goes on exactly; the real
# script, resumed. Ends with a line "all of it held".
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1
python=${PYTHON:-python}
gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
[ $# -gt 0 ] || set -- 2 $([ "$gpus" -ge 8 ] && echo 8)
settings=("" "--fsdp" "--fsdp --dtype bfloat16" "--lora 4" "--fsdp --lora 4 --gradient-checkpointing")
[ -z "${ONLY+x}" ] || settings=("$ONLY")  # ONLY="--fsdp" tries that alone
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tiny="$folder/tiny" taught=tests/data/freeze/model
$python tests/tiny.py "$tiny" > /dev/null
[ "$gpus" -eq 0 ] || echo "devices: $(nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c)"
for flags in "" "--lora 4"; do
    $python tests/two_processes.py "$tiny" "$folder/one$flags.pt" $flags > "$folder/log" 2>&1 || { tail -20 "$folder/log"; exit 1; }
done
for n in "$@"; do
    if [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$n" ]; then echo "$n processes: skipped, $gpus GPUs"; continue; fi
    launch="$python -m torch.distributed.run --standalone --nproc_per_node $n"
    for flags in "${settings[@]}"; do
        rm -rf "$folder"/two.pt*
        $launch tests/two_processes.py "$tiny" "$folder/two.pt" $flags > "$folder/log" 2>&1 || { tail -20 "$folder/log"; exit 1; }
        one="$folder/one$(grep -o -- '--lora 4' <<< "$flags" || true).pt"
        $python - "$one" "$folder/two.pt" "$n processes $flags" <<'PY'
import sys, torch
one, two = (torch.load(path, weights_only=True, map_location="cpu") for path in sys.argv[1:3])
apart = {k: max((two[a][n].double() - b[n].double()).abs().max().item() for n in b)
         for k, a, b in (("first step", "first", one["first"]), ("resumed", "again", two["weights"]))}
apart["loss"] = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
rough = "bfloat16" in sys.argv[3] or torch.cuda.is_available()
print(f"{sys.argv[3]:60} " + "  ".join(f"{k} {v:.1e}" for k, v in apart.items()))
assert apart["first step"] < (1e-2 if rough else 1e-5) and apart["loss"] < (1e-2 if rough else 1e-5), apart
assert apart["resumed"] == 0 or torch.cuda.is_available() and apart["resumed"] < 1e-3, apart
PY
    done
    out="$folder/run$n"
    common="--sampler $([ "$gpus" -gt 0 ] && echo auto || echo hf) --budgets bucket:16,32 --wording tulu --prompts-per-step $((2 * n))"
    $launch train_grpo.py --model $taught --data tests/data/freeze/rows.jsonl $common --group-size 4 --max-tokens 48 --fsdp \
        --kl-coef 0.01 --lr 1e-4 --steps 2 --out "$out" > "$folder/log" 2>&1 || { tail -20 "$folder/log"; exit 1; }
    $launch train_grpo.py --resume --steps 3 --out "$out" > "$folder/log" 2>&1 || { tail -20 "$folder/log"; exit 1; }
    [ "$(wc -l < "$out/metrics.jsonl")" -eq 3 ] && echo "$n processes: the script with --fsdp, resumed: 3 steps"
done
echo "all of it held"
