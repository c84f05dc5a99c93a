#!/usr/bin/env bash
# Trains on one machine or several; run it once on each.
#   bash launch/torchrun.sh [--nproc-per-node W] -- --config configs/quickstart.yaml [--section.key value ...]
# --doctor before the -- checks and measures the machines instead of training.
# Several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host MASTER_PORT=29500 bash launch/torchrun.sh ...
# NNODES=2:4 starts with those of four machines that are there, and goes on with two when the others are lost.
# RESTARTS, 3 if unset, is how often the processes are started again after a failure; they continue from the newest
# whole checkpoint.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_if_asked "$@"

processes=1
program=(facetrain.train)
while [[ $# -gt 0 && "$1" != -- ]]; do
    case "$1" in
        --nproc-per-node)
            [[ $# -gt 1 ]] || fail "--nproc-per-node: expected a number of processes"
            processes="$2" && shift
            ;;
        --nproc-per-node=*) processes="${1#*=}" ;;
        --doctor) program=(facetrain doctor --distributed) ;;
        *) fail "$1: expected --nproc-per-node W or --doctor, then -- and the flags of the training" ;;
    esac
    shift
done
[[ $# -gt 1 ]] || fail "expected -- and the flags of the training, such as -- --config configs/quickstart.yaml"
shift
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--nproc-per-node: expected a number of processes, got '$processes'"

nodes="${NNODES:-1}"
restarts="${RESTARTS:-3}"
[[ "$nodes" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ && "${nodes%:*}" -le "${nodes#*:}" ]] ||
    fail "NNODES: expected a number of machines, or the fewest and the most as 2:4, got '$nodes'"
[[ "$restarts" =~ ^[0-9]+$ ]] || fail "RESTARTS: expected a number, got '$restarts'"
node="${NODE_RANK:-0}"
if [[ "${nodes#*:}" -gt 1 ]]; then
    [[ -n "${NODE_RANK:-}" ]] || fail "NODE_RANK: expected the number of this machine, from 0, since NNODES is $nodes"
    [[ -n "${MASTER_ADDR:-}" ]] || fail "MASTER_ADDR: expected the host name of machine 0, since NNODES is $nodes"
fi
[[ "$node" =~ ^[0-9]+$ && "$node" -lt "${nodes#*:}" ]] ||
    fail "NODE_RANK: expected 0 to $((${nodes#*:} - 1)), got '$node'"

use_environment
if [[ "${program[0]}" == facetrain.train ]]; then
    world_sizes="$(seq -s , $((${nodes%:*} * processes)) "$processes" $((${nodes#*:} * processes)))"
    [[ "$node" != 0 ]] || check_config "$world_sizes" "$@"
else
    restarts=0
fi
start=(python3 -m torch.distributed.run --nproc-per-node "$processes" --max-restarts "$restarts")
if [[ "${nodes#*:}" == 1 ]]; then
    exec "${start[@]}" --standalone -m "${program[@]}" "$@"
fi

port="${MASTER_PORT:-29500}"
wait_s="$(python3 -m facetrain check --show run.rendezvous_timeout_s "$@")"
start+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id facetrain --rdzv-endpoint "$MASTER_ADDR:$port")
start+=(--rdzv-conf "is_host=$((node == 0)),join_timeout=${wait_s%.*}")
find_interface "$MASTER_ADDR"
[[ -z "$address" ]] || start+=(--local-addr "$address")
# torchrun starts its processes again by itself. When it is lost itself, by the machine where all meet or the way to it,
# it is started again here; it leaves a word in this file then, or is killed.
lost="$(mktemp)"
trap 'rm -f "$lost"' EXIT
stopped=""
agent=""
stop() {
    stopped=1
    [[ -z "$agent" ]] || kill "-$1" "$agent" 2>/dev/null || true
}
trap 'stop TERM' TERM INT # bash starts torchrun with SIGINT ignored, as long as that takes none itself
trap 'stop HUP' HUP

# Machine 0 checks the config before anything listens there, which may take longer than the minute of torchrun's own.
wait_for_machine_0() {
    local give_up_at=$((SECONDS + ${wait_s%.*}))
    until timeout 5 bash -c ': >"/dev/tcp/$0/$1"' "$MASTER_ADDR" "$port" 2>/dev/null; do
        [[ -z "$stopped" ]] || return 0
        [[ "$SECONDS" -lt "$give_up_at" ]] ||
            fail "MASTER_ADDR: nothing listens at $MASTER_ADDR:$port after ${wait_s%.*} s (run.rendezvous_timeout_s)"
        sleep 1 || true
    done
}

echo "facetrain: machine $node of $nodes meets the others at $MASTER_ADDR:$port within ${wait_s%.*} s: $processes" \
    "processes of $OMP_NUM_THREADS threads, interface ${GLOO_SOCKET_IFNAME:-of the host name}, $restarts restarts" >&2
while true; do
    [[ "$node" == 0 ]] || wait_for_machine_0
    [[ -z "$stopped" ]] || exit 143 # by a signal while nothing was started
    TORCHELASTIC_ERROR_FILE="$lost" "${start[@]}" -m "${program[@]}" "$@" &
    agent=$!
    [[ -z "$stopped" ]] || stop TERM # it came before torchrun was known
    code=0
    wait "$agent" || code=$?
    while kill -0 "$agent" 2>/dev/null; do # a signal ended the wait, not torchrun
        code=0
        wait "$agent" || code=$?
    done
    agent=""
    [[ "$code" != 0 && -z "$stopped" && "$restarts" -gt 0 ]] && [[ -s "$lost" || "$code" -gt 128 ]] || exit "$code"
    restarts=$((restarts - 1))
    export FACETRAIN_RESTART_COUNT=$((${FACETRAIN_RESTART_COUNT:-0} + 1)) # run.resume=never is for the first start
    : >"$lost"
    echo "facetrain: torchrun lost the other machines; started again, $restarts restarts left" >&2
done
