#!/usr/bin/env bash
# One GPU, under 10 minutes, no network: bash tests/gpu/check.sh [PART ...]     (see check.py)
# Without a GPU it runs in tiny sizes and says what it could not check.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec "${PYTHON:-python}" tests/gpu/check.py "$@"
