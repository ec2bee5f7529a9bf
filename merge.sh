#!/usr/bin/env bash
# Merges an adapter into the model it was trained on, and writes a plain Hugging Face folder.
#
#   bash merge.sh ADAPTER_OR_RUN OUTPUT [--base PATH] [--dtype float32|bfloat16|float16] [--trust_remote_code]
#
# ADAPTER_OR_RUN: the folder or hub name of an adapter, the output folder of a run with LoRA, or a checkpoint-N of one.
# Exit status: 0 done, 2 a mistake, 3 the adapter is damaged.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
source "$ROOT/stanford_alpaca/ensure_env.sh"
ensure_env requirements.txt
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # our modules, and none of the current folder's
exec "$PYTHON" -m stanford_alpaca.merge_lora "$@"
