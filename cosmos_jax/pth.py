"""Trained stages in the layout of the authors' PyTorch checkpoints: undoes `convert`.

    autoencoder.pth   encoder, decoder, latent_mean, latent_std, encodings_mean, encodings_std, step
    diffusion.pth     score_estimator, ema, step, latent_mean, latent_std

The release has a place for every parameter of ours, and no other: names, shapes, order and types
are its own. What it cannot hold is refused.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cosmos_jax import workdir
from cosmos_jax.encoder import TextEncoder
from cosmos_jax.errors import UserError
from cosmos_jax.exported import Exported
from cosmos_jax.models import weights
from cosmos_jax.models.bert import RobertaConfig, to_torch_names
from cosmos_jax.models.cosmos import Cosmos
from cosmos_jax.models.denoiser import NOT_OF_THE_PAPER


def check(config: ConfigDict, stages: Mapping[str, Exported], encoder: TextEncoder) -> None:
    """UserError if the release has no place for something, or there is no PyTorch."""
    size = config.encoder.vocab_size
    if config.system != "cosmos":
        raise UserError(f"--pth: the release has no layout for config.system {config.system!r}")
    if not config.autoencoder.compress:
        raise UserError("--pth: the release has no layout for an autoencoder without compression")
    for part in NOT_OF_THE_PAPER:
        if config.diffusion[part]:
            raise UserError(f"--pth: the release has no layout for config.diffusion.{part}")
    vocabulary = stages["autoencoder"].statistics["vocabulary"]
    if not np.array_equal(vocabulary, np.arange(size)):
        raise UserError(
            f"--pth: the head can say {len(vocabulary):,} of the encoder's {size:,} tokens, and "
            "that of the release says all; train with --config.autoencoder.vocabulary=encoder, or "
            "export without --pth"
        )
    if isinstance(encoder.config, RobertaConfig):
        raise UserError("--pth: the release has no layout for another text encoder than BERT")
    _torch()


def write(
    directory: Path,
    config: ConfigDict,
    model: Cosmos,
    stages: Mapping[str, Exported],
    raw: Mapping[str, Any],
    encoder: TextEncoder,
) -> None:
    """Writes both files into a directory.

    Args:
      stages: "autoencoder" and "diffusion"; params of the latter are the averaged ones.
      raw: the denoiser's params without averaging.

    Raises:
      UserError: as `check` says, or a file cannot be written.
    """
    check(config, stages, encoder)
    first, second = stages["autoencoder"], stages["diffusion"]
    latents = {
        "latent_mean": second.statistics["latents_mean"],
        "latent_std": second.statistics["latents_std"],
    }
    autoencoder = {
        **_autoencoder(model, first.params, encoder),
        **latents,
        "encodings_mean": first.statistics["states_mean"],
        "encodings_std": first.statistics["states_std"],
        "step": first.step,
    }
    averages = _denoiser(model, second.params)
    diffusion = {
        # The table of position numbers is the one buffer, and a buffer has no average.
        "score_estimator": {**_denoiser(model, raw), **_buffers(model)},
        "ema": {
            "decay": float(config.diffusion.ema_decay),
            "num_updates": second.step,
            "shadow_params": list(averages.values()),
            "collected_params": None,
        },
        "step": second.step,
        **latents,
    }
    torch = _torch()
    for name, content in (("autoencoder", autoencoder), ("diffusion", diffusion)):
        path = directory / f"{name}.pth"
        with workdir.writing(path):
            torch.save(_tensors(torch, content), path)


def _autoencoder(model: Cosmos, params: Mapping[str, Any], encoder: TextEncoder) -> dict[str, Any]:
    """The state dicts of encoder and decoder."""
    compressor: Any = model.compressor
    decompressor: Any = model.decompressor
    bert = to_torch_names(encoder.config, encoder.params)
    words = {"embedding.weight": bert["embeddings.word_embeddings.weight"]}
    return {
        "encoder": _inserted(
            weights.revert(weights.compressor_table(compressor.config), params["compressor"]),
            {weights.BERT_PREFIX + name: tensor for name, tensor in bert.items()},
        ),
        "decoder": _inserted(
            weights.revert(weights.decompressor_table(decompressor.config), params["decompressor"]),
            words,
        ),
    }


def _inserted(tensors: Mapping[str, Any], more: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """`more` after the first of the tensors, where the release has what is frozen."""
    first, *rest = tensors.items()
    return OrderedDict([first, *more.items(), *rest])


def _denoiser(model: Cosmos, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of the score estimator."""
    sizes = model.denoiser.config
    tensors = weights.revert(weights.denoiser_table(sizes), params["denoiser"])
    if sizes.conditional:
        table = weights.condition_encoder_table(sizes)
        tensors |= weights.revert(table, params["condition_encoder"])
    return tensors


def _buffers(model: Cosmos) -> dict[str, np.ndarray]:
    sizes = model.denoiser.config
    if not sizes.conditional:
        return {}
    return {"position_ids": np.arange(sizes.max_source_length, dtype=np.int64)[None]}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError("--pth writes with PyTorch, which is missing: pip install torch") from error
    return torch


def _tensors(torch: Any, content: Any) -> Any:
    """The same with tensors instead of arrays, each with memory of its own."""
    if isinstance(content, dict):
        return type(content)((name, _tensors(torch, value)) for name, value in content.items())
    if isinstance(content, list):
        return [_tensors(torch, value) for value in content]
    return torch.tensor(content) if isinstance(content, np.ndarray) else content
