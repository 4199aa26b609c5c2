"""The autoencoder beyond what the reference cases fix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from bounds import close
from flax.errors import ScopeParamNotFoundError

from keysync_jax.config import VAEConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.stage import init_vae_params
from keysync_jax.models.vae import VAE, sample_posterior

# One level, since compiling is what takes time here, and the decoder that mixes frames.
TINY = dataclasses.replace(tiny.VAE, channel_mult=(1,), decoder=VAEConfig().decoder)


@functools.cache
def params_of(config=TINY):
    return init_vae_params(config, 0, gain=3**0.5)


@functools.cache
def jitted(model, method):
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))


def run(x, method, config=TINY, dtype=jnp.float32, params=None):
    return jax.tree.map(np.asarray, jitted(VAE(config, dtype), method)(params or params_of(config), x))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


Z = draw(2, 3, 4, 5, 4)


def test_frames_decoded_together_mix_and_alone_do_not():
    together, alone = run(Z, "decode"), run(Z.reshape(6, 1, 4, 5, 4), "decode").reshape(2, 3, 4, 5, 3)
    assert np.abs(together - alone).max() > 1e-2
    other = Z.copy()
    other[:, 2] += 1
    changed = np.abs(run(other, "decode") - together).max(axis=(0, 2, 3, 4))
    assert (changed > 1e-3).all()
    changed = np.abs(run(other.reshape(6, 1, 4, 5, 4), "decode").reshape(alone.shape) - alone).max(axis=(0, 2, 3, 4))
    assert (changed[:2] == 0).all() and changed[2] > 1e-2


def test_image_decoder_never_mixes_frames():
    config = dataclasses.replace(TINY, decoder="image", post_quant_conv=True)
    together, alone = run(Z, "decode", config), run(Z.reshape(6, 1, 4, 5, 4), "decode", config)
    # Some ten convolutions of 3 x 3 x 32 in a row, over batches of another form.
    close(together.reshape(alone.shape), alone, 8, terms=9 * 32, wrong=np.roll(alone, 1, axis=0))


def test_odd_sizes_round_down():
    config = dataclasses.replace(TINY, channel_mult=(1, 1, 1))
    mean, logvar = jitted(VAE(config), "encode_moments").eval_shape(params_of(config), draw(1, 27, 20, 3))
    assert mean.shape == logvar.shape == (1, 6, 5, 4)


def test_bfloat16_is_close():
    full, low = run(Z, "decode"), run(Z, "decode", dtype=jnp.bfloat16)
    assert low.dtype == np.float32 and full.std() > 0.1
    assert 1e-5 < np.abs(full - low).max() / full.std() < 0.2


def test_log_variance_is_clamped_and_the_mean_is_not():
    params = jax.tree.map(lambda leaf: leaf, params_of())
    bias = np.float32([50, 50, 50, 50, -50, 50, 1, 0])
    params["first_stage_model"]["quant_conv"] = {"kernel": np.zeros((1, 1, 8, 8), np.float32), "bias": bias}
    mean, logvar = run(draw(1, 4, 4, 3), "encode_moments", params=params)
    assert (mean == 50).all()
    np.testing.assert_array_equal(logvar[0, 0, 0], [-30, 20, 1, 0])


def test_posterior_sample():
    mean, logvar, noise = np.float32([1.0, 2.0]), np.log(np.float32([4.0, 9.0])), np.float32([1.0, -1.0])
    close(sample_posterior(mean, logvar, noise), [3.0, -1.0], 8)


def test_a_part_needs_its_own_parameters_only():
    """KeySync's checkpoints have no encoder."""
    tree = params_of()["first_stage_model"]
    decoder = {"first_stage_model": {"decoder": tree["decoder"]}}
    assert jitted(VAE(TINY), "decode").eval_shape(decoder, Z).shape == (2, 3, 4, 5, 3)
    encoder = {"first_stage_model": {"encoder": tree["encoder"], "quant_conv": tree["quant_conv"]}}
    assert jitted(VAE(TINY), "encode_moments").eval_shape(encoder, draw(1, 8, 8, 3))[0].shape == (1, 8, 8, 4)
    with pytest.raises(ScopeParamNotFoundError):
        jitted(VAE(TINY), "decode").eval_shape(encoder, Z)


def test_wrong_shapes_are_named():
    with pytest.raises(KeySyncError, match=r"\[N, H, W, 3\]"):
        run(draw(1, 8, 8, 4), "encode_moments")
    with pytest.raises(KeySyncError, match=r"\[B, T, h, w, 4\]"):
        run(draw(2, 4, 4, 4), "decode")
