"""Audio features: alignment, exactness of streaming, windows, encoders side by side, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import close
from tiny_speech import SIZES, encoder

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.encoders import audio_features
from keysync_jax.encoders.audio_features import AudioFeatures, plan_windows, side_by_side
from keysync_jax.models.speech.waveform import standardise


@functools.cache
def voice(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise bursts whose loudness changes over the clip, so that statistics of a part differ from those of the whole."""
    rng = np.random.default_rng(seed)
    n = round(seconds * 16000)
    t = np.arange(n) / 16000
    envelope = np.abs(np.sin(7 * t)) * (0.02 + 0.2 * t / seconds)
    return (0.01 + envelope * rng.standard_normal(n)).astype(np.float32)


# Some twenty layers lie between samples and tokens, with sums of up to 400 terms.
ROUNDING = dict(ulps=4, terms=400)
SHORT = {"window_seconds": 4.0, "context_seconds": 1.0}


def features(kind: str, **settings) -> AudioFeatures:
    return AudioFeatures(*encoder(kind), **settings)


@pytest.mark.parametrize("kind", ["hubert", "wavlm", "log_mel"])
@pytest.mark.parametrize("samples", [1, 640, 641, 16000, 17000])
def test_two_tokens_for_every_started_frame(kind, samples):
    out = features(kind)(voice(2.0)[:samples])
    assert out.shape == (math.ceil(samples / 640), 2, encoder(kind)[0].hidden_size)
    assert out.dtype == np.float32 and np.isfinite(out).all()


def test_hubert_frames_are_token_pairs_and_end_in_a_zero_token():
    run = features("hubert")
    wav = voice(1.0)
    tokens = run.tokens(run.prepare(wav))
    assert tokens.shape == (49, 16)
    out = run(wav).reshape(50, 16)
    np.testing.assert_array_equal(out[:49], tokens)
    assert not out[49].any()


def test_wavlm_repeats_the_first_token_and_shifts_the_rest():
    run = features("wavlm")
    wav = voice(1.0)  # 25 frames: one of silence is appended for the encoder and cut again
    prepared = run.prepare(wav)
    assert len(prepared) == 26 * 640
    tokens = run.tokens(prepared)
    out = run(wav)
    np.testing.assert_array_equal(out[0], tokens[[0, 0]])
    np.testing.assert_array_equal(out[1:], tokens[1:49].reshape(24, 2, 16))
    assert run.offline(wav).shape == (26, 2, 16)


def test_a_click_lands_in_its_frame_in_long_audio():
    """No drift: where a sound stands in the features does not depend on how far into a long clip it is."""
    run = features("log_mel")
    wav = np.zeros(90 * 16000, np.float32)
    wav[[640 * 10 + 320, 640 * 2200 + 320]] = 1.0
    loud = run(wav).mean(axis=2).max(axis=1)
    assert set(np.argsort(loud)[-2:]) == {10, 2200}


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_long_clips_keep_every_token_in_place(kind):
    """A tone in a long clip changes the same frames of the windowed features as of the single pass."""
    run = features(kind, **SHORT)
    wav = voice(20.0)
    other = wav.copy()
    other[640 * 400 : 640 * 405] += 0.3 * np.sin(np.arange(3200) / 3).astype(np.float32)
    changed = np.abs(run(other) - run(wav)).max(axis=(1, 2))
    assert 398 <= changed.argmax() <= 406


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_streaming_is_exact(kind):
    """Blocks of convolutions with whole-clip statistics, and masked padding, give the single pass to rounding."""
    run = features(kind)
    prepared = run.prepare(voice(15.0))  # three blocks, the last one partial; 749 tokens in a window of 1200
    exact = run.single_pass(prepared)
    close(run.tokens(prepared), exact, **ROUNDING, wrong=np.roll(exact, 1, axis=0))


def test_statistics_of_a_block_alone_would_be_wrong():
    """The test above can fail: normalising a block by its own statistics is far off."""
    run = features("hubert")
    prepared = run.prepare(voice(15.0))
    block = prepared[: 299 * 320 + 400]
    own = audio_features._features(run._module, run._variables, block[None], run._moments(block))
    exact = next(run._feature_blocks(prepared, 749))
    close(exact, exact, **ROUNDING, wrong=own[0])
    assert np.abs(np.asarray(own[0]) - exact).max() > 1e-3


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_windows_are_close_to_the_single_pass(kind):
    run = features(kind, **SHORT)
    prepared = run.prepare(voice(15.0))
    exact = run.single_pass(prepared)
    error = run.tokens(prepared) - exact
    assert np.abs(error).max() > 1e-3  # it did run in windows
    # Random weights attend everywhere alike, the worst case for a short window; trained ones look near by.
    assert np.sqrt((error**2).mean()) < 0.3 * exact.std()
    # What a window does not change is where things are: each token resembles its own place most.
    for shift in (-2, -1, 1, 2):
        assert np.sqrt(((np.roll(run.tokens(prepared), shift, axis=0) - exact) ** 2).mean()) > 2 * np.sqrt((error**2).mean())


def test_same_shapes_for_every_length():
    """Long audio of any length runs on the programs that were compiled for the first one."""
    run = features("hubert", **SHORT)
    run(voice(9.0))
    counts = [f._cache_size() for f in (audio_features._features, audio_features._encode, audio_features._first_moments)]
    run(voice(12.3))
    run(voice(4.5))
    assert counts == [f._cache_size() for f in (audio_features._features, audio_features._encode, audio_features._first_moments)]


def test_side_by_side_in_the_order_that_the_stage_says():
    tokens = {name: features(name)(voice(1.0)) for name in ("hubert", "log_mel")}
    both = side_by_side("log_mel+hubert", tokens)
    assert both.shape == (25, 2, 96)
    np.testing.assert_array_equal(both[..., :80], tokens["log_mel"])
    np.testing.assert_array_equal(both[..., 80:], tokens["hubert"])
    assert side_by_side("hubert", tokens) is tokens["hubert"]


def test_deterministic():
    np.testing.assert_array_equal(features("wavlm", **SHORT)(voice(9.0)), features("wavlm", **SHORT)(voice(9.0)))


def test_loudness_matters_only_where_the_encoder_is_not_normalised():
    wav = voice(2.0)
    # The variance has 1e-7 added, which of that of the quiet sound (0.3^2 of 0.008) is 1.4e-4; the layers may make ten times as much.
    np.testing.assert_allclose(features("hubert")(wav), features("hubert")(0.3 * wav + 0.1), rtol=0, atol=2e-3)
    assert np.abs(features("log_mel")(wav) - features("log_mel")(0.3 * wav)).max() > 0.1


def test_bfloat16_stays_close():
    wav = voice(2.0)
    exact, rough = features("hubert")(wav), features("hubert", dtype=jnp.bfloat16)(wav)
    assert rough.dtype == np.float32
    assert 1e-4 < np.abs(rough - exact).max() and np.sqrt(((rough - exact) ** 2).mean()) < 0.05


class TestPlanWindows:
    def test_short(self):
        assert plan_windows(1200, 1200, 200) == [(0, 1200, 0, 1200)]
        assert plan_windows(7, 1200, 200) == [(0, 7, 0, 7)]

    @pytest.mark.parametrize("tokens", [1201, 1600, 2000, 2001, 2999, 50_000])
    def test_cover_once_with_context(self, tokens):
        windows = plan_windows(tokens, 1200, 200)
        assert windows[0].keep_from == 0 and windows[-1].keep_to == tokens
        for i, w in enumerate(windows):
            assert w.stop - w.start == 1200 and 0 <= w.start and w.stop <= tokens
            assert w.keep_from - w.start >= (200 if i else 0)
            assert w.stop - w.keep_to >= (200 if i < len(windows) - 1 else 0)
            assert i == 0 or windows[i - 1].keep_to == w.keep_from
        assert len(windows) == 1 + math.ceil((tokens - 1200) / 800)


def test_standardise_uses_the_unbiased_variance():
    x = np.array([1.0, 2.0, 4.0], np.float32)
    close(standardise(x, unbiased=True, eps=0.0), (x - x.mean()) / x.std(ddof=1), 4)
    close(standardise(x, unbiased=False, eps=0.5), (x - x.mean()) / np.sqrt(x.var() + 0.5), 4)
    assert not standardise(np.zeros(5, np.float32), unbiased=True, eps=1e-7).any()


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.array([0.0, np.nan, 0.0]), "non-finite"),
        (np.zeros((2, 100), np.float32), r"shape \(2, 100\)"),
        (np.zeros(100, np.int16), "int16"),
    ],
)
def test_bad_audio_is_refused(wav, message):
    with pytest.raises(KeySyncError, match=message):
        features("hubert")(wav)


def test_broken_weights_are_noticed():
    config, params = encoder("hubert")
    broken = jax.tree.map(np.copy, params)
    broken["encoder"]["layer_norm"]["bias"][0] = np.inf
    with pytest.raises(KeySyncError, match="hubert encoder gave non-finite"):
        AudioFeatures(config, broken)(voice(1.0))


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ({"conv_stride": (5, 8, 4)}, {}, "a token every 160|token every 160"),
        ({"conv_kernel": (10, 9, 20)}, {}, "no more than a frame"),
        ({}, {"window_seconds": 2.0, "context_seconds": 1.0}, "too short"),
    ],
)
def test_impossible_settings_are_refused(values, settings, message):
    config = AudioEncoderConfig(**(SIZES | values))
    with pytest.raises(KeySyncError, match=message):
        AudioFeatures(config, {}, **settings)
