# Functions that the scripts in launch/ and tests/ share; sourced, never run.
# FACETRAIN_VENV=DIR uses an environment of your own, with facetrain installed, instead of .venv, and leaves it as it is.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Ends with one line and the exit code of a user's error.
fail() {
    printf 'facetrain: error: %s\n' "$1" >&2
    exit 2
}

# Prints the comment at the head of the script and ends it, where its first word asks for that.
help_if_asked() {
    [[ "${1:-}" == --help || "${1:-}" == -h ]] || return 0
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
}

# make_environment package|dev: makes .venv with the package, its pinned dependencies and, with 'dev', the tools of the
# tests; nothing where that is done already. A stamp holds the hash of what was installed.
make_environment() {
    local venv="$root/.venv" target="$root" wanted stamp started_at=$SECONDS
    [[ "$1" == package ]] || target="${root}[$1]"
    if [[ -n "${FACETRAIN_VENV:-}" ]]; then
        use_environment "$FACETRAIN_VENV"
        return
    fi
    wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum)"
    stamp="$venv/installed-$1"
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" && "$(cat "$venv/installed-dev" 2>/dev/null)" != "$wanted" ]]; then
        echo "installing into .venv"
        "$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m uv --version >/dev/null 2>&1 || make_venv
        install_into_venv -e "$target"
        printf '%s\n' "$wanted" >"$stamp"
        echo "installed in $((SECONDS - started_at)) s"
    fi
    use_environment "$venv"
}

# Some Pythons come without ensurepip (Debian splits it off): then uv makes the environment.
make_venv() {
    local python venv="$root/.venv" aside
    python="$(find_python)" || fail "expected Python 3.11, 3.12 or 3.13 on the PATH, or its path in PYTHON"
    if ! "$python" -m venv --clear "$venv" >/dev/null 2>&1; then
        aside="$(mktemp -d)"
        "$python" -m pip install --quiet --target "$aside" -c "$root/constraints.txt" uv >/dev/null 2>&1 ||
            fail "$python: expected the module venv with ensurepip, or pip; on Debian: apt-get install python3-venv"
        PYTHONPATH="$aside" "$python" -m uv venv --quiet --clear --seed --python "$python" "$venv"
        rm -r "$aside"
    fi
}

find_python() {
    local python
    for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$python"
            return
        fi
        [[ -z "${PYTHON:-}" ]] || return 1
    done
    return 1
}

# uv installs five times faster than pip; where it can't be had, pip does the same.
install_into_venv() {
    local python="$root/.venv/bin/python"
    if "$python" -m uv --version >/dev/null 2>&1 ||
        "$python" -m pip install --quiet -c "$root/constraints.txt" uv >/dev/null 2>&1; then
        "$python" -m uv pip install --quiet --python "$python" -c "$root/constraints.txt" "$@"
    else
        "$python" -m pip install --quiet -c "$root/constraints.txt" "$@"
    fi
}

# Puts an environment first on the PATH: the given one, else FACETRAIN_VENV, the active one, or .venv. A .venv with
# facetrain in it goes before conda's, whose base is active everywhere on many clusters.
use_environment() {
    local fallback="${CONDA_PREFIX:-$root/.venv}"
    ! has_facetrain "$root/.venv" || fallback="$root/.venv"
    local venv="${1:-${FACETRAIN_VENV:-${VIRTUAL_ENV:-$fallback}}}"
    [[ ! -d "$venv/bin" ]] || export PATH="$venv/bin:$PATH"
    # -P leaves the current folder out, where a checkout would be found; Python before 3.11 doesn't know it, and fails.
    python3 -P -c 'import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("facetrain", "torch"))))' 2>/dev/null ||
        fail "facetrain isn't installed in $venv, with torch and Python 3.11 or later; bash launch/quickstart.sh makes\
 .venv, FACETRAIN_VENV names another"
    # With more threads, the processes of a machine take each other's cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # Processes on CPUs keep to a share of the cores each; 0 leaves it to the system, as where two runs share a machine.
    export FACETRAIN_SHARE_CORES="${FACETRAIN_SHARE_CORES:-1}"
    # Otherwise a restart over gloo gets stale addresses from the agent's store, and fails.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
}

# Says whether an environment was finished by make_environment, or got the package from pip.
has_facetrain() {
    [[ -n "$(compgen -G "$1/installed-*")$(compgen -G "$1/lib/python3*/site-packages/facetrain-*.dist-info")" ]]
}

# Checks the config and what it reads once, before any process starts, for each number of processes that is possible:
# check_config WORLD_SIZE[,WORLD_SIZE...] --config FILE [flags]
check_config() {
    python3 -m facetrain check --world-sizes "$1" "${@:2}"
}

# Sets `address`, by which this machine reaches a host, and where nobody has chosen one, the network interface that has
# it; both stay as they are where that is loopback or can't be found out.
find_interface() {
    local host interface
    address=""
    host="$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }')" || return 0
    command -v ip >/dev/null || return 0
    address="$(ip -4 -o route get "$host" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p')" || return 0
    [[ "$address" != 127.* ]] || address=""
    [[ -n "$address" ]] || return 0
    interface="$(ip -4 -o addr | awk -v address="$address/" 'index($4, address) == 1 && !n++ { print $2 }')"
    [[ -n "$interface" ]] || return 0
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
}
