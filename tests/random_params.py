"""Weights for tests, drawn without compiling the initialisers of a module."""

import jax
import numpy as np


def random_params(module, *inputs, **options):
    """What `module.init` returns, all random: gains of 1 and biases of 0 hide mistakes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("gain", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = leaf.shape[0] ** -0.5 if len(leaf.shape) == 2 else 0.3
        return (spread * rng.normal(size=leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, **options), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)
