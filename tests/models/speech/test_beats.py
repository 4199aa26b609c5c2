"""BEATs: the traps of its numbers, its alignment with frames, and that long sound in pieces equals sound in one piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import close
from scipy.special import erf

from keysync_jax.core.errors import KeySyncError
from keysync_jax.encoders.audio_features import AudioFeatures, plan_windows
from keysync_jax.models import table
from keysync_jax.models.speech import beats, fbank, registry
from keysync_jax.models.speech.beats import Beats, BeatsConfig
from keysync_jax.models.speech.random_params import init_params
from keysync_jax.models.speech.speech_layers import relative_buckets

CONFIG = BeatsConfig(
    hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, patch_width=12, conv_pos=16, conv_pos_groups=4, num_buckets=32,
    max_distance=40, num_classes=3,
)  # fmt: skip


@functools.cache
def encoder():
    return init_params(CONFIG, np.random.default_rng(1))


def voice(frames, seed=0):
    """Bursts of noise, and a hum that keeps every mel band off the floor."""
    rng = np.random.default_rng(seed)
    n = 640 * frames
    return (np.abs(np.sin(np.arange(n) / 900)) * 0.2 * rng.standard_normal(n)).astype(np.float32)


def kaldi(wav, bands=128):
    """The filterbank from its description, in float64 and without vectorised frames."""
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), bands + 2)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    rows = []
    for start in range(0, len(wav) - 399, 160):
        x = wav[start : start + 400].astype(np.float64) * 32768
        x = x - x.mean()
        x = x - 0.97 * np.r_[x[0], x[:-1]]
        power = np.abs(np.fft.rfft(x * window, 512)) ** 2
        row = []
        for low, top, high in zip(edges, edges[1:], edges[2:], strict=False):
            m = mel(np.arange(256) * 31.25)
            weight = np.maximum(0, np.minimum((m - low) / (top - low), (high - m) / (high - top)))
            row.append(np.log(max(weight @ power[:256], 1.1920929e-7)))
        rows.append(row)
    return np.array(rows)


def test_filterbank_is_kaldis():
    wav = voice(3)
    expected = kaldi(wav)
    mistakes = [expected + np.log(1.01), kaldi(wav * 1.005), np.roll(expected, 1, axis=1)]
    close(jax.jit(fbank.log_mel, static_argnums=1)(32768 * wav[None], 128)[0], expected, ulps=8, terms=400, wrong=mistakes)
    silence = Beats(CONFIG).apply({"params": {}}, jnp.zeros((1, 1200)), method="spectrogram")
    close(silence, np.full(silence.shape, -2.39169), ulps=32)


def test_a_token_is_a_patch_mel_bands_first():
    """Token 8t + m sees 160 ms from 160 t ms on and 16 bands from 16 m on."""
    module, params = Beats(CONFIG), encoder()
    patches = jax.jit(lambda w: module.apply({"params": params}, w, method="features"))
    wav = voice(12)[None]
    plain = np.asarray(patches(wav))
    assert plain.shape == (1, 16, 12)
    kernel = params["patch_embedding"]["kernel"]
    spectrum = np.asarray(module.apply({"params": {}}, wav, method="spectrogram"))[0]
    for token, (t, m) in ((3, (0, 3)), (12, (1, 4))):
        patch = spectrum[16 * t : 16 * t + 16, 16 * m : 16 * m + 16]
        close(plain[0, token], np.einsum("tm,tmc->c", patch, kernel[:, :, 0]), ulps=8, terms=256)


def test_frames_share_tokens_by_the_ratio_of_the_whole_clip():
    """2 F places for N tokens: place i takes token floor(i N / 2F), F even; fewer than six frames are followed by silence."""
    run = AudioFeatures(CONFIG, encoder())
    for frames in (7, 50):
        wav = voice(frames)
        even = frames + frames % 2
        tokens = run.tokens(run.prepare(wav))
        assert len(tokens) == 8 * ((4 * even - 2) // 16)
        places = [int(i * len(tokens) / (2 * even)) for i in range(2 * frames)]
        np.testing.assert_array_equal(run(wav).reshape(2 * frames, -1), tokens[places])
    for samples in (1, 640, 640 * 5):
        short = run(voice(6)[:samples])
        assert short.shape == (-(-samples // 640), 2, 16) and np.isfinite(short).all()


def test_sound_in_pieces_equals_sound_in_one_piece():
    run = AudioFeatures(CONFIG, encoder())
    prepared = run.prepare(voice(350))  # 14 s: three blocks, one window padded to half
    exact = run.single_pass(prepared)
    close(run.tokens(prepared), exact, ulps=16, terms=400, wrong=[np.roll(exact, 1, axis=0), np.roll(exact, 8, axis=0)])


def test_long_sound_keeps_every_token_in_place():
    run = AudioFeatures(CONFIG, encoder(), window_seconds=4.8, context_seconds=1.12)
    wav = voice(500)
    other = wav.copy()
    other[640 * 400 : 640 * 404] += 0.3 * np.sin(np.arange(2560) / 3).astype(np.float32)
    changed = np.abs(run.tokens(run.prepare(other)) - run.tokens(run.prepare(wav))).max(axis=1)
    assert 800 - 8 <= changed.argmax() < 808 + 8
    assert np.abs(run.tokens(run.prepare(wav))).max(axis=1).all()


def test_windows_are_whole_moments():
    for tokens in (8, 1200, 1208, 2248, 30000):
        windows = plan_windows(tokens, 1200, 200, 8)
        assert [w.keep_from for w in windows] == [0, *(w.keep_to for w in windows[:-1])] and windows[-1].keep_to == tokens
        assert all(place % 8 == 0 for window in windows for place in window)
        assert all(w.stop - w.start == min(tokens, 1200) for w in windows)


def test_padding_of_a_batch_changes_nothing():
    """Keys that do not exist are masked and their place in the convolution is empty."""
    module, params = Beats(CONFIG), encoder()
    patches = np.random.default_rng(2).standard_normal((2, 40, 12)).astype(np.float32)
    run = jax.jit(lambda p, x, count: module.apply({"params": p}, x, count, method="encode"))
    encode = functools.partial(run, params)
    both = encode(patches, jnp.array([24, 40]))
    alone = encode(patches[:1, :24], jnp.array([24]))
    close(both[0, :24], alone[0], ulps=32, terms=24, wrong=encode(patches, jnp.array([40, 40]))[0, :24])


def test_the_gate_reads_the_query_and_the_residual_is_weighted():
    """Both halves of a layer from the formulas: alpha x, gate of q, bias by distance."""
    params = jax.tree.map(lambda x: x + 0.05 * np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32), encoder())
    x = np.random.default_rng(3).standard_normal((1, 6, 16)).astype(np.float32)
    layer = beats.EncoderLayer(CONFIG, jnp.float32)
    p = params["encoder"]["layers_0"]
    got, _ = jax.jit(lambda w, v: layer.apply({"params": w}, v, jnp.ones((1, 6), bool), None))(p, x)

    def dense(name, v, where=p):
        return v @ where[name]["kernel"].astype(np.float64) + where[name]["bias"]

    def norm(name, v):
        v = v - v.mean(-1, keepdims=True)
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-5) * p[name]["scale"] + p[name]["bias"]

    def half(alpha, query):
        a, v64 = p["self_attn"], x[0].astype(np.float64)
        q, k, v = (dense(f"{n}_proj", v64, a).reshape(6, 2, 8) for n in "qkv")
        s = 1 / (1 + np.exp(-dense("grep_linear", q if query else v64.reshape(6, 2, 8), a).reshape(6, 2, 2, 4).sum(-1)))
        gate = s[..., 0] * (s[..., 1] * a["grep_a"][0, :, 0, 0] - 1) + 2  # [N, H]
        by_distance = a["relative_attention_bias"]["embedding"][relative_buckets(6, 32, 40)]
        bias = np.stack([[by_distance[key - row + 5] for key in range(6)] for row in range(6)])  # [N, N, H]
        scores = np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(8) + np.moveaxis(gate[:, None] * bias, -1, 0)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        y = norm("self_attn_layer_norm", alpha * v64 + dense("out_proj", np.einsum("hnm,mhd->nhd", weight, v).reshape(6, 16), a))
        z = dense("fc1", y)
        z = dense("fc2", 0.5 * z * (1 + erf(z / np.sqrt(2))))
        return norm("final_layer_norm", alpha * y + z)

    alpha = 4**0.25
    close(got[0], half(alpha, True), ulps=32, terms=24, wrong=[half(1.0, True), half(alpha, False)])


def test_every_published_tensor_has_a_place_and_comes_back():
    entries = registry.audio_table(CONFIG)
    back = dict(table.to_torch(entries, encoder()))
    again = table.to_flax(entries, back)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, encoder()))
    assert sum("relative_attention_bias" in key for key in back) == CONFIG.num_layers
    with pytest.raises(KeySyncError, match="activation_fn is 'glu'"):
        beats.config_from_microsoft({"activation_fn": "glu"})
    with pytest.raises(KeySyncError, match="not a multiple of num_heads 5"):
        BeatsConfig(num_heads=5)
