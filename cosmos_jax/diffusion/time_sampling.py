"""How training draws diffusion times."""

import jax

# Below this time there is no noise left to remove.
MIN_TRAINING_TIME = 1e-5


def uniform(keys_B: jax.Array) -> jax.Array:
    """t ~ U[MIN_TRAINING_TIME, 1] from the key of each text; [B] fp32."""
    return jax.vmap(lambda key: jax.random.uniform(key, minval=MIN_TRAINING_TIME, maxval=1.0))(
        keys_B
    )
