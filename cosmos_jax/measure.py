"""What is measured on the training texts before a stage begins, and saved with it.

Means and variances are taken over `statistics_texts` texts in the order of training, so the
cost does not grow with the data; the vocabulary of a corpus needs all of it.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax import distributed, metrics, sharding
from cosmos_jax.data import tokens
from cosmos_jax.data.batches import prefetch
from cosmos_jax.models.cosmos import MIN_VARIANCE, Cosmos, Weights
from cosmos_jax.run import Run

logger = logging.getLogger(__name__)

Statistics = dict[str, np.ndarray]

# Of `head`: the ridge per token, and a scale at which a good guess is a confident one.
RIDGE = 1e-3
HEAD_SCALE = 20.0


def vocabulary(run: Run) -> np.ndarray:
    """Token ids that the decompressor's head can say, ascending, [V] int32.

    All of the encoder's, or with "corpus" those that the training texts have at least
    `vocabulary_min_count` times; [CLS], [SEP] and [UNK] always.
    """
    settings = run.config.autoencoder
    if settings.vocabulary == "encoder":
        return np.arange(run.config.encoder.vocab_size, dtype=np.int32)
    batch_size = 1_024
    rows, length = run.dataset.train, run.config.data.max_length
    counts = np.zeros(run.config.encoder.vocab_size, np.int64)
    active = distributed.is_first()
    with metrics.progress(len(rows), "vocabulary", unit="text", active=active) as bar:
        for start in range(0, len(rows), batch_size):
            # Each process counts in its own share of the texts.
            share = range(start, min(start + batch_size, len(rows)))
            texts = [rows[i].text for i in share[jax.process_index() :: jax.process_count()]]
            if texts:
                encoded = tokens.encode(run.encoder.tokenizer, texts, length)
                counts += np.bincount(encoded.ids_BxL[encoded.mask_BxL], minlength=len(counts))
            bar.update(len(share))
            if distributed.preempted():
                raise distributed.Preempted("autoencoder: nothing to save yet")
    counts = distributed.add_up(counts)
    used = counts >= settings.vocabulary_min_count
    tokenizer = run.encoder.tokenizer
    used[[tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id]] = True
    logger.info(
        "the head can say %d of the encoder's tokens, %.1f%% of the training texts",
        used.sum(),
        100 * counts[used].sum() / counts.sum(),
    )
    return np.flatnonzero(used).astype(np.int32)


def states(run: Run, model: Any, weights: Weights, stage: str = "autoencoder") -> Statistics:
    """Mean and deviation of the encoder's states over non-pad tokens: states_* [D].

    Of `model` only `text_states` is asked, and of the config the settings of `stage`.
    """
    identity = {"states_mean": np.float32(0), "states_std": np.float32(1)}

    def moments(weights, batch):
        states_BxLxD = model.text_states({**weights, **identity}, batch["ids"], batch["mask"])
        weight_BxLx1 = batch["mask"][..., None].astype(jnp.float32)
        return (
            jnp.sum(states_BxLxD * weight_BxLx1, axis=(0, 1)),
            jnp.sum(states_BxLxD**2 * weight_BxLx1, axis=(0, 1)),
            jnp.sum(weight_BxLx1),
        )

    mean, std = _mean_and_std(_sums(run, stage, moments, weights))
    return {"states_mean": mean, "states_std": std}


def head(run: Run, model: Cosmos, weights: Weights) -> Statistics:
    """A start for the decompressor's head without bias: head_kernel [D, V].

    Word embeddings e_v, centred and of length 1, are predicted from states h by ridge
    regression, and a state votes for the tokens whose embedding it predicts:

        (1) R = (sum h h^T + c I)^-1 sum h e^T        (2) logit_v = s (h^T R) e_v
    """
    words_VxD = run.encoder.params["word_embeddings"]["embedding"][
        np.asarray(weights["vocabulary"])
    ]
    words_VxD = words_VxD - words_VxD.mean(axis=0)
    words_VxD /= np.linalg.norm(words_VxD, axis=1, keepdims=True)

    def moments(inputs, batch):
        weights, words_VxD = inputs
        states_BxLxD = model.text_states(weights, batch["ids"], batch["mask"])
        states_BxLxD *= batch["mask"][..., None]
        targets_BxLxD = words_VxD[weights["head_index"][batch["ids"]]]
        return (
            jnp.einsum("bld,ble->de", states_BxLxD, states_BxLxD),
            jnp.einsum("bld,ble->de", states_BxLxD, targets_BxLxD),
            jnp.sum(batch["mask"], dtype=jnp.float32),
        )

    inputs = (weights, sharding.put_tree(words_VxD, run.mesh))
    states_DxD, products_DxD, num_tokens = _sums(run, "autoencoder", moments, inputs)
    ridge_DxD = RIDGE * num_tokens * np.eye(len(states_DxD))
    map_DxD = np.linalg.solve(states_DxD + ridge_DxD, products_DxD)
    return {"head_kernel": (HEAD_SCALE * map_DxD @ words_VxD.T).astype(np.float32)}


def latents(run: Run, model: Cosmos, weights: Weights) -> Statistics:
    """Mean and deviation of the latents per slot and feature: latents_* [N, D]."""

    def moments(weights, batch):
        states_BxLxD = model.text_states(weights, batch["ids"], batch["mask"])
        latents_BxNxD = model.compress(weights, states_BxLxD, batch["mask"])
        return (
            jnp.sum(latents_BxNxD, axis=0),
            jnp.sum(latents_BxNxD**2, axis=0),
            jnp.float32(latents_BxNxD.shape[0]),
        )

    mean, std = _mean_and_std(_sums(run, "diffusion", moments, weights))
    return {"latents_mean": mean, "latents_std": std}


def _mean_and_std(sums: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """From sums of x, of x^2 and of weights."""
    mean = sums[0] / sums[2]
    variance = np.maximum(sums[1] / sums[2] - mean**2, MIN_VARIANCE)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def _sums(run: Run, stage: str, moments: Callable, weights: Any) -> list[np.ndarray]:
    """`moments(weights, batch)`, three sums, added up over batches on the host in fp64."""
    settings = run.config[stage]
    load = run.training_batches(settings.batch_size, f"{stage}/statistics")
    num_texts = min(settings.statistics_texts, len(run.dataset.train))
    steps = range(max(1, num_texts // settings.batch_size))
    total = [np.zeros(()) for _ in range(3)]
    compiled = jax.jit(moments, out_shardings=sharding.replicated(run.mesh))
    bar = metrics.progress(len(steps), f"{stage}: statistics", active=distributed.is_first())
    with contextlib.closing(prefetch(load, steps)) as batches, bar:
        for _, batch in batches:
            sums = jax.device_get(compiled(weights, sharding.put_batch(batch, run.mesh)))
            total = [t + s.astype(np.float64) for t, s in zip(total, sums, strict=True)]
            bar.update()
            if distributed.preempted():
                raise distributed.Preempted(f"{stage}: nothing to save yet")
    return total
