#!/usr/bin/env bash
# The study: every experiment of docs/study.md, then its pictures and tables. Runs that docs/study.json holds
# are not repeated, so it goes on where it stopped.
#   bash studies/study.sh            what docs/study.json lacks, two at a time; hours on two cores from nothing
#   bash studies/study.sh --quick    one seed, the fewest models, from nothing, to out/study_quick/
#   ONLY="warm:0 remind_warm:0" bash studies/study.sh      some of the runs
#   STEPS=2 OUT=out/try DOCS=out/try bash studies/study.sh --quick      tries the machinery
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --quick ]; then
  export OUT="${OUT:-out/study_quick}" DOCS="${DOCS:-out/study_quick/docs}"
fi
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false OUT="${OUT:-out/study}" DOCS="${DOCS:-docs}"
code=0
# A run that fails is named and leaves the others alone.
{ [ -n "${ONLY:-}" ] && printf '%s\n' $ONLY || python -m studies.study names "$@"; } |
  xargs -r -P 2 -n 1 python -m studies.study run || code=1
python -m studies.study_report
exit $code
