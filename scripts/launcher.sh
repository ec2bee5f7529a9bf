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

# `where_to_run [--recipe published] -- FLAGS`: chooses what the flags, a --config file among them,
# and the environment leave open. Sets FLAGS, the whole command line, NPROC and LAUNCHED, and what
# the flags say as MODEL_PATH, MODE, DATA and OUTPUT_DIR. See stanford_alpaca/run/where.py.
where_to_run() {
    local answer
    answer=$("$PYTHON" -m stanford_alpaca.run.where "$@") || exit $?
    eval "$answer"
}

# Runs `python -m MODULE ARGUMENTS...` on NPROC processes. If its status is not 0, the launcher ends
# with that status.
launch() {
    local module=$1 training status=0
    shift
    local command=("$PYTHON" -m "$module")
    if [ -n "$LAUNCHED" ]; then
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
