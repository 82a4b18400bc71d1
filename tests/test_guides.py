"""Changes of estimates against the equations, on a decompressor that is a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos_jax import guides

B, N, D, L, V = 2, 2, 4, 3, 5
MEAN, STD = 0.5, 2.0


class Linear:
    """Logits [B, L, V] as a linear function of the latents."""

    def __init__(self):
        self.kernel = jnp.array(np.random.default_rng(0).normal(size=(N * D, L * V)))

    def unstandardise(self, weights, x_0):
        return x_0 * STD + MEAN

    def decompress(self, weights, latents):
        return None, (latents.reshape(-1, N * D) @ self.kernel).reshape(-1, L, V)


@pytest.fixture(scope="module")
def x_0():
    return jnp.array(np.random.default_rng(1).normal(size=(B, N, D)), jnp.float32)


def test_log_probabilities_are_of_the_restored_latents(x_0):
    found = guides.log_probabilities(Linear(), {}, x_0)
    logits = (np.asarray(x_0) * STD + MEAN).reshape(B, -1) @ np.asarray(Linear().kernel)
    odds = np.exp(logits.reshape(B, L, V))
    np.testing.assert_allclose(np.exp(found), odds / odds.sum(axis=-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("weight", "sigma"), [(0.1, 0.5), (0.3, 1.0)])
def test_the_mean_moves_by_the_gradient(x_0, weight, sigma):
    """Equation (2) for -|x - a|^2 / 2, whose gradient is a - x."""
    refine = guides.guided(
        Linear(), {}, lambda x, _: -jnp.sum((x - 1) ** 2, axis=(1, 2)) / 2, weight
    )
    expected = x_0 + weight * sigma**2 * (1 - x_0)
    np.testing.assert_allclose(refine(x_0, jnp.float32(sigma)), expected, atol=1e-6)


def test_no_weight_moves_it_by_more_than_the_deviation(x_0):
    refine = guides.guided(Linear(), {}, lambda x, _: jnp.sum(x * jnp.arange(4.0), (1, 2)), 1e6)
    move = refine(x_0, jnp.float32(0.3)) - x_0
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(move**2, axis=(1, 2))), 0.3, rtol=1e-5)
    # In the direction of the gradient.
    np.testing.assert_allclose(move[..., 3] / move[..., 1], 3, rtol=1e-4)
    np.testing.assert_allclose(move[..., 0], 0, atol=1e-6)


def test_a_guide_may_ask_for_tokens(x_0):
    refine = guides.guided(Linear(), {}, lambda _, log_probs: log_probs[:, 1, 2], 1.0)
    before = guides.log_probabilities(Linear(), {}, x_0)[:, 1, 2]
    after = guides.log_probabilities(Linear(), {}, refine(x_0, jnp.float32(0.5)))[:, 1, 2]
    assert np.all(after > before)


def test_nothing_is_decoded_for_a_guide_of_latents(x_0):
    refine = guides.guided(Linear(), {}, lambda x, _: -jnp.sum(x**2, axis=(1, 2)), 1.0)
    compiled = jax.jit(refine).lower(x_0, jnp.float32(0.5)).compile()
    assert "dot" not in compiled.as_text()


def test_given_tokens_are_held(x_0):
    weights = {"head_index": jnp.arange(V)[::-1]}  # token ids are not rows
    likeliest = jnp.argmin(guides.log_probabilities(Linear(), {}, x_0), axis=-1)  # least at first
    ids = V - 1 - likeliest
    given = jnp.array([[True, False, True], [False, False, False]])
    refine = guides.holding(Linear(), weights, ids, given, steps=50)
    moved = refine(x_0, jnp.float32(1.0))
    found = jnp.argmax(guides.log_probabilities(Linear(), {}, moved), axis=-1)
    np.testing.assert_array_equal(found[0][given[0]], likeliest[0][given[0]])
    # Where nothing is given nothing is missing.
    np.testing.assert_array_equal(moved[1], x_0[1])


def test_a_step_is_the_shortest_way_to_the_zero_of_a_plane(x_0):
    """Equation (3) against a gradient by differences in double precision."""
    weights, ids = {"head_index": jnp.arange(V)}, jnp.full((B, L), 2)
    given = jnp.array([[True, True, False]] * B)
    found = guides.holding(Linear(), weights, ids, given, steps=1)(x_0, jnp.float32(1e3))
    kernel = np.asarray(Linear().kernel, np.float64)

    def shortfall(x):
        logits = ((x * STD + MEAN) @ kernel).reshape(L, V)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -log_probs[:2, 2].sum()

    for text, moved in zip(np.asarray(x_0, np.float64).reshape(B, -1), found, strict=True):
        basis = 1e-5 * np.eye(N * D)
        slope = np.array([shortfall(text + e) - shortfall(text - e) for e in basis]) / 2e-5
        expected = text - shortfall(text) * slope / (slope @ slope)
        np.testing.assert_allclose(np.ravel(moved), expected, atol=1e-4)


def test_no_step_is_longer_than_the_deviation(x_0):
    weights, ids = {"head_index": jnp.arange(V)}, jnp.zeros((B, L), jnp.int32)
    hold = guides.holding(Linear(), weights, ids, jnp.ones((B, L), bool), steps=1)
    move = hold(x_0, jnp.float32(1e-3)) - x_0
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(move**2, axis=(1, 2))), 1e-3, rtol=1e-2)
