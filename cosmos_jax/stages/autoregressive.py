"""The stage of the autoregressive baseline: learn to say the next token.

L = -log p(token | those before it, source),  a mean over the tokens after [CLS], with [SEP]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from cosmos_jax.models.autoregressive import Autoregressive
from cosmos_jax.models.layers import is_greatest
from cosmos_jax.stages.base import (
    Batch,
    Frozen,
    Params,
    Stage,
    Sums,
    row_keys,
    with_source_states,
)


def make(
    config: ConfigDict,
    model: Autoregressive,
    frozen: Frozen,
    statistics: dict[str, np.ndarray],
    data: str,
) -> Stage:
    """The stage; `frozen` holds vocabulary and head_index, and with a source bert and states_*."""

    def init(key: jax.Array, frozen: Frozen) -> Params:
        del frozen
        inputs: tuple[jax.Array, ...] = (jnp.zeros((1, config.data.max_length - 1), jnp.int32),)
        if model.conditional:
            length = config.data.max_source_length
            states = jnp.zeros((1, length, config.encoder.hidden_size))
            inputs = (*inputs, states, jnp.ones((1, length), bool))
        return {"decoder": model.decoder.init(key, *inputs)["params"]}

    def sums(
        params: Params, frozen: Frozen, batch: Batch, dropout_keys_B: jax.Array | None
    ) -> Sums:
        rows_BxL = frozen["head_index"][batch["ids"]]
        source: tuple[jax.Array | None, ...] = (None, None)
        if model.conditional:
            source = (batch["source_states"].astype(jnp.float32), batch["source_mask"])
        logits = model.logits(params, rows_BxL[:, :-1], *source, dropout_keys_B)
        crossentropy = optax.softmax_cross_entropy_with_integer_labels(logits, rows_BxL[:, 1:])
        # A token the head cannot say counts as wrong, though the loss has it as [UNK].
        sayable = frozen["vocabulary"][rows_BxL] == batch["ids"]
        right = is_greatest(logits, rows_BxL[:, 1:]) & sayable[:, 1:]
        mask = batch["mask"][:, 1:]
        if "real" in batch:
            mask = mask & batch["real"][:, None]
        num_tokens = jnp.sum(mask, dtype=jnp.float32)
        return {
            "loss": (jnp.sum(jnp.where(mask, crossentropy, 0.0)), num_tokens),
            "token_accuracy": (jnp.sum(mask & right, dtype=jnp.float32), num_tokens),
        }

    def losses(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        return sums(params, frozen, batch, row_keys(key, batch["rows"]))

    def validation(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        del key  # nothing is dropped
        return sums(params, frozen, batch, None)

    return Stage(
        name="autoregressive",
        settings=config.autoregressive,
        init=init,
        features=functools.partial(with_source_states, model),
        losses=losses,
        validation=validation,
        frozen=frozen,
        statistics=statistics,
        provenance={"data": data},
    )
