#!/usr/bin/env bash
# Sets fastlt up in ./.venv: the system packages FFCV is built against, then the project under constraints.txt.
# Installs, where it may, an allocator that saves memory and LLVM's OpenMP; see fastlt/device/.
# Idempotent: once it has succeeded and its inputs are unchanged it returns at once, without a network.
#
#   PYTHON=python3.12   the interpreter the environment is made with (default: python3, 3.10 or newer)
#   DALI_CUDA=12        the CUDA major version DALI is installed for (default: 13)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
dali_cuda=${DALI_CUDA:-13}
extras="cuda$dali_cuda,stream,test"
stamp=.venv/.fastlt-setup

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

case $dali_cuda in 12 | 13) ;; *) fail "DALI_CUDA is '$dali_cuda': allowed are 12 and 13." ;; esac

inputs=$({ cat pyproject.toml setup.py constraints.txt tools/setup.sh; printf '%s %s' "$extras" "$PWD"; } | sha256sum | cut -d ' ' -f 1)
same_python() { [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" --version 2>&1)" = "$(.venv/bin/python --version 2>&1)" ]; }
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ] && same_python; then
    exit 0
fi

# What is missing is found by asking for it, not for a package: on other distributions the names differ, the need does not.
missing_packages() {
    command -v c++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    { command -v pkg-config >/dev/null && pkg-config --exists opencv4; } || echo libopencv-dev
    { command -v pkg-config >/dev/null && pkg-config --exists libturbojpeg; } || echo libturbojpeg0-dev
    if ! command -v "$python" >/dev/null; then
        echo python3 python3-venv python3-dev
        return
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' \
        || echo python3-dev
}

packages=$(missing_packages | tr '\n' ' ')
if [ -n "$packages" ]; then
    command -v apt-get >/dev/null || fail "FFCV is built from source and needs, under their Debian names: $packages
There is no apt-get here; install what your system calls them, then run this again."
    sudo=
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || fail "these packages are missing and this user is not root: $packages
Install them (apt-get install $packages), then run this again."
        sudo=sudo
    fi
    echo "setup: installing $packages"
    $sudo apt-get update -qq || fail "apt-get update failed; without a network, install these by other means: $packages"
    # shellcheck disable=SC2086  # the list is meant to be split
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null \
        || fail "apt-get could not install: $packages"
fi

# Of use and not needed: another malloc (for `options.lean` alone), and an OpenMP that gives way to other programs on the
# same cores. Nothing fails for their sake, and nobody is asked for a password.
# Not by a pipe into grep -q: that ends at the first line, and SIGPIPE would end the writer of the second as a failure.
preloads() { [[ $(LD_PRELOAD=$1 env true 2>&1) != *'cannot be preloaded'* ]]; }
useful() {
    if ! preloads "$1" && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing $2"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "$2"; } >/dev/null 2>&1 || true
    fi
    preloads "$1" || echo "setup: going on without $1 (Debian's $2); $3"
}
useful libtcmalloc_minimal.so.4 libtcmalloc-minimal4 "only options.lean would gain from it"
useful libomp.so.5 libomp5 "two programs on the same cores will slow each other down more than by half"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || fail "$("$python" --version) is too old: Python 3.10 or newer is needed; name one with PYTHON=python3.12 make setup"

echo "setup: installing into .venv (about 8 GB: torch brings its CUDA libraries, and runs on a CPU as well)"
# Scripts in .venv hold its place, so one that was moved, or is of another Python, is made anew; so is half of one.
made_for="$PWD, $("$python" --version)"
if [ -e .venv/made-for ] && [ "$(cat .venv/made-for)" != "$made_for" ] ||
    ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    [ ! -e .venv ] || echo "setup: .venv is of another place or Python, or has no pip: it is made anew"
    "$python" -m venv --clear .venv
fi
printf '%s' "$made_for" >.venv/made-for
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" \
    || fail "pip could not install the project; what it said stands above"
.venv/bin/python -c 'import ffcv, timm, torch, torchvision, accelerate, nvidia.dali' \
    || fail "the installed packages do not import; remove .venv and run this again"
printf '%s' "$inputs" >"$stamp"
