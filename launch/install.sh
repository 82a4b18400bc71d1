#!/usr/bin/env bash
# Makes the Python environment: bash launch/install.sh [dev]
#
#   dev           also what the tests, the linter and the type checker need
#   COSMOS_VENV   where the environment goes; default: .venv in the repository
#   PYTHON        the Python to make it with, 3.11 to 3.13; default: the first one on the PATH
#
# Work that is done is not done again, so every other script starts with this one.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${COSMOS_VENV:-$root/.venv}

fail() {
    echo "error: $*" >&2
    exit 2
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

make_environment() {
    local python
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if is_supported "$python"; then
            echo "Making $venv with $("$python" --version)"
            "$python" -m venv "$venv"
            return
        fi
    done
    fail "${PYTHON:-python3} is not Python 3.11 to 3.13; name one with PYTHON=/path/to/python3.11"
}

# FILE [PIP OPTION...]: installs a requirements file unless a copy of it, left in the
# environment, says that it is in already.
install_once() {
    local file=$root/$1 installed=$venv/$1
    if cmp -s "$file" "$installed"; then
        return
    fi
    echo "Installing $1"
    "$venv/bin/python" -m pip install --disable-pip-version-check $quiet "${@:2}" -r "$file"
    cp "$file" "$installed"
}

case ${1:-} in
    "" | dev) ;;
    *) fail "launch/install.sh takes nothing or 'dev', not '$1'" ;;
esac
quiet=
if [[ ! -t 1 ]]; then
    quiet=--quiet # no progress bars in logs
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    make_environment
fi
install_once requirements.txt
install_once requirements-encoder.txt --no-deps --require-hashes
if [[ ${1:-} == dev ]]; then
    install_once requirements-dev.txt
fi
