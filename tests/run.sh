#!/usr/bin/env bash
# Sets up .venv and runs every check: format, lint, types, import layers, tests. Each runs even if another fails.
#   bash tests/run.sh [--all] [arguments for pytest]      --all adds the tests marked slow and cluster
# FACETRAIN_DATA=DIR adds the tests on real faces.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

marks=(-m "not slow and not cluster")
if [[ "${1:-}" == --all ]]; then
    marks=()
    shift
fi
cores="$(env -u OMP_NUM_THREADS nproc)" # which would obey it
make_environment dev
export OMP_NUM_THREADS=1 FACETRAIN_SHARE_CORES=0 # several tests share the cores
ulimit -c 0                                      # what a test aborts, so that it says where it hangs, leaves no core file

failed=()
run() {
    printf '\n== %s\n' "$*"
    "$@" || failed+=("$1 ${2:-}")
}
run ruff format --check .
run ruff check .
run mypy
run lint-imports
# A new vulnerability is no fault of the change that meets it, nor is an index that doesn't answer.
if [[ ${#marks[@]} == 0 ]]; then
    printf '\n== pip-audit of constraints.txt: reported, fails nothing\n'
    timeout 120 python3 -m uv tool run --quiet pip-audit -r constraints.txt --no-deps --disable-pip \
        --progress-spinner off 2>&1 |
        awk '/could not be audited/ { missing++; next } { print } END { if (missing) print missing, "not audited" }' || true
fi
[[ ${#failed[@]} == 0 ]] || printf '\nfailed so far: %s\n' "$(IFS=, && echo "${failed[*]}")"
# Last, so that the output ends with its summary.
run python3 -m pytest --numprocesses "$cores" --dist loadgroup "${marks[@]}" "$@"
exit $((${#failed[@]} > 0))
