"""Samplers against numpy loops, exact solutions and a data law whose denoiser is known.

If x_0 ~ N(mu, C) over all latents and features, then x_t ~ N(alpha mu, alpha^2 C + sigma^2 I)
and E[x_0 | x_t] = mu + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mu).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos_jax.diffusion import samplers
from cosmos_jax.diffusion.schedule import TanSchedule

SCHEDULE = TanSchedule(5.0)
ALL = tuple(samplers.SAMPLERS)
DETERMINISTIC = ("euler_ode", "heun", "ddim")
N, D = 2, 2
MU = np.array([1.5, -0.7, 0.0, 0.4])
COVARIANCE = np.array(
    [
        [1.00, 0.60, 0.0, 0.10],
        [0.60, 0.80, 0.0, -0.20],
        [0.00, 0.00, 0.3, 0.00],
        [0.10, -0.20, 0.0, 1.50],
    ]
)


def alpha64(t):
    return 1 / np.sqrt(1 + (5 * np.tan(np.pi * t / 2)) ** 2)


def sigma64(t):
    return np.sqrt(1 - alpha64(t) ** 2)


def beta64(t):
    u = np.tan(np.pi * min(t, 0.95) / 2)
    return np.pi * 25 * u * (1 + u**2) / (1 + 25 * u**2)


def marginal(t):
    """Covariance of x_t."""
    return alpha64(t) ** 2 * COVARIANCE + sigma64(t) ** 2 * np.eye(N * D)


VARIANCES, AXES = np.linalg.eigh(COVARIANCE)


def posterior_mean(x_t, t, self_condition):
    """The exact denoiser, along the axes of the data law."""
    del self_condition
    alpha, sigma = SCHEDULE.alpha(t[0]), SCHEDULE.sigma(t[0])
    gain = (AXES * (alpha * VARIANCES / (alpha**2 * VARIANCES + sigma**2))) @ AXES.T
    flat = x_t.reshape(-1, N * D)
    return (MU + (flat - alpha * MU) @ gain).reshape(x_t.shape).astype(x_t.dtype)


def draw(sampler, *, num_texts=10_000, steps=250, min_time=0.05, answer="mean"):
    prior_key, noise_key = jax.random.split(jax.random.key(0))
    shape = (num_texts, N, D)
    run = jax.jit(
        lambda x_T: samplers.sample(
            posterior_mean,
            SCHEDULE,
            sampler,
            x_T,
            samplers.uniform_times(steps, min_time),
            lambda i: jax.random.normal(jax.random.fold_in(noise_key, i), shape),
            answer=answer,
        )
    )
    return np.asarray(run(jax.random.normal(prior_key, shape)), np.float64).reshape(-1, N * D)


def assert_law(drawn, mean, covariance, bias):
    """Mean and covariance within 4 standard errors plus the bias of finite steps."""
    num = len(drawn)
    scale = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(drawn.mean(0) - mean) < 4 * scale / np.sqrt(num) + bias)
    error = np.sqrt((np.outer(scale, scale) ** 2 + covariance**2) / num)
    assert np.all(np.abs(np.cov(drawn.T) - covariance) < 4 * error + bias)


@pytest.mark.parametrize("sampler", ALL)
def test_a_gaussian_is_sampled_back(sampler):
    steps, end = 250, 0.05
    covariance = marginal(end)
    # The answer is without the noise of the last step.
    last = end + (1 - end) / steps
    if sampler == "euler_sde":
        covariance = covariance - beta64(last) * (last - end) * np.eye(N * D)
    if sampler == "ddpm":
        weight = 1 - (alpha64(last) / alpha64(end)) ** 2
        covariance = covariance - sigma64(end) ** 2 * weight / sigma64(last) ** 2 * np.eye(N * D)
    drawn = draw(sampler, steps=steps, min_time=end)
    assert_law(drawn, alpha64(end) * MU, covariance, bias=0.015)


@pytest.mark.parametrize("sampler", ALL)
def test_the_last_estimate_has_the_law_of_the_posterior_mean(sampler):
    steps, end = 250, 0.05
    drawn = draw(sampler, steps=steps, min_time=end, answer="x0")
    time = end if sampler == "heun" else end + (1 - end) / steps
    explained = alpha64(time) ** 2 * COVARIANCE @ np.linalg.solve(marginal(time), COVARIANCE)
    assert_law(drawn, MU, explained, bias=0.015)


@pytest.mark.parametrize(("sampler", "order"), [("euler_ode", 1), ("ddim", 1), ("heun", 2)])
def test_deterministic_samplers_converge_with_their_order(sampler, order):
    """Along an axis of the data law the exact flow scales by the ratio of standard deviations."""
    start, end = 0.9, 0.1
    deviations = [np.sqrt(alpha64(t) ** 2 * VARIANCES + sigma64(t) ** 2) for t in (start, end)]
    x = np.random.default_rng(0).normal(size=(5, N * D))
    flow = AXES @ np.diag(deviations[1] / deviations[0]) @ AXES.T
    exact = alpha64(end) * MU + (x - alpha64(start) * MU) @ flow.T

    def error(steps):
        times = jnp.linspace(start, end, steps + 1)
        x_T = jnp.asarray(x, jnp.float32).reshape(-1, N, D)
        found = samplers.sample(posterior_mean, SCHEDULE, sampler, x_T, times, lambda i: x_T)
        return np.abs(np.asarray(found).reshape(-1, N * D) - exact).max()

    coarse, fine = error(20), error(40)
    assert fine < 0.1
    assert 0.75 * 2**order < coarse / fine < 1.6 * 2**order


def denoise_of_everything(x, t, c):
    """Depends on all three arguments; works on numpy and JAX arrays alike."""
    tanh = jnp.tanh if isinstance(x, jax.Array) else np.tanh
    return tanh(0.8 * x + 0.3 * c) + 0.2 * t[:, None, None] - 0.1 * c**2


def reference(sampler, x, times, noise):
    """The update rules of the release in a plain loop: (mean, x_0) of the last step."""
    c = np.zeros_like(x)

    def estimate(x, t):
        return denoise_of_everything(x, np.full(len(x), t), c)

    def score(x, t, x_0):
        return (alpha64(t) * x_0 - x) / sigma64(t) ** 2

    def flow(x, t, x_0):
        return -beta64(t) / 2 * x - beta64(t) / 2 * score(x, t, x_0)

    for t, s, z in zip(times[:-1], times[1:], noise, strict=True):
        x_0 = estimate(x, t)
        scale = 0.0
        if sampler == "euler_sde":
            drift = -beta64(t) / 2 * x - beta64(t) * score(x, t, x_0)
            mean, scale = x + drift * (s - t), np.sqrt(beta64(t) * (t - s))
        elif sampler == "euler_ode":
            mean = x + flow(x, t, x_0) * (s - t)
        elif sampler == "heun":
            first = flow(x, t, x_0)
            ahead = x + first * (s - t)
            x_0 = estimate(ahead, s)
            mean = x + (first + flow(ahead, s, x_0)) / 2 * (s - t)
        elif sampler == "ddim":
            mean = alpha64(s) * x_0 + sigma64(s) * (x - alpha64(t) * x_0) / sigma64(t)
        elif sampler == "ddpm":
            # p(x_s | x_t, x_0): product of the Gaussians p(x_s | x_0) and p(x_t | x_s).
            ratio = alpha64(t) / alpha64(s)
            precision = 1 / sigma64(s) ** 2 + ratio**2 / (1 - ratio**2)
            mean = (alpha64(s) * x_0 / sigma64(s) ** 2 + ratio * x / (1 - ratio**2)) / precision
            scale = np.sqrt(1 / precision)
        x, c = mean + scale * z, x_0
    return mean, x_0


@pytest.mark.parametrize("answer", ["mean", "x0"])
@pytest.mark.parametrize("sampler", ALL)
def test_samplers_follow_a_plain_loop(sampler, answer):
    rng = np.random.default_rng(1)
    times = np.linspace(1, 0.05, 11)
    x_T, noise = rng.normal(size=(3, N, D)), rng.normal(size=(10, 3, N, D))
    mean, x_0 = reference(sampler, x_T, times, noise)
    found = samplers.sample(
        denoise_of_everything,
        SCHEDULE,
        sampler,
        jnp.asarray(x_T, jnp.float32),
        jnp.asarray(times, jnp.float32),
        lambda i: jnp.asarray(noise, jnp.float32)[i],
        answer=answer,
    )
    np.testing.assert_allclose(found, mean if answer == "mean" else x_0, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("sampler", ["euler_sde", "ddpm"])
def test_the_answer_does_not_see_the_noise_of_the_last_step(sampler):
    x_T, last = jnp.ones((2, N, D)), 4

    def noise(i):
        return jnp.where(i == last, jnp.nan, jnp.full(x_T.shape, 0.1))

    times = samplers.uniform_times(last + 1, 0.05)
    found = samplers.sample(posterior_mean, SCHEDULE, sampler, x_T, times, noise)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_ignore_noise(sampler):
    x_T = jnp.ones((2, N, D))
    times = samplers.uniform_times(5, 0.05)
    found = samplers.sample(
        posterior_mean, SCHEDULE, sampler, x_T, times, lambda i: jnp.full(x_T.shape, jnp.nan)
    )
    assert np.isfinite(found).all()


def test_heun_ends_with_an_euler_step_at_time_zero():
    x_T = jnp.linspace(-1, 1, 2 * N * D).reshape(2, N, D)
    times = jnp.array([0.4, 0.0])
    heun, euler = (
        samplers.sample(posterior_mean, SCHEDULE, name, x_T, times, lambda i: x_T)
        for name in ("heun", "euler_ode")
    )
    assert np.isfinite(heun).all()
    np.testing.assert_allclose(heun, euler, rtol=1e-6)


def test_uniform_times():
    np.testing.assert_allclose(samplers.uniform_times(4, 0.2), [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    times = np.asarray(samplers.uniform_times(200, 0.05))
    assert times.dtype == np.float32
    assert times[0] == 1
    assert times[-1] == np.float32(0.05)


@pytest.mark.parametrize(("sampler", "answer"), [("euler", "mean"), ("ddim", "x_0")])
def test_unknown_names_are_refused(sampler, answer):
    x_T = jnp.zeros((1, N, D))
    with pytest.raises(ValueError, match=repr(sampler)):
        samplers.sample(
            posterior_mean,
            SCHEDULE,
            sampler,
            x_T,
            samplers.uniform_times(2, 0.05),
            lambda i: x_T,
            answer=answer,
        )
