"""Configuration: every bad field is refused by its name; what a run may change and may not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import config_checks
from cosmos_jax.errors import UserError

FIELDS = config_lib.flatten(config_lib.base())
STAGES = ("autoencoder", "diffusion", "distillation", "autoregressive", "masked")
WITH_HEADS = ("autoencoder", "diffusion", "autoregressive", "masked")


def changed(**fields):
    """The base configuration with `section__name=value`."""
    config = config_lib.base()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


def with_field(field, value):
    return changed(**{field.replace(".", "__"): value})


def test_the_base_is_the_paper_and_valid():
    config_checks.validate(config_lib.base())
    recipe = {
        "autoencoder.num_latents": 16,
        "autoencoder.num_layers": 12,
        "autoencoder.batch_size": 512,
        "autoencoder.token_mask_rate": 0.3,
        "autoencoder.activation_noise_delta": 0.7,
        "autoencoder.latent_dropout": 0.4,
        "autoencoder.optimizer.final_learning_rate": 1e-4,
        "autoencoder.optimizer.clip_norm": 10.0,
        "diffusion.steps": 200_000,
        "diffusion.schedule_d": 5.0,
        "diffusion.ema_decay": 0.9999,
        "diffusion.self_condition_rate": 0.5,
        "diffusion.min_time": 0.05,
        "diffusion.answer": "mean",
        "diffusion.optimizer.clip_norm": 1.0,
        "diffusion.optimizer.b2": 0.98,
        "diffusion.optimizer.eps": 1e-6,
        "encoder.hidden_size": 768,
    }
    assert {field: FIELDS[field] for field in recipe} == recipe


POSITIVE = (
    "data.max_length",
    "data.max_source_length",
    "autoencoder.num_latents",
    "diffusion.num_sampling_steps",
    "generate.num_texts",
    "generate.batch_size",
    "evaluate.num_texts",
    "evaluate.block_size",
    "evaluate.seeds",
    *(
        f"{stage}.{name}"
        for stage in STAGES
        for name in (
            "batch_size",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
        )
    ),
    *(
        f"{stage}.{name}"
        for stage in WITH_HEADS
        for name in ("num_layers", "num_heads", "statistics_texts")
    ),
)
SHARES = (
    "autoencoder.dropout",
    "autoencoder.masked_share",
    "autoencoder.token_mask_rate",
    "autoencoder.noised_share",
    "autoencoder.activation_noise_delta",
    "autoencoder.latent_dropout",
    "diffusion.self_condition_rate",
    "diffusion.source_dropout_rate",
)
BAD = [
    *((field, value) for field in POSITIVE for value in (0, -3)),
    *((field, value) for field in SHARES for value in (-0.1, 1.1, float("nan"))),
    *((f"{stage}.steps", -1) for stage in STAGES),
    *((f"{stage}.accumulate", parts) for stage in STAGES for parts in (0, -2, 3)),  # of 512
    *((f"{stage}.num_heads", 7) for stage in WITH_HEADS),  # does not divide 768
    *((f"{stage}.num_heads", 256) for stage in WITH_HEADS),  # heads of width 3 cannot rotate
    ("system", "diffusion"),
    ("autoencoder.decompressor_layers", -1),
    ("distillation.steps", -1),
    ("distillation.num_sampling_steps", 0),
    ("distillation.teacher_steps", 25),
    ("distillation.teacher_steps", 0),
    ("distillation.best_metric", "validation_self_conditioned_loss"),
    ("diffusion.condition_layers", -1),
    ("autoencoder.compress", False),  # 16 latents for 128 tokens
    *(("diffusion.pointer_temperature", value) for value in (0.0, -1.0)),
    ("diffusion.time_grid", "cosine"),
    ("diffusion.rescale", "clip"),
    ("autoregressive.decoding", "random"),
    ("autoregressive.temperature", 0.0),
    *(("autoregressive.top_p", value) for value in (0.0, 1.1)),
    ("autoregressive.num_beams", 0),
    ("autoregressive.length_penalty", -1.0),
    ("masked.num_sampling_steps", 0),
    *((f"{stage}.ema_decay", 1.0) for stage in STAGES),
    *((f"{stage}.best_metric", "loss") for stage in STAGES),
    ("diffusion.best_metric", "validation_exact_match"),
    ("evaluate.words", "letters"),
    ("evaluate.bertscore_layer", -1),
    *(
        (f"{stage}.optimizer.{name}", value)
        for stage in STAGES
        for name, value in (
            ("learning_rate", 0.0),
            ("final_learning_rate", -1e-4),
            ("warmup_steps", -1),
            ("warmup_from", -1e-8),
            ("weight_decay", -0.1),
            ("b1", 1.0),
            ("b2", 1.5),
            ("eps", 0.0),
            ("clip_norm", 0.0),
        )
    ),
    ("data.max_length", 2),  # [CLS], [SEP] and no token between them
    ("data.max_length", 513),
    ("data.max_source_length", 1_024),
    ("diffusion.num_layers", 5),  # long skips pair the blocks
    ("diffusion.min_time", 0.0),
    ("diffusion.min_time", 1.0),
    ("diffusion.schedule_d", 0.0),
    ("diffusion.sampler", "euler"),
    ("diffusion.answer", "x_0"),
    ("autoencoder.vocabulary", "words"),
    ("dtype", "float16"),
    ("mesh.data", 0),
    ("mesh.fsdp", -2),
    ("mesh.tensor", -1),  # a second -1
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_bad_field_is_refused_by_its_name_and_value(field, value):
    config, section = with_field(field, value), field.split(".")[0]
    if section in config_lib.SYSTEMS:  # the width of heads matters to the system that has them
        config.system = section
    with pytest.raises(UserError) as error:
        config_checks.validate(config)
    message = str(error.value)
    assert message.startswith(f"config.{field} is {value!r}")
    assert "\n" not in message


@given(
    steps=st.integers(0, 10**9),
    share=st.floats(0, 1),
    time=st.floats(1e-3, 0.999),
    length=st.integers(3, 512),
    half_layers=st.integers(1, 20),
    heads=st.sampled_from((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 384)),
)
def test_good_fields_pass(steps, share, time, length, half_layers, heads):
    config_checks.validate(
        changed(
            diffusion__steps=steps,
            autoencoder__latent_dropout=share,
            diffusion__min_time=time,
            data__max_length=length,
            diffusion__num_layers=2 * half_layers,
            diffusion__num_heads=heads,
        )
    )


def test_a_file_keeps_every_field_and_type():
    config = changed(seed=7, diffusion__schedule_d=9.0, data__source="jsonl:texts with ümlauts")
    text = config_lib.to_json(config)
    back = config_lib.from_json(text)
    assert config_lib.flatten(back) == config_lib.flatten(config)
    for field, value in config_lib.flatten(config).items():
        assert type(config_lib.flatten(back)[field]) is type(value), field
    assert json.loads(text)["diffusion"]["schedule_d"] == 9.0
    assert text.endswith("}\n")


def other_value(value):
    if isinstance(value, bool):
        return not value
    return value + ("x" if isinstance(value, str) else 1)


MAY_CHANGE = {
    "data.directory",
    *(
        f"{stage}.{name}"
        for stage in STAGES
        for name in (
            *("steps", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"),
            *("best_metric", "accumulate", "remat"),
        )
    ),
    *(
        f"diffusion.{name}"
        for name in (
            *("sampler", "num_sampling_steps", "min_time", "time_grid", "rescale", "answer"),
            "guidance",
            "pointer_temperature",
        )
    ),
    *(
        f"autoregressive.{name}"
        for name in ("decoding", "temperature", "top_p", "num_beams", "length_penalty")
    ),
    "masked.num_sampling_steps",
    *(field for field in FIELDS if field.startswith(("generate.", "evaluate.", "mesh."))),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_run_may_change_only_what_keeps_its_training_usable(field):
    value = other_value(FIELDS[field])
    message = config_checks.conflict(config_lib.base(), with_field(field, value))
    if field in MAY_CHANGE:
        assert message == ""
    else:
        assert message == f"{field} is {FIELDS[field]!r} there and {value!r} here"


def test_a_field_of_another_version_is_a_conflict():
    recorded = config_lib.base()
    recorded.unlock()
    recorded.diffusion.forgotten = 3
    assert config_checks.conflict(recorded, config_lib.base()).startswith(
        "diffusion.forgotten is 3"
    )
    assert "diffusion.forgotten" in config_checks.conflict(config_lib.base(), recorded)


def test_a_field_that_an_older_config_lacks_has_its_default():
    recorded = config_lib.base()
    with recorded.unlocked():
        del recorded["system"]
    assert config_checks.conflict(recorded, config_lib.base()) == ""
    assert config_checks.conflict(recorded, with_field("system", "masked")).startswith("system is")


def test_a_run_that_is_not_distilled_yet_may_be_in_any_way():
    def conflict(field, value):
        asked = with_field(field, value)
        return config_checks.conflict(config_lib.base(), asked, distilled=False)

    assert conflict("distillation.batch_size", 7) == ""
    assert conflict("autoencoder.pretrained", "elsewhere").startswith("autoencoder.pretrained is")
    assert conflict("diffusion.schedule_d", 9.0).startswith("diffusion.schedule_d is 5.0 there")


def test_no_layers_of_the_decompressor_are_as_many_as_the_compressor_has():
    all_of_them, none = (with_field("autoencoder.decompressor_layers", n) for n in (12, 0))
    assert config_checks.conflict(all_of_them, none) == ""
    assert "is 12 there and 3 here" in config_checks.conflict(none, config_lib.base())


def test_a_run_of_before_there_were_these_fields_goes_on():
    content = config_lib.base().to_dict()
    del content["distillation"], content["autoencoder"]["decompressor_layers"]
    content["diffusion"]["distilled_steps"] = 0
    found = config_lib.recorded(content)
    assert config_lib.training(found) == ("autoencoder", "diffusion")
    assert found.autoencoder.decompressor_layers == 0
    assert config_checks.conflict(ConfigDict(content), found) == ""


def test_a_config_does_not_conflict_with_its_file():
    config = config_lib.base()
    assert config_checks.conflict(config_lib.from_json(config_lib.to_json(config)), config) == ""
