#!/usr/bin/env bash
# The toy study: every reward from the same base model and seed, two runs at a time; then docs/zoo.md and zoo.png.
#   bash studies/zoo.sh                                all runs, some 2 hours on two idle cores; finished ones are not repeated
#   STEPS=2 OUT=out/zoo_try bash studies/zoo.sh        every run with 2 steps: tries the machinery, writes into OUT
#   ONLY="dler kimi" bash studies/zoo.sh               some of the runs
# The flags are those of the line "# toy:" in each recipe. A run's output goes to OUT/NAME.log.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false OUT="${OUT:-out/zoo}" STEPS="${STEPS:-}"
python -m toy.prepare # once, before two runs would make the base model side by side
code=0
# A run that fails is named and leaves the others alone.
python -m studies.zoo names ${ONLY:-} | xargs -P 2 -n 1 python -m studies.zoo run || code=1
python -m studies.zoo report
exit $code
