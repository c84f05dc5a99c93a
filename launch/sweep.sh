#!/usr/bin/env bash
# Trains a config with each of several losses and batch sizes, one after another.
# Runs that are finished are left alone. MLflow shows them under one parent run, the name of the sweep.
#   bash launch/sweep.sh --config FILE --losses L1,L2,... --pairs N1,N2,... --name NAME [-- --section.key value ...]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_if_asked "$@"

config=""
losses=""
pairs=""
name=""
while [[ $# -gt 0 && "$1" != -- ]]; do
    [[ $# -gt 1 ]] || fail "$1: expected --config FILE, --losses L1,L2, --pairs N1,N2 or --name NAME"
    case "$1" in
        --config) config="$2" ;;
        --losses) losses="$2" ;;
        --pairs) pairs="$2" ;;
        --name) name="$2" ;;
        *) fail "$1: expected --config, --losses, --pairs or --name; flags of the training come after --" ;;
    esac
    shift 2
done
flags=("${@:2}")
for option in config losses pairs name; do [[ -n "${!option}" ]] || fail "--$option: expected a value"; done

use_environment ""
for loss in ${losses//,/ }; do
    for count in ${pairs//,/ }; do
        python3 -m facetrain train --config "$config" --loss.name "$loss" --train.global_pairs "$count" \
            --run.dir "runs/$name/$loss-$count" --tracking.sweep "$name" --tracking.run_name "$loss-$count" "${flags[@]}"
    done
done
