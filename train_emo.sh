#!/usr/bin/env bash
# Fine-tunes a causal LM with EMO.
#
#   bash train_emo.sh
#       Trains the embedded base model on the shipped instructions. Then makes a table before/after,
#       samples and a report. All this takes a few minutes on two CPU cores.
#       With another objective: DEMO_MODE=mle bash train_emo.sh
#
#   bash train_emo.sh MODEL_PATH [MODE] [train flags]
#       Trains your model with the published recipe. MODEL_PATH is a folder or a hub name.
#       MODE is emo (default), mle, emo2, emd, mix, tailr, mixce or dft.
#       Flags after MODE go to stanford_alpaca/train.py and win over the recipe's.
#
# Environment:
#   DATA_PATH   A file, a folder or a hub name (default: the shipped instructions).
#               For several, give the flag --data_path A B.
#   OUTPUT_DIR  Where the model goes (default: output/MODEL-MODE). The folder is new, empty, or that
#               of the same command, which then goes on from its newest checkpoint.
#   NPROC       The number of processes (default: one for each visible GPU, or 1).
#   ENGINE      none, ddp, fsdp, zero1, zero2, zero3 or zero3_offload. The default is fsdp with
#               several GPUs, ddp with several processes on a CPU, and else none.
#   REPORT      no: no report is written (default: OUTPUT_DIR/report.html is written).
#
# Exit status:
#   0        done
#   2        a mistake in the command
#   3        what was saved is damaged, or belongs to another run
#   75       stopped by a signal; run the same command again to go on
#   128 + N  a process was ended by signal N (9: out of memory?)
# SIGKILL to this script alone leaves the training running.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$ROOT/scripts/launcher.sh"
help_if_asked "$@"
ensure_env requirements.txt

DEMO=
if [ $# -eq 0 ]; then
    DEMO=1
    NPROC=1 ENGINE=none
    set -- "$ROOT/data/tiny-base" "${DEMO_MODE:-emo}" --learning_rate 4e-4 --num_train_epochs 6 \
        --global_batch 32 --per_device_train_batch_size 8 --balance_lengths True \
        --logging_steps 20 --save_strategy no
fi
MODEL_PATH=$1
[ "${MODEL_PATH#-}" = "$MODEL_PATH" ] || \
    die "$MODEL_PATH: give MODEL_PATH first, then the mode, then flags"
shift
MODE=emo
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then MODE=$1; shift; fi

where_to_run "$@"

# ---- the published recipe has 128 examples a step ----
BATCH=()
if [ -z "$(flag --global_batch "$@")$(flag --gradient_accumulation_steps "$@")" ]; then
    per_device=$(flag --per_device_train_batch_size "$@")
    [[ ${per_device:=4} =~ ^[1-9][0-9]*$ ]] || \
        die "--per_device_train_batch_size $per_device: give 1 or more"
    at_once=$((per_device * NPROC))
    global=$((at_once > 128 ? at_once : 128 / at_once * at_once))
    [ "$global" -eq 128 ] || \
        echo "global batch $global: 128 cannot be had from $NPROC processes of $per_device"
    BATCH=(--global_batch "$global")
fi

# ---- train ----
DATA_PATH=${DATA_PATH-$ROOT/data/instructions/train.json}
if [ -z "${OUTPUT_DIR:-}" ]; then
    OUTPUT_DIR=$(default_output "$MODEL_PATH" "$MODE")
    if [ -n "$DEMO" ]; then # each run of the demo gets a new folder
        n=1 first=$OUTPUT_DIR
        while [ -e "$OUTPUT_DIR" ]; do n=$((n + 1)); OUTPUT_DIR=$first-$n; done
    fi
fi
launch stanford_alpaca.train --model_name_or_path "$MODEL_PATH" --data_path "$DATA_PATH" \
    --output_dir "$OUTPUT_DIR" --mode "$MODE" \
    --num_train_epochs 3 --per_device_train_batch_size 4 \
    --learning_rate 2e-5 --lr_scheduler_type cosine \
    --warmup_steps 0.03 --weight_decay 0 --model_max_length 512 --logging_steps 1 \
    --save_strategy steps --save_steps 2000 --save_total_limit 1 \
    "${PRECISION[@]}" "${ENGINE_FLAGS[@]}" "${BATCH[@]}" "${RESUME[@]}" "$@"

# ---- look at it ----
if [ "${REPORT:-}" = no ]; then REPORT=; else REPORT=$OUTPUT_DIR/report.html; fi
ABOUT=(--limit 100) # of --eval_path; without it the page has only the curves
if [ -n "$DEMO" ]; then
    [ -e "$OUTPUT_DIR/evaluation" ] || \
        "$PYTHON" -m stanford_alpaca.evaluation.metrics "$MODEL_PATH" "$OUTPUT_DIR" \
        --data "$ROOT/data/instructions/held_out.json" --out "$OUTPUT_DIR/evaluation"
    ABOUT=(--evaluation "$OUTPUT_DIR/evaluation")
fi
if [ -n "$REPORT" ] && [ ! -e "$REPORT" ]; then
    "$PYTHON" -m stanford_alpaca.evaluation.report "$MODEL_PATH" "$OUTPUT_DIR" \
        --out "$REPORT" "${ABOUT[@]}" || echo "report: none could be written"
fi
echo "checkpoint: $OUTPUT_DIR"
printf 'talk to it: PYTHONPATH=%q %q -m stanford_alpaca.generate %q --interactive\n' \
    "$ROOT" "$PYTHON" "$OUTPUT_DIR"
