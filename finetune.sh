#!/usr/bin/env bash
# Continual fine-tuning of a causal LM on running text with EMO.
#
#   bash finetune.sh MODEL_PATH [OUTPUT] [flags]
#       Trains with the published recipe: 25,000 lines of WikiText-103 in blocks of 256 tokens,
#       16 blocks at a time, one epoch, mode emo2, a LoRA adapter. docs/continual.md tells what of
#       it is the paper's and what the published script's.
#       MODEL_PATH is a folder or a hub name. OUTPUT (default: output/MODEL-continual) is new,
#       empty, or that of the same command, which then goes on from its newest checkpoint.
#
# Flags are those of stanford_alpaca/train.py and win over the recipe's:
#   --data_path FILE    other text: a file of text, JSON lines or CSV (also gzipped) or parquet,
#                       a folder, or a hub name
#   --recipe script     what the published script does and the paper does not say: all of the text,
#                       LoRA on q_proj and v_proj, seed 100
#   --max_sentences 0   all of the text
#   --lora False        trains all weights
#   --mode mle          another objective
#
# Environment:
#   NPROC   The number of processes (default: one for each visible GPU, or 1). They share the
#           16 blocks; 3 processes make 15 blocks a step.
#   ENGINE  none, ddp, fsdp, zero1, zero2, zero3 or zero3_offload (default: as in train_emo.sh).
#
# Then: bash merge.sh OUTPUT MERGED; python icl.py --model_path MERGED
# Exit status: as in train_emo.sh.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$ROOT/scripts/launcher.sh"
help_if_asked "$@"
[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || die "give MODEL_PATH first, a folder or a hub name:" \
    "bash finetune.sh MODEL_PATH [OUTPUT] [flags]"
MODEL_PATH=$1
shift
OUTPUT=$(default_output "$MODEL_PATH" continual)
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then OUTPUT=$1; shift; fi
asked=$(flag --output_dir "$@")
OUTPUT=${asked:-$OUTPUT}
ensure_env "" requirements.txt

export NPROC ENGINE
where_to_run -- --model_name_or_path "$MODEL_PATH" --output_dir "$OUTPUT" "$@"
launch stanford_alpaca.continual "${FLAGS[@]}"

if [ -f "$OUTPUT/adapter_config.json" ]; then
    printf 'adapter: %s\nmerge it: bash %q %q %q\n' \
        "$OUTPUT" "$ROOT/merge.sh" "$OUTPUT" "$OUTPUT-merged"
else
    printf 'model: %s\n' "$OUTPUT"
fi
