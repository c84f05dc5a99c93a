#!/usr/bin/env bash
# Everything that wants a GPU, in one run and one JSON: the tests marked gpu; steps of CasiaNet, iResNet-18 and -50 at
# 112x112 in bfloat16 beside plain PyTorch (images/s, MFU against the measured matrix product); where the time of a
# real run's step goes (data wait); memory against N with and without GradCache; the loss at large N.
#   bash benchmarks/gpu.sh [--out FILE] [--tiny]
# --tiny takes sizes of no meaning, and a CPU if there is no GPU: it shows that all of it runs.
# It needs this checkout, python3 on the PATH, and in it torch with CUDA and
#   pip install 'deepspeed>=0.19.8' 'jsonargparse[signatures]>=4.53,<5' matplotlib opencv-python-headless safetensors \
#       scipy tqdm 'webdataset>=1.0' fsspec pytest pytest-timeout hypothesis pytorch-metric-learning open-clip-torch
# Without the last two their lines are missing from the tables. mlflow and faiss aren't needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=gpu.json
tiny=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --tiny) tiny=(--tiny) ;;
        --out) [[ $# -gt 1 ]] || { echo "--out: expected a file" >&2 && exit 2; }; out="$2" && shift ;;
        *) echo "$1: expected --out FILE or --tiny" >&2 && exit 2 ;;
    esac
    shift
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
device=cuda
python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || device=cpu
[[ "$device" == cuda || ${#tiny[@]} -gt 0 ]] || { echo "torch sees no CUDA device; --tiny runs without" >&2 && exit 2; }

parts="$(mktemp -d)"
trap 'rm -r "$parts"' EXIT
failed=()
# part NAME COMMAND...: a part that fails is named at the end, and the others run.
part() {
    local name="$1" begun_at=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - begun_at))
}

# One run of the whole trainer on drawn faces, profiled when it is warm.
train_profiled() {
    local identities=2000 settings=(--model.name iresnet50 --train.global_pairs 128 --train.steps 60
        --train.profile_steps 30:60 --train.precision bfloat16 --data.workers 12)
    if [[ ${#tiny[@]} -gt 0 ]]; then
        identities=24
        settings=(--data.image_px 16 --train.global_pairs 4 --train.steps 8 --train.profile_steps 2:8)
    fi
    python3 -m facetrain synth "$parts/faces" --num-identities "$identities" --images-per-identity 4 \
        --heldout-identities 20 >/dev/null
    python3 -m facetrain pack "$parts/faces/train" "$parts/shards" >/dev/null
    python3 -m facetrain train --run.dir "$parts/run" --data.shards "$parts/shards" --tracking.backend none \
        --run.device "$device" --eval.at_start false --train.log_every_steps 10 "${settings[@]}"
    cp "$parts/run/profile/profile.json" "$parts/profile.json"
}

loss_sizes=()
[[ ${#tiny[@]} == 0 ]] || loss_sizes=(--tiny)
part "tests" python3 -m pytest -q -m gpu tests/gpu --junit-xml "$parts/tests.xml"
part "steps" python3 benchmarks/step.py --device "$device" "${tiny[@]}" --json "$parts/steps.json"
part "profile" train_profiled
part "memory" python3 benchmarks/memory.py --device "$device" "${tiny[@]}" --json "$parts/memory.json"
part "loss" python3 benchmarks/loss.py --device "$device" "${loss_sizes[@]}" --json "$parts/loss.json"

python3 - "$parts" "$out" "${failed[@]}" <<'PYTHON'
import json
import platform
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

parts, out, failed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
on_cuda = torch.cuda.is_available()
found = {
    "machine": platform.machine(),
    "gpu": torch.cuda.get_device_name() if on_cuda else None,
    "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if on_cuda else None,
    "torch": torch.__version__,
    "failed": failed,
}
for name in ("steps", "profile", "memory", "loss"):
    file = parts / f"{name}.json"
    found[name] = json.loads(file.read_text()) if file.is_file() else None
if (parts / "tests.xml").is_file():
    suite = ET.parse(parts / "tests.xml").getroot().find("testsuite")
    found["tests"] = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
out.write_text(json.dumps(found, indent=1) + "\n")
print(f"\n{out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
PYTHON
[[ ${#failed[@]} == 0 ]]
