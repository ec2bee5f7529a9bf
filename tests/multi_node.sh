#!/usr/bin/env bash
# Trains on two hosts and compares the losses with those of one process: `bash tests/multi_node.sh`.
# The hosts are network namespaces of this machine, joined by a cable (a veth pair). torchrun finds
# the other host by rendezvous, as between machines. Each host has one process, its own cache of the
# data, and no other network.
# Exit status: 0 the losses are equal; 1 they are not; 77 network namespaces are not allowed here.
# The test needs `unshare`, `ip`, and the right to use them.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [ "${1:-}" != inside ]; then
    if ! unshare --user --map-root-user --net --mount true 2>/dev/null || \
        ! command -v ip >/dev/null; then
        echo "multi_node: not tried: network namespaces are not allowed here," \
            "or the command ip is missing"
        exit 77
    fi
    source "$ROOT/scripts/ensure_env.sh"
    ensure_env test requirements.txt tests/requirements.txt
    export PYTHON
    # The namespaces end with this process.
    exec unshare --user --map-root-user --net --mount bash "${BASH_SOURCE[0]}" inside
fi

WORK=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$WORK"' EXIT
ENGINE=${ENGINE:-ddp}
export PYTHONPATH=$ROOT PYTHONSAFEPATH=1 OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu

# ---- two hosts: this namespace is 10.0.0.1, a sleeping process's is 10.0.0.2 ----
ip link set lo up
unshare --net sleep infinity &
HOST2=$!
until [ "$(readlink /proc/$HOST2/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link add eth1 type veth peer name eth2 netns $HOST2
ip addr add 10.0.0.1/24 dev eth1
ip link set eth1 up
nsenter --net=/proc/$HOST2/ns/net \
    sh -c "ip link set lo up && ip addr add 10.0.0.2/24 dev eth2 && ip link set eth2 up"

# ---- the same run: on one process, and on two hosts ----
train() { # arguments: the launcher and its arguments, then -- and those of the run
    local launcher=()
    while [ "$1" != -- ]; do launcher+=("$1"); shift; done
    shift
    "${launcher[@]}" -m stanford_alpaca.train --model_name_or_path "$ROOT/data/tiny-base" \
        --data_path "$ROOT/data/instructions/train.json" --mode emo --max_steps 3 \
        --per_device_train_batch_size 4 --global_batch 16 --learning_rate 1e-3 \
        --logging_steps 1 --save_strategy no --disable_tqdm True --log_level error "$@"
}
host() { # arguments: the host's number, its interface, and the command that enters it
    local number=$1 interface=$2
    shift 2
    GLOO_SOCKET_IFNAME=$interface train "$@" "$PYTHON" -m torch.distributed.run \
        --nnodes 2 --nproc_per_node 1 --rdzv_id emo --rdzv_backend c10d \
        --rdzv_endpoint 10.0.0.1:29500 --rdzv_conf "is_host=$((2 - number))" \
        --local_addr "10.0.0.$number" -- \
        --engine "$ENGINE" --output_dir "$WORK/two" --cache_dir "$WORK/cache$number" \
        >"$WORK/host$number.txt" 2>&1
}
train "$PYTHON" -- --output_dir "$WORK/one" --cache_dir "$WORK/cache" >"$WORK/one.txt" 2>&1 || \
    { cat "$WORK/one.txt"; exit 1; }
host 2 eth2 nsenter --net=/proc/$HOST2/ns/net &
SECOND=$!
host 1 eth1 || { tail -n 30 "$WORK"/host*.txt; exit 1; }
wait $SECOND || { tail -n 30 "$WORK"/host*.txt; exit 1; }

"$PYTHON" - "$WORK/one" "$WORK/two" "$ENGINE" <<'END'
import json, sys
from pathlib import Path

*folders, engine = sys.argv[1:]
histories = [
    json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    for folder in folders
]
one, two = ([entry for entry in history if "loss" in entry] for history in histories)
loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True))
norm = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(one, two, strict=True))
equal = loss <= 1e-5 and norm <= 1e-4
print(f"multi_node: {engine} on two hosts and one process, {len(one)} steps: "
      f"losses within {loss:.1e}, gradient norms within {norm:.1e} of one another: "
      f"{'equal' if equal else 'NOT EQUAL'}")
sys.exit(not equal)
END
