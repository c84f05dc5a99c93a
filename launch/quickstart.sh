#!/usr/bin/env bash
# From nothing to a trained and evaluated network: installs into .venv, draws synthetic people, packs them, trains on
# GPUs or on two CPU processes, and shows what was learned. Writes below ./quickstart alone; run again, it goes on
# where it stopped.
#   bash launch/quickstart.sh [--identities I] [--lfw-images PATH... --pairs FILE] [-- --section.key value ...]
#     --identities I       people to train on, 500 if not given
#     --lfw-images PATH... aligned LFW, a folder of Name/Name_0001.jpg or tars of it; needs --pairs
#     --pairs FILE         LFW's pairs.txt
#     -- ...               flags of the training
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_if_asked "$@"

identities=500
images=()
pairs=""
while [[ $# -gt 0 && "$1" != -- ]]; do
    [[ $# -gt 1 ]] || fail "$1: expected --identities I, --lfw-images PATH... or --pairs FILE, each with a value"
    option="$1"
    shift
    case "$option" in
        --identities) identities="$1" && shift ;;
        --pairs) pairs="$1" && shift ;;
        --lfw-images) while [[ $# -gt 0 && "$1" != --* ]]; do images+=("$1") && shift; done ;;
        *) fail "$option: expected --identities, --lfw-images or --pairs; flags of the training come after --" ;;
    esac
done
flags=("${@:2}")
[[ "$identities" =~ ^[1-9][0-9]*$ ]] || fail "--identities: expected a number, got '$identities'"
[[ ${#images[@]} -gt 0 || -z "$pairs" ]] || fail "--pairs: goes with --lfw-images"
[[ ${#images[@]} == 0 || -n "$pairs" ]] || fail "--lfw-images: goes with --pairs"
for path in "${images[@]}" ${pairs:+"$pairs"}; do
    [[ -e "$path" ]] || fail "$path: no such file or folder"
done

make_environment package
mkdir -p quickstart
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///quickstart/mlflow.db}"

# Up to four GPUs, which is enough for the small batch; without any, two processes.
processes=2
gpus=0
! command -v nvidia-smi >/dev/null || gpus="$(python3 -c 'import torch; print(torch.cuda.device_count())')"
for count in 1 2 4; do [[ "$gpus" -lt "$count" ]] || processes="$count"; done
on_all() { python3 -m torch.distributed.run --standalone --nproc-per-node "$processes" -m "$@"; }

# Both leave alone what is there already.
python3 -m facetrain synth quickstart/faces --num-identities "$identities"
python3 -m facetrain pack quickstart/faces/train quickstart/shards

config=(--config "$root/configs/quickstart.yaml" "${flags[@]}")
lfw=()
if [[ ${#images[@]} -gt 0 ]]; then
    list="$(printf ', "%s"' "${images[@]}")"
    lfw=(--eval.dataset lfw --eval.images "[${list:2}]" --eval.pairs "$pairs" --eval.open_set_people null)
fi
check_config "$processes" "${config[@]}" "${lfw[@]}"

on_all facetrain.train "${config[@]}"
if [[ ${#images[@]} -gt 0 ]]; then
    on_all facetrain lfw --checkpoint quickstart/run --images "${images[@]}" --pairs "$pairs" --out quickstart/lfw
fi

python3 - <<'PYTHON'
import json

records = [json.loads(line) for line in open("quickstart/run/metrics.jsonl")]
judged = [record for record in records if "synthetic/verification/accuracy" in record]
rows = {
    "verification accuracy": "synthetic/verification/accuracy",
    "closed-full rank-1": "synthetic/closed-full/rank1",
    "open-best-rowden rank-1": "synthetic/open-best-rowden/rank1",
    "open-best-rowden DIR@FAR=1%": "synthetic/open-best-rowden/dir_rank1_at_far_1e-2",
}
print(f"\n{'synthetic people never trained on':36}{'untrained':>10}{'trained':>10}")
for name, key in rows.items():
    print(f"{name:36}{judged[0][key]:10.1%}{judged[-1][key]:10.1%}")
PYTHON
cat <<TEXT

run       quickstart/run       run this script again: it goes on where it stopped, or is done at once
report    quickstart/run/report.html${lfw:+
LFW       quickstart/lfw}
MLflow    $(command -v mlflow) ui --backend-store-uri $MLFLOW_TRACKING_URI
          then http://127.0.0.1:5000/#/experiments?workflowType=machine_learning
TEXT
