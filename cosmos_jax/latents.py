"""Texts to latents and back, in batches of one shape, with a trained autoencoder."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from cosmos_jax import distributed, sharding
from cosmos_jax.data import tokens
from cosmos_jax.data.sources import Row
from cosmos_jax.errors import UserError
from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.run import Run
from cosmos_jax.stages.base import Batch


def encode(run: Run, model: Cosmos, weights: Weights, texts: Sequence[str]) -> np.ndarray:
    """Latents of texts as the decompressor reads them, [n, N, D] fp32.

    UserError if there are no texts or one has no tokens.
    """
    if not texts:
        raise UserError("there are no texts to encode")
    # What one process would refuse of its part of a batch all of them refuse here.
    tokens.encode(run.encoder.tokenizer, texts, run.config.data.max_length)
    batches = run.ordered_batches(
        [Row(text) for text in texts], run.config.evaluate.batch_size, len(texts)
    )
    found = [
        distributed.gather(_encode(model, weights, sharding.put_batch(batches(i), run.mesh)))
        for i in range(len(batches))
    ]
    return np.concatenate(found)[: len(texts)]


def decode(run: Run, model: Cosmos, weights: Weights, latents_nxNxD: np.ndarray) -> np.ndarray:
    """Token ids that latents stand for, [n, L] int32."""
    count = len(latents_nxNxD)
    size = run.even_batch_size(min(run.config.evaluate.batch_size, count))
    local = sharding.local_rows(size, run.mesh)
    found = []
    for start in range(0, count, size):
        part = latents_nxNxD[start : start + size]
        part = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
        batch = sharding.put_batch({"latents": part[local]}, run.mesh)
        found.append(distributed.gather(_decode(model, weights, batch["latents"])))
    return np.concatenate(found)[:count]


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Cosmos, weights: Weights, batch: Batch) -> jax.Array:
    states_BxLxD = model.text_states(weights, batch["ids"], batch["mask"])
    return model.compress(weights, states_BxLxD, batch["mask"])


@functools.partial(jax.jit, static_argnums=0)
def _decode(model: Cosmos, weights: Weights, latents_BxNxD: jax.Array) -> jax.Array:
    return model.decode(weights, latents_BxNxD)
