"""How training draws diffusion times."""

import jax

# Below this time there is no noise left to remove.
MIN_TRAINING_TIME = 1e-5


def uniform(key: jax.Array, batch_size: int) -> jax.Array:
    """t ~ U[MIN_TRAINING_TIME, 1], independently for each text; [B] fp32."""
    return jax.random.uniform(key, (batch_size,), minval=MIN_TRAINING_TIME, maxval=1.0)
