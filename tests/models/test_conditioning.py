"""Network inputs of the two stages and the dropout of conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.conditions import zero_where_dropped
from keysync_jax.models.conditioning import join_frames
from keysync_jax.models.stage_inputs import AudioEmbedder, interpolation_input, keyframe_input


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = draw(2, 4, 3, 2, 4)


def test_keyframe_input():
    identity = draw(2, 3, 2, 4, seed=1)
    got = keyframe_input(X, identity)
    np.testing.assert_array_equal(got[..., :4], X)
    np.testing.assert_array_equal(got[:, 2, ..., 4:], identity)
    per_frame = draw(2, 4, 3, 2, 4, seed=2)
    np.testing.assert_array_equal(keyframe_input(X, per_frame)[..., 4:], per_frame)


def test_interpolation_input():
    endpoints, filler = draw(2, 3, 2, 8, seed=1), draw(3, 2, 4, seed=2)
    got = np.asarray(interpolation_input(X, endpoints, filler))
    assert got.shape == (2, 4, 3, 2, 9)
    np.testing.assert_array_equal(got[..., :4], X)
    np.testing.assert_array_equal(got[:, 0, ..., 4:8], endpoints[..., :4])
    np.testing.assert_array_equal(got[:, 3, ..., 4:8], endpoints[..., 4:])
    np.testing.assert_array_equal(got[:, 1:3, ..., 4:8], np.broadcast_to(filler, (2, 2, 3, 2, 4)))
    np.testing.assert_array_equal(got[1, :, 0, 0, 8], [1, 0, 0, 1])
    assert interpolation_input(X, endpoints, filler, add_indicator=False).shape[-1] == 8


def test_no_filler_repeats_the_nearer_endpoint():
    endpoints = draw(2, 3, 2, 8, seed=1)
    got = np.asarray(interpolation_input(X, endpoints, None))
    for frame, half in enumerate((slice(0, 4), slice(0, 4), slice(4, 8), slice(4, 8))):
        np.testing.assert_array_equal(got[:, frame, ..., 4:8], endpoints[..., half])


def test_interpolation_refusals():
    endpoints = draw(2, 3, 2, 8, seed=1)
    with pytest.raises(KeySyncError, match="2x2, not 3x2"):
        interpolation_input(X, endpoints, np.zeros((2, 2, 4), np.float32))
    with pytest.raises(KeySyncError, match="not 1"):
        interpolation_input(X[:, :1], endpoints, None)


def test_join_frames_puts_the_start_first():
    frames = draw(2, 2, 3, 2, 4)
    got = join_frames(frames)
    np.testing.assert_array_equal(got, np.concatenate([frames[:, 0], frames[:, 1]], axis=-1))


def test_dropout_by_video_and_by_frame():
    by_video = np.asarray(zero_where_dropped(X, np.float32([1, 0])))
    np.testing.assert_array_equal(by_video[0], X[0])
    assert not by_video[1].any()
    by_frame = np.asarray(zero_where_dropped(X, np.bool_([[1, 0, 1, 1], [0, 1, 1, 1]])))
    assert not by_frame[0, 1].any() and not by_frame[1, 0].any()
    np.testing.assert_array_equal(by_frame[0, 0], X[0, 0])


@pytest.mark.parametrize(("merge", "expected"), [("mean", 1.5), ("add", 3.0)])
def test_audio_merges(merge, expected):
    audio = np.ones((1, 3, 2, 4), np.float32) * np.float32([1, 2]).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(AudioEmbedder(None, merge).apply({}, audio), np.full((1, 3, 4), expected))


def test_audio_concat_keeps_the_order_of_tokens():
    audio = draw(1, 3, 2, 4)
    got = AudioEmbedder(None, "concat").apply({}, audio)
    np.testing.assert_array_equal(got, np.concatenate([audio[:, :, 0], audio[:, :, 1]], axis=-1))


def test_null_audio_is_not_the_projection_of_silence():
    module = AudioEmbedder(5)
    params = jax.tree.map(jnp.ones_like, module.init(jax.random.key(0), draw(1, 3, 2, 4)))
    tokens = module.apply(params, np.zeros((1, 3, 2, 4), np.float32))
    assert (tokens == 1).all()  # the bias
    assert (zero_where_dropped(tokens, np.zeros(1)) == 0).all()
    with pytest.raises(KeySyncError, match=r"\[B, T, 2, D\]"):
        module.apply(params, draw(3, 2, 4))
