"""The authors' checkpoints as tables of renames, and the parameters they become, or come from.

A table lists (name in the PyTorch state dict, path in our parameters), in the order of the state
dict, which is also that of the averages in `diffusion.pth`. PyTorch stores a dense kernel as
[out, in] and ours are [in, out], so every path that ends in `kernel` is transposed; everything
else is taken as it is. The compressor's and the decompressor's key and value projections are one
matrix in the release, keys first.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cosmos_jax.errors import UserError
from cosmos_jax.models.autoencoder import AutoencoderConfig
from cosmos_jax.models.denoiser import DenoiserConfig

Tensors = Mapping[str, np.ndarray]
Table = list[tuple[str, str]]

BERT_PREFIX = "text_encoder."


def _autoencoder_block(theirs: str, ours: str, *, gated: bool) -> Table:
    attention = f"{theirs}.latent_attn"
    table = [
        (f"{attention}.norm_embeddings.gamma", f"{ours}/attention/norm_memory/gain"),
        (f"{attention}.norm_latents.gamma", f"{ours}/attention/norm_queries/gain"),
        (f"{attention}.embeddings_to_KV.weight#0", f"{ours}/attention/memory_key/kernel"),
        (f"{attention}.embeddings_to_KV.weight#1", f"{ours}/attention/memory_value/kernel"),
        (f"{attention}.latents_to_Q.weight", f"{ours}/attention/query/kernel"),
        (f"{attention}.latents_to_KV.weight#0", f"{ours}/attention/key/kernel"),
        (f"{attention}.latents_to_KV.weight#1", f"{ours}/attention/value/kernel"),
        (f"{attention}.query_norm.gamma", f"{ours}/attention/norm_query_heads/gain"),
        (f"{attention}.key_norm.gamma", f"{ours}/attention/norm_key_heads/gain"),
        (f"{attention}.projector_latents.weight", f"{ours}/attention/out/kernel"),
    ]
    if gated:
        table += _gate(f"{theirs}.attn_scale", f"{ours}/attention_gate")
    table += _feed_forward(f"{theirs}.ffn_latent", f"{ours}/mlp")
    if gated:
        table += _gate(f"{theirs}.ffn_scale", f"{ours}/mlp_gate")
    return table


def _feed_forward(theirs: str, ours: str) -> Table:
    return [
        (f"{theirs}.ffd.0.weight", f"{ours}/norm/scale"),
        (f"{theirs}.ffd.0.bias", f"{ours}/norm/bias"),
        *_dense(f"{theirs}.ffd.1", f"{ours}/up"),
        *_dense(f"{theirs}.ffd.4", f"{ours}/down"),
    ]


def _gate(theirs: str, ours: str) -> Table:
    return [
        (f"{theirs}.scale_mlp.weight", f"{ours}/weight"),
        (f"{theirs}.scale_mlp.bias", f"{ours}/bias"),
    ]


def _dense(theirs: str, ours: str) -> Table:
    return [(f"{theirs}.weight", f"{ours}/kernel"), (f"{theirs}.bias", f"{ours}/bias")]


def compressor_table(config: AutoencoderConfig) -> Table:
    """`autoencoder.pth["encoder"]` without the text encoder, which stands after the first row."""
    table = [
        ("latents", "queries"),
        ("positional_emb.emb.weight", "positions"),
        ("latent_norm.gamma", "norm_queries/gain"),
    ]
    for i in range(config.num_layers):
        table += _autoencoder_block(f"latent_layers.{i}", f"layers_{i}", gated=False)
    return [*table, ("output_norm.gamma", "norm_out/gain")]


def decompressor_table(config: AutoencoderConfig) -> Table:
    """`autoencoder.pth["decoder"]` without the frozen word embeddings, after the first row."""
    table = [
        ("positional_emb.emb.weight", "positions"),
        *_feed_forward("embedding_ffn", "mask_mlp"),
    ]
    for i in range(config.num_layers):
        table += _autoencoder_block(f"layers.{i}", f"layers_{i}", gated=True)
    return [*table, ("lm_head.weight", "head/kernel"), *_gate("scale_embedding", "mask_gate")]


def _transformer_block(theirs: str, ours: str, *, cross_attention: bool) -> Table:
    def attention(their_kind: str, our_kind: str) -> Table:
        names = {"query": "query", "key": "key", "value": "value", "o_proj": "out"}
        return [
            (f"{theirs}.{their_kind}.{name}.weight", f"{ours}/{our_kind}/{our_name}/kernel")
            for name, our_name in names.items()
        ]

    table = attention("self_attn", "attention")
    table.append((f"{theirs}.norm_self_attn.gamma", f"{ours}/norm_attention/gain"))
    if cross_attention:
        table += attention("cross_attn", "cross_attention")
    for name in ("gate", "up", "down"):
        table.append((f"{theirs}.mlp.{name}_proj.weight", f"{ours}/mlp/{name}/kernel"))
    return [*table, (f"{theirs}.norm_mlp.gamma", f"{ours}/norm_mlp/gain")]


def denoiser_table(config: DenoiserConfig) -> Table:
    """`diffusion.pth["score_estimator"]` without the condition encoder."""
    table = [*_dense("time_emb.0", "time_up"), *_dense("time_emb.2", "time_down")]
    half, layers = config.num_layers // 2, range(config.num_layers)
    for i in layers:
        side = f"encoder.input_blocks.{i}" if i < half else f"encoder.output_blocks.{i - half}"
        table += _transformer_block(side, f"layers_{i}", cross_attention=config.conditional)
    for i in layers:
        table += _dense(f"encoder.time_layers.{i}.1", f"time_{i}")
    for i in layers:
        table += _dense(f"encoder.self_cond_layers.{i}", f"self_condition_{i}")
    return [*table, ("encoder.output_norm.gamma", "norm_out/gain")]


def condition_encoder_table(config: DenoiserConfig) -> Table:
    """The condition encoder inside `diffusion.pth["score_estimator"]`, after the denoiser."""
    table = []
    for i in range(config.condition_layers):
        table += _transformer_block(
            f"conditional_encoder.blocks.{i}", f"layers_{i}", cross_attention=False
        )
    return [
        *table,
        ("conditional_encoder.output_norm.gamma", "norm_out/gain"),
        ("position_embeddings.weight", "positions"),
    ]


def ema_weights(checkpoint: Mapping[str, Any], where: str) -> Tensors:
    """The tensors of `score_estimator` in `diffusion.pth` with their exponential moving averages.

    The averages are a list in the order of the parameters, which is that of the state dict
    without its buffers; of all its entries only buffers hold integers.

    Raises:
      UserError: not a diffusion checkpoint, or the averages do not fit its parameters.
    """
    try:
        tensors = checkpoint["score_estimator"]
        averages = checkpoint["ema"]["shadow_params"]
        names = [name for name, value in tensors.items() if value.dtype.kind not in "iub"]
        shapes = [tensors[name].shape for name in names]
        fits = shapes == [average.shape for average in averages]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: is not a diffusion checkpoint of Cosmos") from error
    if not fits:
        raise UserError(
            f"{where}: the {len(averages)} averages of its 'ema' do not fit the"
            f" {len(names)} parameters of its 'score_estimator'"
        )
    return {**tensors, **dict(zip(names, averages, strict=True))}


def convert(table: Table, tensors: Tensors, where: str) -> dict[str, Any]:
    """Our parameters from their tensors; UserError if the checkpoint lacks one."""
    params = {}
    for theirs, ours in table:
        name, _, half = theirs.partition("#")
        if name not in tensors:
            raise UserError(f"{where}: no tensor {name!r}; is this a checkpoint of Cosmos?")
        value = np.asarray(tensors[name])
        if half:
            value = np.split(value, 2)[int(half)]
        if ours.endswith("kernel"):
            value = value.T
        if ours.endswith(("gate/weight", "gate/bias")):
            value = value.reshape(())
        params[tuple(ours.split("/"))] = np.array(value, dtype=np.float32, order="C")
    return unflatten_dict(params)


def revert(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors from our parameters, fp32, in the order of the table: undoes `convert`."""
    flat = flatten_dict(params, sep="/")
    tensors: dict[str, np.ndarray] = {}
    for theirs, ours in table:
        name, _, half = theirs.partition("#")
        value = np.asarray(flat[ours], np.float32)
        if ours.endswith("kernel"):
            value = value.T
        if ours.endswith("gate/weight"):
            value = value.reshape(1, 1)
        if ours.endswith("gate/bias"):
            value = value.reshape(1)
        if half == "1":
            value = np.concatenate([tensors[name], value])
        tensors[name] = np.array(value, order="C")
    return tensors
