#!/usr/bin/env bash
# Runs the commands and the code of every page of the documentation, in order: `bash tests/docs.sh`.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/ensure_env.sh"
ensure_env test requirements.txt tests/requirements.txt
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export PYTHON HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
EMO_PAGES=all exec "$PYTHON" -m pytest tests/test_pages.py tests/test_docs.py "$@"
