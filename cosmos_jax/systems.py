"""The systems that `benchmark.py` compares, with weights that are random or trained.

Random weights have the shapes that the stages of training ask for. What they write has its full
length: no row of their head stands for [SEP].
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import (
    config_checks,
    encoder,
    pipeline,
    runner,
    sharding,
    torch_gpt2,
    workdir,
)
from cosmos_jax.baselines import BASELINES, make_generator
from cosmos_jax.data import tokens
from cosmos_jax.data.batches import Batch
from cosmos_jax.errors import UserError
from cosmos_jax.models import cosmos
from cosmos_jax.models.cosmos import inverse_vocabulary
from cosmos_jax.stages import autoencoder, diffusion, distillation
from cosmos_jax.stages.base import Stage

EAGER = "torch_autoregressive"  # GPT-2 in PyTorch

# What each system changes in the common config. Of "token_level" `num_latents` follows.
CHANGES: dict[str, dict[str, Any]] = {
    "default": {"system": "cosmos", "autoencoder.compress": True},
    "undistilled": {"system": "cosmos", "autoencoder.compress": True, "distillation.steps": 0},
    "faithful": {"system": "cosmos", "autoencoder.compress": True, **config_lib.FAITHFUL},
    "autoregressive": {"system": "autoregressive"},
    "token_level": {"system": "cosmos", "autoencoder.compress": False},
    "masked": {"system": "masked"},
    EAGER: {"system": "autoregressive"},
}
SEED = 0
ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}

Decode = Callable[[np.ndarray], list[str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A system with its weights.

    Attributes:
      origin: "random", or the workdir that the weights come from.
      stages: those that train it, by name.
      weights: all that it generates with.
      batch: number of texts -> what generation is given on the host: rows, and sources.
      decode: token ids -> texts.
    """

    origin: str
    config: ConfigDict
    model: Any
    stages: dict[str, Stage]
    weights: dict[str, Any]
    batch: Callable[[int], Batch]
    decode: Decode

    def generate(self, weights: Any, key: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        """Token ids [B, L], as the stage "generate" makes them."""
        return make_generator(self.config, self.model)(weights, key, batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Eager:
    """A system that nothing is known of but how to call it: (texts, tokens of each) -> ids."""

    config: ConfigDict
    generate: Callable[[int, int], np.ndarray]
    decode: Decode
    origin: str = "random"


def open_systems(config: ConfigDict, mesh: Mesh) -> dict[str, Model | Eager | UserError]:
    """The systems of a benchmark's config by name, with why where one cannot be had."""
    shared: dict[Any, Model] = {}
    found: dict[str, Model | Eager | UserError] = {}
    tokenizer = load_tokenizer(config.base)
    for name in config.systems.split(","):
        directory = config.workdirs.get(name)
        if directory:
            found[name] = trained(name, Path(directory), config.base)
            continue
        of_system = config_of(name, config.base)
        if name == EAGER:
            try:
                generate = torch_gpt2.make_generator(of_system)
                found[name] = Eager(of_system, generate, decode(of_system, tokenizer))
            except UserError as reason:
                found[name] = reason
            continue
        # The same weights where only the sampling differs.
        ae = of_system.autoencoder
        kind = (of_system.system, ae.compress, ae.decompressor_layers or ae.num_layers)
        if kind not in shared:
            shared[kind] = random(of_system, tokenizer, mesh)
        found[name] = dataclasses.replace(shared[kind], config=of_system)
    return found


def config_of(name: str, base: ConfigDict) -> ConfigDict:
    """The config of a system; UserError for a value that cannot work."""
    config = ConfigDict(base.to_dict())
    config.update_from_flattened_dict(CHANGES[name])
    if not config.autoencoder.compress:
        config.autoencoder.num_latents = config.data.max_length
    for stage in config_lib.TRAINED:
        config[stage].accumulate = 1
    config.mesh = ConfigDict(ONE_DEVICE)
    config_checks.validate(config)
    return config


# Random weights


def load_tokenizer(base: ConfigDict) -> Any:
    """The tokenizer of the encoder that is named, None if none is."""
    name, vocab_size = base.encoder.name, base.encoder.vocab_size
    if not name:
        return None
    found = encoder.load_tokenizer(name)
    if len(found) > vocab_size:
        raise UserError(
            f"config.base.encoder.vocab_size is {vocab_size}; the tokenizer {name!r} has "
            f"{len(found)} tokens: give that size, or no tokenizer by --config.base.encoder.name="
        )
    return found


def random(config: ConfigDict, tokenizer: Any, mesh: Mesh) -> Model:
    """A system of random fp32 weights; without a tokenizer its texts are of stand-in words."""
    vocab_size, width = config.encoder.vocab_size, config.encoder.hidden_size
    start, end, unknown = (
        (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id)
        if tokenizer
        else (0, 1, 2)
    )
    vocabulary = np.arange(vocab_size, dtype=np.int32)
    vocabulary[end] = unknown
    head_index = inverse_vocabulary(vocabulary, vocab_size, unknown)
    generator, key = np.random.default_rng(SEED), jax.random.key(SEED)
    weights: dict[str, Any] = {}

    def add(**host: Any) -> None:
        weights.update(sharding.put_tree(host, mesh))

    def add_stage(make: Callable[..., Stage], *more: int) -> Stage:
        """A stage to which all that is there is frozen, and then its own parameters."""
        stage = make(config, model, dict(weights), {}, "", *more)
        add(**_fill(jax.eval_shape(stage.init, key, stage.frozen), generator))
        return stage

    baseline = BASELINES.get(config.system)
    model = (baseline.build if baseline else cosmos.build)(config, vocab_size)
    add(vocabulary=vocabulary, head_index=head_index, start=np.int32(start), end=np.int32(end))
    if baseline is None or config.data.conditional:
        text = jnp.zeros((1, config.data.max_length), jnp.int32)
        shapes = jax.eval_shape(model.bert.init, key, text, text > 0)["params"]
        add(
            bert=_fill(shapes, generator),
            mask_embedding=np.zeros(width, np.float32),
            states_mean=np.zeros(width, np.float32),
            states_std=np.ones(width, np.float32),
        )
    if baseline:
        stages = {config.system: add_stage(baseline.stage)}
        # A row that the head does not have, so that no text ends.
        add(head_index=np.append(head_index, np.int32(vocab_size)), end=np.int32(vocab_size))
    else:
        stages = {"autoencoder": add_stage(autoencoder.make)}
        latents, source = (config.autoencoder.num_latents, width), config.data.max_source_length
        add(
            latents_mean=np.zeros(latents, np.float32),
            latents_std=np.ones(latents, np.float32),
            no_source_states=np.zeros((source, width), np.float32),
            no_source_mask=np.arange(source) < 2,
        )
        stages["diffusion"] = add_stage(diffusion.make, 0)
        parts = [name for name in ("denoiser", "condition_encoder") if name in weights]
        teacher = {name: weights[name] for name in parts}
        stages["distillation"] = distillation.make(config, model, stages["diffusion"], teacher, 0)
    return Model(
        "random",
        config,
        model,
        stages,
        weights,
        lambda batch_size: random_batch(config, batch_size, sources_only=True),
        decode(config, tokenizer),
    )


def _fill(shapes: Any, generator: np.random.Generator) -> Any:
    """Numbers that keep activations near 1: gains of 1, biases of 0, matrices by their inputs."""

    def draw(path, leaf):
        if len(leaf.shape) > 1:
            scale = np.float32(leaf.shape[-2] ** -0.5)
            return scale * generator.standard_normal(leaf.shape, np.float32)
        return np.full(leaf.shape, path[-1].key in ("gain", "scale"), np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(config: ConfigDict, batch_size: int, *, sources_only: bool = False) -> Batch:
    """A batch of random tokens without padding, as of `data.batches.TokenBatches`."""
    generator = np.random.default_rng(SEED)

    def ids_and_mask(length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = generator.integers(config.encoder.vocab_size, size=(batch_size, length))
        return ids.astype(np.int32), np.ones((batch_size, length), bool)

    batch: Batch = {"rows": np.arange(batch_size)}
    if not sources_only:
        batch["ids"], batch["mask"] = ids_and_mask(config.data.max_length)
    if config.data.conditional:
        batch["source_ids"], batch["source_mask"] = ids_and_mask(config.data.max_source_length)
    return batch


def decode(config: ConfigDict, tokenizer: Any) -> Decode:
    """Token ids to texts; without a tokenizer to stand-in words."""
    if tokenizer:
        return functools.partial(tokens.decode, tokenizer)
    words = [f"word{i}" for i in range(config.encoder.vocab_size)]
    return lambda ids_BxL: [" ".join(words[i] for i in ids_L) for ids_L in ids_BxL.tolist()]


# Trained weights


def trained(name: str, directory: Path, base: ConfigDict) -> Model:
    """What a workdir holds, generating as `base` and the system say."""
    recorded = workdir.read_config(directory)
    if recorded is None:
        raise UserError(f"config.workdirs.{name}: {directory} holds no config.json")
    config = config_lib.recorded(recorded)
    ae = config.autoencoder
    if ae.decompressor_layers == ae.num_layers:
        ae.decompressor_layers = 0  # which means the same
    for field in ("system", "autoencoder.compress", "autoencoder.decompressor_layers"):
        wanted = CHANGES[name].get(field, config_lib.flatten(config)[field])
        found = config_lib.flatten(config)[field]
        if found != wanted:
            raise UserError(
                f"config.workdirs.{name}: {directory} has {field} {found!r}, not {wanted!r}"
            )
    student = config_of(name, config).distillation.steps
    for stage, fields in config_lib.SAMPLING.items():
        for field in fields:
            if not (student and field in config_lib.LEARNED):
                config[stage][field] = base[stage][field]
    run = runner.open_run(config_of(name, config), directory)
    finished = pipeline.finished(run)

    def batch(batch_size: int) -> Batch:
        texts = run.training_batches(batch_size, "benchmark")(0)
        return {field: value for field, value in texts.items() if field not in ("ids", "mask")}

    return Model(
        str(directory),
        run.config,
        finished.model,
        finished.stages,
        finished.weights,
        batch,
        decode(run.config, run.encoder.tokenizer),
    )
