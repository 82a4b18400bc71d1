"""BERT and RoBERTa without their poolers, and the table of renames for their weights.

Shapes: B texts, L tokens, D features, H heads, K features of a head.
Residual stream, layer norms and softmax are float32; only matrix products run in `dtype`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cosmos_jax.errors import UserError
from cosmos_jax.models.layers import Dtype

Params = dict[str, Any]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}

# Our name of a size -> that in a Hugging Face `config.json`.
_HUGGINGFACE_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; `activation` is one of gelu (exact), gelu_new (tanh), relu."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise UserError(
                f"encoder config: activation {self.activation!r} is not supported;"
                f" supported are {', '.join(_ACTIVATIONS)}"
            )
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.type == "int" and (type(size) is not int or size < 1):
                raise UserError(
                    f"encoder config: {field.name} is {size!r}; it must be a positive integer"
                )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"encoder config: hidden size {self.hidden_size} cannot be divided among"
                f" {self.num_heads} heads"
            )

    @property
    def position_rows(self) -> int:
        """Rows of the table of positions in the file: the last `max_positions` are read."""
        return self.max_positions

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> BertConfig:
        """Reads the dictionary of a Hugging Face `config.json`; a `RobertaConfig` for RoBERTa's.

        Raises:
          UserError: not a plain BERT encoder with absolute positions, or a size is missing.
        """
        model_type = config.get("model_type", "bert")
        if model_type not in ("bert", "roberta"):
            raise UserError(
                f"encoder config: model_type is {model_type!r}; only 'bert' and 'roberta' will do"
            )
        positions = config.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise UserError(
                f"encoder config: position_embedding_type is {positions!r}; only 'absolute' will do"
            )
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise UserError("encoder config: this BERT is a decoder; an encoder is needed")
        missing = [name for name in _HUGGINGFACE_NAMES.values() if name not in config]
        if missing:
            raise UserError(f"encoder config: {missing[0]} is missing")
        sizes = cls(
            **{ours: config[theirs] for ours, theirs in _HUGGINGFACE_NAMES.items()},
            type_vocab_size=config.get("type_vocab_size", 2),
            layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
            activation=config.get("hidden_act", "gelu"),
        )
        return RobertaConfig.of(sizes, config) if model_type == "roberta" else sizes

    def to_huggingface(self) -> dict[str, Any]:
        """The dictionary that `from_huggingface` reads."""
        return {
            "model_type": "bert",
            "architectures": ["BertModel"],
            **{theirs: getattr(self, ours) for ours, theirs in _HUGGINGFACE_NAMES.items()},
            "type_vocab_size": self.type_vocab_size,
            "layer_norm_eps": self.layer_norm_eps,
            "hidden_act": self.activation,
        }


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Sizes of a RoBERTa, which is a BERT but for its positions: they begin at `first_position`.

    The rows before it are read by padding alone. So `max_positions` does not count them, the
    weights are read without them, and `Bert` runs a RoBERTa as it is.
    """

    first_position: int = 2

    @property
    def position_rows(self) -> int:
        return self.first_position + self.max_positions

    @classmethod
    def of(cls, sizes: BertConfig, config: Mapping[str, Any]) -> RobertaConfig:
        """From the sizes read as if they were BERT's, and the `config.json` itself."""
        padding = config.get("pad_token_id")
        first = 2 if padding is None else padding + 1
        positions = max(0, sizes.max_positions - first)
        return cls(
            **{**dataclasses.asdict(sizes), "max_positions": positions}, first_position=first
        )

    def to_huggingface(self) -> dict[str, Any]:
        return super().to_huggingface() | {
            "model_type": "roberta",
            "architectures": ["RobertaModel"],
            "max_position_embeddings": self.position_rows,
            "pad_token_id": self.first_position - 1,
        }


def _layer_norm(config: BertConfig, name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits that agreement with PyTorch needs.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name
    )


class _Attention(nn.Module):
    config: BertConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, states_BxLxD: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        width, heads = self.config.hidden_size, self.config.num_heads

        def split(name: str) -> jax.Array:
            projected_BxLxD = nn.Dense(width, dtype=self.dtype, name=name)(states_BxLxD)
            return projected_BxLxD.reshape(*states_BxLxD.shape[:2], heads, width // heads)

        mixed_BxLxHxK = jax.nn.dot_product_attention(
            split("query"), split("key"), split("value"), mask=mask_BxL[:, None, None, :]
        )
        mixed_BxLxD = mixed_BxLxHxK.reshape(states_BxLxD.shape)
        return nn.Dense(width, dtype=self.dtype, name="out")(mixed_BxLxD)


class _Mlp(nn.Module):
    config: BertConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, states_BxLxD: jax.Array) -> jax.Array:
        hidden = nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="up")(states_BxLxD)
        hidden = _ACTIVATIONS[self.config.activation](hidden)
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, name="down")(hidden)


class _Layer(nn.Module):
    config: BertConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, states_BxLxD: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        mixed_BxLxD = _Attention(config, dtype, name="attention")(states_BxLxD, mask_BxL)
        states_BxLxD = _layer_norm(config, "attention_norm")(states_BxLxD + mixed_BxLxD)
        mixed_BxLxD = _Mlp(config, dtype, name="mlp")(states_BxLxD)
        return _layer_norm(config, "mlp_norm")(states_BxLxD + mixed_BxLxD)


class Bert(nn.Module):
    """BERT encoder: no pooler, no dropout, token type 0 everywhere, padding on the right."""

    config: BertConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        """Returns the last hidden state, [B, L, D] float32.

        Args:
          ids_BxL: token ids, integers in [0, vocab_size).
          mask_BxL: 1 or True at tokens that may be attended to. States at the other
            positions are finite but mean nothing.

        Raises:
          UserError: L exceeds the number of positions of the encoder.
        """
        config = self.config
        length = ids_BxL.shape[1]
        if length > config.max_positions:
            raise UserError(
                f"texts of {length} tokens do not fit the encoder, which has"
                f" {config.max_positions} positions: choose a smaller length"
            )

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, config.hidden_size, name=name)

        words_BxLxD = table(config.vocab_size, "word_embeddings")(ids_BxL)
        positions_LxD = table(config.max_positions, "position_embeddings")(jnp.arange(length))
        type_1x1xD = table(config.type_vocab_size, "token_type_embeddings")(
            jnp.zeros((1, 1), jnp.int32)
        )
        states_BxLxD = words_BxLxD + type_1x1xD + positions_LxD
        states_BxLxD = _layer_norm(config, "embeddings_norm")(states_BxLxD)
        mask_BxL = mask_BxL.astype(bool)
        for i in range(config.num_layers):
            states_BxLxD = _Layer(config, self.dtype, name=f"layers_{i}")(states_BxLxD, mask_BxL)
        return states_BxLxD


def _renames(config: BertConfig) -> dict[tuple[str, ...], tuple[str, tuple[int, ...]]]:
    """Our parameter path -> (PyTorch name, our shape)."""
    width, inner = config.hidden_size, config.intermediate_size
    table: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}

    def embedding(ours: str, theirs: str, rows: int) -> None:
        table[ours, "embedding"] = (f"{theirs}.weight", (rows, width))

    def norm(ours: tuple[str, ...], theirs: str) -> None:
        table[*ours, "scale"] = (f"{theirs}.weight", (width,))
        table[*ours, "bias"] = (f"{theirs}.bias", (width,))

    def dense(ours: tuple[str, ...], theirs: str, fan_in: int, fan_out: int) -> None:
        table[*ours, "kernel"] = (f"{theirs}.weight", (fan_in, fan_out))
        table[*ours, "bias"] = (f"{theirs}.bias", (fan_out,))

    embedding("word_embeddings", "embeddings.word_embeddings", config.vocab_size)
    embedding("position_embeddings", "embeddings.position_embeddings", config.position_rows)
    embedding("token_type_embeddings", "embeddings.token_type_embeddings", config.type_vocab_size)
    norm(("embeddings_norm",), "embeddings.LayerNorm")
    for i in range(config.num_layers):
        layer, theirs = f"layers_{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            dense((layer, "attention", name), f"{theirs}.attention.self.{name}", width, width)
        dense((layer, "attention", "out"), f"{theirs}.attention.output.dense", width, width)
        norm((layer, "attention_norm"), f"{theirs}.attention.output.LayerNorm")
        dense((layer, "mlp", "up"), f"{theirs}.intermediate.dense", width, inner)
        dense((layer, "mlp", "down"), f"{theirs}.output.dense", inner, width)
        norm((layer, "mlp_norm"), f"{theirs}.output.LayerNorm")
    return table


def from_torch_names(
    config: BertConfig, tensors: Mapping[str, np.ndarray], prefix: str | None = None
) -> Params:
    """Renames the tensors of a PyTorch BERT or RoBERTa to the parameters of `Bert`, in float32.

    Args:
      tensors: PyTorch names and arrays; Linear weights are [out, in]. The old names
        `LayerNorm.gamma` and `LayerNorm.beta` will do. Pooler, heads and position ids
        are left out.
      prefix: what stands before `embeddings.` and `encoder.`; None finds `bert.`, `roberta.` or
        nothing.

    Raises:
      UserError: names the first tensor that is missing, of a wrong shape, or left over.
    """
    if prefix is None:
        families = {name.partition(".")[0] for name in tensors} & {"bert", "roberta"}
        prefix = f"{families.pop()}." if families else ""
    found = {
        name.removeprefix(prefix)
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for name, tensor in tensors.items()
        if name.startswith((f"{prefix}embeddings.", f"{prefix}encoder."))
    }
    found.pop("embeddings.position_ids", None)
    params = {}
    for path, (name, shape) in _renames(config).items():
        if name not in found:
            raise UserError(f"encoder weights: tensor {prefix}{name} is missing")
        tensor = np.asarray(found.pop(name))
        if path[-1] == "kernel":
            tensor, expected = tensor.T, shape[::-1]
        else:
            expected = shape
        if tensor.shape != shape:
            given = tensor.shape[::-1] if path[-1] == "kernel" else tensor.shape
            raise UserError(
                f"encoder weights: tensor {prefix}{name} has shape {list(given)},"
                f" but its config asks for {list(expected)}"
            )
        params[path] = np.ascontiguousarray(tensor, dtype=np.float32)
    if found:
        raise UserError(
            f"encoder weights: tensor {prefix}{next(iter(found))} has no place in a BERT of"
            f" {config.num_layers} layers; do its config and its weights belong together?"
        )
    positions = params["position_embeddings", "embedding"]
    params["position_embeddings", "embedding"] = positions[-config.max_positions :]
    return traverse_util.unflatten_dict(params)


def to_torch_names(config: BertConfig, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch BERT, in the order of its state dict: undoes `from_torch_names`."""
    flat = traverse_util.flatten_dict(params)
    return {
        name: np.ascontiguousarray(flat[path].T if path[-1] == "kernel" else flat[path])
        for path, (name, _) in _renames(config).items()
    }
