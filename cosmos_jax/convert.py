"""Turns the authors' PyTorch checkpoints into a workdir of ours.

    python -m cosmos_jax.convert --autoencoder=autoencoder.pth --diffusion=diffusion.pth \
        --config=configs/rocstories.py --config.data.source=jsonl:PATH --workdir=runs/released

Sizes come from the files; what they do not tell (numbers of heads of BERT and the denoiser,
the schedule, the data) from the config. The workdir gets `config.json`, `encoder/` (the BERT
inside the checkpoint with the tokenizer of `--tokenizer`), `autoencoder/` and `diffusion/`,
with raw weights and the averaged ones to sample with. Files are read without PyTorch and
without running code in them.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from absl import flags
from ml_collections import ConfigDict, config_flags

from cosmos_jax import commands, config_checks, encoder, workdir
from cosmos_jax import config as config_lib
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.errors import UserError
from cosmos_jax.models import weights
from cosmos_jax.models.bert import BertConfig
from cosmos_jax.models.cosmos import build
from cosmos_jax.models.denoiser import NOT_OF_THE_PAPER
from cosmos_jax.models.torch_files import load_torch_file

Tensors = Mapping[str, np.ndarray]


def convert(
    config: ConfigDict, autoencoder: Path, diffusion: Path, tokenizer: str, directory: Path
) -> ConfigDict:
    """Makes the workdir and returns its config.

    Raises:
      UserError: a file is not what it should be or does not go with the config, or the
        workdir exists.
    """
    if directory.exists():
        raise UserError(f"{directory} exists; choose a new --workdir")
    first = _read(autoencoder, ("encoder", "decoder", "encodings_mean", "encodings_std"))
    second = _read(diffusion, ("score_estimator", "ema", "latent_mean", "latent_std"))
    bert = {
        name.removeprefix(weights.BERT_PREFIX): tensor
        for name, tensor in first["encoder"].items()
        if name.startswith(weights.BERT_PREFIX)
    }
    config = _fill_sizes(config, bert, first, second, autoencoder)
    config.encoder.name = str(directory / "encoder")
    config.autoencoder.steps = int(first.get("step", 0))
    config.diffusion.steps = int(second.get("step", 0))
    sizes = BertConfig(**{k: v for k, v in config.encoder.items() if k != "name"})
    config = config_checks.resolve(config, sizes, config.data.conditional)

    model = build(config, config.encoder.vocab_size)
    parts = (
        ("compressor", weights.compressor_table(model.compressor.config), first["encoder"]),
        ("decompressor", weights.decompressor_table(model.decompressor.config), first["decoder"]),
    )
    autoencoder_params = {
        name: weights.convert(table, tensors, str(autoencoder)) for name, table, tensors in parts
    }
    averages = weights.ema_weights(second, str(diffusion))
    raw_params, ema_params = (
        _denoiser_params(config, tensors, diffusion)
        for tensors in (second["score_estimator"], averages)
    )
    words = encoder.load_tokenizer(tokenizer)
    # Everything has been read: only now is anything written, and the folder appears whole.
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write_encoder(sizes, bert, words, partial / "encoder")
    _write_checkpoint(
        partial / "autoencoder",
        config.autoencoder.steps,
        {
            "params": autoencoder_params,
            "statistics": {
                "vocabulary": np.arange(config.encoder.vocab_size, dtype=np.int32),
                "states_mean": first["encodings_mean"],
                "states_std": first["encodings_std"],
            },
        },
    )
    _write_checkpoint(
        partial / "diffusion",
        config.diffusion.steps,
        {
            "params": raw_params,
            "ema": ema_params,
            "statistics": {
                "latents_mean": second["latent_mean"],
                "latents_std": second["latent_std"],
            },
        },
    )
    workdir.write_text(partial / "config.json", config_lib.to_json(config))
    os.replace(partial, directory)
    return config


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    content = load_torch_file(path)
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path}: no {key!r}; is this a checkpoint of Cosmos?")
    return content


def _fill_sizes(
    config: ConfigDict,
    bert: Tensors,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    path: Path,
) -> ConfigDict:
    """A copy of the config with every size that the shapes of the tensors tell."""
    config = ConfigDict(config.to_dict())
    compressor, denoiser = first["encoder"], second["score_estimator"]
    try:
        words = bert["embeddings.word_embeddings.weight"]
        head_width = len(compressor["latent_layers.0.latent_attn.query_norm.gamma"])
        config.encoder.update(
            vocab_size=len(words),
            hidden_size=words.shape[1],
            num_layers=_count(bert, r"encoder\.layer\.(\d+)\."),
            intermediate_size=len(bert["encoder.layer.0.intermediate.dense.weight"]),
            max_positions=len(bert["embeddings.position_embeddings.weight"]),
            type_vocab_size=len(bert["embeddings.token_type_embeddings.weight"]),
        )
        config.autoencoder.update(
            num_latents=len(compressor["latents"]),
            num_layers=_count(compressor, r"latent_layers\.(\d+)\."),
            num_heads=words.shape[1] // head_width,
        )
        config.autoencoder.decompressor_layers = _count(first["decoder"], r"layers\.(\d+)\.")
        config.distillation.steps = 0
        # The table has max(L, N) rows; where it has N, L is what the config says.
        positions = len(compressor["positional_emb.emb.weight"])
        if positions > config.autoencoder.num_latents:
            config.data.max_length = positions
        config.diffusion.num_layers = _count(denoiser, r"encoder\.input_blocks\.(\d+)\.") + _count(
            denoiser, r"encoder\.output_blocks\.(\d+)\."
        )
        config.diffusion.update(dict.fromkeys(NOT_OF_THE_PAPER, False))
        config.data.conditional = "position_embeddings.weight" in denoiser
        if config.data.conditional:
            config.data.max_source_length = len(denoiser["position_embeddings.weight"])
            config.diffusion.condition_layers = _count(
                denoiser, r"conditional_encoder\.blocks\.(\d+)\."
            )
    except KeyError as error:
        raise UserError(f"{path}: no tensor {error}; is this a checkpoint of Cosmos?") from error
    return config


def _count(tensors: Tensors, pattern: str) -> int:
    """How many layers there are whose names match."""
    return len({match[1] for match in map(re.compile(pattern).match, tensors) if match})


def _denoiser_params(config: ConfigDict, tensors: Tensors, path: Path) -> dict[str, Any]:
    sizes = build(config, 1).denoiser.config
    params = {"denoiser": weights.convert(weights.denoiser_table(sizes), tensors, str(path))}
    if sizes.conditional:
        table = weights.condition_encoder_table(sizes)
        params["condition_encoder"] = weights.convert(table, tensors, str(path))
    return params


def _write_encoder(sizes: BertConfig, bert: Tensors, tokenizer: Any, directory: Path) -> None:
    directory.mkdir(parents=True)
    workdir.write_json(directory / "config.json", sizes.to_huggingface())
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in bert.items()}
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    shutil.copymode(directory / "config.json", path)  # it is written for its owner alone
    tokenizer.save_pretrained(str(directory))


def _write_checkpoint(directory: Path, step: int, items: dict[str, Any]) -> None:
    with Checkpoints(directory) as checkpoints:
        items = {"step": {"step": np.int32(step)}, **items}
        checkpoints.save(step, items, {"data": "converted"})


def define_flags() -> None:
    """Not at import: absl's flags are global, and `main.py` has some of the same names."""
    config_flags.DEFINE_config_file("config", None, "What the files do not tell.")
    flags.DEFINE_string("autoencoder", None, "The authors' autoencoder.pth.")
    flags.DEFINE_string("diffusion", None, "The authors' diffusion.pth.")
    flags.DEFINE_string("tokenizer", "", "Directory or id; empty: config.encoder.name.")
    flags.DEFINE_string("workdir", None, "Folder to make.")


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    commands.check(argv, options.config)
    directory = Path(options.workdir).absolute()
    config = convert(
        options.config,
        Path(options.autoencoder),
        Path(options.diffusion),
        options.tokenizer or options.config.encoder.name,
        directory,
    )
    print(
        f"{directory} is ready: {config.autoencoder.num_latents} latents of width "
        f"{config.encoder.hidden_size}. Now:\npython -m cosmos_jax.main "
        f"--config=configs/workdir.py:{directory} --workdir={directory} --stage=generate"
    )


if __name__ == "__main__":
    define_flags()
    commands.run(main, required=("config", "autoencoder", "diffusion", "workdir"))
