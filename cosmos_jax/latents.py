"""Texts to latents and back, in batches of one shape, with a trained autoencoder."""

from collections.abc import Sequence

import jax
import numpy as np

from cosmos_jax import distributed, sharding
from cosmos_jax.data.sources import Row
from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.run import Run


def encode(run: Run, model: Cosmos, weights: Weights, texts: Sequence[str]) -> np.ndarray:
    """Latents of texts as the decompressor reads them, [n, N, D] fp32.

    UserError for a text without tokens.
    """

    @jax.jit
    def compiled(weights, batch):
        states_BxLxD = model.text_states(weights, batch["ids"], batch["mask"])
        return model.compress(weights, states_BxLxD, batch["mask"])

    batches = run.ordered_batches(
        [Row(text) for text in texts], run.config.evaluate.batch_size, len(texts)
    )
    found = [
        distributed.gather(compiled(weights, sharding.put_batch(batches(i), run.mesh)))
        for i in range(len(batches))
    ]
    return np.concatenate(found)[: len(texts)]


def decode(run: Run, model: Cosmos, weights: Weights, latents_nxNxD: np.ndarray) -> np.ndarray:
    """Token ids that latents stand for, [n, L] int32."""
    compiled = jax.jit(model.decode)
    count = len(latents_nxNxD)
    size = run.even_batch_size(min(run.config.evaluate.batch_size, count))
    local = sharding.local_rows(size, run.mesh)
    found = []
    for start in range(0, count, size):
        part = latents_nxNxD[start : start + size]
        part = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
        batch = sharding.put_batch({"latents": part[local]}, run.mesh)
        found.append(distributed.gather(compiled(weights, batch["latents"])))
    return np.concatenate(found)[:count]
