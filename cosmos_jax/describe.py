"""`--stage=describe`: sizes and costs of a config from shapes alone; nothing is allocated."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import optimizer, sharding
from cosmos_jax.baselines import BASELINES
from cosmos_jax.models import cosmos
from cosmos_jax.stages import autoencoder, diffusion, distillation
from cosmos_jax.stages.base import Stage
from cosmos_jax.train import init_state

# Arrays of the size of the vocabulary.
_VOCABULARY = ("vocabulary", "head_index")


def describe(config: ConfigDict) -> dict[str, Any]:
    """Parameters of each part, floating-point operations, bytes on each device.

    FLOPs are XLA's count of the forward passes (2 per multiply-add); a backward pass counts as
    two forward passes. Bytes are those of weights and training state, not of activations.
    With `autoencoder.vocabulary` "corpus" the head is smaller than is said here.
    """
    found = _baseline(config) if config.system in BASELINES else _cosmos(config)
    mesh = _mesh(config)
    return {
        "parameters": found.parameters,
        "flops": found.flops,
        "mesh": dict(mesh.shape),
        "bytes_per_device": {
            "text_encoder_frozen": sharding.bytes_per_device(found.bert, mesh),
            **{stage.name: _state_bytes(stage, mesh) for stage in found.stages},
        },
    }


def _mesh(config: ConfigDict) -> jax.sharding.AbstractMesh:
    """The mesh asked for, which may be that of other machines: here there may be fewer devices.

    Where that is so an axis of -1 counts as 1.
    """
    sizes = [config.mesh[axis] for axis in sharding.AXES]
    num_devices = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        num_devices = max(num_devices, jax.device_count())
    return sharding.abstract_mesh(config.mesh, num_devices)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    parameters: dict[str, int]
    flops: dict[str, float]
    bert: Any
    stages: list[Stage]


def _cosmos(config: ConfigDict) -> _Sizes:
    model = cosmos.build(config, config.encoder.vocab_size)
    shapes = _shapes(config, model)
    parameters = {"text_encoder_frozen": _count(shapes["bert"]), **_trained(shapes)}
    second = diffusion.make(config, model, {}, {}, "", 0)
    stages = [autoencoder.make(config, model, {}, {}, ""), second]
    if config.distillation.steps:
        stages.append(distillation.student(config, second))
    return _Sizes(parameters, _flops(config, model, shapes), shapes["bert"], stages)


def _baseline(config: ConfigDict) -> _Sizes:
    """FLOPs from the loss itself; a text is one pass, with masked diffusion many."""
    name, x = config.system, _inputs(config)
    settings, vocabulary_size = config[name], config.encoder.vocab_size
    model = BASELINES[name].build(config, vocabulary_size)
    stage = BASELINES[name].stage(config, model, {}, {}, "")
    frozen: dict[str, Any] = {
        **{key: jax.ShapeDtypeStruct((vocabulary_size,), jnp.int32) for key in _VOCABULARY},
        **{key: jax.ShapeDtypeStruct((), jnp.int32) for key in ("start", "end")},
    }
    batch = {key: x[key] for key in ("ids", "mask")} | {
        "rows": jax.ShapeDtypeStruct((1,), jnp.int32)
    }
    parameters, bert = {}, {}
    if config.data.conditional:
        bert = jax.eval_shape(model.bert.init, jax.random.key(0), x["ids"], x["mask"])["params"]
        parameters["text_encoder_frozen"] = _count(bert)
        frozen |= {"bert": bert, "states_mean": x["mask_embedding"]}
        frozen |= {"states_std": x["mask_embedding"]}
        batch |= {key: x[key] for key in ("source_ids", "source_mask")}
    params = jax.eval_shape(stage.init, jax.random.key(0), frozen)
    parameters |= {part: _count(tree) for part, tree in params.items()}
    encode = _count_flops(stage.features, frozen, batch)
    features = jax.eval_shape(stage.features, frozen, batch)

    def loss(params, frozen, batch, key):
        return stage.losses(params, frozen, batch, key)["loss"][0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    forward = _count_flops(loss, params, frozen, features, key)
    passes = min(settings.num_sampling_steps, config.data.max_length) if name == "masked" else 1
    flops = {
        f"{name}_training_step": settings.batch_size * (encode + 3 * forward),
        "generated_text": encode + passes * forward,
    }
    return _Sizes(parameters, flops, bert, [stage])


def _trained(shapes: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {
        part: _count(shapes[part])
        for part in ("compressor", "decompressor", "denoiser", "condition_encoder")
        if part in shapes
    }
    if "condition_encoder" in counts:
        # The table of positions is counted apart, as the authors' code does.
        counts["condition_positions"] = _count(shapes["condition_encoder"]["positions"])
        counts["condition_encoder"] -= counts["condition_positions"]
    return counts


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _state_bytes(stage: Stage, mesh: jax.sharding.AbstractMesh) -> dict[str, int]:
    """Bytes of parameters, averaged parameters and optimiser state, and a student's teacher."""
    transform = optimizer.make(stage.settings.optimizer, max(1, stage.settings.steps))
    init = functools.partial(init_state, stage, transform)
    state = jax.eval_shape(init, jax.random.key(0), stage.frozen)
    trees = {"params": state.params, "ema": state.ema, "optimizer": state.optimizer}
    if stage.name == "distillation":
        trees["teacher"] = state.params
    return {name: sharding.bytes_per_device(tree, mesh) for name, tree in trees.items()}


def _inputs(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what enters the modules, for one text."""
    length, source = config.data.max_length, config.data.max_source_length
    width, latents = config.encoder.hidden_size, config.autoencoder.num_latents

    def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *dims), dtype)

    return {
        "ids": shape(length, dtype=jnp.int32),
        "mask": shape(length, dtype=jnp.bool_),
        "states": shape(length, width),
        "latents": shape(latents, width),
        "mask_embedding": jax.ShapeDtypeStruct((width,), jnp.float32),
        "t": shape(),
        "source_ids": shape(source, dtype=jnp.int32),
        "source_mask": shape(source, dtype=jnp.bool_),
        "source_states": shape(source, width),
    }


def _calls(config: ConfigDict, model: cosmos.Cosmos) -> dict[str, tuple[Any, list[Any]]]:
    """Name of each forward pass -> module and shapes of its inputs."""
    x = _inputs(config)
    calls: dict[str, tuple[Any, list[Any]]] = {
        "bert": (model.bert, [x["ids"], x["mask"]]),
        "compressor": (model.compressor, [x["states"], x["mask"]]),
        "decompressor": (model.decompressor, [x["latents"], x["mask_embedding"]]),
        "denoiser": (model.denoiser, [x["latents"], x["t"], x["latents"]]),
    }
    if model.conditional:
        calls["denoiser"][1].extend([x["source_states"], x["source_mask"]])
        calls["condition_encoder"] = (
            model.condition_encoder,
            [x["source_states"], x["source_mask"]],
        )
        calls["bert_on_source"] = (model.bert, [x["source_ids"], x["source_mask"]])
    return calls


def _shapes(config: ConfigDict, model: cosmos.Cosmos) -> dict[str, Any]:
    """Parameters of every module as shapes."""
    return {
        name: jax.eval_shape(module.init, jax.random.key(0), *inputs).get("params", {})
        for name, (module, inputs) in _calls(config, model).items()
    }


def _count_flops(function: Any, *shapes: Any) -> float:
    analysis: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return analysis.get("flops", 0.0)  # none where nothing is computed


def _flops(config: ConfigDict, model: cosmos.Cosmos, shapes: dict[str, Any]) -> dict[str, float]:
    forward = {
        name: _count_flops(module.apply, {"params": shapes[name]}, *inputs)
        for name, (module, inputs) in _calls(config, model).items()
    }
    settings, student, how = config.diffusion, config.distillation, config_lib.sampling(config)
    encode = forward["compressor"] + forward["decompressor"]
    # One pass forward, two back, and the first pass of self-conditioning.
    denoise = forward["denoiser"] * (3 + settings.self_condition_rate)
    per_source = forward.get("bert_on_source", 0) + forward.get("condition_encoder", 0)
    train_source = forward.get("bert_on_source", 0) + 3 * forward.get("condition_encoder", 0)
    evaluations = how["num_sampling_steps"] * (2 if how["sampler"] == "heun" else 1)
    if model.conditional and how["guidance"] != 1:
        evaluations *= 2
    train_denoiser = forward["bert"] + forward["compressor"] + train_source + denoise
    taught = student.teacher_steps * (2 if model.conditional and settings.guidance != 1 else 1)
    train_student = forward["denoiser"] * (3 * student.num_sampling_steps + taught)
    train_student += train_source + forward.get("condition_encoder", 0)
    distillation = {"distillation_training_step": student.batch_size * train_student}
    return {
        "autoencoder_training_step": config.autoencoder.batch_size * (forward["bert"] + 3 * encode),
        "diffusion_training_step": settings.batch_size * train_denoiser,
        **(distillation if student.steps else {}),
        "generated_text": per_source + evaluations * forward["denoiser"] + forward["decompressor"],
    }
