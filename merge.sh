#!/usr/bin/env bash
# Merges an adapter into the model it was trained on, and writes a plain Hugging Face folder.
#
#   bash merge.sh ADAPTER_OR_RUN OUTPUT [--base PATH] [--dtype float32|bfloat16|float16]
#       [--trust_remote_code]
#
# ADAPTER_OR_RUN is the folder or hub name of an adapter, the output folder of a run with LoRA, or a
# checkpoint-N of such a run.
# Exit status: 0 done, 2 a mistake in the command, 3 the adapter is damaged.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$ROOT/scripts/launcher.sh"
help_if_asked "$@"
ensure_env "" requirements.txt
exec "$PYTHON" -m stanford_alpaca.merge_lora "$@"
