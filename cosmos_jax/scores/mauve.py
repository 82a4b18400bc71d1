"""MAUVE: how much of two distributions of texts overlaps, from features of their texts.

Pillutla et al., NeurIPS 2021 and JMLR 2023. The features of both sets are cut into buckets
by k-means; with p and q the shares of the buckets and R_w = w p + (1 - w) q,

    (1) frontier = {(exp(-c KL(q | R_w)), exp(-c KL(p | R_w))) : 0 < w < 1}
    (2) MAUVE    = area below it, from (1, 0) to (0, 1)
    (3) MAUVE*   = (2) of shares smoothed after Krichevsky and Trofimov,
                   p_k = (n_k + 1/2) / (n + K/2)

The score moves with k-means' seed and with the number of texts, so several seeds are
averaged, and only equal numbers of texts should be compared.
Shapes: N, M texts, T = N + M, D features, C kept components, K buckets.
"""

import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse

from cosmos_jax.errors import UserError
from cosmos_jax.scores.frechet import check_features
from cosmos_jax.scores.score import Flag, Score

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

AT_LEAST = 50  # texts a side: five buckets of ten texts each
VARIANCE = 0.9
MIXTURES = 25
RESTARTS = 5
ITERATIONS = 500


def mauve(
    features_p_NxD: npt.ArrayLike,
    features_q_MxD: npt.ArrayLike,
    *,
    buckets: int | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    scaling: float = 5.0,
) -> dict[str, Score]:
    """`mauve` and `mauve_star`, from 0 to 1, each the mean over `seeds` of k-means.

    `buckets` is a tenth of the smaller set if not given. The flags name all that the
    values depend on but the model of the features. UserError if a set has fewer than
    AT_LEAST texts, widths differ or a number is not finite.
    """
    p_NxD, q_MxD = check_features(features_p_NxD, features_q_MxD, at_least=AT_LEAST)
    n, m = len(p_NxD), len(q_MxD)
    buckets = max(2, round(min(n, m) / 10)) if buckets is None else buckets
    points_TxC = project(p_NxD, q_MxD)
    # To six decimals, as the same vector may come out of two rows of a product a little apart.
    different = len(np.unique(points_TxC.round(6), axis=0))
    if not 2 <= buckets <= different:
        raise UserError(
            f"MAUVE with {buckets} buckets: there must be at least 2, and no more than the"
            f" {different} different feature vectors"
        )
    if not seeds:
        raise UserError("MAUVE without a seed: give at least one")
    values = []
    for seed in seeds:
        labels_T = quantise(points_TxC, buckets, seed)
        counts_p_K, counts_q_K = (
            np.bincount(part, minlength=buckets) for part in (labels_T[:n], labels_T[n:])
        )
        values.append(from_histograms(counts_p_K, counts_q_K, scaling))
    flags: dict[str, Flag] = {
        "buckets": buckets,
        "scaling": scaling,
        "mixtures": MIXTURES,
        "features": "l2-normalised",
        "pca": VARIANCE,
        "components": points_TxC.shape[1],
        "kmeans": f"k-means++, best of {RESTARTS}",
        "seeds": ",".join(map(str, seeds)),
        "n_p": n,
        "n_q": m,
    }
    return {
        name: Score(
            statistics.fmean(of_seeds),
            flags,
            spread=statistics.stdev(of_seeds) if len(seeds) > 1 else None,
            spread_over="seeds" if len(seeds) > 1 else "",
        )
        for name, of_seeds in zip(("mauve", "mauve_star"), zip(*values, strict=True), strict=True)
    }


def project(features_p_NxD: Floats, features_q_MxD: Floats) -> Floats:
    """Both sets, one after the other: scaled to length 1, then PCA to VARIANCE of the variance."""
    points_TxD = np.concatenate([features_p_NxD, features_q_MxD])
    lengths_Tx1 = np.linalg.norm(points_TxD, axis=1, keepdims=True)
    points_TxD = points_TxD / np.where(lengths_Tx1 > 0, lengths_Tx1, 1)
    points_TxD -= points_TxD.mean(0)
    variances_D, axes_DxD = np.linalg.eigh(points_TxD.T @ points_TxD)
    explained_D = np.cumsum(variances_D[::-1])
    kept = 1 + np.searchsorted(explained_D, VARIANCE * explained_D[-1])
    return points_TxD @ axes_DxD[:, ::-1][:, :kept]


def quantise(points_TxC: Floats, buckets: int, seed: int) -> Labels:
    """The bucket of each point, from 0: the best of RESTARTS runs of k-means."""
    rng = np.random.default_rng(seed)
    runs = [_lloyd(points_TxC, _first_centres(points_TxC, buckets, rng)) for _ in range(RESTARTS)]
    return min(runs, key=lambda run: run[1])[0]


def from_histograms(
    counts_p_K: npt.ArrayLike, counts_q_K: npt.ArrayLike, scaling: float = 5.0
) -> tuple[float, float]:
    """MAUVE and MAUVE* of texts counted in buckets, equations (2) and (3)."""
    counts = np.asarray(counts_p_K, np.float64), np.asarray(counts_q_K, np.float64)
    plain_p, plain_q = (count / count.sum() for count in counts)
    smooth_p, smooth_q = ((count + 0.5) / (count + 0.5).sum() for count in counts)
    return _area(plain_p, plain_q, scaling), _area(smooth_p, smooth_q, scaling)


def _area(p_K: Floats, q_K: Floats, scaling: float) -> float:
    # The paper has 0 < w < 1; how near to the ends it begins is that of the authors' package.
    weights = np.linspace(1e-6, 1 - 1e-6, MIXTURES)
    mixtures = [w * p_K + (1 - w) * q_K for w in weights]
    x = np.exp([0.0, *(-scaling * _kl(q_K, r_K) for r_K in mixtures), -np.inf])
    y = np.exp([-np.inf, *(-scaling * _kl(p_K, r_K) for r_K in mixtures), 0.0])
    return float(-np.trapezoid(y, x))  # x falls with w


def _kl(p_K: Floats, r_K: Floats) -> float:
    inside = p_K > 0
    return float(p_K[inside] @ np.log(p_K[inside] / r_K[inside]))


def _first_centres(points_TxC: Floats, buckets: int, rng: np.random.Generator) -> Floats:
    """k-means++: each next one is a point drawn by its squared distance to those before."""
    nearest_T = np.ones(len(points_TxC))
    centres = []
    for _ in range(buckets):
        centres.append(points_TxC[rng.choice(len(points_TxC), p=nearest_T / nearest_T.sum())])
        distances_T = np.square(points_TxC - centres[-1]).sum(1)
        nearest_T = distances_T if len(centres) == 1 else np.minimum(nearest_T, distances_T)
    return np.stack(centres)


def _lloyd(points_TxC: Floats, centres_KxC: Floats) -> tuple[Labels, float]:
    """Labels at which the centres rest, and the sum of squared distances to them."""
    buckets, rows = len(centres_KxC), np.arange(len(points_TxC))
    labels_T = np.full(len(points_TxC), -1)
    for _ in range(ITERATIONS):
        # Less the square of the point, which is the same for all centres.
        distances_TxK = np.square(centres_KxC).sum(1) - 2 * points_TxC @ centres_KxC.T
        before_T, labels_T = labels_T, distances_TxK.argmin(1)
        if np.array_equal(before_T, labels_T):
            break
        members_KxT = scipy.sparse.csr_array(
            (np.ones(len(rows)), (labels_T, rows)), shape=(buckets, len(rows))
        )
        sizes_Kx1 = np.bincount(labels_T, minlength=buckets)[:, None]
        # A bucket that has lost its last point goes to 0, the mean of all points.
        centres_KxC = members_KxT @ points_TxC / np.maximum(1, sizes_Kx1)
    return labels_T, float(np.square(points_TxC - centres_KxC[labels_T]).sum())
