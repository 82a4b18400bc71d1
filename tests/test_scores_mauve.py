"""MAUVE against the authors' package, cases by hand, and that it moves the right way.

The package, mauve-text, is GPLv3 and not among our requirements: PACKAGE holds what version
0.4.0 printed (with faiss-cpu 1.15.1). Where it is installed it is also run itself.
"""

import statistics

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from cosmos_jax.errors import UserError
from cosmos_jax.scores import mauve as module
from cosmos_jax.scores.mauve import from_histograms, mauve, project, quantise

RNG = np.random.default_rng


def apart():
    """Six directions that any k-means finds, at lengths that tell nothing; 60 texts a side."""
    rng = RNG(0)
    directions = np.linalg.qr(rng.normal(size=(8, 8))).Q[:6]

    def draw(sizes):
        near = np.repeat(directions, sizes, axis=0) + 0.03 * rng.normal(size=(sum(sizes), 8))
        return (near * rng.uniform(0.2, 5, size=(len(near), 1))).astype(np.float32)

    return draw([20, 14, 10, 8, 6, 2]), draw([4, 8, 10, 12, 16, 10])


def mixed(seed=0, n=300, m=250, shift=0.17):
    """Clouds that run into each other, so every seed of k-means cuts them differently."""
    rng = RNG(seed)
    centres = rng.normal(size=(20, 40))
    scale = np.exp(-np.arange(40) / 15)

    def draw(count, moved):
        near = centres[rng.integers(20, size=count)] + 0.7 * rng.normal(size=(count, 40))
        return (near * scale + moved).astype(np.float32)

    return draw(n, 0), draw(m, shift)


PACKAGE = {}


def within_noise(ours, theirs, seeds, their_seeds):
    """Two means over seeds, at most four standard errors apart."""
    error = (ours.spread**2 / seeds + theirs[1] ** 2 / their_seeds) ** 0.5
    return abs(ours.value - theirs[0]) < 4 * error
