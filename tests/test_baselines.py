"""The systems that Cosmos is compared with, through the stages of a run from end to end."""

import json

import pytest
import tiny as tiny_lib

from cosmos_jax import config as config_lib
from cosmos_jax.describe import describe
from cosmos_jax.errors import UserError
from cosmos_jax.runner import run_stages

TOKEN_LEVEL = {
    "autoencoder__compress": False,
    "autoencoder__num_latents": 12,
    "autoencoder__steps": 40,
}


# What a source changes is tested system by system; that a run carries it, with two of them.
@pytest.mark.parametrize(
    ("fields", "conditional"),
    [
        ({"system": "autoregressive"}, True),
        ({"system": "masked"}, False),
        (TOKEN_LEVEL, True),
    ],
)
def test_a_run_from_end_to_end(tiny, tmp_path, capsys, fields, conditional):
    config = tiny.config(tiny.pairs if conditional else None, **fields)
    run_stages(config, tmp_path)
    samples = tiny_lib.read_rows(tmp_path / "samples.jsonl")
    assert len(samples) == 6
    assert all(isinstance(sample["text"], str) for sample in samples)
    assert ("reference" in samples[0]) == conditional
    metrics = tiny_lib.read_rows(tmp_path / "metrics.jsonl")
    for stage in config_lib.training(config):
        losses = [
            m["validation_loss"]
            for m in metrics
            if m.get("stage") == stage and "validation_loss" in m
        ]
        assert losses[-1] < losses[0]
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(evaluation["held_out"]) == set(config_lib.training(config))
    assert ("latent_frechet" in evaluation["done"]) == (config.system == "cosmos")
    assert "diversity" in evaluation["scores"]
    assert (tmp_path / "report.html").exists()
    assert f"trained for {config[config_lib.training(config)[-1]].steps}" in capsys.readouterr().out

    run_stages(config, tmp_path)  # nothing is left to do
    assert tiny_lib.read_rows(tmp_path / "metrics.jsonl") == metrics
    assert tiny_lib.read_rows(tmp_path / "samples.jsonl") == samples


@pytest.mark.parametrize("system", ["autoregressive", "masked"])
def test_describe_counts_what_is_trained(tiny, system):
    found = describe(tiny.pairs_config(system=system))
    (part,) = set(found["parameters"]) - {"text_encoder_frozen"}
    size, state = found["parameters"][part], found["bytes_per_device"][system]
    assert state["params"] == state["ema"] == 4 * size
    # 2 operations for each weight and token, three passes; a table of words is not multiplied, and
    # what reads the source does so for its 10 tokens.
    weights = size - 29_000 * 768
    assert found["flops"][f"{system}_training_step"] > 3 * 2 * weights * 8 * 10
    assert found["flops"]["generated_text"] > 0


def test_a_stage_of_another_system_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=r"--stage=diffusion: .* 'masked' are masked, gen"):
        run_stages(tiny.config(system="masked"), tmp_path / "run", "diffusion")


def test_a_workdir_belongs_to_one_system(tiny, finished):
    with pytest.raises(UserError, match="system is 'cosmos' there and 'masked' here"):
        run_stages(tiny.config(system="masked"), finished)
