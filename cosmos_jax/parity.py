"""Compares our modules with outputs of the authors' PyTorch code, number by number.

    python -m cosmos_jax.parity --fixture=DIR --out=FILE.npz

DIR holds `config.json` (sizes), checkpoints of the authors' code (`autoencoder.pth`,
`diffusion.pth`, `diffusion_conditional.pth`) and `expected.npz`, inputs and what that code
made of them. Every output is computed here from the inputs and the checkpoints alone, in
fp32. FILE gets the names of `expected.npz`: inputs as they are, outputs as computed. The
exit status is 0 only if every output is there and differs by no more than `TOLERANCE`.
"""

import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from cosmos_jax.diffusion import samplers
from cosmos_jax.diffusion.schedule import TanSchedule
from cosmos_jax.errors import UserError
from cosmos_jax.models import denoiser, layers, weights
from cosmos_jax.models.autoencoder import AutoencoderConfig, Compressor, Decompressor
from cosmos_jax.models.bert import Bert, BertConfig, from_torch_names
from cosmos_jax.models.denoiser import ConditionEncoder, Denoiser, DenoiserConfig
from cosmos_jax.models.torch_files import load_torch_file

TOLERANCE = 2e-5

# Parts of the authors' architecture that are constants of ours.
CONSTANTS = {
    "time_max_period": denoiser.TIME_MAX_PERIOD,
    "norm_eps": layers.NORM_EPS,
    "rope_theta": layers.ROPE_THETA,
}

INPUTS = (
    r"token_ids|token_mask|denoiser_x_t|denoiser_t|denoiser_self_cond|cond_states|cond_mask"
    r"|schedule_d[\d.]+_t|sampler_x_T|sampler_timesteps|sampler_noise"
)

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A directory of the form that the module's docstring describes."""

    directory: Path
    sizes: dict[str, Any]
    expected: dict[str, np.ndarray]

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {k: v for k, v in self.expected.items() if re.fullmatch(INPUTS, k)}

    @property
    def schedule_d(self) -> float:
        """The d of the schedule that the samplers follow."""
        d = self.sizes.get("schedule_d")
        if not isinstance(d, int | float) or d <= 0:
            raise UserError(f"{self.directory / 'config.json'}: schedule_d is {d!r}")
        return float(d)

    def checkpoint(self, name: str, *keys: str) -> dict[str, Any]:
        """A checkpoint, in which these keys have to be."""
        path = self.directory / name
        content = load_torch_file(path)
        missing = [key for key in keys if not isinstance(content, dict) or key not in content]
        if missing:
            raise UserError(f"{path}: no {missing[0]!r}; is this a checkpoint of Cosmos?")
        return content

    def size(self, name: str) -> int:
        """A field of `config.json`."""
        size = self.sizes.get(name)
        if type(size) is not int or size < 1:
            raise UserError(
                f"{self.directory / 'config.json'}: {name} is {size!r};"
                " it must be a positive integer"
            )
        return size


def read_fixture(directory: Path) -> Fixture:
    """Reads all of a fixture but its checkpoints; UserError if something is wrong with it."""
    config, expected = directory / "config.json", directory / "expected.npz"
    try:
        sizes = json.loads(config.read_bytes())
        with np.load(expected) as file:
            arrays = dict(file)
    except OSError as error:
        raise UserError(f"{directory}: is not a fixture: {error}") from error
    # A damaged archive can fail in any way that a zip file can.
    except Exception as error:
        raise UserError(f"{directory}: a file is damaged: {error}") from error
    if not isinstance(sizes, dict):
        raise UserError(f"{config}: is not a JSON object")
    for name, value in CONSTANTS.items():
        if sizes.get(name, value) != value:
            raise UserError(f"{config}: {name} is {sizes[name]}; only {value} is supported")
    return Fixture(directory, sizes, arrays)


# Each of these computes the outputs that belong to one checkpoint, or to none.


def autoencoder_outputs(fixture: Fixture) -> Arrays:
    given, size = fixture.inputs, fixture.size
    where = str(fixture.directory / "autoencoder.pth")
    statistics = [f"{kind}_{name}" for kind in ("encodings", "latent") for name in ("mean", "std")]
    checkpoint = fixture.checkpoint("autoencoder.pth", "encoder", "decoder", *statistics)
    tensors, decoder = checkpoint["encoder"], checkpoint["decoder"]

    def rows(table: str) -> int:
        name = f"{weights.BERT_PREFIX}embeddings.{table}.weight"
        if name not in tensors:
            raise UserError(f"{where}: no tensor {name!r}; it has to hold its text encoder")
        return len(tensors[name])

    bert = BertConfig(
        vocab_size=rows("word_embeddings"),
        hidden_size=size("hidden_size"),
        num_layers=size("bert_layers"),
        num_heads=size("num_heads"),
        intermediate_size=size("bert_intermediate"),
        max_positions=rows("position_embeddings"),
        type_vocab_size=rows("token_type_embeddings"),
    )
    config = AutoencoderConfig(
        width=size("hidden_size"),
        num_heads=size("num_heads"),
        num_layers=size("num_layers"),
        num_latents=size("num_latents"),
        max_length=size("max_length"),
        vocab_size=size("vocab_size"),
    )
    mask = given["token_mask"].astype(bool)
    bert_params = from_torch_names(bert, tensors, weights.BERT_PREFIX)
    states = _apply(where, Bert(bert), bert_params, given["token_ids"], mask)
    standardised = (states - checkpoint["encodings_mean"]) / checkpoint["encodings_std"]
    compressor = weights.convert(weights.compressor_table(config), tensors, where)
    latents = _apply(where, Compressor(config), compressor, standardised, mask)
    decompressor = weights.convert(weights.decompressor_table(config), decoder, where)
    mask_embedding = bert_params["word_embeddings"]["embedding"][size("mask_token_id")]
    last, logits = _apply(where, Decompressor(config), decompressor, latents, mask_embedding)
    return {
        "bert_last_hidden": states,
        "encodings_normalized": standardised,
        "latents": latents,
        "latents_normalized": (latents - checkpoint["latent_mean"]) / checkpoint["latent_std"],
        "decoder_last_hidden": last,
        "decoder_logits": logits,
    }


def denoiser_outputs(fixture: Fixture) -> Arrays:
    given, where = fixture.inputs, str(fixture.directory / "diffusion.pth")
    config = _denoiser_config(fixture)
    tensors = weights.ema_weights(fixture.checkpoint("diffusion.pth"), where)
    params = weights.convert(weights.denoiser_table(config), tensors, where)

    def denoise(x_t: Any, t: Any, self_condition: Any) -> jax.Array:
        return _apply(where, Denoiser(config), params, x_t, t, self_condition)

    x_t, t, estimate = (given[f"denoiser_{name}"] for name in ("x_t", "t", "self_cond"))
    outputs = {
        "denoiser_x0": denoise(x_t, t, estimate),
        "denoiser_x0_zero_self_cond": denoise(x_t, t, np.zeros_like(estimate)),
    }
    if {"sampler_x_T", "sampler_timesteps", "sampler_noise"} <= given.keys():
        schedule = TanSchedule(fixture.schedule_d)
        noise = jnp.asarray(given["sampler_noise"])
        for sampler in samplers.SAMPLERS:
            outputs[f"sampler_{sampler}"] = samplers.sample(
                denoise,
                schedule,
                sampler,
                jnp.asarray(given["sampler_x_T"]),
                jnp.asarray(given["sampler_timesteps"]),
                lambda i: noise[i],
            )
    return outputs


def conditional_denoiser_outputs(fixture: Fixture) -> Arrays:
    given, where = fixture.inputs, str(fixture.directory / "diffusion_conditional.pth")
    config = dataclasses.replace(
        _denoiser_config(fixture),
        condition_layers=fixture.size("condition_layers"),
        max_source_length=fixture.size("condition_max_length"),
    )
    tensors = weights.ema_weights(fixture.checkpoint("diffusion_conditional.pth"), where)
    encoder = weights.convert(weights.condition_encoder_table(config), tensors, where)
    params = weights.convert(weights.denoiser_table(config), tensors, where)
    mask = given["cond_mask"].astype(bool)
    condition = _apply(where, ConditionEncoder(config), encoder, given["cond_states"], mask)
    inputs = (given[f"denoiser_{name}"] for name in ("x_t", "t", "self_cond"))
    x_0 = _apply(where, Denoiser(config), params, *inputs, condition, mask)
    return {"cond_denoiser_x0": x_0}


def schedule_outputs(fixture: Fixture) -> Arrays:
    outputs = {}
    for name, times in fixture.inputs.items():
        if found := re.fullmatch(r"(schedule_d([\d.]+))_t", name):
            schedule, t = TanSchedule(float(found[2])), jnp.asarray(times)
            outputs[f"{found[1]}_alpha"] = schedule.alpha(t)
            outputs[f"{found[1]}_sigma"] = schedule.sigma(t)
            outputs[f"{found[1]}_beta"] = schedule.beta(t)
    return outputs


def _denoiser_config(fixture: Fixture) -> DenoiserConfig:
    return DenoiserConfig(
        width=fixture.size("hidden_size"),
        num_heads=fixture.size("num_heads"),
        num_layers=fixture.size("num_layers"),
        mlp_width=fixture.size("intermediate_size"),
    )


def _apply(where: str, module: nn.Module, params: Arrays, *inputs: Any) -> Any:
    try:
        return jax.jit(module.apply)({"params": params}, *inputs)
    except flax.errors.ScopeParamShapeError as error:
        raise UserError(f"{where}: does not have the sizes of config.json: {error}") from error


# (outputs, the checkpoint they come from, the inputs they need)
PARTS: tuple[tuple[Callable[[Fixture], Arrays], str | None, set[str]], ...] = (
    (autoencoder_outputs, "autoencoder.pth", {"token_ids", "token_mask"}),
    (
        denoiser_outputs,
        "diffusion.pth",
        {"denoiser_x_t", "denoiser_t", "denoiser_self_cond"},
    ),
    (
        conditional_denoiser_outputs,
        "diffusion_conditional.pth",
        {"denoiser_x_t", "denoiser_t", "denoiser_self_cond", "cond_states", "cond_mask"},
    ),
    (schedule_outputs, None, set()),
)


def compute(fixture: Fixture) -> dict[str, np.ndarray]:
    """Every output whose checkpoint and inputs the fixture has, by name.

    Raises:
      UserError: a checkpoint is damaged, or does not belong to `config.json`.
    """
    outputs: Arrays = {}
    # Accelerators round the factors of fp32 products unless told not to.
    with jax.default_matmul_precision("highest"):
        for part, checkpoint, inputs in PARTS:
            there = checkpoint is None or (fixture.directory / checkpoint).exists()
            if there and inputs <= fixture.inputs.keys():
                outputs |= part(fixture)
    return {name: np.asarray(value) for name, value in outputs.items()}


def compare(expected: Arrays, computed: Arrays) -> list[tuple[str, float, str]]:
    """(name, largest absolute difference, remark) of every expected output.

    The difference is infinite for an output that is missing or has another shape, and NaN
    where only one side is NaN.
    """
    rows = []
    for name, value in expected.items():
        if name not in computed:
            rows.append((name, np.inf, "not computed"))
        elif computed[name].shape != value.shape:
            remark = f"shape {computed[name].shape}, not {value.shape}"
            rows.append((name, np.inf, remark))
        else:
            same = np.isclose(computed[name], value, rtol=0, atol=0, equal_nan=True)
            with np.errstate(invalid="ignore"):
                difference = np.where(same, 0, np.abs(computed[name].astype(float) - value))
            rows.append((name, float(difference.max(initial=0)), ""))
    return rows


def _write(path: Path, arrays: Arrays) -> None:
    """Writes an `.npz` file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def run(directory: Path, out: Path) -> bool:
    """Computes, writes `out`, prints the table; True if every output agrees."""
    fixture = read_fixture(directory)
    computed = compute(fixture)
    expected = {k: v for k, v in fixture.expected.items() if k not in fixture.inputs}
    _write(out, fixture.inputs | {k: v for k, v in computed.items() if k in expected})
    rows = compare(expected, computed)
    width = max((len(name) for name, *_ in rows), default=0)
    print(f"{'output':{width}}  largest absolute difference")
    for name, difference, remark in rows:
        remark = remark or ("" if difference <= TOLERANCE else "too large")
        print(f"{name:{width}}  {difference:.2e}  {remark}".rstrip())
    agreeing = sum(difference <= TOLERANCE for _, difference, _ in rows)
    print(f"{agreeing} of {len(rows)} outputs agree to {TOLERANCE:g}")
    return agreeing == len(rows)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status: 0 agreement, 1 none, 2 unusable input."""
    options = flags.FlagValues()
    define = functools.partial(flags.DEFINE_string, default=None, flag_values=options)
    fixture = define("fixture", help="Directory to compare with.", required=True)
    out = define("out", help="File for what was computed (.npz).", required=True)
    try:
        if rest := options(argv)[1:]:
            raise UserError(f"unexpected argument {rest[0]!r}")
        return 0 if run(Path(fixture.value), Path(out.value)) else 1
    except flags.Error as error:
        print(
            f"error: {error}",
            "usage: python -m cosmos_jax.parity --fixture=DIR --out=FILE.npz",
            sep="\n",
            file=sys.stderr,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
