"""Minimum Bayes risk against cases that can be seen by eye."""

import pytest

from cosmos_jax.consensus import best


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (["alone"], "alone"),
        (["a b c d", "a b c e", "x y z"], "a b c d"),  # of equals the first
        (["x y z", "a b c d", "a b c d e f", "a b c"], "a b c d"),
        (["", "", "a"], ""),
        (["a", "b", "c"], "a"),
    ],
)
def test_the_one_that_the_others_agree_with_most(candidates, expected):
    assert best(candidates) == expected
