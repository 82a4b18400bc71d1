#!/usr/bin/env bash
# From a fresh machine to generated text: bash launch/quickstart.sh [WORKDIR] [FLAG...]
#
# Shows what the models in demo/ write, then trains a small Cosmos on the text in the package: only its
# diffusion, on the autoencoder of demo/passages. With --config.data.source=jsonl:PATH it trains
# both on your text. Run again, it goes on where it stopped.
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
python=${COSMOS_VENV:-$root/.venv}/bin/python

pretrained=(--config.autoencoder.pretrained="$root/demo/passages")
for flag; do
    # An autoencoder knows the words and the sizes that it was trained with.
    case $flag in
        --config.data.source* | --config.data.max_length* | --config.encoder* | --config.autoencoder*)
            pretrained=()
            ;;
    esac
done

if [[ ! -e $workdir ]]; then
    echo "What the small models in demo/ write. Prose, from noise:"
    "$python" -m cosmos_jax.generate --model="$root/demo/passages" --num=6
    echo "Descriptions of software packages, and the synopses made of them:"
    "$python" -m cosmos_jax.generate --model="$root/demo/synopses" \
        --input="$root/demo/descriptions.txt" --format=jsonl
    echo "Now one of your own:"
fi
exec "$python" -m cosmos_jax.main --config="$root/configs/quickstart.py" \
    --workdir="$workdir" "${pretrained[@]}" "$@"
