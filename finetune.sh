#!/usr/bin/env bash
# Continual fine-tuning of a causal LM on running text with EMO.
#
#   bash finetune.sh MODEL_PATH [OUTPUT] [flags]   the published recipe: 25,000 lines of WikiText-103 in blocks of 256 tokens,
#                                                  16 at a time, one epoch, emo2, a LoRA adapter. MODEL_PATH is a folder or a
#                                                  hub name; OUTPUT (default: output/MODEL-continual) is new, empty, or that of
#                                                  the same command, which then goes on from its newest checkpoint
#
# Other text: --data_path FILE (text, JSON lines, CSV, also gzipped; parquet; a folder; a hub name), all of it: --max_sentences 0.
# All weights: --lora False. Other objectives: --mode mle. Flags are those of stanford_alpaca/train.py and win over the recipe's.
# Environment: NPROC       processes (default: the visible GPUs, or 1); they share the 16 blocks; 15 a step for 3
#              ENGINE      none, ddp, fsdp, zero1, zero2, zero3 or zero3_offload (default: as train_emo.sh)
# Then: bash merge.sh OUTPUT MERGED; python icl.py --model_path MERGED
# Exit status: as train_emo.sh.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$ROOT/scripts/launcher.sh"
help_if_asked "$@"
[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || die "give MODEL_PATH first, a folder or a hub name: bash finetune.sh MODEL_PATH [OUTPUT] [flags]"
MODEL_PATH=$1
shift
OUTPUT=$(default_output "$MODEL_PATH" continual)
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then OUTPUT=$1; shift; fi
asked=$(flag --output_dir "$@")
OUTPUT=${asked:-$OUTPUT}
ensure_env requirements.txt

where_to_run "$@"
launch stanford_alpaca.continual --model_name_or_path "$MODEL_PATH" --output_dir "$OUTPUT" \
    "${PRECISION[@]}" "${ENGINE_FLAGS[@]}" "${RESUME[@]}" "$@"

if [ -f "$OUTPUT/adapter_config.json" ]; then
    printf 'adapter: %s\nmerge it: bash %q %q %q\n' "$OUTPUT" "$ROOT/merge.sh" "$OUTPUT" "$OUTPUT-merged"
else
    printf 'model: %s\n' "$OUTPUT"
fi
