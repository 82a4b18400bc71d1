"""Fréchet distance against closed forms and scipy's root of a matrix."""

import numpy as np
import pytest
import scipy.linalg

from cosmos_jax.errors import UserError
from cosmos_jax.scores.frechet import frechet_distance

RNG = np.random.default_rng


def correlated(seed, n, width):
    rng = RNG(seed)
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def by_definition(p, q):
    cov_p, cov_q = np.cov(p.T), np.cov(q.T)
    root = scipy.linalg.sqrtm(cov_p @ cov_q)
    return np.sum((p.mean(0) - q.mean(0)) ** 2) + np.trace(cov_p + cov_q - 2 * root.real)


@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 2), (60, 500, 24), (400, 400, 100)])
def test_agrees_with_scipy(n, m, width):
    p, q = correlated(0, n, width), correlated(1, m, width)
    assert frechet_distance(p, q).value == pytest.approx(by_definition(p, q), rel=1e-9)


def test_in_one_dimension():
    p, q = np.array([[0.0], [2.0]]), np.array([[3.0], [4.0], [5.0], [6.0]])
    # Means 1 and 4.5, variances 2 and 5/3.
    wanted = 3.5**2 + (np.sqrt(2) - np.sqrt(5 / 3)) ** 2
    assert frechet_distance(p, q).value == pytest.approx(wanted, rel=1e-12)


# With 20 vectors of width 50 the covariance is singular; all forms hold as they do at full rank.
@pytest.mark.parametrize(("n", "width"), [(200, 10), (20, 50)])
def test_closed_forms(n, width):
    p, shift = correlated(2, n, width), RNG(3).normal(size=width)
    centred = p - p.mean(0)
    trace = np.trace(np.cov(p.T))
    tolerance = 1e-11 * trace
    assert frechet_distance(p, p[::-1]).value == pytest.approx(0, abs=tolerance)
    assert frechet_distance(p, p + shift).value == pytest.approx(shift @ shift, abs=tolerance)
    # Roots of covariances that commute: |1 - 3|^2 tr S.
    assert frechet_distance(centred, 3 * centred).value == pytest.approx(4 * trace)


def test_one_set_collapsed_to_a_point():
    p = correlated(4, 100, 6)
    wanted = np.trace(np.cov(p.T)) + np.sum((p.mean(0) - 1) ** 2)
    assert frechet_distance(p, np.ones((30, 6))).value == pytest.approx(wanted, rel=1e-12)


def test_spaces_without_a_common_direction():
    line = RNG(5).normal(size=40)
    p, q = np.zeros((40, 3)), np.zeros((40, 3))
    p[:, 0], q[:, 2] = line - line.mean(), 2 * (line - line.mean())
    assert frechet_distance(p, q).value == pytest.approx(5 * np.var(line, ddof=1), rel=1e-12)


def test_a_rotation_and_a_swap_change_nothing():
    p, q = correlated(6, 80, 12), correlated(7, 90, 12)
    rotation = np.linalg.qr(RNG(8).normal(size=(12, 12))).Q
    value = frechet_distance(p, q).value
    assert frechet_distance(p @ rotation, q @ rotation).value == pytest.approx(value, rel=1e-9)
    assert frechet_distance(q, p).value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, amount: q + amount,
        lambda q, amount: q + 3 * amount * RNG(9).normal(size=q.shape),
        lambda q, amount: q * (1 - amount) + q.mean(0) * amount,
    ],
    ids=["shifted", "noised", "collapsed"],
)
def test_farther_features_score_higher(change):
    rng = RNG(10)
    p, q = rng.normal(size=(2, 500, 16))
    scores = [frechet_distance(p, change(q, amount)).value for amount in (0, 0.25, 0.5, 1)]
    assert scores == sorted(set(scores))
    assert scores[-1] > 10 * scores[0]


def test_flags_name_what_the_value_depends_on():
    score = frechet_distance(correlated(0, 30, 4), correlated(1, 40, 4))
    assert score.signature() == "squared:yes|covariance:n-1|dimensions:4|n_p:30|n_q:40"


def test_single_precision_is_enough():
    p, q = correlated(11, 100, 8), correlated(12, 100, 8)
    single = frechet_distance(p.astype(np.float32), q.astype(np.float32)).value
    assert single == pytest.approx(frechet_distance(p, q).value, rel=1e-5)


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "^1 feature vectors in the first set; at least 2"),
        (np.zeros((5, 3)), np.zeros((0, 3)), "^0 feature vectors in the second set; at least 2"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "3 wide in the first set and 4 in the second"),
        (np.zeros(5), np.zeros((5, 4)), r"first set have shape \(5,\)"),
        (np.zeros((5, 1)), [[0], [1], [np.nan], [np.inf]], "vector 3 of the second .*2 of 4"),
    ],
)
def test_bad_features_are_an_error(p, q, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(p, q)
