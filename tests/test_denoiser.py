"""The denoiser and its condition encoder: sizes, masks, and layers by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from cosmos_jax.models.denoiser import ConditionEncoder, Denoiser, DenoiserConfig, time_features
from cosmos_jax.models.layers import SwiGLU, attend, linear, rotate

PAPER = DenoiserConfig(width=768, num_heads=12, num_layers=12)
PAPER_CONDITIONAL = DenoiserConfig(
    width=768, num_heads=12, num_layers=12, condition_layers=12, max_source_length=512
)
TINY = DenoiserConfig(width=16, num_heads=2, num_layers=4, condition_layers=2, max_source_length=6)


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def sizes(module, *inputs) -> dict[str, int]:
    """Parameters of each direct part of a module."""
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
        for name, part in params.items()
    }


def test_unconditional_denoiser_has_the_size_of_the_release():
    latents = shape(1, 16, 768)
    parts = sizes(Denoiser(PAPER), latents, shape(1), latents)
    assert sum(parts.values()) == 129_801_216


def test_conditional_denoiser_has_the_size_of_the_release():
    latents, source = shape(1, 16, 768), shape(1, 512, 768)
    mask = shape(1, 512, dtype=bool)
    denoiser = Denoiser(PAPER_CONDITIONAL)
    parts = sizes(denoiser, latents, shape(1), latents, source, mask)
    assert sum(parts.values()) == 158_112_768


def test_condition_encoder_has_the_size_of_the_release():
    source, mask = shape(1, 512, 768), shape(1, 512, dtype=bool)
    parts = sizes(ConditionEncoder(PAPER_CONDITIONAL), source, mask)
    positions = parts.pop("positions")
    assert positions == 393_216  # These are counted apart.
    assert sum(parts.values()) == 113_265_408


def random(seed: int, *sizes: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=sizes).astype(np.float32)


MASK = np.arange(6) < np.array([6, 3, 1])[:, None]


@functools.cache
def condition_encoder():
    module = ConditionEncoder(TINY)
    source = random(0, 3, 6, 16)
    params = random_params(module, source, MASK)
    return jax.jit(functools.partial(module.apply, params)), source


@functools.cache
def denoiser(conditional: bool):
    """(function of the inputs, inputs) with weights that are all random."""
    inputs = [random(1, 3, 5, 16), np.array([0.1, 0.5, 1.0], np.float32), random(2, 3, 5, 16)]
    if conditional:
        inputs += [random(3, 3, 6, 16), MASK]
    module = Denoiser(TINY)
    params = random_params(module, *inputs)
    return jax.jit(functools.partial(module.apply, params)), inputs


@pytest.mark.parametrize("conditional", [False, True])
def test_rows_are_independent_and_every_input_matters(conditional):
    apply, inputs = denoiser(conditional)
    x_0 = apply(*inputs)
    assert x_0.shape == (3, 5, 16)
    assert x_0.dtype == jnp.float32
    for i in range(4 if conditional else 3):
        other = [array.copy() for array in inputs]
        other[i][1] += 0.3
        changed = apply(*other)
        np.testing.assert_array_equal(changed[0::2], x_0[0::2])
        assert np.abs(changed[1] - x_0[1]).max() > 1e-3


def test_padding_of_the_source_is_never_seen():
    apply, inputs = denoiser(True)
    x_0 = apply(*inputs)
    *rest, source, mask = inputs
    np.testing.assert_array_equal(apply(*rest, np.where(mask[..., None], source, 1e3), mask), x_0)
    shorter = apply(*rest, source[:, :3], mask[:, :3])
    np.testing.assert_allclose(shorter[1:], x_0[1:], atol=1e-5)


def test_condition_encoder_never_sees_padding_or_neighbours():
    apply, source = condition_encoder()
    condition = apply(source, MASK)
    assert condition.dtype == jnp.float32
    other = np.where(MASK[..., None], source, 1e3)
    other[1, :3] += 1
    changed = apply(other, MASK)
    for row in (0, 2):
        np.testing.assert_array_equal(changed[row][MASK[row]], condition[row][MASK[row]])
    assert np.abs(changed[1] - condition[1])[:3].max() > 1e-3
    shorter = apply(source[:, :3], MASK[:, :3])
    np.testing.assert_allclose(shorter[1, :3], condition[1, :3], atol=1e-5)


def test_without_layers_the_condition_is_the_source_normed():
    module = ConditionEncoder(dataclasses.replace(TINY, condition_layers=0))
    source = random(0, 3, 6, 16)
    params = random_params(module, source, MASK)
    assert set(params["params"]) == {"norm_out", "positions"}
    rms = np.sqrt((source**2).mean(axis=-1, keepdims=True))
    expected = source / rms * params["params"]["norm_out"]["gain"] + params["params"]["positions"]
    np.testing.assert_allclose(module.apply(params, source, MASK), expected, atol=1e-5)


def test_bfloat16_answers_in_float32():
    apply, inputs = denoiser(True)
    params = apply.__wrapped__.args[0]
    rounded = jax.jit(Denoiser(TINY, jnp.bfloat16).apply)(params, *inputs)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - apply(*inputs)).max()
    assert 0 < error < 0.3


def test_positions_are_added_to_the_latents():
    plain, inputs = denoiser(True)
    module = Denoiser(dataclasses.replace(TINY, latent_positions=True))
    params = dict(plain.__wrapped__.args[0]["params"])
    positions = random(9, 5, 16)
    x_t, *rest = inputs
    found = jax.jit(module.apply)({"params": params | {"positions": positions}}, x_t, *rest)
    np.testing.assert_allclose(found, plain(x_t + positions, *rest), atol=1e-5)
    started = jax.jit(module.init)(jax.random.key(0), x_t, *rest)["params"]["positions"]
    assert started.shape == (5, 16)
    assert 0.7 < started.std() < 1.3


def test_gains_scale_the_estimate_and_let_the_noised_latents_through():
    plain, inputs = denoiser(True)
    module = Denoiser(dataclasses.replace(TINY, time_gains=True))
    params = dict(plain.__wrapped__.args[0]["params"])
    x_t, t, *_ = inputs
    apply = jax.jit(module.apply)
    gains = {"kernel": np.zeros((16, 32), np.float32), "bias": np.zeros(32, np.float32)}
    found = apply({"params": params | {"time_gains": gains}}, *inputs)
    np.testing.assert_allclose(found, plain(*inputs), atol=1e-5)

    def silu(x):
        return x / (1 + np.exp(-x))

    gains = {"kernel": random(10, 16, 32), "bias": random(11, 32)}
    time = np.asarray(time_features(jnp.asarray(t), 16), float)
    for name, between in (("time_up", lambda x: x), ("time_down", silu)):
        time = between(time) @ params[name]["kernel"] + params[name]["bias"]
    gain, skip = np.split((silu(time) @ gains["kernel"] + gains["bias"])[:, None], 2, axis=-1)
    found = apply({"params": params | {"time_gains": gains}}, *inputs)
    np.testing.assert_allclose(found, plain(*inputs) * (1 + gain) + x_t * skip, atol=1e-4)
    started = jax.jit(module.init)(jax.random.key(0), *inputs)["params"]["time_gains"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(started))


def test_skips_join_first_and_last_blocks():
    """In four blocks that do nothing but add a number, the sum tells what was stored when."""
    module = Denoiser(TINY)
    x = random(4, 1, 5, 16)
    t, zeros = np.zeros(1, np.float32), np.zeros_like(x)
    params = jax.eval_shape(module.init, jax.random.key(0), x, t, zeros)["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    params["norm_out"]["gain"] += 1
    added = np.array([1.0, 10.0, 100.0, 1000.0])
    for i, value in enumerate(added):
        params[f"time_{i}"]["bias"] += value
    # Stored: x and x + 1. Then x + 11 takes back x + 1, and at last x.
    before = x.astype(float) + 1 + 10
    before = before + (x + 1) + 100
    before = before + x + 1000
    rms = np.sqrt((before**2).mean(axis=-1, keepdims=True))
    actual = jax.jit(module.apply)({"params": params}, x, t, zeros)
    np.testing.assert_allclose(actual, before / rms, rtol=1e-5)


# Layers, recomputed in NumPy in double precision.


def test_rotation_is_that_of_complex_numbers():
    x = random(5, 2, 7, 3, 8)
    pairs = x[..., :4] + 1j * x[..., 4:].astype(complex)
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    angles = np.arange(7)[:, None] * frequencies
    turned = pairs * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(
        rotate(x), np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5
    )


def test_rotated_products_depend_on_distance_alone():
    query, key = random(6, 8), random(7, 8)
    queries = rotate(np.broadcast_to(query, (1, 9, 1, 8)))[0, :, 0]
    keys = rotate(np.broadcast_to(key, (1, 9, 1, 8)))[0, :, 0]
    products = np.asarray(queries @ keys.T)
    for distance in range(-8, 9):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(products[0]) > 0.1


def test_time_features():
    t = np.array([0.0, 0.3, 1.0])
    expected = np.zeros((3, 6))
    for i in range(3):
        frequency = math.exp(-math.log(10) * i / 3)
        expected[:, i] = np.cos(t * frequency)
        expected[:, 3 + i] = np.sin(t * frequency)
    np.testing.assert_allclose(time_features(jnp.asarray(t), 6), expected, atol=1e-6)


def test_swiglu():
    x = random(8, 3, 4)
    module = SwiGLU(6, jnp.float32)
    params = random_params(module, x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    assert all(set(part) == {"kernel"} for part in p.values())
    gate = x @ p["gate"]["kernel"]
    inner = gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"])
    np.testing.assert_allclose(module.apply(params, x), inner @ p["down"]["kernel"], atol=1e-5)


def test_attend_agrees_with_torch():
    torch = pytest.importorskip("torch", reason="PyTorch's attention is the reference")
    query, key, value = random(9, 3, 4, 2, 8), random(10, 3, 6, 2, 8), random(11, 3, 6, 2, 8)
    heads_first = [torch.tensor(x).transpose(1, 2) for x in (query, key, value)]
    for mask in (None, MASK):
        expected = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, attn_mask=None if mask is None else torch.tensor(mask)[:, None, None]
        )
        expected = expected.transpose(1, 2).reshape(3, 4, 16).numpy()
        np.testing.assert_allclose(attend(query, key, value, mask), expected, atol=1e-5)


def test_dense_layers_start_as_in_torch():
    layer = linear(400, 300, dtype=jnp.float32, name="layer", use_bias=True)
    params = layer.init(jax.random.key(0), np.zeros((1, 300), np.float32))["params"]
    bound = 300**-0.5
    for values in params.values():
        assert np.abs(values).max() <= bound
        np.testing.assert_allclose(np.std(values), bound / math.sqrt(3), rtol=0.1)
        assert abs(np.mean(values)) < 0.1 * bound
