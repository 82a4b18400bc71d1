"""Few steps instead of many: a student learns to go in one step where its teacher goes in several.

A DDIM step from t to s with the estimate x_0 ends at

    (1) x_s = r x_t + a x_0,  r = sigma_s / sigma_t,  a = alpha_s - r alpha_t

so it ends at the x_s* to which the teacher's steps of DPM-Solver++(2M) lead if the estimate is

    (2) x_0* = (x_s* - r x_t) / a
    (3) L = mean over steps, latents and features of (x_0* - x_0)^2

as in progressive distillation (arXiv 2202.00512), but at once from many steps to few, and on the
student's own way: each step begins at the x_t to which its steps before lead from noise, with the
self-condition that it has then. So training meets what sampling meets, and asks for no texts.
"""

import jax
import jax.numpy as jnp

from cosmos_jax.diffusion import process, samplers
from cosmos_jax.diffusion.loss import Denoise
from cosmos_jax.diffusion.schedule import Schedule


def distillation_errors(
    student: Denoise,
    teacher: Denoise,
    schedule: Schedule,
    x_T_BxNxD: jax.Array,
    times: jax.Array,
    teacher_steps: int,
) -> jax.Array:
    """Equation (3) for each text, [B], of a student that goes from noise x_T along `times`.

    `teacher_steps` are those in one step of the student. No gradient passes through the teacher or
    from one step to another.
    """

    def step(carry, interval):
        x, self_condition = carry
        t, s = interval
        goal = samplers.sample(
            teacher,
            schedule,
            "dpmpp_2m",
            x,
            jnp.linspace(t, s, teacher_steps + 1),
            lambda _: jnp.zeros_like(x),
            self_condition=self_condition,
        )
        ratio = schedule.sigma(s) / schedule.sigma(t)
        wanted = (goal - ratio * x) / (schedule.alpha(s) - ratio * schedule.alpha(t))
        x_0 = student(x, jnp.full(x.shape[:1], t), self_condition)
        error_B = jnp.mean((jax.lax.stop_gradient(wanted) - x_0) ** 2, axis=(1, 2))
        x_0 = jax.lax.stop_gradient(x_0).astype(x.dtype)
        eps = process.noise_estimate(schedule, x, t, x_0)
        return (process.add_noise(schedule, x_0, s, eps), x_0), error_B

    start = (x_T_BxNxD, jnp.zeros_like(x_T_BxNxD))
    _, errors_KxB = jax.lax.scan(step, start, (times[:-1], times[1:]))
    return jnp.mean(errors_KxB, axis=0)
