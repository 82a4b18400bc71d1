"""GPT-2, the language model that scores texts, and the table of renames for its weights.

Shapes: B texts, L tokens, D features, H heads, K features of a head, V vocabulary.
Residual stream, layer norms and softmax are float32; only matrix products run in `dtype`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cosmos_jax.errors import UserError
from cosmos_jax.models.layers import Dtype

Params = dict[str, Any]

# Our name of a size -> that in a Hugging Face `config.json`.
_HUGGINGFACE_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_positions": "n_positions",
}
# What changes the model and is not built here -> the only value that will do.
_FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """Sizes of a GPT-2."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.type == "int" and (type(size) is not int or size < 1):
                raise UserError(
                    f"GPT-2 config: {field.name} is {size!r}; it must be a positive integer"
                )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"GPT-2 config: hidden size {self.hidden_size} cannot be divided among"
                f" {self.num_heads} heads"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Gpt2Config:
        """Reads the dictionary of a Hugging Face `config.json`.

        Raises:
          UserError: not a plain GPT-2, or a size is missing.
        """
        for name, needed in _FIXED.items():
            if config.get(name, needed) != needed:
                raise UserError(
                    f"GPT-2 config: {name} is {config[name]!r}; only {needed!r} will do"
                )
        missing = [name for name in _HUGGINGFACE_NAMES.values() if name not in config]
        if missing:
            raise UserError(f"GPT-2 config: {missing[0]} is missing")
        sizes = {ours: config[theirs] for ours, theirs in _HUGGINGFACE_NAMES.items()}
        inner = config.get("n_inner")
        return cls(
            **sizes,
            intermediate_size=4 * sizes["hidden_size"] if inner is None else inner,
            layer_norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        )


def _layer_norm(config: Gpt2Config, name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits that agreement with PyTorch needs.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name
    )


class _Layer(nn.Module):
    config: Gpt2Config
    dtype: Dtype

    @nn.compact
    def __call__(self, states_BxLxD: jax.Array) -> jax.Array:
        config = self.config
        width, heads = config.hidden_size, config.num_heads

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        normed_BxLxD = _layer_norm(config, "attention_norm")(states_BxLxD)
        query, key, value = (
            part.reshape(*part.shape[:2], heads, width // heads)
            for part in jnp.split(dense(3 * width, "query_key_value")(normed_BxLxD), 3, axis=-1)
        )
        mixed_BxLxHxK = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        states_BxLxD += dense(width, "attention_out")(mixed_BxLxHxK.reshape(states_BxLxD.shape))
        normed_BxLxD = _layer_norm(config, "mlp_norm")(states_BxLxD)
        hidden = dense(config.intermediate_size, "up")(normed_BxLxD)
        return states_BxLxD + dense(width, "down")(nn.gelu(hidden, approximate=True))


class Gpt2(nn.Module):
    """GPT-2 without its head, for which see `logits`, and without dropout."""

    config: Gpt2Config
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids_BxL: jax.Array) -> jax.Array:
        """Returns the last hidden state, after the last norm, [B, L, D] float32.

        There is no mask: a token sees those before it, so what stands behind a text cannot
        reach it.

        Raises:
          UserError: L exceeds the number of positions of the model.
        """
        config = self.config
        length = ids_BxL.shape[1]
        if length > config.max_positions:
            raise UserError(
                f"texts of {length} tokens do not fit the language model, which has"
                f" {config.max_positions} positions: choose a smaller length"
            )

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, config.hidden_size, name=name)

        words_BxLxD = table(config.vocab_size, "word_embeddings")(ids_BxL)
        positions_LxD = table(config.max_positions, "position_embeddings")(jnp.arange(length))
        states_BxLxD = words_BxLxD + positions_LxD
        for i in range(config.num_layers):
            states_BxLxD = _Layer(config, self.dtype, name=f"layers_{i}")(states_BxLxD)
        return _layer_norm(config, "norm")(states_BxLxD)


def logits(params: Params, states_BxLxD: jax.Array) -> jax.Array:
    """Scores of the next token, [B, L, V]: the head is the table of word embeddings."""
    return states_BxLxD @ params["word_embeddings"]["embedding"].T


def _renames(config: Gpt2Config) -> dict[tuple[str, ...], tuple[str, tuple[int, ...]]]:
    """Our parameter path -> (PyTorch name, shape). Its dense kernels are [in, out] as ours."""
    width, inner = config.hidden_size, config.intermediate_size
    table: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {
        ("word_embeddings", "embedding"): ("wte.weight", (config.vocab_size, width)),
        ("position_embeddings", "embedding"): ("wpe.weight", (config.max_positions, width)),
    }

    def norm(ours: tuple[str, ...], theirs: str) -> None:
        table[*ours, "scale"] = (f"{theirs}.weight", (width,))
        table[*ours, "bias"] = (f"{theirs}.bias", (width,))

    def dense(ours: tuple[str, ...], theirs: str, fan_in: int, fan_out: int) -> None:
        table[*ours, "kernel"] = (f"{theirs}.weight", (fan_in, fan_out))
        table[*ours, "bias"] = (f"{theirs}.bias", (fan_out,))

    for i in range(config.num_layers):
        layer, theirs = f"layers_{i}", f"h.{i}"
        norm((layer, "attention_norm"), f"{theirs}.ln_1")
        dense((layer, "query_key_value"), f"{theirs}.attn.c_attn", width, 3 * width)
        dense((layer, "attention_out"), f"{theirs}.attn.c_proj", width, width)
        norm((layer, "mlp_norm"), f"{theirs}.ln_2")
        dense((layer, "up"), f"{theirs}.mlp.c_fc", width, inner)
        dense((layer, "down"), f"{theirs}.mlp.c_proj", inner, width)
    norm(("norm",), "ln_f")
    return table


def from_torch_names(config: Gpt2Config, tensors: Mapping[str, np.ndarray]) -> Params:
    """Renames the tensors of a PyTorch GPT-2 to the parameters of `Gpt2`, as float32 arrays.

    Names may begin with `transformer.`. The head, which is the table of word embeddings, and
    the causal masks that old files hold are left out.

    Raises:
      UserError: names the first tensor that is missing, of a wrong shape, or left over.
    """
    found = {
        name.removeprefix("transformer."): tensor
        for name, tensor in tensors.items()
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    params = {}
    for path, (name, shape) in _renames(config).items():
        if name not in found:
            raise UserError(f"GPT-2 weights: tensor {name} is missing")
        tensor = np.asarray(found.pop(name))
        if tensor.shape != shape:
            raise UserError(
                f"GPT-2 weights: tensor {name} has shape {list(tensor.shape)},"
                f" but its config asks for {list(shape)}"
            )
        params[path] = np.ascontiguousarray(tensor, dtype=np.float32)
    if found:
        raise UserError(
            f"GPT-2 weights: tensor {next(iter(found))} has no place in a GPT-2 of"
            f" {config.num_layers} layers; do its config and its weights belong together?"
        )
    return traverse_util.unflatten_dict(params)
