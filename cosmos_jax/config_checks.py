"""What a configuration must be to work, and to go on with what another one began."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from cosmos_jax.config import METRICS, SAMPLERS, SAMPLING, SYSTEMS, TRAINED, flatten, recorded
from cosmos_jax.errors import UserError

# Fields that a run may change after it has begun: what it has trained stays usable.
FREE = (
    "data.directory",
    *(
        f"{stage}.{field}"
        for stage in TRAINED
        for field in (
            "steps",
            "accumulate",
            "remat",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
            "best_metric",
        )
    ),
    *(f"{stage}.{field}" for stage, fields in SAMPLING.items() for field in fields),
    "generate.",
    "evaluate.",
    "mesh.",
)


def validate(config: ConfigDict) -> None:
    """Raises UserError for the first field with a value that cannot work."""
    flat = flatten(config)

    def require(condition: bool, field: str, need: str) -> None:
        if not condition:
            raise UserError(f"config.{field} is {flat.get(field)!r}; it must be {need}")

    require(config.system in SYSTEMS, "system", "one of " + ", ".join(SYSTEMS))
    for field in (
        "data.max_length",
        "data.max_source_length",
        "autoencoder.num_latents",
        "diffusion.num_sampling_steps",
        "distillation.num_sampling_steps",
        "masked.num_sampling_steps",
        "autoregressive.num_beams",
        "generate.batch_size",
        "evaluate.batch_size",
        *(
            f"{stage}.{name}"
            for name in (
                "batch_size",
                "num_layers",
                "statistics_texts",
                "log_every",
                "evaluate_every",
                "checkpoint_every",
                "keep_checkpoints",
            )
            for stage in TRAINED
            if name in config[stage]
        ),
        "autoencoder.vocabulary_min_count",
        "generate.num_texts",
        "evaluate.num_texts",
        "evaluate.block_size",
        "evaluate.seeds",
    ):
        require(flat[field] >= 1, field, "at least 1")
    for stage in TRAINED:
        batch_size, parts = config[stage].batch_size, config[stage].accumulate
        require(
            parts >= 1 and batch_size % parts == 0,
            f"{stage}.accumulate",
            f"a divisor of the batch size, {batch_size}",
        )
    for field in (
        *(f"{stage}.steps" for stage in TRAINED),
        "autoencoder.decompressor_layers",
        "data.num_train_texts",
        "evaluate.bertscore_layer",
        "autoregressive.length_penalty",
    ):
        require(flat[field] >= 0, field, "0 or more")
    for field in (
        *(f"{stage}.dropout" for stage in ("autoencoder", "autoregressive", "masked")),
        "autoencoder.masked_share",
        "autoencoder.token_mask_rate",
        "autoencoder.noised_share",
        "autoencoder.activation_noise_delta",
        "autoencoder.latent_dropout",
        "diffusion.self_condition_rate",
        "diffusion.source_dropout_rate",
    ):
        require(0 <= flat[field] <= 1, field, "between 0 and 1")
    for field in ("data.max_length", "data.max_source_length"):
        limit = config.encoder.max_positions
        require(3 <= flat[field] <= limit, field, f"from 3 to {limit}, the encoder's")
    for stage in SYSTEMS[config.system]:
        if "num_heads" not in config[stage]:
            continue  # it has no modules of its own
        width, heads = config.encoder.hidden_size, config[stage].num_heads
        require(
            heads >= 1 and width % heads == 0 and (width // heads) % 2 == 0,
            f"{stage}.num_heads",
            f"such that {width}, the encoder's width, divides into heads of even width",
        )
    require(
        config.autoencoder.compress or config.autoencoder.num_latents == config.data.max_length,
        "autoencoder.compress",
        f"True unless autoencoder.num_latents is data.max_length, {config.data.max_length}",
    )
    require(
        config.system != "cosmos"
        or not config.diffusion.get("pretrained")
        or bool(config.autoencoder.pretrained),
        "autoencoder.pretrained",
        "the run whose latents config.diffusion.pretrained learned, often the same one",
    )
    per_step = config.distillation.num_sampling_steps
    require(
        config.distillation.teacher_steps > 0 and config.distillation.teacher_steps % per_step == 0,
        "distillation.teacher_steps",
        f"a multiple of distillation.num_sampling_steps, {per_step}",
    )
    require(0 < config.autoregressive.top_p <= 1, "autoregressive.top_p", "above 0, at most 1")
    require(config.autoregressive.temperature > 0, "autoregressive.temperature", "positive")
    require(config.diffusion.pointer_temperature > 0, "diffusion.pointer_temperature", "positive")
    require(config.autoencoder.position_std > 0, "autoencoder.position_std", "positive")
    require(config.diffusion.num_layers % 2 == 0, "diffusion.num_layers", "even")
    require(config.diffusion.condition_layers >= 0, "diffusion.condition_layers", "0 or more")
    require(1e-3 <= config.diffusion.min_time < 1, "diffusion.min_time", "from 0.001 to below 1")
    require(config.diffusion.schedule_d > 0, "diffusion.schedule_d", "positive")
    require(config.dtype in ("float32", "bfloat16"), "dtype", "float32 or bfloat16")
    for field, choices in (
        ("diffusion.sampler", SAMPLERS),
        ("diffusion.time_grid", ("time", "logsnr")),
        ("diffusion.rescale", ("none", "threshold", "standardise")),
        ("autoregressive.decoding", ("nucleus", "greedy", "beam")),
        ("diffusion.answer", ("mean", "x0")),
        ("autoencoder.vocabulary", ("encoder", "corpus")),
        ("autoencoder.head_init", ("random", "regression")),
        ("evaluate.words", ("regex", "spacy")),
    ):
        require(flat[field] in choices, field, "one of " + ", ".join(choices))
    for stage in TRAINED:
        optimizer = config[stage].optimizer
        for name in ("learning_rate", "eps", "clip_norm"):
            require(optimizer[name] > 0, f"{stage}.optimizer.{name}", "positive")
        for name in ("final_learning_rate", "warmup_steps", "warmup_from", "weight_decay"):
            require(optimizer[name] >= 0, f"{stage}.optimizer.{name}", "0 or more")
        for name in ("b1", "b2"):
            require(0 <= optimizer[name] < 1, f"{stage}.optimizer.{name}", "from 0 to below 1")
        metrics = [f"validation_{name}" for name in METRICS[stage]]
        require(
            config[stage].best_metric in ("", *metrics),
            f"{stage}.best_metric",
            f"empty or one of {', '.join(metrics)}",
        )
        require(0 <= config[stage].ema_decay < 1, f"{stage}.ema_decay", "from 0 to below 1")
    for axis in ("data", "fsdp", "tensor"):
        size = config.mesh[axis]
        require(size == -1 or size >= 1, f"mesh.{axis}", "1 or more, or -1")
    rest = [axis for axis in ("data", "fsdp", "tensor") if config.mesh[axis] == -1]
    require(len(rest) <= 1, f"mesh.{rest[-1]}" if rest else "mesh", "1 or more: one -1 is enough")


def resolve(config: ConfigDict, encoder: Any, conditional: bool) -> ConfigDict:
    """The config with what the files say: the encoder's sizes and whether texts have sources.

    `encoder` is a `BertConfig`. UserError if the sizes found do not go with the other fields.
    """
    resolved = ConfigDict(config.to_dict())
    for field in dataclasses.fields(encoder):
        resolved.encoder[field.name] = getattr(encoder, field.name)
    resolved.data.conditional = conditional
    validate(resolved)
    df = resolved.diffusion
    if resolved.system == "cosmos" and df.pointer and not conditional:
        raise UserError(
            "config.diffusion.pointer is True, but the texts of config.data.source have no sources "
            "to point into"
        )
    return resolved


def conflict(old: ConfigDict, asked: ConfigDict, *, distilled: bool = True) -> str:
    """The first field that may not differ between a workdir's config and the one asked for.

    Empty if there is none. A run that is not `distilled` yet may be in any way.
    """
    free = FREE if distilled else (*FREE, "distillation.")
    there, here = (flatten(config) for config in (recorded(old), asked))
    for fields in (there, here):  # 0 layers are as many as the compressor has
        depth = "autoencoder.decompressor_layers"
        fields[depth] = fields[depth] or fields["autoencoder.num_layers"]
    for field in sorted(there.keys() | here.keys()):
        if there.get(field) != here.get(field) and not field.startswith(free):
            return f"{field} is {there.get(field)!r} there and {here.get(field)!r} here"
    return ""
