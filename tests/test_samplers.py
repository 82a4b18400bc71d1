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
DETERMINISTIC = ("euler_ode", "heun", "ddim", "dpmpp_2m")
STOCHASTIC = ("euler_sde", "ddpm", "dpmpp_2m_sde")
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


def lambda64(t):
    """log(alpha / sigma), at t = 1 what it is and not what rounding makes of it."""
    return np.log(alpha64(t) / sigma64(t)) if t < 1 else -np.inf


def time64(half_log_snr):
    return 2 / np.pi * np.arctan(np.exp(-half_log_snr) / 5)


def grid(kind, start, end, steps):
    """Times at equal distances in t, or in lambda."""
    if kind == "time":
        return np.linspace(start, end, steps + 1)
    return time64(np.linspace(lambda64(start), lambda64(end), steps + 1))


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


def draw(sampler, *, steps=250, min_time=0.05, answer="mean", time_grid="time"):
    prior_key, noise_key = jax.random.split(jax.random.key(0))
    shape = (10_000, N, D)
    run = jax.jit(
        lambda x_T: samplers.sample(
            posterior_mean,
            SCHEDULE,
            sampler,
            x_T,
            samplers.TIME_GRIDS[time_grid](SCHEDULE, steps, min_time),
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
    if sampler in ("ddpm", "dpmpp_2m_sde"):
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


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_few_steps_even_in_log_snr_sample_the_gaussian_back(sampler):
    """Twenty steps do what the tests above take 250 for, and first-order ones do not."""
    end = 0.05
    expected = alpha64(end) ** 2 * COVARIANCE + sigma64(end) ** 2 * np.eye(N * D)
    last = samplers.log_snr_times(SCHEDULE, 20, end)[-2]
    noise = 0.0
    if sampler == "dpmpp_2m_sde":
        noise = sigma64(end) ** 2 * (1 - np.exp(2 * (lambda64(float(last)) - lambda64(end))))
    drawn = draw(sampler, steps=20, time_grid="logsnr")
    assert_law(drawn, alpha64(end) * MU, expected - noise * np.eye(N * D), bias=0.015)
    first_order = draw({"dpmpp_2m": "ddim", "dpmpp_2m_sde": "ddpm"}[sampler], steps=20)
    with pytest.raises(AssertionError):
        assert_law(first_order, alpha64(end) * MU, expected - noise * np.eye(N * D), bias=0.015)


START, END = 0.9, 0.1
X_START = np.array([[0.8, -0.5, 1.7, 0.1], [-1.1, 0.3, 0.6, -2.0]])


def along_the_axes(values):
    return AXES @ np.diag(values) @ AXES.T


def order(errors):
    """By what power of the step the error falls, from runs with twice the steps each."""
    return np.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("kind", ["time", "logsnr"])
@pytest.mark.parametrize(
    ("sampler", "expected"), [("euler_ode", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)]
)
def test_deterministic_samplers_converge_with_their_order(sampler, expected, kind):
    """Along an axis of the data law the exact flow scales by the ratio of standard deviations."""
    deviations = [np.sqrt(alpha64(t) ** 2 * VARIANCES + sigma64(t) ** 2) for t in (START, END)]
    flow = along_the_axes(deviations[1] / deviations[0])
    exact = alpha64(END) * MU + (X_START - alpha64(START) * MU) @ flow.T

    def error(steps):
        times = jnp.asarray(grid(kind, START, END, steps), jnp.float32)
        x_T = jnp.asarray(X_START, jnp.float32).reshape(-1, N, D)
        found = samplers.sample(posterior_mean, SCHEDULE, sampler, x_T, times, lambda i: x_T)
        return np.abs(np.asarray(found).reshape(-1, N * D) - exact).max()

    errors = [error(steps) for steps in (20, 40)]
    assert errors[-1] < 0.1
    assert order(errors) == pytest.approx(expected, abs=0.35)


def law(sampler, times):
    """Mean and covariance of what a run from X_START answers, without drawing anything.

    With a linear denoiser the answer is linear in the start and the noises, so its law follows
    from runs in which all noises but one number are 0.
    """
    steps, size = len(times) - 1, N * D
    noises = np.zeros((steps, 1 + steps * size, N, D), np.float32)
    for i in range(steps):
        for j in range(size):
            noises[i, 1 + i * size + j].flat[j] = 1
    x_T = jnp.broadcast_to(jnp.asarray(X_START[0], jnp.float32).reshape(N, D), noises.shape[1:])
    found = samplers.sample(
        posterior_mean,
        SCHEDULE,
        sampler,
        x_T,
        jnp.asarray(times, jnp.float32),
        lambda i: jnp.asarray(noises)[i],
    )
    mean, *shifted = np.asarray(found, np.float64).reshape(-1, size)
    response = np.array(shifted) - mean
    return mean, response.T @ response


def law_before_the_last_noise(sampler, times):
    """Mean and covariance of the exact process, less the noise of a sampler's last step.

    The reverse process is the forward one backwards: x_s given x_t, s < t, is Gaussian with
    covariance of the two a Var(x_s), a = alpha_t / alpha_s.
    """
    start, last, end = times[0], times[-2], times[-1]
    var_t, var_s = (alpha64(t) ** 2 * VARIANCES + sigma64(t) ** 2 for t in (start, end))
    a = alpha64(start) / alpha64(end)
    mean = alpha64(end) * MU + along_the_axes(a * var_s / var_t) @ (
        X_START[0] - alpha64(start) * MU
    )
    if sampler == "euler_sde":
        noise = beta64(last) * (last - end)
    else:
        noise = sigma64(end) ** 2 * (1 - np.exp(2 * (lambda64(last) - lambda64(end))))
    return mean, along_the_axes(var_s - (a * var_s) ** 2 / var_t - noise)


@pytest.mark.parametrize(
    ("sampler", "expected"), [("euler_sde", 1), ("ddpm", 1), ("dpmpp_2m_sde", 2)]
)
def test_stochastic_samplers_converge_in_law_with_their_order(sampler, expected):
    """Exact estimates are a martingale, E[x_0(s) | x_t] = x_0(t), so the mean of samplers that
    solve the linear part exactly has no error at all; the covariance has that of the order."""
    errors = []
    for steps in (32, 64):
        times = grid("logsnr", START, END, steps)
        found, exact = law(sampler, times), law_before_the_last_noise(sampler, times)
        errors.append([np.abs(f - e).max() for f, e in zip(found, exact, strict=True)])
    means, covariances = zip(*errors, strict=True)
    assert covariances[-1] < 0.06
    assert order(covariances) == pytest.approx(expected, abs=0.25)
    if sampler == "euler_sde":
        assert order(means) == pytest.approx(1, abs=0.25)
    else:
        assert max(means) < 1e-5


def denoise_of_everything(x, t, c):
    """Depends on all three arguments; works on numpy and JAX arrays alike."""
    tanh = jnp.tanh if isinstance(x, jax.Array) else np.tanh
    return tanh(0.8 * x + 0.3 * c) + 0.2 * t[:, None, None] - 0.1 * c**2


def reference(sampler, x, times, noise):
    """The update rules of the release and of DPM-Solver++ in a plain loop in double precision:
    (mean, x_0) of the last step."""
    c, h_before = np.zeros_like(x), None

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
        elif sampler in ("dpmpp_2m", "dpmpp_2m_sde"):
            # With h_i and r_i of the paper, and D_i = x_0 in its first step.
            h = lambda64(s) - lambda64(t)
            data = x_0
            if h_before is not None:
                r = h_before / h
                data = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * c
            h_before = h
            if sampler == "dpmpp_2m":
                mean = sigma64(s) / sigma64(t) * x - alpha64(s) * (np.exp(-h) - 1) * data
            else:
                mean = sigma64(s) / sigma64(t) * np.exp(-h) * x
                mean = mean + alpha64(s) * (1 - np.exp(-2 * h)) * data
                scale = sigma64(s) * np.sqrt(1 - np.exp(-2 * h))
        x, c = mean + scale * z, x_0
    return mean, x_0


@pytest.mark.parametrize("kind", ["time", "logsnr"])
@pytest.mark.parametrize("answer", ["mean", "x0"])
@pytest.mark.parametrize("sampler", ALL)
def test_samplers_follow_a_plain_loop(sampler, answer, kind):
    rng = np.random.default_rng(1)
    times = np.concatenate([[1], grid(kind, 0.905, 0.05, 9)])
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


@pytest.mark.parametrize(("second", "first"), [("dpmpp_2m", "ddim"), ("dpmpp_2m_sde", "ddpm")])
def test_one_estimate_makes_no_line(second, first):
    """Two steps from t = 1 are of the first order: the step before the second was infinite."""
    x_T = jax.random.normal(jax.random.key(2), (3, N, D))
    for steps, same in ((1, True), (2, True), (3, False)):
        times = jnp.array([1.0, 0.7, 0.4, 0.1][: steps + 1])
        lines, points = (
            samplers.sample(denoise_of_everything, SCHEDULE, name, x_T, times, lambda i: 0.3 * x_T)
            for name in (second, first)
        )
        assert (np.abs(lines - points).max() < 1e-5) == same


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_a_run_to_time_zero_ends_in_the_last_estimate(sampler):
    x_T = jax.random.normal(jax.random.key(3), (2, N, D))
    mean, x_0 = (
        samplers.sample(
            denoise_of_everything,
            SCHEDULE,
            sampler,
            x_T,
            jnp.array([1.0, 0.6, 0.3, 0.0]),
            lambda i: x_T,
            answer=answer,
        )
        for answer in ("mean", "x0")
    )
    np.testing.assert_allclose(mean, x_0, rtol=1e-6)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_the_answer_does_not_see_the_noise_of_the_last_step(sampler):
    x_T, last = jnp.ones((2, N, D)), 4

    def noise(i):
        return jnp.where(i == last, jnp.nan, jnp.full(x_T.shape, 0.1))

    times = samplers.uniform_times(SCHEDULE, last + 1, 0.05)
    found = samplers.sample(posterior_mean, SCHEDULE, sampler, x_T, times, noise)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_ignore_noise(sampler):
    x_T = jnp.ones((2, N, D))
    times = samplers.uniform_times(SCHEDULE, 5, 0.05)
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
    times = samplers.uniform_times(SCHEDULE, 4, 0.2)
    np.testing.assert_allclose(times, [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_times_even_in_log_snr():
    """The first of them is 1, in the place of the time at which alpha / sigma is 0.01."""
    times = np.asarray(samplers.log_snr_times(SCHEDULE, 6, 0.05), np.float64)
    assert times[0] == 1
    found = [lambda64(t) for t in times[1:]]
    np.testing.assert_allclose(found, np.linspace(np.log(0.01), lambda64(0.05), 7)[1:], atol=1e-5)


@pytest.mark.parametrize("kind", samplers.TIME_GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 200])
@pytest.mark.parametrize("end", [0.001, 0.05, 0.6, 0.999])
def test_times_fall_from_one_to_the_last(kind, steps, end):
    times = np.asarray(samplers.TIME_GRIDS[kind](SCHEDULE, steps, end))
    assert times.dtype == np.float32
    assert len(times) == steps + 1
    assert times[0] == 1
    assert times[-1] == np.float32(end)
    assert (np.diff(times) < 0).all()


@pytest.mark.parametrize(("sampler", "answer"), [("euler", "mean"), ("ddim", "x_0")])
def test_unknown_names_are_refused(sampler, answer):
    x_T = jnp.zeros((1, N, D))
    with pytest.raises(ValueError, match=repr(sampler)):
        samplers.sample(
            posterior_mean,
            SCHEDULE,
            sampler,
            x_T,
            samplers.uniform_times(SCHEDULE, 2, 0.05),
            lambda i: x_T,
            answer=answer,
        )
