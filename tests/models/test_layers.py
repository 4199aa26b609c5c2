"""Conventions that are easy to get wrong and change every number: norms, activations, paddings, blends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from bounds import close

from keysync_jax.models import layers
from keysync_jax.models.resblock import TemporalResBlock
from keysync_jax.models.transformer import GEGLU
from keysync_jax.models.vae import EncoderDownsample, ResnetBlock

KEY = jax.random.key(0)


def test_sinusoid_is_cosines_then_sines():
    got = np.asarray(layers.sinusoidal_embedding(jnp.float32([0.0, 3.0]), 8))
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    cosines, sines = np.cos(3 * frequencies), np.sin(3 * frequencies)
    close(got[1], [*cosines, *sines], 8, scale=1, wrong=[*sines, *cosines])
    np.testing.assert_array_equal(got[0], [1, 1, 1, 1, 0, 0, 0, 0])
    assert layers.sinusoidal_embedding(jnp.zeros((2, 3)), 7).shape == (2, 3, 7)


def test_geglu_is_exact_and_value_comes_first():
    x = np.linspace(-3, 3, 12, dtype=np.float32)[:, None]
    kernel = np.float32([[2.0, 1.0]])  # value = 2x, gate = x
    params = {"proj": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}
    got = GEGLU(1).apply({"params": params}, x)
    exact = 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))
    # Below zero, 1 + erf is a difference of numbers near one: the size is that of 2 x * x.
    close(got, 2 * x * exact, 4, scale=2 * x * x, wrong=2 * x * np.asarray(jax.nn.gelu(x, approximate=True)))


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_group_norm_pools_frames_and_clips(epsilon):
    """Over H, W of a frame for [B, T, H, W, C]; over T and space of a video for [B, T, S, C]. Small values show the epsilon."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, 3, 4, 5, 64)).astype(np.float32) + np.arange(3).reshape(3, 1, 1, 1) * 1e-3
    module = layers.group_norm("norm", epsilon)
    params = {"params": {"scale": np.ones(64, np.float32), "bias": np.zeros(64, np.float32)}}

    def expected(x, axes):
        grouped = x.reshape(*x.shape[:-1], 32, 2).astype(np.float64)
        mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
        return ((grouped - mean) / np.sqrt(var + epsilon)).reshape(x.shape)

    # Means over 40 and 120 values, twice; the variance is a mean of squares less a square, which are a few times as large.
    close(module.apply(params, x), expected(x, (2, 3, 5)), 4, terms=40, wrong=expected(x, (1, 2, 3, 5)))
    video = x.reshape(2, 3, 20, 64)
    close(module.apply(params, video), expected(video, (1, 2, 4)), 4, terms=120, wrong=expected(video, (2, 4)))


def test_group_norm_statistics_are_float32_in_bfloat16():
    x = 100 + np.random.default_rng(0).standard_normal((1, 1, 8, 8, 32)).astype(np.float32)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    params = {"params": {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)}}
    low = layers.group_norm("norm", 1e-5, jnp.bfloat16).apply(params, jnp.asarray(x, jnp.bfloat16))
    high = layers.group_norm("norm", 1e-5).apply(params, x)
    assert low.dtype == jnp.bfloat16
    # One rounding of the result to bfloat16. Statistics in bfloat16 would read every value as one of 100, 100.5, ...: off by a quarter.
    close(np.asarray(low, np.float32), high, 1, dtype="bfloat16")


def _impulse_response(module, size, channels=1):
    """Positions of the input that each output position reads, for a module with a single all-ones 3x3 kernel."""
    params = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(module.init, KEY, jnp.zeros((1, size, size, channels)))["params"]
    )
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * (path[-1].key == "kernel"), params)
    eye = jnp.eye(size)[:, :, None, None] * jnp.ones((1, 1, size, channels))  # row impulses
    return np.asarray(module.apply({"params": params}, eye))[:, :, 1, 0] > 0  # [row of the impulse, output row]


def test_unet_downsample_pads_both_sides():
    reads = _impulse_response(layers.Downsample(), 6)
    assert [list(np.flatnonzero(column)) for column in reads.T] == [[0, 1], [1, 2, 3], [3, 4, 5]]


def test_vae_downsample_pads_the_end_only():
    reads = _impulse_response(EncoderDownsample(), 6)
    assert [list(np.flatnonzero(column)) for column in reads.T] == [[0, 1, 2], [2, 3, 4], [4, 5]]


def test_upsample_repeats_neighbours():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(layers.upsample_nearest(x)[0, :, :, 0], [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])


@pytest.mark.parametrize(
    ("strategy", "alpha", "with_image"), [("fixed", 2.0, 2.0), ("learned", 0.8807971, 0.8807971), ("learned_with_images", 0.8807971, 1.0)]
)
def test_unet_blend_weights_the_spatial_branch(strategy, alpha, with_image):
    spatial, temporal = np.full((1, 2, 3), 10.0, np.float32), np.full((1, 2, 3), 1.0, np.float32)
    params = {"params": {"mix_factor": np.float32([2.0])}}
    got = layers.AlphaBlender(strategy).apply(params, spatial, temporal, np.float32([[0, 1]]))
    close(got[0, :, 0], [1 + 9 * alpha, 1 + 9 * with_image], 8)
    close(layers.AlphaBlender(strategy).apply(params, spatial, temporal)[0, :, 0], [1 + 9 * alpha] * 2, 8)


def test_fixed_blend_has_no_gradient():
    x = np.ones((1, 2, 3), np.float32)

    def loss(factor, strategy):
        return layers.AlphaBlender(strategy).apply({"params": {"mix_factor": factor}}, x, 2 * x).sum()

    assert jax.grad(loss)(jnp.ones(1), "fixed") == 0
    assert jax.grad(loss)(jnp.ones(1), "learned") != 0


def test_vae_blend_weights_the_temporal_branch():
    """With a mix factor that saturates the sigmoid, the VAE's block is the temporal branch alone."""
    module = ResnetBlock(32, temporal_kernel=3)
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 2, 32)).astype(np.float32)
    shapes = jax.eval_shape(module.init, KEY, x)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    spatial_params = {name: value for name, value in params.items() if name not in ("time_stack", "mix_factor")}
    spatial = ResnetBlock(32).apply({"params": spatial_params}, x)
    temporal = TemporalResBlock().apply({"params": params["time_stack"]}, spatial.reshape(1, 3, 4, 32)).reshape(x.shape)
    for factor, expected, other in ((30.0, temporal, spatial), (-30.0, spatial, temporal)):
        got = module.apply({"params": {**params, "mix_factor": np.float32([factor])}}, x)
        close(got, expected, 8, terms=9 * 32, wrong=other)  # four convolutions
