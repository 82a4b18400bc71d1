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


def mixed(seed=0, n=300, m=250, shift=0.2):
    """Clouds that run into each other, so every seed of k-means cuts them differently."""
    rng = RNG(seed)
    centres = rng.normal(size=(20, 40))
    scale = np.exp(-np.arange(40) / 15)

    def draw(count, moved):
        near = centres[rng.integers(20, size=count)] + 0.7 * rng.normal(size=(count, 40))
        return (near * scale + moved).astype(np.float32)

    return draw(n, 0), draw(m, shift)


# Of each set: components kept, texts in the buckets of seed 0 and both scores of these, and the
# scores' mean and standard deviation over the seeds 0 to 19.
PACKAGE = {
    "apart": {
        "components": 5,
        "counts": (
            [8, 14, 10, 6, 2, 20],
            [12, 8, 10, 16, 10, 4],
        ),
        "scores": (0.66849502039, 0.712644707451),
        "over_seeds": {"mauve": (0.668495, 4.07e-17), "mauve_star": (0.712645, 3.42e-17)},
    },
    "mixed": {
        "components": 15,
        "counts": (
            [
                11,
                14,
                9,
                14,
                2,
                6,
                10,
                10,
                9,
                18,
                9,
                13,
                15,
                20,
                12,
                9,
                9,
                16,
                4,
                19,
                16,
                15,
                19,
                9,
                12,
            ],
            [
                14,
                9,
                19,
                9,
                10,
                5,
                10,
                6,
                5,
                13,
                12,
                8,
                18,
                8,
                10,
                12,
                6,
                9,
                4,
                15,
                11,
                11,
                7,
                10,
                9,
            ],
        ),
        "scores": (0.960933011094, 0.96724745388),
        "over_seeds": {"mauve": (0.88469, 0.0668), "mauve_star": (0.910742, 0.0522)},
    },
}
SETS = {"apart": apart, "mixed": mixed}


# The same of buckets that only one side has texts in: `mixed(shift=0.25)`, seed 0.
ONE_SIDED = (
    [10, 14, 0, 12, 14, 16, 19, 1, 0, 21, 0, 18, 20, 10, 13, 9, 15, 18, 18, 11, 9, 0, 18, 19, 15],
    [10, 9, 13, 9, 18, 11, 2, 14, 17, 15, 8, 18, 0, 5, 6, 0, 15, 13, 1, 0, 19, 16, 13, 7, 11],
)
ONE_SIDED_SCORES = (0.384327947705, 0.486576893329)


def within_noise(ours, seeds, theirs, their_seeds):
    """Whether two means over seeds are at most four standard errors apart."""
    mean, spread = theirs
    error = (ours.spread**2 / seeds + spread**2 / their_seeds) ** 0.5
    return abs(ours.value - mean) < 4 * error


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [(of["counts"], of["scores"]) for of in PACKAGE.values()] + [(ONE_SIDED, ONE_SIDED_SCORES)],
    ids=[*PACKAGE, "one-sided"],
)
def test_agrees_with_the_package_on_the_same_buckets(counts, wanted):
    assert from_histograms(*counts) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("name", SETS)
def test_prepares_features_as_the_package_does(name):
    scores = mauve(*SETS[name](), seeds=[0])
    assert scores["mauve"].flags["components"] == PACKAGE[name]["components"]
    assert scores["mauve"].flags["buckets"] == len(PACKAGE[name]["counts"][0])


def test_agrees_with_the_package_from_features_on():
    # All k-means agree here, so there is no noise to hide behind.
    scores = mauve(*apart())
    values = scores["mauve"].value, scores["mauve_star"].value
    assert values == pytest.approx(PACKAGE["apart"]["scores"], abs=1e-9)
    assert scores["mauve"].spread == pytest.approx(0, abs=1e-12)


def test_agrees_with_the_package_within_noise_of_seeds():
    for name, score in mauve(*mixed(), seeds=range(20)).items():
        theirs = PACKAGE["mixed"]["over_seeds"][name]
        assert within_noise(score, 20, theirs, 20), (score, theirs)
        assert theirs[1] / 2.5 < score.spread < theirs[1] * 2.5


def test_agrees_with_the_package_where_it_is_installed():
    package = pytest.importorskip("mauve", reason="mauve-text (GPLv3) is not installed; optional")
    p, q = mixed(seed=1, n=200, m=220)
    runs = [package.compute_mauve(p_features=p, q_features=q, seed=seed) for seed in range(8)]
    for run in runs:
        scores = from_histograms(run.p_hist * len(p), run.q_hist * len(q))
        assert scores == pytest.approx((run.mauve, run.mauve_star), abs=1e-6)
    for name, score in mauve(p, q, seeds=range(8)).items():
        values = [getattr(run, name) for run in runs]
        theirs = statistics.fmean(values), statistics.stdev(values)
        assert within_noise(score, 8, theirs, 8), (score, theirs)


def frontier_of_three_mixtures(scaling):
    """Area for p = (3/4, 1/4), q = (1/4, 3/4) and w = 0, 1/2, 1, segment by segment."""
    far = 3 ** (-scaling / 2)  # KL(p | q) = log(3) / 2
    # R = (1/2, 1/2): KL = log 2 - (entropy of p), entropy = log 4 - 3/4 log 3.
    middle = (2 / 3**0.75) ** scaling
    from_end = (1 - middle) * (far + middle) / 2
    to_end = (middle - far) * (middle + 1) / 2
    return from_end + to_end + far


def test_two_buckets_by_hand(monkeypatch):
    monkeypatch.setattr(module, "MIXTURES", 3)
    for scaling in (1, 5):
        wanted = frontier_of_three_mixtures(scaling)
        assert from_histograms([3, 1], [1, 3], scaling)[0] == pytest.approx(wanted, abs=1e-5)
        # One text and half a text make 3/4 of what two buckets hold.
        assert from_histograms([1, 0], [0, 1], scaling)[1] == pytest.approx(wanted, abs=1e-5)


def test_buckets_without_overlap():
    # R = (w, 1 - w), so the frontier is ((1 - w)^c, w^c): a straight line for c = 1, and for
    # c = 2 the area under it is 1/6, a little more by 25 chords.
    assert from_histograms([7, 0], [0, 3], 1)[0] == pytest.approx(1 / 2, abs=1e-6)
    assert 1 / 6 < from_histograms([7, 0], [0, 3], 2)[0] < 1 / 6 + 0.002


def test_histograms_are_treated_alike():
    p, q = RNG(2).multinomial(80, RNG(3).dirichlet(np.ones(9)), size=2)
    scores = from_histograms(p, q)
    assert from_histograms(q, p) == pytest.approx(scores)
    order = RNG(4).permutation(9)
    assert from_histograms(p[order], q[order]) == pytest.approx(scores)
    assert from_histograms(p, p) == pytest.approx((1, 1), abs=1e-12)
    # More of the same texts change nothing but how much is smoothed.
    plain, smooth = from_histograms(1000 * p, 1000 * q)
    assert plain == pytest.approx(scores[0])
    assert smooth == pytest.approx(plain, abs=1e-3)


def test_projection_keeps_as_much_as_it_should():
    p, q = mixed()
    joint = np.concatenate([p, q]).astype(np.float64)
    joint /= np.linalg.norm(joint, axis=1, keepdims=True)
    joint -= joint.mean(0)
    u, singular, _ = np.linalg.svd(joint, full_matrices=False)
    share = np.cumsum(singular**2) / np.sum(singular**2)
    kept = int(np.sum(share < 0.9)) + 1
    assert 2 < kept < 40
    points = project(p, q)
    np.testing.assert_allclose(np.abs(points), np.abs((u * singular)[:, :kept]), atol=1e-6)


def test_lengths_of_features_are_ignored():
    p, q = mixed()
    lengths = RNG(5).uniform(0.1, 10, size=(len(p), 1))
    changed, unchanged = mauve(p * lengths, q, seeds=[0]), mauve(p, q, seeds=[0])
    assert changed["mauve"].value == pytest.approx(unchanged["mauve"].value, abs=1e-6)


def test_clusters_are_as_tight_as_scipys():
    points, buckets = project(*mixed()), 25

    def looseness(labels):
        parts = [points[labels == k] for k in range(buckets)]
        return sum(np.sum((part - part.mean(0)) ** 2) for part in parts if len(part))

    theirs = [
        looseness(kmeans2(points, buckets, iter=100, minit="++", seed=seed)[1])
        for seed in range(15)
    ]
    ours = [looseness(quantise(points, buckets, seed)) for seed in range(3)]
    assert max(ours) < statistics.median(theirs)


def test_clusters_come_to_rest():
    points = project(*mixed())
    labels = quantise(points, 25, seed=0)
    centres = np.stack([points[labels == k].mean(0) for k in range(25)])
    distances = np.linalg.norm(points[:, None] - centres, axis=2)
    np.testing.assert_array_equal(distances.argmin(1), labels)


def test_repeated_points_take_no_more_than_one_bucket():
    points = np.repeat(RNG(6).normal(size=(12, 3)), [200, *range(1, 12)], axis=0)
    labels = quantise(points, 12, seed=0)
    assert len(set(zip(labels, points[:, 0], strict=True))) == len(set(labels)) == 12


def test_seeds_are_averaged():
    p, q = mixed(n=100, m=100)
    both = mauve(p, q, seeds=(3, 4))
    for name, score in both.items():
        values = [mauve(p, q, seeds=[seed])[name].value for seed in (3, 4)]
        assert values[0] != values[1]
        assert score.value == pytest.approx(sum(values) / 2, abs=1e-12)
        assert score.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert score.spread_over == "seeds"
    assert mauve(p, q, seeds=[3])["mauve"].spread is None
    assert mauve(p, q, seeds=(3, 4)) == both
    wanted = {"buckets": 10, "scaling": 5.0, "pca": 0.9, "seeds": "3,4", "n_p": 100, "n_q": 100}
    assert wanted.items() <= both["mauve"].flags.items()


def test_the_same_texts_score_one():
    p, _ = mixed()
    for score in mauve(p, p[::-1]).values():
        assert score.value == pytest.approx(1, abs=1e-9)


def test_texts_of_one_source_score_nearly_one():
    assert mauve(*mixed(shift=0))["mauve"].value > 0.93


@pytest.mark.parametrize(
    "change",
    [
        lambda q, amount: q + 1.2 * amount,
        lambda q, amount: np.concatenate(
            [q[: len(q) - int(amount * len(q))], np.repeat(q[:1], int(amount * len(q)), axis=0)]
        ),
    ],
    ids=["shifted", "collapsed"],
)
def test_farther_features_score_lower(change):
    p, q = mixed(n=250, shift=0)
    for name in ("mauve", "mauve_star"):
        scores = [mauve(p, change(q, amount))[name].value for amount in (0, 0.3, 0.6, 1)]
        assert scores == sorted(set(scores), reverse=True)
        assert scores[0] > 0.9
        assert scores[-1] < 0.1


@pytest.mark.parametrize(
    ("p", "q", "options", "message"),
    [
        (np.ones((49, 3)), np.ones((60, 3)), {}, "^49 feature vectors in the first .* least 50"),
        (np.ones((60, 3)), np.ones((60, 4)), {}, "3 wide in the first set and 4 in the second"),
        (np.ones((60, 3)), np.full((60, 3), np.nan), {}, "vector 1 of the second .*60 of 60"),
        (np.ones((60, 3)), np.ones((60, 3)), {}, "6 buckets: .* 1 different feature vectors"),
        (*apart(), {"buckets": 1}, "1 buckets: there must be at least 2"),
        (*apart(), {"buckets": 121}, "121 buckets: .* 120 different"),
        (*apart(), {"seeds": ()}, "without a seed"),
    ],
)
def test_bad_input_is_an_error(p, q, options, message):
    with pytest.raises(UserError, match=message):
        mauve(p, q, **options)


def test_fifty_texts_a_side_are_enough():
    p, q = mixed(n=50, m=50)
    assert 0 < mauve(p, q)["mauve"].value <= 1
