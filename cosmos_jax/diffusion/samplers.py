"""Samplers: from noise at t = 1 to latents at a small time, as one `lax.scan`.

One step goes from t to s < t with h = s - t, given x_0 = denoise(x_t, t, c), where the
self-condition c is the x_0 of the step before (zeros at first). With eps and score as in
`process.py`:

    (1) Euler SDE  mean = x + h (-beta/2 x - beta score),  x_s = mean + sqrt(beta |h|) z
    (2) Euler ODE  x_s = x + h v(x, t),  v(x, t) = -beta/2 x - beta/2 score
    (3) Heun       x_s = x + h/2 (v(x, t) + v(x + h v(x, t), s)), or (2) if s = 0
    (4) DDIM       x_s = alpha_s x_0 + sigma_s eps
    (5) DDPM       mean = (r sigma_s^2 x + alpha_s w x_0) / sigma_t^2,
                   x_s = mean + sigma_s sqrt(w) / sigma_t z,
                   r = alpha_t / alpha_s,  w = sigma_t^2 - r^2 sigma_s^2
    (6) DPM-Solver++(2M)      x_s = sigma_s / sigma_t x + alpha_s (1 - e^-k) D
    (7) SDE-DPM-Solver++(2M)  mean = sigma_s / sigma_t e^-k x + alpha_s (1 - e^-2k) D,
                              x_s = mean + sigma_s sqrt(1 - e^-2k) z
    (8) D = x_0 + q (x_0 - c),  q = k / (2 k'),  k = lambda_s - lambda_t, k' that of the step before

(6) and (7) are Lu et al. 2022 (arXiv 2211.01095): they solve the linear part of the equation
exactly and take x_0 to be a line in lambda, through this estimate and the one before; with q = 0
they are (4) and (5). q is 0 in the first step, which has no estimate before it, and in the
second of a run from t = 1: lambda_1 is minus infinity, so k' is infinite and there is no slope
to go on with. (The alpha_1 of about 1e-8 that fp32 has would make it whatever rounding says.)

z ~ N(0, I). A run answers with the mean of its last step, without that step's noise.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cosmos_jax.diffusion import process
from cosmos_jax.diffusion.loss import Denoise
from cosmos_jax.diffusion.schedule import Schedule

Step = Callable[..., tuple[jax.Array, jax.Array | None, jax.Array]]
"""(denoise, schedule, x, c, t, s, q) -> (mean, scale of z or None if x_s has no noise, x_0 to hand
on). q is of equation (8); steps that look at one estimate alone leave it."""


def _at(t: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.full(x.shape[:1], t)


def _ode_drift(schedule: Schedule, x: jax.Array, t: jax.Array, x_0: jax.Array) -> jax.Array:
    """v(x, t) of equation (2)."""
    return -schedule.beta(t) / 2 * (x + process.score(schedule, x, t, x_0))


def euler_sde(denoise, schedule, x, c, t, s, _):
    """Equation (1)."""
    x_0 = denoise(x, _at(t, x), c)
    beta, h = schedule.beta(t), s - t
    mean = x + h * (-beta / 2 * x - beta * process.score(schedule, x, t, x_0))
    return mean, jnp.sqrt(beta * jnp.abs(h)), x_0


def euler_ode(denoise, schedule, x, c, t, s, _):
    """Equation (2)."""
    x_0 = denoise(x, _at(t, x), c)
    return x + (s - t) * _ode_drift(schedule, x, t, x_0), None, x_0


def heun(denoise, schedule, x, c, t, s, _):
    """Equation (3). Both evaluations are given c; the second one's x_0 is handed on."""
    x_0 = denoise(x, _at(t, x), c)
    drift = _ode_drift(schedule, x, t, x_0)
    euler = x + (s - t) * drift

    def corrected():
        x_0_end = denoise(euler, _at(s, x), c)
        drift_end = _ode_drift(schedule, euler, s, x_0_end)
        return x + (s - t) / 2 * (drift + drift_end), x_0_end

    # There is no score at s = 0.
    mean, x_0 = jax.lax.cond(s > 0, corrected, lambda: (euler, x_0))
    return mean, None, x_0


def ddim(denoise, schedule, x, c, t, s, _):
    """Equation (4)."""
    x_0 = denoise(x, _at(t, x), c)
    eps = process.noise_estimate(schedule, x, t, x_0)
    return process.add_noise(schedule, x_0, s, eps), None, x_0


def ddpm(denoise, schedule, x, c, t, s, _):
    """Equation (5)."""
    x_0 = denoise(x, _at(t, x), c)
    sigma_t, sigma_s, alpha_s = schedule.sigma(t), schedule.sigma(s), schedule.alpha(s)
    ratio = schedule.alpha(t) / alpha_s
    weight = sigma_t**2 - ratio**2 * sigma_s**2
    mean = (ratio * sigma_s**2 * x + alpha_s * weight * x_0) / sigma_t**2
    return mean, sigma_s * jnp.sqrt(weight) / sigma_t, x_0


def dpmpp_2m(denoise, schedule, x, c, t, s, q):
    """Equation (6)."""
    x_0 = denoise(x, _at(t, x), c)
    k = schedule.half_log_snr(s) - schedule.half_log_snr(t)
    line = x_0 + q * (x_0 - c)
    mean = schedule.sigma(s) / schedule.sigma(t) * x - schedule.alpha(s) * jnp.expm1(-k) * line
    return mean, None, x_0


def dpmpp_2m_sde(denoise, schedule, x, c, t, s, q):
    """Equation (7)."""
    x_0 = denoise(x, _at(t, x), c)
    k = schedule.half_log_snr(s) - schedule.half_log_snr(t)
    line = x_0 + q * (x_0 - c)
    sigma_s, renewed = schedule.sigma(s), -jnp.expm1(-2 * k)
    mean = sigma_s / schedule.sigma(t) * jnp.exp(-k) * x + schedule.alpha(s) * renewed * line
    return mean, sigma_s * jnp.sqrt(renewed), x_0


SAMPLERS: dict[str, Step] = {
    "euler_sde": euler_sde,
    "euler_ode": euler_ode,
    "heun": heun,
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}

# Where a grid that is even in lambda begins: alpha = 0.01. What x_t knows of x_0 there is at most
# alpha^2 / 2 nats a feature, less than one over all features of the paper's latents.
FIRST_HALF_LOG_SNR = math.log(0.01)


def uniform_times(
    schedule: Schedule, num_steps: int, last: jax.Array | float, first: jax.Array | float = 1.0
) -> jax.Array:
    """`num_steps` + 1 times from `first` down to `last` at equal distances, fp32."""
    del schedule
    return jnp.linspace(first, last, num_steps + 1, dtype=jnp.float32)


def log_snr_times(
    schedule: Schedule, num_steps: int, last: jax.Array | float, first: jax.Array | float = 1.0
) -> jax.Array:
    """`num_steps` + 1 times from `first` down to `last` at equal distances in lambda, fp32.

    lambda_1 is minus infinity, so distances are counted from FIRST_HALF_LOG_SNR, or from 1 below
    that of the `last` time if that is less, where `first` has no more. There x_t is as good as
    noise alone, and so the first time is `first` itself.
    """
    end = schedule.half_log_snr(jnp.float32(last))
    begin = jnp.minimum(FIRST_HALF_LOG_SNR, end - 1)
    begin = jnp.maximum(begin, schedule.half_log_snr(jnp.float32(first)))
    times = schedule.time(jnp.linspace(begin, end, num_steps + 1))
    return times.at[0].set(first).at[-1].set(last)


TIME_GRIDS = {"time": uniform_times, "logsnr": log_snr_times}


def _line_weights(schedule: Schedule, times: jax.Array) -> jax.Array:
    """q of equation (8) for each step; 0 too in one to t = 0, which ends in x_0 itself."""
    k = jnp.diff(schedule.half_log_snr(times))
    before = jnp.concatenate([jnp.full(1, jnp.inf), k[:-1]])
    return jnp.where(jnp.isfinite(k), k / (2 * before), 0.0)


def sample(
    denoise: Denoise,
    schedule: Schedule,
    sampler: str,
    x_T_BxNxD: jax.Array,
    times: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    *,
    self_condition: jax.Array | None = None,
    answer: str = "mean",
    trace: bool = False,
) -> Any:
    """Runs a sampler from x_T along `times` (decreasing; from 1 if x_T ~ N(0, I)).

    `noise(i)` is the z of step i, [B, N, D]. `self_condition` is what the first step is given, such
    as the estimate that led to x_T; None: zeros. `answer` is what the run returns: "mean", the
    mean of the last step, or "x0", the last estimate of the clean latents. With `trace` it returns
    the estimates that the steps hand on too, [steps, B, N, D].
    """
    if sampler not in SAMPLERS or answer not in ("mean", "x0"):
        raise ValueError(f"no sampler {sampler!r} with answer {answer!r}")
    step, weights = SAMPLERS[sampler], _line_weights(schedule, times)

    def body(carry, i):
        x, c, _ = carry
        mean, scale, x_0 = step(denoise, schedule, x, c, times[i], times[i + 1], weights[i])
        x = mean if scale is None else mean + scale * noise(i)
        return (x, x_0, mean), (x_0 if trace else None)

    first = jnp.zeros_like(x_T_BxNxD) if self_condition is None else self_condition
    start = (x_T_BxNxD, first, x_T_BxNxD)
    (_, x_0, mean), estimates = jax.lax.scan(body, start, jnp.arange(len(times) - 1))
    found = mean if answer == "mean" else x_0
    return (found, estimates) if trace else found
