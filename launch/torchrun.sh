#!/usr/bin/env bash
# Trains on one machine or several; run it once on each.
#   bash launch/torchrun.sh [--nproc-per-node W] -- --config configs/quickstart.yaml [--section.key value ...]
# --doctor before the -- checks and measures the machines instead of training.
# Several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host MASTER_PORT=29500 bash launch/torchrun.sh ...
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

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
node="${NODE_RANK:-0}"
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "NNODES: expected a number of machines, got '$nodes'"
[[ "$node" =~ ^[0-9]+$ && "$node" -lt "$nodes" ]] || fail "NODE_RANK: expected 0 to $((nodes - 1)), got '$node'"
if [[ "$nodes" == 1 ]]; then
    meeting=(--standalone)
else
    [[ -n "${MASTER_ADDR:-}" ]] || fail "MASTER_ADDR: expected the host name of machine 0, since NNODES is $nodes"
    meeting=(--nnodes "$nodes" --node-rank "$node" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

use_environment
if [[ "$node" == 0 && "${program[0]}" == facetrain.train ]]; then
    check_config $((nodes * processes)) "$@"
fi
exec python3 -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$processes" -m "${program[@]}" "$@"
