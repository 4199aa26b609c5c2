"""The U-Net beyond what the reference cases fix: types, call forms, work done once, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from bounds import close

from keysync_jax.config import UNetConfig
from keysync_jax.converters import sgm
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.initializers import random_params
from keysync_jax.models.video_unet import VideoUNet

TINY, WIDTH = tiny.UNET, tiny.UNET.context_dim


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def params_of(config: UNetConfig):
    """Random parameters with the variance of activations kept and nothing at zero."""
    audio = None if config.audio_cond_method in ("none", "both", "both_keyframes") else jnp.zeros((1, 2, config.audio_dim))
    vector = jnp.zeros((1, config.adm_in_channels)) if config.adm_in_channels else None
    tokens = 2 * config.additional_audio_frames + 1 if config.audio_cond_method == "both" else 2
    side = 2 ** (len(config.channel_mult) - 1)
    x, context = jnp.zeros((1, 2, side, side, config.in_channels)), jnp.zeros((1, tokens, config.context_dim))
    shapes = jax.eval_shape(VideoUNet(config).init, jax.random.key(0), x, jnp.zeros(1), context, audio, vector)["params"]
    return random_params(shapes, 0, zero=lambda path: False, gain=3**0.5, constants={"mix_factor": 0.5})


@functools.cache
def jitted(model: VideoUNet):
    return jax.jit(lambda params, args, kwargs: model.apply({"params": params}, *args, **kwargs))


def run(*args, config=TINY, dtype=jnp.float32, **kwargs):
    return np.asarray(jitted(VideoUNet(config, dtype))(params_of(config), args, kwargs))


X, C_NOISE, TOKENS = draw(2, 3, 4, 6, 8), draw(2, seed=1), draw(2, 3, WIDTH, seed=2)


# Some thirty products of 32 to 576 terms lie between input and output, and on half as many the next depends.
ROUNDING = dict(ulps=4, terms=9 * 32)


def test_bfloat16_is_close_and_returns_float32():
    full, low = run(X, C_NOISE, TOKENS), run(X, C_NOISE, TOKENS, dtype=jnp.bfloat16)
    assert full.shape == (2, 3, 4, 6, 4) and low.dtype == np.float32
    assert 0.3 < full.std() < 10
    error = np.abs(full - low).max() / full.std()
    assert 1e-5 < error < 0.1


def test_videos_of_a_batch_are_independent_and_frames_are_not():
    full = run(X, C_NOISE, TOKENS)
    other = X.copy()
    other[0, 2] += 1
    got = run(other, C_NOISE, TOKENS)
    assert (np.abs(got - full).max(axis=(2, 3, 4))[0] > 1e-2).all()
    close(got[1], full[1], **ROUNDING, wrong=got[0])


def test_still_images_do_not_read_other_frames():
    indicator = np.float32([[1, 1, 1], [0, 0, 0]])
    full = run(X, C_NOISE, TOKENS, image_only_indicator=indicator)
    other = X.copy()
    other[0, 2] += 1
    got = run(other, C_NOISE, TOKENS, image_only_indicator=indicator)
    assert np.abs(got - full)[0, 2].max() > 1e-2
    close(got[0, :2], full[0, :2], **ROUNDING, wrong=run(other, C_NOISE, TOKENS)[0, :2])


def test_audio_reaches_each_frame_through_the_time_embedding():
    """Swapping two tokens leaves attention (no positions) as it was; only the per-frame embedding tells them apart."""
    full = run(X, C_NOISE, TOKENS)
    swapped = run(X, C_NOISE, TOKENS[:, [1, 0, 2]])
    assert np.abs(swapped - full).max() > 1e-2
    quiet = dataclasses.replace(TINY, audio_cond_method="none")
    close(run(X, C_NOISE, TOKENS[:, [1, 0, 2]], config=quiet), run(X, C_NOISE, TOKENS, config=quiet), **ROUNDING)


def test_call_forms_agree():
    """Noise level, context and audio of a video, or repeated per frame and given apart."""
    config = dataclasses.replace(TINY, audio_cond_method="to_time_emb")  # the same parameters, audio given by itself
    per_frame_noise = np.broadcast_to(C_NOISE[:, None], (2, 3))
    per_frame_context = np.broadcast_to(TOKENS[:, None], (2, 3, 3, WIDTH))
    got = run(X, per_frame_noise, per_frame_context, TOKENS, config=config)
    close(got, run(X, C_NOISE, TOKENS), **ROUNDING, wrong=run(X, C_NOISE, TOKENS[:, [1, 0, 2]]))


def test_all_audio_of_a_sample_in_one_embedding():
    # As many groups as channels would take out what one embedding adds to all of a sample.
    config = dataclasses.replace(TINY, audio_cond_method="both", additional_audio_frames=1, norm_groups=8)
    assert config.label_dim == 3 * WIDTH
    x = X[:, :1]
    full = run(x, C_NOISE, TOKENS, config=config)
    assert np.abs(run(x, C_NOISE, TOKENS[:, [1, 0, 2]], config=config) - full).max() > 1e-2


def test_vector_precedes_audio():
    config = dataclasses.replace(TINY, audio_cond_method="to_time_emb", adm_in_channels=6)
    vector = draw(2, 6, seed=3)
    full = run(X, C_NOISE, TOKENS, TOKENS, vector, config=config)
    kernel = params_of(config)["label_emb_0_0"]["kernel"]
    saved = kernel.copy()
    kernel[:6] = 0
    try:
        without = run(X, C_NOISE, TOKENS, TOKENS, vector, config=config)
        close(run(X, C_NOISE, TOKENS, TOKENS, 2 * vector, config=config), without, **ROUNDING, wrong=full)
    finally:
        kernel[:] = saved


def test_context_is_projected_once_per_video():
    """No matrix product of the whole network reads the context repeated over frames or positions."""
    frames, tokens, width = 5, 7, 24  # a width by which the products that read the context are known
    x, context = jnp.zeros((2, frames, 8, 8, 8)), jnp.zeros((2, tokens, width))
    config = dataclasses.replace(TINY, audio_cond_method="none", attention_resolutions=(1,), context_dim=width)
    model = VideoUNet(config)
    jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, x, jnp.zeros(2), context))(params_of(config))
    products = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    projections = [eqn.invars[0].aval.shape for eqn in products if eqn.invars[1].aval.shape == (width, TINY.model_channels)]
    # Keys and values in the spatial and the temporal block of each of 4 transformers (input, middle, two outputs).
    assert projections == [(2, tokens, width)] * 2 * 2 * 4


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_narrow_networks_have_fewer_groups():
    config = dataclasses.replace(TINY, model_channels=24, norm_groups=8, num_head_channels=24)
    params = params_of(config)
    assert {e.flax_path[0] for e in sgm.unet_table(config)} == set(params)
    out = run(X, C_NOISE, TOKENS, config=config)
    assert out.shape == (2, 3, 4, 6, 4) and np.isfinite(out).all() and out.std() > 0.1


@pytest.mark.parametrize(
    ("config", "args", "match"),
    [
        (TINY, (X[..., :7], C_NOISE, TOKENS), "7 channels.*in_channels 8"),
        (TINY, (X, C_NOISE, TOKENS[..., :20]), f"width 20.*context_dim {WIDTH}"),
        (TINY, (X, C_NOISE, TOKENS, TOKENS), "give no audio_emb"),
        (TINY, (X, C_NOISE, TOKENS[:, :2]), rf"\[B, 3, {WIDTH}\].*\(2, 2, {WIDTH}\)"),
        (dataclasses.replace(TINY, audio_cond_method="to_time_emb"), (X, C_NOISE, TOKENS), "needs audio_emb"),
        (dataclasses.replace(TINY, audio_cond_method="none", adm_in_channels=5), (X, C_NOISE, TOKENS), "was given nothing"),
        (dataclasses.replace(TINY, channel_mult=(1, 1)), (X[:, :, :, :5], C_NOISE, TOKENS), "4x5 is not divisible by 2"),
        (dataclasses.replace(TINY, model_channels=48), (X, C_NOISE, TOKENS), "width 48 is not a multiple of norm_groups 32"),
        (
            dataclasses.replace(TINY, model_channels=12, channel_mult=(2,), norm_groups=8, num_head_channels=24),
            (X, C_NOISE, TOKENS),
            "width 12 is not a multiple of norm_groups 8",
        ),
        (dataclasses.replace(TINY, num_head_channels=48), (X, C_NOISE, TOKENS), "num_head_channels 48"),
    ],
)
def test_misfits_are_named(config, args, match):
    with pytest.raises(KeySyncError, match=match):
        jax.eval_shape(VideoUNet(config).init, jax.random.key(0), *args)
