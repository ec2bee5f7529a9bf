#!/usr/bin/env bash
# Fine-tunes a causal LM with EMO.
#
#   bash train_emo.sh
#       Trains the embedded base model on the shipped instructions. Then makes a table before/after,
#       samples and a report. All this takes a few minutes on two CPU cores.
#       With another objective: DEMO_MODE=mle bash train_emo.sh
#       For a shorter look: DEMO_EPOCHS=1 DEMO_RECORDS=40 bash train_emo.sh
#       (DEMO_RECORDS is how many held-out records are measured.)
#
#   bash train_emo.sh --config run.yaml [train flags]
#       The same for a recipe in a file of lines `flag: value`.
#   bash train_emo.sh MODEL_PATH [MODE] [train flags]
#       Trains your model with the published recipe. MODEL_PATH is a folder or a hub name.
#       MODE is emo (default), mle, emo2, emd, mix, tailr, mixce or dft. With the flag
#       --loss FILE.py:NAME there is none: docs/own_loss.md.
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
if [ $# -eq 0 ]; then ensure_env eval requirements.txt; else ensure_env "" requirements.txt; fi

DEMO=
if [ $# -eq 0 ]; then
    DEMO=1
    NPROC=1 ENGINE=none
    set -- "$ROOT/data/tiny-base" "${DEMO_MODE:-emo}" --learning_rate 4e-4 \
        --num_train_epochs "${DEMO_EPOCHS:-6}" --global_batch 32 \
        --per_device_train_batch_size 8 --balance_lengths True --logging_steps 20 --save_strategy no
fi
case "$1" in
    --config | --config=*) ;; # the file names the model and the mode
    -*) die "$1: give MODEL_PATH first, then the mode, then flags; or --config FILE" ;;
    *)
        mode=(--mode emo)
        [ -z "$(flag --loss "$@")" ] || mode=()
        if [ $# -gt 1 ] && [ "${2#-}" = "$2" ]; then mode=(--mode "$2"); fi
        model=$1
        if [ $# -gt 1 ] && [ "${2#-}" = "$2" ]; then shift; fi
        shift
        set -- --model_name_or_path "$model" "${mode[@]}" "$@" ;;
esac
if [ -n "${DATA_PATH+set}" ] && [ -z "$(flag --data_path "$@")" ]; then
    set -- "$@" --data_path "$DATA_PATH"
fi
if [ -n "${OUTPUT_DIR:-}" ] && [ -z "$(flag --output_dir "$@")" ]; then
    set -- "$@" --output_dir "$OUTPUT_DIR"
fi

# ---- train ----
export NPROC ENGINE
where_to_run --recipe published -- "$@"
[ -n "$DATA" ] || [ -n "${DATA_PATH+set}" ] || \
    FLAGS+=(--data_path "$ROOT/data/instructions/train.json")
if [ -z "$OUTPUT_DIR" ]; then
    [ -n "$MODE" ] || MODE=$(flag --loss "${FLAGS[@]}")
    MODE=${MODE:-mle}
    OUTPUT_DIR=$(default_output "$MODEL_PATH" "${MODE##*:}")
    if [ -n "$DEMO" ]; then # each run of the demo gets a new folder
        n=1 first=$OUTPUT_DIR
        while [ -e "$OUTPUT_DIR" ]; do n=$((n + 1)); OUTPUT_DIR=$first-$n; done
    fi
    FLAGS+=(--output_dir "$OUTPUT_DIR")
fi
launch stanford_alpaca.train "${FLAGS[@]}"

# ---- look at it ----
if [ "${REPORT:-}" = no ]; then REPORT=; else REPORT=$OUTPUT_DIR/report.html; fi
ABOUT=(--limit 100) # of --eval_path; without it the page has only the curves
if [ -n "$DEMO" ]; then
    [ -e "$OUTPUT_DIR/evaluation" ] || \
        "$PYTHON" -m stanford_alpaca.evaluation.metrics "$MODEL_PATH" "$OUTPUT_DIR" \
        --data "$ROOT/data/instructions/held_out.json" --out "$OUTPUT_DIR/evaluation" \
        ${DEMO_RECORDS:+--limit "$DEMO_RECORDS"}
    ABOUT=(--evaluation "$OUTPUT_DIR/evaluation")
fi
if [ -n "$REPORT" ] && [ ! -e "$REPORT" ]; then
    "$PYTHON" -m stanford_alpaca.evaluation.report "$MODEL_PATH" "$OUTPUT_DIR" \
        --out "$REPORT" "${ABOUT[@]}" \
        ${MAX_RECORD_MIB:+--max_record_mib "$MAX_RECORD_MIB"} || \
        echo "report: none could be written"
fi
{
    echo "checkpoint: $OUTPUT_DIR"
    printf 'talk to it: PYTHONPATH=%q %q -m stanford_alpaca.generate %q --interactive\n' \
        "$ROOT" "$PYTHON" "$OUTPUT_DIR"
} || true # a full or closed standard output ends no run that is done
