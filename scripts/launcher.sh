# Sourced by train_emo.sh, finetune.sh and merge.sh, which set ROOT. Decides where a training runs,
# and starts it so that each signal reaches it exactly once.
source "$ROOT/scripts/ensure_env.sh"
# Python finds our modules, and none of the current folder's.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

die() { echo "error: $*" >&2; exit 2; }

help_if_asked() { # prints the comment at the head of the launcher, if $1 asks for it
    case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
}

flag() { # prints the value of flag $1 (--a_b or --a-b) in the other arguments
    local name=${1//-/_} value=
    shift
    while [ $# -gt 0 ]; do
        case ${1//-/_} in "$name") value=${2:-} ;; "$name"=*) value=${1#*=} ;; esac
        shift
    done
    echo "$value"
}

default_output() { # prints the output folder for model $1 and suffix $2
    local name=$1
    [ ! -d "$name" ] || name=$(cd "$name" && pwd)
    echo "$ROOT/output/$(basename "$name")-$2"
}

# Sets NPROC and ENGINE, from the environment, the GPUs and the training flags. Also sets
# ENGINE_FLAGS, PRECISION and RESUME, the flags that follow from them.
where_to_run() {
    local gpus bf16
    case " $* " in *" --config "* | *" --config="*)
        die "--config holds a whole recipe, as this script does:" \
            "use python -m stanford_alpaca.train --config FILE" ;;
    esac
    read -r gpus bf16 < <("$PYTHON" -c "
import torch
count = torch.cuda.device_count()
print(count, int(count > 0 and torch.cuda.is_bf16_supported(including_emulation=False)))")
    NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC: give a number of processes"
    if [ "$NPROC" -eq 1 ] && [ "$gpus" -gt 1 ]; then # one process gets the first visible GPU
        CUDA_VISIBLE_DEVICES=$(cut -d, -f1 <<<"${CUDA_VISIBLE_DEVICES:-0}")
        export CUDA_VISIBLE_DEVICES
    fi
    case " $* " in
        *" --engine"[\ =]* | *" --fsdp"[\ =]* | *" --deepspeed"[\ =]*) # the flags choose it
            [ -z "${ENGINE:-}" ] || die "ENGINE=$ENGINE and --engine, --fsdp or --deepspeed" \
                "exclude each other: drop one"
            ENGINE_FLAGS=() ;;
        *)
            if [ "$NPROC" -eq 1 ]; then ENGINE=${ENGINE:-none}
            elif [ "$gpus" -gt 0 ]; then ENGINE=${ENGINE:-fsdp}
            else ENGINE=${ENGINE:-ddp}; fi
            ENGINE_FLAGS=(--engine "$ENGINE") ;;
    esac
    PRECISION=()
    if [ "$gpus" -gt 0 ]; then
        [ "$bf16" -eq 0 ] || PRECISION=(--bf16 True)
    else
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((n = $(nproc) / NPROC) > 0 ? n : 1))}
        # With these thresholds glibc keeps the memory of freed tensors (see benchmarks/LOG.md).
        export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}
        export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
    fi
    RESUME=(--resume auto)
    case " $* " in # the flags choose it
        *" --resume"[_\ =]* | *" --resume-from-checkpoint"[\ =]*) RESUME=() ;;
    esac
}

# Runs `python -m MODULE ARGUMENTS...` on NPROC processes. If its status is not 0, the launcher ends
# with that status.
launch() {
    local module=$1 training status=0
    shift
    local command=("$PYTHON" -m "$module")
    if [ "$NPROC" -gt 1 ] || [ "${ENGINE:-}" != none ]; then
        command=("$PYTHON" -m stanford_alpaca.launch --standalone --nproc_per_node "$NPROC" \
            -m "$module")
    fi
    # The training gets a process group of its own: signals reach it only through this script, once.
    set -m
    "${command[@]}" "$@" &
    training=$!
    set +m
    trap "kill -INT $training" INT
    trap "kill -TERM $training" TERM HUP
    wait $training || status=$?
    while kill -0 $training 2>/dev/null; do # a signal has ended wait, but not the training
        wait $training || status=$?
    done
    status=0
    wait $training || status=$? # the status of the training, not that of an interrupted wait
    trap - INT TERM HUP
    [ $status -eq 0 ] || exit $status
}
