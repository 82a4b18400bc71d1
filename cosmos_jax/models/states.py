"""What all systems do with a text first: the standardised states of the frozen encoder.

Shape letters: B batch, L positions, D width.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax.models.bert import Bert, BertConfig
from cosmos_jax.sharding import split_batch

Weights = dict[str, Any]


def make_bert(config: ConfigDict) -> Bert:
    """The frozen encoder's module."""
    sizes = {
        field.name: config.encoder[field.name]
        for field in dataclasses.fields(BertConfig)
        if field.name in config.encoder
    }
    return Bert(BertConfig(**sizes), jnp.dtype(config.dtype))


def text_states(bert: Bert, weights: Weights, ids_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
    """Standardised states, [B, L, D] fp32; of `weights` bert, states_mean and states_std."""
    states = apply(bert, weights["bert"], ids_BxL, mask_BxL)
    return (states - weights["states_mean"]) / weights["states_std"]


def apply(module: nn.Module, params: Any, *inputs: Any, method: str | None = None) -> Any:
    """What the module answers, split over the devices as the batch is.

    Within the modules the compiler needs no help: what goes in and out decides.
    """
    return jax.tree.map(split_batch, _apply(module, params, *inputs, method=method))


# JAX keeps its trace for every program, and every place in one, with inputs of the same shapes.
@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(module: nn.Module, params: Any, *inputs: Any, method: str | None) -> Any:
    return module.apply({"params": params}, *inputs, method=method)
