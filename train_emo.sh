#!/usr/bin/env bash
# Fine-tunes a causal LM with EMO.
#
#   bash train_emo.sh                                  the embedded base model on the shipped instructions, then a
#                                                      table before/after and samples: a few minutes on two CPU cores
#                                                      (DEMO_MODE=mle bash train_emo.sh: with another objective)
#   bash train_emo.sh MODEL_PATH [MODE] [train flags]  the published recipe on your model: a folder or a hub name;
#                                                      MODE is emo (default), mle, emo2, emd, mix, tailr, mixce or dft
#
# Environment: DATA_PATH   a file, a folder or a hub name (default: the shipped instructions); several: --data_path A B
#              OUTPUT_DIR  where the model goes (default: output/MODEL-MODE): new, empty, or that of the same command, which
#                          then goes on from its newest checkpoint
#              NPROC       processes (default: the visible GPUs, or 1)
#              ENGINE      none, ddp, fsdp, zero1, zero2, zero3 or zero3_offload (default: fsdp with several GPUs, else
#                          none; ddp with several processes on a CPU)
# Flags after MODE go to stanford_alpaca/train.py and win over the recipe's.
# Exit status: 0 done, 2 a mistake, 3 what was saved is damaged or another run's, 75 stopped by a signal: run it again,
# 128 + N a process was ended by signal N (9: out of memory?).
# SIGKILL to this script alone leaves the training running.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
die() { echo "error: $*" >&2; exit 2; }

case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
source "$ROOT/stanford_alpaca/ensure_env.sh"
ensure_env requirements.txt

DEMO=
if [ $# -eq 0 ]; then
    DEMO=1
    NPROC=1 ENGINE=none
    set -- "$ROOT/data/tiny-base" "${DEMO_MODE:-emo}" --learning_rate 4e-4 --num_train_epochs 6 --global_batch 32 \
        --per_device_train_batch_size 32 --logging_steps 20 --save_strategy no
fi
MODEL_PATH=$1
[ "${MODEL_PATH#-}" = "$MODEL_PATH" ] || die "$MODEL_PATH: give MODEL_PATH first, then the mode, then flags"
shift
MODE=emo
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then MODE=$1; shift; fi

case " $* " in *" --config "* | *" --config="*)
    die "--config holds a whole recipe, as this script does: use python -m stanford_alpaca.train --config FILE" ;;
esac

# ---- where to run ----
read -r GPUS BF16 < <("$PYTHON" -c "
import torch
count = torch.cuda.device_count()
print(count, int(count > 0 and torch.cuda.is_bf16_supported(including_emulation=False)))")
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC: give a number of processes"
if [ "$NPROC" -eq 1 ] && [ "$GPUS" -gt 1 ]; then # one process, one GPU: the first of the visible ones
    CUDA_VISIBLE_DEVICES=$(cut -d, -f1 <<<"${CUDA_VISIBLE_DEVICES:-0}")
    export CUDA_VISIBLE_DEVICES
fi
case " $* " in
    *" --engine"[\ =]* | *" --fsdp"[\ =]* | *" --deepspeed"[\ =]*) # the flags say it themselves
        [ -z "${ENGINE:-}" ] || die "ENGINE=$ENGINE and --engine, --fsdp or --deepspeed exclude each other: drop one"
        ENGINE_FLAGS=() ;;
    *)
        if [ "$NPROC" -eq 1 ]; then ENGINE=${ENGINE:-none}; elif [ "$GPUS" -gt 0 ]; then ENGINE=${ENGINE:-fsdp}; else ENGINE=${ENGINE:-ddp}; fi
        ENGINE_FLAGS=(--engine "$ENGINE") ;;
esac
PRECISION=()
if [ "$GPUS" -gt 0 ]; then
    [ "$BF16" -eq 0 ] || PRECISION=(--bf16 True)
else
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((n = $(nproc) / NPROC) > 0 ? n : 1))}
    # freed tensors stay with the process (glibc; see benchmarks/LOG.md)
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
fi

# ---- the published recipe: 128 examples a step ----
flag() { # the value of flag $1 among the arguments after it (--a_b or --a-b), else nothing
    local name=${1//-/_} value=
    shift
    while [ $# -gt 0 ]; do
        case ${1//-/_} in "$name") value=${2:-} ;; "$name"=*) value=${1#*=} ;; esac
        shift
    done
    echo "$value"
}
BATCH=()
if [ -z "$(flag --global_batch "$@")$(flag --gradient_accumulation_steps "$@")" ]; then
    per_device=$(flag --per_device_train_batch_size "$@")
    [[ ${per_device:=4} =~ ^[1-9][0-9]*$ ]] || die "--per_device_train_batch_size $per_device: give 1 or more"
    at_once=$((per_device * NPROC))
    global=$((at_once > 128 ? at_once : 128 / at_once * at_once))
    [ "$global" -eq 128 ] || echo "global batch $global: 128 cannot be had from $NPROC processes of $per_device"
    BATCH=(--global_batch "$global")
fi

# ---- train ----
DATA_PATH=${DATA_PATH:-$ROOT/data/instructions/train.json}
if [ -z "${OUTPUT_DIR:-}" ]; then
    name=$MODEL_PATH
    [ ! -d "$name" ] || name=$(cd "$name" && pwd)
    OUTPUT_DIR=$ROOT/output/$(basename "$name")-$MODE
    if [ -n "$DEMO" ]; then # run as often as you like
        n=1 first=$OUTPUT_DIR
        while [ -e "$OUTPUT_DIR" ]; do n=$((n + 1)); OUTPUT_DIR=$first-$n; done
    fi
fi
if [ "$NPROC" -gt 1 ] || [ "${ENGINE:-}" != none ]; then
    LAUNCH=("$PYTHON" -m stanford_alpaca.launch --standalone --nproc_per_node "$NPROC" -m stanford_alpaca.train)
else
    LAUNCH=("$PYTHON" -m stanford_alpaca.train)
fi
RESUME=(--resume auto)
case " $* " in *" --resume"[_\ =]* | *" --resume-from-checkpoint"[\ =]*) RESUME=() ;; esac # the flags say it themselves
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # our modules, and none of the current folder's
set -m # a process group of its own: a signal reaches the training through this script, once
"${LAUNCH[@]}" --model_name_or_path "$MODEL_PATH" --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --mode "$MODE" \
    --num_train_epochs 3 --per_device_train_batch_size 4 --learning_rate 2e-5 --lr_scheduler_type cosine \
    --warmup_steps 0.03 --weight_decay 0 --model_max_length 512 --logging_steps 1 \
    --save_strategy steps --save_steps 2000 --save_total_limit 1 \
    "${PRECISION[@]}" "${ENGINE_FLAGS[@]}" "${BATCH[@]}" "${RESUME[@]}" "$@" &
TRAINING=$!
set +m
trap 'kill -INT $TRAINING' INT
trap 'kill -TERM $TRAINING' TERM HUP
STATUS=0
wait $TRAINING || STATUS=$?
while kill -0 $TRAINING 2>/dev/null; do # wait ended with a signal, the training has not
    STATUS=0
    wait $TRAINING || STATUS=$?
done
STATUS=0
wait $TRAINING || STATUS=$? # its own, where the signal's has taken its place
trap - INT TERM HUP
[ $STATUS -eq 0 ] || exit $STATUS

if [ -n "$DEMO" ]; then
    "$PYTHON" -m stanford_alpaca.evaluation.metrics "$MODEL_PATH" "$OUTPUT_DIR" \
        --data "$ROOT/data/instructions/held_out.json" --out "$OUTPUT_DIR/evaluation"
fi
echo "checkpoint: $OUTPUT_DIR"
printf 'talk to it: PYTHONPATH=%q %q -m stanford_alpaca.generate %q --interactive\n' "$ROOT" "$PYTHON" "$OUTPUT_DIR"
