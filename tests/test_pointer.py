"""The pointer against loops by hand: its equations, its targets, the window that is read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import random_params

from cosmos_jax.models import pointer
from cosmos_jax.models.denoiser import Denoiser, DenoiserConfig, keys_and_values

B, N, L, S, D, H = 3, 4, 7, 6, 16, 2
CONFIG = DenoiserConfig(D, H, num_layers=2, max_source_length=S, pointer_length=L)
MASK = np.arange(S) < np.array([6, 3, 1])[:, None]


def random(seed: int, *sizes: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=sizes).astype(np.float32)


@functools.cache
def denoiser():
    inputs = [random(1, B, N, D), np.array([0.1, 0.5, 1.0], np.float32), random(2, B, N, D)]
    inputs += [random(3, B, S, D), MASK]
    module = Denoiser(CONFIG)
    return module, random_params(module, *inputs)["params"], inputs


def by_heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], H, D // H)


def test_diagonals_are_summed_to_the_end_of_the_source():
    x = random(0, B, L, S)
    expected = [
        [sum(x[b, j, p + j] for j in range(L) if p + j < S) for p in range(S)] for b in range(B)
    ]
    np.testing.assert_allclose(jax.jit(pointer.diagonal_sums)(x), expected, atol=1e-5)


def test_a_window_is_the_source_from_where_it_begins():
    shares, source = random(0, B, S), random(1, B, S, D)
    found = jax.jit(pointer.windows, static_argnums=1)(shares, L) @ source
    for b in range(B):
        for j in range(L):
            wanted = sum((shares[b, p] * source[b, p + j] for p in range(S - j)), start=np.zeros(D))
            np.testing.assert_allclose(found[b, j], wanted, atol=1e-5)


def test_targets_are_where_text_and_source_agree():
    cls, sep = 101, 102
    text = np.array([[cls, 5, 6, 7, sep, 0, 0]] * B)
    source = np.array(
        [
            [cls, 9, 5, 6, 7, sep],  # from its second token on
            [cls, 5, 8, 6, sep, 0],  # one token here, one there
            [cls, 9, 9, sep, 0, 0],  # nowhere, though [SEP] is where it is in the window
        ]
    )
    found = jax.jit(pointer.targets)(text, text > 0, source, source > 0)
    np.testing.assert_allclose(found[0], np.array([0, 81, 0, 0, 0, 0]) / 82)
    np.testing.assert_allclose(found[1], np.array([1, 1, 0, 0, 0, 0]) / 3)
    np.testing.assert_array_equal(found[2], 0)


def test_the_loss_is_the_crossentropy_with_the_targets():
    shares = np.array([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    wanted = np.array([[0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        found = pointer.loss(jnp.log(shares), jnp.array(wanted))
    np.testing.assert_allclose(found, [-0.9 * np.log(0.25), 0], rtol=1e-6)


def test_the_pointer_is_what_its_equations_say():
    _, params, inputs = denoiser()
    x_t, _, estimate, condition, _ = inputs
    time = random(4, B, D)
    of_keys, of_pointer = params["pointer_keys"], params["pointer"]

    keys = by_heads(condition @ of_keys["key"]["kernel"])
    hidden = condition @ of_keys["up"]["kernel"] + of_keys["up"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    prior = (hidden @ of_keys["prior"]["kernel"] + of_keys["prior"]["bias"])[..., 0]
    found_keys, found_prior = pointer.PointerKeys(H, jnp.float32).apply(
        {"params": of_keys}, condition
    )
    np.testing.assert_allclose(found_keys, keys, atol=1e-5)
    np.testing.assert_allclose(found_prior, prior, atol=1e-4)

    gains = np.exp(time @ of_pointer["gains"]["kernel"] + of_pointer["gains"]["bias"])
    noised = by_heads(x_t @ of_pointer["noised"]["kernel"])
    guessed = by_heads(estimate @ of_pointer["estimate"]["kernel"])
    found = pointer.Pointer(H, L, jnp.float32).apply(
        {"params": of_pointer}, x_t, estimate, time, keys, prior, MASK
    )
    for b in range(B):
        evidence = gains[b, :H, None] * noised[b] + gains[b, H:, None] * guessed[b]
        seen = np.einsum("hnl,nhk->lhk", of_pointer["places"], evidence)
        length = MASK[b].sum()
        scores = [
            prior[b, p]
            + sum((seen[j] * keys[b, p + j]).sum() for j in range(L) if p + j < length) / D**0.5
            for p in range(length)
        ]
        shares = np.exp(scores - np.max(scores))
        np.testing.assert_allclose(
            np.exp(found[b, :length]), shares / shares.sum(), rtol=1e-3, atol=1e-5
        )
        np.testing.assert_array_equal(np.exp(found[b, length:]), 0)


def test_at_first_it_points_everywhere():
    module, _, inputs = denoiser()
    params = module.init(jax.random.key(0), *inputs)["params"]
    found = np.exp(module.apply({"params": params}, *inputs, method="point"))
    np.testing.assert_allclose(found, MASK / MASK.sum(axis=1, keepdims=True), rtol=1e-5)


def with_window_behind(shares: np.ndarray) -> jax.Array:
    """What a denoiser without a pointer answers to the source with that window behind it."""
    _, params, (*rest, source, mask) = denoiser()
    window = np.asarray(pointer.windows(shares, L)) @ source + params["slots"]
    plain = Denoiser(dataclasses.replace(CONFIG, pointer_length=0, max_source_length=S + L))
    others = {k: v for k, v in params.items() if k not in ("pointer", "pointer_keys", "slots")}
    longer = np.concatenate([source, window], axis=1)
    seen = np.concatenate([mask, np.ones((B, L), bool)], axis=1)
    return plain.apply({"params": others}, *rest, longer, seen)


def test_cross_attention_reads_the_window_beside_the_source():
    module, params, inputs = denoiser()
    shares = np.exp(module.apply({"params": params}, *inputs, method="point"))
    found = module.apply({"params": params}, *inputs)
    np.testing.assert_allclose(found, with_window_behind(shares), atol=1e-4)


def test_a_low_temperature_keeps_to_the_likeliest():
    """Near 0 the window is the one from the position of the greatest share."""
    module, params, inputs = denoiser()
    log_shares = module.apply({"params": params}, *inputs, method="point")
    one = np.eye(S, dtype=np.float32)[np.asarray(log_shares).argmax(axis=1)]
    cold = Denoiser(dataclasses.replace(CONFIG, pointer_temperature=1e-4))
    found = cold.apply({"params": params}, *inputs)
    np.testing.assert_allclose(found, with_window_behind(one), atol=1e-4)
    assert np.abs(found - module.apply({"params": params}, *inputs)).max() > 0.01


def test_a_condition_read_once_serves_every_step():
    module, params, (*rest, source, mask) = denoiser()
    read = keys_and_values(module, params, source)
    for method in (None, "point"):
        apply = functools.partial(module.apply, {"params": params}, method=method)
        np.testing.assert_allclose(apply(*rest, read, mask), apply(*rest, source, mask), atol=1e-5)


def test_products_in_bfloat16():
    module, *given = denoiser()
    params, (*rest, source, mask) = jax.tree.map(jnp.asarray, given)
    rounded = Denoiser(CONFIG, jnp.bfloat16)
    found = rounded.apply({"params": params}, *rest, source, mask)
    assert found.dtype == jnp.float32
    error = np.abs(found - module.apply({"params": params}, *rest, source, mask)).max()
    assert 0 < error < 0.3
    read = keys_and_values(rounded, params, source)
    assert read.of_block[0][0].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        rounded.apply({"params": params}, *rest, read, mask), found, atol=0.05
    )


@pytest.mark.parametrize("part", ["noised", "estimate"])
def test_it_learns_where_a_text_begins(part):
    """From latents that are the states of a window, under noise, with the error of a step."""
    num_texts, length, source_length, width = 64, 4, 10, 8
    module = pointer.Pointer(2, length, jnp.float32)
    keys_module = pointer.PointerKeys(2, jnp.float32)
    generator = np.random.default_rng(0)

    def batch():
        source = generator.normal(size=(num_texts, source_length, width)).astype(np.float32)
        begin = generator.integers(0, source_length - length + 1, num_texts)
        text = np.stack([s[p : p + length] for s, p in zip(source, begin, strict=True)])
        text = text + generator.normal(size=text.shape).astype(np.float32)
        return source, text, np.eye(source_length, dtype=np.float32)[begin]

    mask = jnp.ones((num_texts, source_length), bool)
    time = jnp.ones((num_texts, width))

    def shares(params, source, text):
        given = {"noised": jnp.zeros_like(text), "estimate": jnp.zeros_like(text), part: text}
        read = keys_module.apply({"params": params["keys"]}, source)
        return module.apply(
            {"params": params["pointer"]}, given["noised"], given["estimate"], time, *read, mask
        )

    source, text, wanted = batch()
    keys_params = keys_module.init(jax.random.key(0), source)
    read = keys_module.apply(keys_params, source)
    params = {
        "keys": keys_params["params"],
        "pointer": module.init(jax.random.key(1), text, text, time, *read, mask)["params"],
    }

    transform = optax.adam(1e-2)

    @jax.jit
    def step(params, state, source, text, wanted):
        def objective(params):
            return jnp.mean(pointer.loss(shares(params, source, text), wanted))

        updates, state = transform.update(jax.grad(objective)(params), state)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    for _ in range(300):
        params, state = step(params, state, *batch())
    source, text, wanted = batch()
    found = shares(params, source, text)
    assert np.mean(found.argmax(axis=1) == wanted.argmax(axis=1)) > 0.8
