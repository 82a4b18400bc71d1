#!/usr/bin/env bash
# Checks everything on a fresh machine: bash launch/test.sh [PYTEST OPTION...]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh dev
export PATH="${COSMOS_VENV:-$PWD/.venv}/bin:$PATH"
export HF_HUB_OFFLINE=1 # a test that needs the network is a mistake

shellcheck launch/*.sh .ci/run
ruff check .
ruff format --check .
mypy
python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
