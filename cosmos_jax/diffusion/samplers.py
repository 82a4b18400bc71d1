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

z ~ N(0, I). A run answers with the mean of its last step, without that step's noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cosmos_jax.diffusion import process
from cosmos_jax.diffusion.loss import Denoise
from cosmos_jax.diffusion.schedule import Schedule

Step = Callable[..., tuple[jax.Array, jax.Array | None, jax.Array]]
"""(denoise, schedule, x, c, t, s) -> (mean, scale of z or None if x_s has no noise, x_0 to hand
on)."""


def _at(t: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.full(x.shape[:1], t)


def _ode_drift(schedule: Schedule, x: jax.Array, t: jax.Array, x_0: jax.Array) -> jax.Array:
    """v(x, t) of equation (2)."""
    return -schedule.beta(t) / 2 * (x + process.score(schedule, x, t, x_0))


def euler_sde(denoise, schedule, x, c, t, s):
    """Equation (1)."""
    x_0 = denoise(x, _at(t, x), c)
    beta, h = schedule.beta(t), s - t
    mean = x + h * (-beta / 2 * x - beta * process.score(schedule, x, t, x_0))
    return mean, jnp.sqrt(beta * jnp.abs(h)), x_0


def euler_ode(denoise, schedule, x, c, t, s):
    """Equation (2)."""
    x_0 = denoise(x, _at(t, x), c)
    return x + (s - t) * _ode_drift(schedule, x, t, x_0), None, x_0


def heun(denoise, schedule, x, c, t, s):
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


def ddim(denoise, schedule, x, c, t, s):
    """Equation (4)."""
    x_0 = denoise(x, _at(t, x), c)
    eps = process.noise_estimate(schedule, x, t, x_0)
    return process.add_noise(schedule, x_0, s, eps), None, x_0


def ddpm(denoise, schedule, x, c, t, s):
    """Equation (5)."""
    x_0 = denoise(x, _at(t, x), c)
    sigma_t, sigma_s, alpha_s = schedule.sigma(t), schedule.sigma(s), schedule.alpha(s)
    ratio = schedule.alpha(t) / alpha_s
    weight = sigma_t**2 - ratio**2 * sigma_s**2
    mean = (ratio * sigma_s**2 * x + alpha_s * weight * x_0) / sigma_t**2
    return mean, sigma_s * jnp.sqrt(weight) / sigma_t, x_0


SAMPLERS: dict[str, Step] = {
    "euler_sde": euler_sde,
    "euler_ode": euler_ode,
    "heun": heun,
    "ddim": ddim,
    "ddpm": ddpm,
}


def uniform_times(num_steps: int, min_time: float) -> jax.Array:
    """`num_steps` + 1 times from 1 down to `min_time` at equal distances, fp32."""
    return jnp.linspace(1.0, min_time, num_steps + 1)


def sample(
    denoise: Denoise,
    schedule: Schedule,
    sampler: str,
    x_T_BxNxD: jax.Array,
    times: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    *,
    answer: str = "mean",
) -> jax.Array:
    """Runs a sampler from x_T ~ N(0, I) along `times` (decreasing, from 1).

    `noise(i)` is the z of step i, [B, N, D]. `answer` is what the run returns: "mean", the
    mean of the last step, or "x0", the last estimate of the clean latents.
    """
    if sampler not in SAMPLERS or answer not in ("mean", "x0"):
        raise ValueError(f"no sampler {sampler!r} with answer {answer!r}")
    step = SAMPLERS[sampler]

    def body(carry, i):
        x, c, _ = carry
        mean, scale, x_0 = step(denoise, schedule, x, c, times[i], times[i + 1])
        x = mean if scale is None else mean + scale * noise(i)
        return (x, x_0, mean), None

    start = (x_T_BxNxD, jnp.zeros_like(x_T_BxNxD), x_T_BxNxD)
    (_, x_0, mean), _ = jax.lax.scan(body, start, jnp.arange(len(times) - 1))
    return mean if answer == "mean" else x_0
