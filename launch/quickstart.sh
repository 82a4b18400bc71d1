#!/usr/bin/env bash
# From a fresh machine to generated text: bash launch/quickstart.sh [WORKDIR] [FLAG...]
#
# Trains a small Cosmos on the text in the package, with flags such as
# --config.data.source=jsonl:PATH on yours. Run again, it goes on where it stopped.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
workdir=$root/runs/quickstart
if [[ $# -gt 0 && $1 != -* ]]; then
    workdir=$1
    shift
fi

bash "$root/launch/install.sh"
# Not `cd`: relative paths in the arguments are the caller's.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${COSMOS_VENV:-$root/.venv}/bin/python" -m cosmos_jax.main \
    --config="$root/configs/quickstart.py" --workdir="$workdir" "$@"
