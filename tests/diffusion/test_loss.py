"""Training loss against hand-written NumPy, and its gradient through a decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import close

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.diffusion.inpainting import denoise
from keysync_jax.diffusion.loss import LossConfig, PixelTargets, noised, prediction_loss

B, T, H, W = 2, 3, 5, 4


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, B, T, H, W, 4)).astype(np.float32)
    masks = np.zeros((B, T, H, W, 1), np.float32)
    masks[:, :, 2:] = 1
    conditions = Conditions(np.zeros((B, H, W, 4), np.float32), np.zeros((B, T, 3), np.float32), latents, masks)
    return latents, noise, np.float32([0.7, 4.0]), conditions


def diffusion_loss(network, latents, noise, sigma, conditions, config=LossConfig(), **pixels):
    denoised = denoise(network, noised(latents, noise, sigma), sigma, conditions)
    return prediction_loss(denoised, latents, sigma, conditions.masks, config, **pixels)


def zero_network(x, c_noise, conditions):
    return jnp.zeros_like(x)


def expected_error(batch):
    """Prediction error of the zero network, whose prediction is c_skip x inside the mask."""
    latents, noise, sigma, conditions = batch
    sigma = sigma[:, None, None, None, None]
    error = (latents + sigma * noise) / (sigma**2 + 1) - latents
    return error * conditions.masks, (sigma**2 + 1) / sigma**2


def test_latent_terms(batch):
    error, weight = expected_error(batch)
    l2 = diffusion_loss(zero_network, *batch)
    close(l2.latent, (weight * error**2).mean((2, 3, 4)), 4, scale="each", terms=80, wrong=(error**2).mean((2, 3, 4)))
    np.testing.assert_array_equal(l2.per_frame, l2.latent)  # no other term: the same array
    close(l2.mean, (weight * error**2).mean(), 2, terms=480)
    assert l2.pixels == {}
    l1 = diffusion_loss(zero_network, *batch, LossConfig(latent_loss="l1"))
    close(l1.latent, (weight * np.abs(error)).mean((2, 3, 4)), 4, scale="each", terms=80)


def test_halves_are_weighted_by_row(batch):
    error, weight = expected_error(batch)
    rows = np.float32([3, 3, 2, 2, 2])[:, None, None]  # five rows: the lower half starts at the third
    weighted = diffusion_loss(zero_network, *batch, LossConfig(upper_weight=3, lower_weight=2))
    shifted = (weight * np.roll(rows, 1, axis=0) * error**2).mean((2, 3, 4))
    close(weighted.latent, (weight * rows * error**2).mean((2, 3, 4)), 4, scale="each", terms=80, wrong=shifted)


def test_known_region_costs_nothing(batch):
    latents, noise, sigma, conditions = batch
    nothing = conditions._replace(masks=np.zeros_like(conditions.masks))
    np.testing.assert_array_equal(diffusion_loss(zero_network, latents, noise, sigma, nothing).per_frame, 0)


def test_perfect_network_costs_nothing(batch):
    latents, noise, sigma, conditions = batch

    def perfect(x, c_noise, conditions):
        s = jnp.exp(4 * c_noise)[:, None, None, None, None]
        alpha = 1 / jnp.sqrt(1 + s**2)
        return alpha * noise - alpha * s * latents  # the velocity, see test_preconditioning

    whole = conditions._replace(masks=np.ones_like(conditions.masks))
    # The error is rounding of the noisy latents, and weighted by 3 at most.
    size = np.abs(sigma[:, None, None, None, None] * noise).max()
    close(np.sqrt(diffusion_loss(perfect, latents, noise, sigma, whole).mean), 0, 4, scale=size)
    assert diffusion_loss(zero_network, latents, noise, sigma, whole).mean > 0.1


def decode(z):
    """Stand-in decoder: each latent becomes a 2x2 block of pixels."""
    return 0.25 * jnp.repeat(jnp.repeat(z[..., :3], 2, axis=2), 2, axis=3)


def pixel_targets(indices):
    frames = np.random.default_rng(5).uniform(-1, 1, size=(B, len(indices), 2 * H, 2 * W, 3)).astype(np.float32)
    return PixelTargets(np.array(indices), frames)


@pytest.mark.parametrize("mask_pixels", [False, True])
def test_pixel_terms(batch, mask_pixels):
    _, weight = expected_error(batch)
    pixels = pixel_targets([2, 0])
    config = LossConfig(pixel_weight=0.5, pixel_losses=("l1", "l2"), mask_pixels=mask_pixels)
    losses = diffusion_loss(zero_network, *batch, config, decode=decode, pixels=pixels)
    chosen = np.asarray(losses.denoised)[:, [2, 0]] / 0.18215
    images = np.clip(np.asarray(decode(chosen)), -1, 1)
    assert (np.abs(images) == 1).any()  # the clip matters in this test
    difference = images - pixels.frames
    if mask_pixels:
        difference[:, :, :4] = 0
    l1, l2 = 0.5 * (weight * np.abs(difference)).mean(), 0.5 * (weight * difference**2).mean()
    close(losses.pixels["l1"], l1, 2, terms=960)
    close(losses.pixels["l2"], l2, 2, terms=960)
    close(losses.per_frame, losses.latent + l1 + l2, 2, terms=960)


def test_gradient_flows_through_the_decoder(batch):
    latents, noise, sigma, conditions = batch
    pixels = pixel_targets([1])
    config = LossConfig(pixel_weight=1.0)

    def loss(gain):
        def linear(x, c_noise, conditions):
            return gain * x

        return diffusion_loss(linear, latents, noise, sigma, conditions, config, decode=decode, pixels=pixels)

    gradient = jax.grad(lambda gain: loss(gain).pixels["l2"])(0.3)
    step = 1e-2
    numeric = (loss(0.3 + step).pixels["l2"] - loss(0.3 - step).pixels["l2"]) / (2 * step)
    assert abs(gradient) > 1e-3
    # Of a hundred pixels, one or two reach the clip between 0.3 - step and 0.3 + step: there the difference is no derivative.
    assert gradient == pytest.approx(float(numeric), rel=0.02)


def test_pixel_term_needs_a_decoder_and_frames(batch):
    with pytest.raises(KeySyncError, match="pixel loss needs"):
        diffusion_loss(zero_network, *batch, LossConfig(pixel_weight=1.0), pixels=pixel_targets([0]))
    with pytest.raises(KeySyncError, match="pixel loss needs"):
        diffusion_loss(zero_network, *batch, LossConfig(pixel_weight=1.0), decode=decode)


@pytest.mark.parametrize("config", [{"latent_loss": "lpips"}, {"pixel_losses": ("l2", "id")}, {"pixel_weight": -1.0}])
def test_unknown_losses_are_refused(config):
    with pytest.raises(KeySyncError):
        LossConfig(**config)
