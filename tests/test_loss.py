"""The training loss against computations by hand with denoisers that are simple formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from cosmos_jax.diffusion import loss
from cosmos_jax.diffusion.schedule import TanSchedule

SCHEDULE = TanSchedule(5.0)
B, N, D = 512, 4, 8
X_0 = jax.random.normal(jax.random.key(0), (B, N, D))
KEYS = jax.random.split(jax.random.key(1), B)


def errors(denoise, x_0=X_0, keys=KEYS, *, self_condition=False):
    found, _ = loss.denoising_errors(denoise, SCHEDULE, x_0, keys, self_condition=self_condition)
    return found


def noised(x_0=X_0, keys=KEYS):
    """x_t and t as the denoiser meets them."""
    met = []

    def denoise(x_t, t, c):
        met.append((x_t, t))
        return x_t

    errors(denoise, x_0, keys)
    return (np.asarray(value, np.float64) for value in met[-1])


def test_the_denoiser_meets_noised_latents_at_uniform_times():
    x_t, t = noised()
    assert scipy.stats.kstest(t, "uniform").pvalue > 0.01
    signal = (1 / np.sqrt(1 + (5 * np.tan(np.pi * t / 2)) ** 2))[:, None, None]
    seen = t > 0.05  # where there is enough noise to recover
    eps = ((x_t - signal * X_0) / np.sqrt(1 - signal**2))[seen]
    assert scipy.stats.kstest(eps.ravel(), "norm").pvalue > 0.01
    # No two texts share their noise.
    pairs = np.abs(np.corrcoef(eps.reshape(len(eps), -1)) - np.eye(len(eps)))
    assert pairs.max() < 5 / np.sqrt(N * D)


def test_errors_are_means_over_latents_and_features():
    x_t, t = noised()
    found = errors(lambda x, t, c: 0.5 * x + t[:, None, None])
    wanted = ((np.asarray(X_0) - (0.5 * x_t + t[:, None, None])) ** 2).mean((1, 2))
    assert found.shape == (B,)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_perfect_denoiser_has_no_error():
    np.testing.assert_array_equal(errors(lambda x, t, c: X_0, self_condition=True), 0)


def test_the_exact_denoiser_reaches_the_posterior_variance():
    """For x_0 ~ N(0, I) it is alpha x_t, and what stays unknown has variance sigma^2."""
    found = errors(lambda x, t, c: SCHEDULE.alpha(t)[:, None, None] * x)
    squared = (5 * np.tan(np.pi * (np.arange(10_000) + 0.5) / 20_000)) ** 2
    np.testing.assert_allclose(found.mean(), (squared / (1 + squared)).mean(), rtol=0.04)


def test_self_condition_is_the_estimate_of_a_first_pass_or_zeros():
    def denoise(x, t, c):
        return 0.5 * x + 2 * c + 1

    x_t, _ = noised()
    x_0 = np.asarray(X_0)
    first = 0.5 * x_t + 1
    second = 0.5 * x_t + 2 * first + 1
    for self_condition, estimate in ((False, first), (True, second)):
        wanted = ((x_0 - estimate) ** 2).mean((1, 2))
        for flag in (self_condition, jnp.asarray(self_condition)):
            np.testing.assert_allclose(
                errors(denoise, self_condition=flag), wanted, rtol=1e-5, atol=1e-6
            )


def test_the_first_pass_gives_no_gradient():
    def objective(weight):
        return errors(lambda x, t, c: weight * x + c, self_condition=True).mean()

    x_t, _ = noised()
    weight = 0.3  # the estimate is weight x + c, with c = weight x held fixed
    slope = (-2 * (np.asarray(X_0) - 2 * weight * x_t) * x_t).mean()
    np.testing.assert_allclose(jax.grad(objective)(weight), slope, rtol=1e-4)


def test_a_first_pass_that_is_not_wanted_costs_nothing():
    passes = []

    def denoise(x, t, c):
        jax.debug.callback(lambda: passes.append(1))
        return x

    run = jax.jit(lambda flag: errors(denoise, self_condition=flag))
    for flag, count in ((False, 1), (True, 2)):
        passes.clear()
        run(jnp.asarray(flag)).block_until_ready()
        jax.effects_barrier()
        assert len(passes) == count


def test_noise_and_time_of_a_text_do_not_depend_on_its_batch():
    def denoise(x, t, c):
        return 0.5 * x

    # Other texts with other keys in the first half, and the whole batch reversed.
    other = jnp.where(jnp.arange(B)[:, None, None] < B // 2, 0, X_0)[::-1]
    keys = jnp.concatenate([jax.random.split(jax.random.key(9), B // 2), KEYS[B // 2 :]])[::-1]
    np.testing.assert_allclose(
        errors(denoise, other, keys)[::-1][B // 2 :], errors(denoise)[B // 2 :], rtol=1e-6
    )
