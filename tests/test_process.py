"""The noising process and the drawing of times, against densities written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cosmos_jax.diffusion import process, time_sampling
from cosmos_jax.diffusion.schedule import TanSchedule

SCHEDULE = TanSchedule(5.0)
B, N, D = 3, 2, 4
rng = np.random.default_rng(0)
X_0, EPS = rng.normal(size=(2, B, N, D))
TIMES = np.array([0.1, 0.5, 0.9])


def signal_and_noise(t):
    """alpha and sigma in double precision, shaped to multiply [B, N, D]."""
    squared = (5 * np.tan(np.pi * np.asarray(t) / 2)) ** 2
    alpha, sigma = 1 / np.sqrt(1 + squared), np.sqrt(squared / (1 + squared))
    return np.reshape(alpha, (-1, 1, 1)), np.reshape(sigma, (-1, 1, 1))


@pytest.mark.parametrize("t", [TIMES, 0.3], ids=["time of each text", "one time"])
def test_add_noise(t):
    alpha, sigma = signal_and_noise(t)
    noised = process.add_noise(SCHEDULE, jnp.asarray(X_0), jnp.asarray(t), jnp.asarray(EPS))
    np.testing.assert_allclose(noised, alpha * X_0 + sigma * EPS, rtol=1e-5, atol=1e-6)


def test_score_is_the_slope_of_the_log_density():
    alpha, sigma = signal_and_noise(TIMES)
    x_t, h = alpha * X_0 + sigma * EPS, 1e-5
    law = scipy.stats.norm(alpha * X_0, sigma)
    slope = (law.logpdf(x_t + h) - law.logpdf(x_t - h)) / (2 * h)
    score = process.score(SCHEDULE, jnp.asarray(x_t), jnp.asarray(TIMES), jnp.asarray(X_0))
    np.testing.assert_allclose(score, slope, rtol=1e-4, atol=1e-4)


@given(t=st.floats(0.02, 1.0), seed=st.integers(0, 2**31))
def test_noise_is_recovered_from_the_clean_latents(t, seed):
    x_0, eps = np.random.default_rng(seed).normal(size=(2, B, N, D)).astype(np.float32)
    x_t = process.add_noise(SCHEDULE, x_0, t, eps)
    np.testing.assert_allclose(process.noise_estimate(SCHEDULE, x_t, t, x_0), eps, atol=1e-4)


def test_training_times_are_uniform():
    t = time_sampling.uniform(jax.random.split(jax.random.key(0), 5_000))
    assert t.dtype == jnp.float32
    assert t.min() >= 1e-5
    assert t.max() <= 1
    assert scipy.stats.kstest(np.asarray(t), "uniform").pvalue > 0.01


def test_training_time_of_a_text_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(0), 8)
    np.testing.assert_array_equal(
        time_sampling.uniform(keys)[2:5], time_sampling.uniform(keys[2:5])
    )


def of_scale(*scales):
    """Texts of Gaussian numbers, [B, 16, 64], a deviation for each."""
    numbers = np.random.default_rng(1).normal(size=(len(scales), 16, 64))
    return (numbers * np.reshape(scales, (-1, 1, 1))).astype(np.float32)


def test_threshold_is_imagens_with_the_scale_of_clean_latents():
    x_0 = of_scale(0.5, 1.0, 2.0)
    found = np.asarray(process.threshold(x_0), np.float64)
    bound = scipy.stats.norm.ppf(1 - 0.005 / 2)  # 0.5% of |N(0, 1)| are beyond
    for text, rescaled in zip(x_0.astype(np.float64), found, strict=True):
        s = max(np.quantile(np.abs(text), 0.995), bound)
        np.testing.assert_allclose(rescaled, np.clip(text, -s, s) * bound / s, rtol=1e-5)
    np.testing.assert_array_equal(found[0], x_0[0])
    assert np.abs(x_0[2]).max() > np.abs(found[2]).max() == pytest.approx(bound)


def test_standardise_makes_large_estimates_as_large_as_clean_latents():
    x_0 = of_scale(0.01, 0.9, 1.5, 30.0) + np.float32(0.1)
    found = np.asarray(process.standardise(x_0), np.float64)
    np.testing.assert_array_equal(found[:2], x_0[:2])
    for text, rescaled in zip(x_0[2:].astype(np.float64), found[2:], strict=True):
        np.testing.assert_allclose(rescaled, text / np.sqrt(np.mean(text**2)), rtol=1e-5)


@pytest.mark.parametrize("rescale", process.RESCALE.values())
def test_a_text_is_rescaled_by_itself(rescale):
    x_0 = of_scale(0.5, 1.0, 2.0, 30.0)
    apart = [rescale(text[None])[0] for text in x_0]
    np.testing.assert_allclose(rescale(x_0), apart, rtol=1e-6)
