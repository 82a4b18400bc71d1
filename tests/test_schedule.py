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


@pytest.mark.parametrize("d", WIDTHS)
def test_half_log_snr_is_the_logarithm_of_alpha_over_sigma(d):
    """Close to 1 and to 0 too, where in fp32 sigma or 1 - alpha is nothing but rounding."""
    t = np.concatenate([np.linspace(0.01, 0.99, 99), [1e-5, 1e-3, 0.999, 1 - 2**-20]])
    t = t.astype(np.float32).astype(np.float64)
    expected = np.log(np.cos(np.pi * t / 2)) - np.log(d * np.sin(np.pi * t / 2))
    schedule = TanSchedule(d)
    found = schedule.half_log_snr(jnp.asarray(t))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    middle = t[:99]
    alpha = alpha64(middle, d)
    np.testing.assert_allclose(found[:99], np.log(alpha / np.sqrt(1 - alpha**2)), atol=1e-5)
    np.testing.assert_allclose(schedule.time(found), t, rtol=2e-6)
    assert schedule.half_log_snr(1.0) == -np.inf
    assert schedule.half_log_snr(0.0) == np.inf
    assert schedule.time(np.inf) == 0
    assert schedule.time(-np.inf) == 1


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
