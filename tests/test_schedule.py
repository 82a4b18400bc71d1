"""The tan-d schedule against numpy in double precision and its own definition."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_jax.diffusion.schedule import TanSchedule

WIDTHS = (5.0, 7.0, 9.0)


def alpha64(t, d):
    """The definition in double precision; cos and sin keep it exact at t = 1."""
    cos, sin = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
    return cos / np.sqrt(cos**2 + d**2 * sin**2)


@pytest.mark.parametrize("d", WIDTHS)
def test_alpha_and_sigma_follow_the_definition(d):
    t = np.linspace(0, 1, 401)
    schedule = TanSchedule(d)
    alpha, sigma = schedule.alpha(jnp.asarray(t)), schedule.sigma(jnp.asarray(t))
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_allclose(alpha, alpha64(t, d), atol=1e-6)
    np.testing.assert_allclose(sigma[1:], np.sqrt(1 - alpha64(t, d) ** 2)[1:], rtol=1e-4)


@pytest.mark.parametrize("d", WIDTHS)
def test_beta_is_minus_twice_the_slope_of_log_alpha(d):
    t, h = np.linspace(0.01, 0.949, 200), 1e-6
    slope = (np.log(alpha64(t + h, d)) - np.log(alpha64(t - h, d))) / (2 * h)
    np.testing.assert_allclose(TanSchedule(d).beta(jnp.asarray(t)), -2 * slope, rtol=2e-5)


@pytest.mark.parametrize("d", WIDTHS)
def test_beta_is_constant_from_0_95(d):
    schedule = TanSchedule(d)
    late = schedule.beta(jnp.array([0.95, 0.97, 1.0]))
    np.testing.assert_array_equal(late, late[0])
    assert schedule.beta(0.949) < late[0] < np.inf


@pytest.mark.parametrize("d", WIDTHS)
def test_ends_are_clean_and_noise(d):
    schedule = TanSchedule(d)
    assert schedule.alpha(0.0) == 1
    assert schedule.sigma(0.0) == 0
    assert 0 < schedule.alpha(1.0) < 1e-6
    assert schedule.sigma(1.0) == 1


@given(
    t=st.floats(0.001, 0.999),
    later=st.floats(0.01, 0.5),
    d=st.floats(1, 10),
    wider=st.floats(1.1, 3),
)
def test_noise_grows_with_time_and_with_d(t, later, d, wider):
    signal = TanSchedule(d).alpha(t)
    assert TanSchedule(d * wider).alpha(t) < signal
    assert TanSchedule(d).alpha(t + later * (1 - t)) < signal
    np.testing.assert_allclose(signal**2 + TanSchedule(d).sigma(t) ** 2, 1, atol=2e-7)
