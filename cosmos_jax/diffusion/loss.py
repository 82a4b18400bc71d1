"""The training loss of the denoiser.

    (1) L = mean over texts, latents and features of (x_0 - x_0_hat(x_t, t, c))^2

c is the self-condition: for a share of the batches the estimate of a first pass that saw
c = 0 and passes no gradient; zeros otherwise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cosmos_jax.diffusion import process, time_sampling
from cosmos_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x_t [B, N, D], t [B], self_condition [B, N, D]) -> x_0 [B, N, D]."""

Inputs = tuple[jax.Array, jax.Array, jax.Array]
"""What `Denoise` is given."""


def denoising_errors(
    denoise: Denoise,
    schedule: Schedule,
    x_0_BxNxD: jax.Array,
    keys_B: jax.Array,
    *,
    self_condition: bool | jax.Array,
) -> tuple[jax.Array, Inputs]:
    """Equation (1) before the mean over texts: the mean squared error of each text, [B].

    With it comes what the denoiser was given in the pass that counts. Each text has its own key,
    so that its time and noise do not depend on the batch around it. `self_condition` says whether
    this batch makes the first pass.
    """
    time_keys, noise_keys = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
    t_B = time_sampling.uniform(time_keys)
    eps = jax.vmap(lambda key: jax.random.normal(key, x_0_BxNxD.shape[1:]))(noise_keys)
    x_t = process.add_noise(schedule, x_0_BxNxD, t_B, eps)
    zeros = jnp.zeros_like(x_t)
    # Not jnp.where: a branch that is not taken costs nothing.
    condition = jax.lax.cond(
        self_condition,
        lambda: denoise(x_t, t_B, zeros).astype(zeros.dtype),
        lambda: zeros,
    )
    inputs = (x_t, t_B, jax.lax.stop_gradient(condition))
    return jnp.mean((x_0_BxNxD - denoise(*inputs)) ** 2, axis=(1, 2)), inputs
