"""Fréchet distance of two sets of features, each taken as a Gaussian.

With means mu and covariances S (Dowson & Landau 1982; Heusel et al. 2017):

    (1) d^2 = |mu_P - mu_Q|^2 + tr S_P + tr S_Q - 2 tr (S_P S_Q)^(1/2)

If S_P = A^T A and S_Q = B^T B, the last trace is the sum of the singular values of A B^T.
So no root of a matrix is taken: covariances of any rank will do, to full precision, and
with fewer vectors than dimensions no covariance is formed. Shapes: N, M vectors, D dimensions.
"""

import numpy as np
import numpy.typing as npt

from cosmos_jax.errors import UserError
from cosmos_jax.scores.score import Score


def frechet_distance(features_p_NxD: npt.ArrayLike, features_q_MxD: npt.ArrayLike) -> Score:
    """Equation (1), squared as is usual, with unbiased covariances.

    UserError if a set has fewer than two vectors, widths differ or a number is not finite.
    """
    p_NxD, q_MxD = check_features(features_p_NxD, features_q_MxD, at_least=2)
    mean_p_D, mean_q_D = p_NxD.mean(0), q_MxD.mean(0)
    factor_p, factor_q = _factor(p_NxD - mean_p_D), _factor(q_MxD - mean_q_D)
    cross = np.linalg.svd(factor_p @ factor_q.T, compute_uv=False).sum()
    squared = (
        np.square(mean_p_D - mean_q_D).sum()
        + np.square(factor_p).sum()
        + np.square(factor_q).sum()
        - 2 * cross
    )
    flags = {
        "squared": True,
        "covariance": "n-1",
        "dimensions": p_NxD.shape[1],
        "n_p": len(p_NxD),
        "n_q": len(q_MxD),
    }
    return Score(max(0.0, float(squared)), flags)


def check_features(
    features_p_NxD: npt.ArrayLike, features_q_MxD: npt.ArrayLike, *, at_least: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Both sets in double precision; UserError if they cannot be compared."""
    p, q = np.asarray(features_p_NxD, np.float64), np.asarray(features_q_MxD, np.float64)
    for name, features in (("first", p), ("second", q)):
        if features.ndim != 2:
            raise UserError(
                f"features of the {name} set have shape {features.shape}; give one vector a text"
            )
        if len(features) < at_least:
            raise UserError(
                f"{len(features)} feature vectors in the {name} set; at least {at_least} are needed"
            )
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        if bad.size:
            raise UserError(
                f"feature vector {bad[0] + 1} of the {name} set is not finite"
                f" ({bad.size} of {len(features)} are not); look at that text and its features"
            )
    if p.shape[1] != q.shape[1]:
        raise UserError(
            f"features are {p.shape[1]} wide in the first set and {q.shape[1]} in the second;"
            " take both from the same model"
        )
    return p, q


def _factor(centred_NxD: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A with A^T A the covariance, and no more rows than needed."""
    scaled = centred_NxD / np.sqrt(len(centred_NxD) - 1)
    return scaled if len(scaled) <= scaled.shape[1] else np.linalg.qr(scaled).R
