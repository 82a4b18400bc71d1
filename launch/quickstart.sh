#!/usr/bin/env bash
# From a fresh machine to generated text: bash launch/quickstart.sh [WORKDIR] [FLAG...]
#
# Shows what the small models in demo/ write, then trains another denoiser in the latent space of
# the first, on the short sentences in the package. With flags for other texts, another encoder or
# autoencoder, such as --config.data.source=jsonl:PATH, all stages are trained, on those.
# Run again, it goes on where it stopped.
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

if [[ ! -e $workdir ]]; then
    echo "Sentences by the model in demo/sentences:"
    "$python" -m cosmos_jax.generate --model="$root/demo/sentences" --num=8
    echo "Descriptions of packages, and synopses by the model in demo/synopses:"
    "$python" -m cosmos_jax.generate --model="$root/demo/synopses" \
        --input="$root/demo/descriptions.txt" | paste -d '\n' "$root/demo/descriptions.txt" -
    echo "Training another model of sentences, in $workdir"
fi

flags=(--config="$root/configs/demo/quickstart.py" --config.autoencoder.pretrained="$root/demo/sentences")
case " $*" in
    *" --config.data."* | *" --config.encoder."* | *" --config.autoencoder."*)
        flags=(--config="$root/configs/quickstart.py")
        ;;
esac
exec "$python" -m cosmos_jax.main "${flags[@]}" --workdir="$workdir" "$@"
