"""Preconditioning, loss weights and noise levels against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import close, spread

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import preconditioning, schedules, sigma_sampling
from keysync_jax.verify import reference_scalings

SIGMA = jnp.asarray(np.geomspace(2e-3, 700, 23), jnp.float32)


@pytest.mark.parametrize(
    ("scaling", "sigma_data", "weighting"),
    [
        (preconditioning.v_scaling_edm_noise, 1.0, preconditioning.v_weighting),
        (reference_scalings.v_scaling, 1.0, preconditioning.v_weighting),
        (reference_scalings.edm_scaling, 0.5, reference_scalings.edm_weighting),
    ],
)
def test_unit_variance_in_and_out(scaling, sigma_data, weighting):
    """Input and training target of the network have unit variance (Karras et al. 2022, Appendix B.6), weight * c_out^2 = 1."""
    c_skip, c_out, c_in, _ = scaling(SIGMA)
    close(c_in**2 * (SIGMA**2 + sigma_data**2), 1, 8)
    # At small sigma 1 - c_skip is a difference of two numbers near one, but then it counts with sigma^2 only.
    close(((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * SIGMA**2) / c_out**2, 1, 16)
    close(weighting(SIGMA) * c_out**2, 1, 8)


def test_noise_labels():
    close(preconditioning.v_scaling_edm_noise(SIGMA).c_noise, np.log(SIGMA) / 4, 4)
    close(reference_scalings.edm_scaling(SIGMA).c_noise, np.log(SIGMA) / 4, 4)
    np.testing.assert_array_equal(reference_scalings.v_scaling(SIGMA).c_noise, SIGMA)
    np.testing.assert_array_equal(reference_scalings.eps_scaling(SIGMA).c_noise, SIGMA)


def test_noise_prediction_recovers_the_clean_signal():
    clean, noise = np.random.default_rng(0).normal(size=(2, *SIGMA.shape)).astype(np.float32)
    c_skip, c_out, _, _ = reference_scalings.eps_scaling(SIGMA)
    recovered = c_skip * (clean + SIGMA * noise) + c_out * noise
    close(recovered, clean, 4, scale=np.abs(clean) + SIGMA * np.abs(noise))
    close(reference_scalings.eps_weighting(SIGMA) * SIGMA**2, 1, 8)
    np.testing.assert_array_equal(reference_scalings.unit_weighting(SIGMA), 1)


def test_velocity_prediction_recovers_the_clean_signal():
    """With alpha = 1/sqrt(1+s^2) the network output is v = alpha noise - alpha s clean, up to the sign that c_out carries."""
    clean, noise = np.random.default_rng(1).normal(size=(2, *SIGMA.shape)).astype(np.float32)
    alpha = 1 / np.sqrt(1 + np.asarray(SIGMA) ** 2)
    velocity = alpha * noise - alpha * SIGMA * clean
    c_skip, c_out, _, _ = reference_scalings.v_scaling(SIGMA)
    close(c_skip * (clean + SIGMA * noise) + c_out * velocity, clean, 8, scale=np.abs(clean) + np.abs(noise))


def test_ten_steps_are_eleven_evaluations():
    sigmas = schedules.ays_sigmas(10)
    assert sigmas.dtype == np.float64
    assert len(sigmas) == 12
    assert sigmas[0] == 700
    assert sigmas[-2:].tolist() == [0.002, 0.0]
    close(schedules.ays_sigmas(11), sigmas, 16, scale="each", dtype=np.float64)


def test_more_steps_resample_log_linearly():
    expected = [700, 113.0234, 32.1327, 14.3971, 8.8019, 5.565, 3.318, 1.789, 1.1647, 0.67, 0.3571, 0.1952, 0.0683, 0.0151, 0.002, 0]
    np.testing.assert_allclose(schedules.ays_sigmas(15), expected, rtol=0, atol=0.501e-4)  # printed to four decimals
    for n in range(11, 60):
        sigmas = schedules.ays_sigmas(n)
        assert len(sigmas) == n + 1
        assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize(("strength", "length"), [(1.0, 12), (0.75, 9), (0.5, 6), (0.1, 1), (0.0, 1)])
def test_strength_leaves_out_the_beginning(strength, length):
    np.testing.assert_array_equal(schedules.ays_sigmas(10, strength), schedules.ays_sigmas(10)[12 - length :])


def test_too_few_steps_are_refused_by_option_name():
    with pytest.raises(KeySyncError, match="--steps 9"):
        schedules.ays_sigmas(9)
    with pytest.raises(KeySyncError, match="strength"):
        schedules.ays_sigmas(10, 1.5)


def test_sigmas_are_log_normal():
    sigma = sigma_sampling.sigmas_from_normals(jax.random.normal(jax.random.key(3), (20000,)))
    assert sigma.dtype == jnp.float32
    logs = np.log(sigma)
    assert logs.mean() == pytest.approx(1.0, abs=spread(1.2, 20_000))
    assert logs.std() == pytest.approx(1.2, abs=spread(1.2, 2 * 20_000))
