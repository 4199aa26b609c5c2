"""Speech encoders against transformers (stored outputs) and their own contracts; the parity cases are in tests/parity."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors
from bounds import close

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models import table
from keysync_jax.models.speech import log_mel, registry, speech_layers, transformers_config, wavlm
from keysync_jax.models.speech.random_params import init_params

FIXTURE = pathlib.Path(__file__).parents[2] / "helpers" / "fixtures" / "speech_hf.safetensors"
TINY = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 12),
    "conv_kernel": (10, 9, 8),
    "conv_stride": (5, 8, 8),
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_buckets": 32,
    "max_distance": 40,
}


def waveform(samples: int = 16000) -> np.ndarray:
    """A chirp under a slow envelope with a click: `[S]`, the same on every machine to the last few bits."""
    t = np.arange(samples) / 16000
    x = 0.3 * np.sin(2 * np.pi * (100 + 900 * t) * t) * (0.6 + 0.4 * np.sin(5 * t))
    x[samples // 3] += 0.5
    return x.astype(np.float32)


@functools.cache
def tiny(kind: str, **overrides) -> tuple[AudioEncoderConfig, dict]:
    config = AudioEncoderConfig(kind=kind, **(TINY | overrides))
    return config, init_params(config, np.random.default_rng(0))


def apply(config, params, *args, **kwargs):
    module = registry.build(config)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda p, *a: module.apply({"params": p}, *a, **kwargs))(params, *args))


@pytest.mark.parametrize("case", ["wavlm_group", "wavlm_layer", "hubert_layer"])
def test_equals_transformers(case):
    with safetensors.safe_open(FIXTURE, "numpy") as file:
        values = json.loads(file.metadata()["configs"])[case]
        tensors = {key.removeprefix(f"{case}/"): file.get_tensor(key) for key in file.keys() if key.startswith(f"{case}/")}  # noqa: SIM118
    expected = tensors.pop("out")
    config = registry.config_from_hf(values)
    if config.kind == "wavlm":
        tensors = {wavlm.rename_hf_wavlm(key, config.extractor_mode): value for key, value in tensors.items()}
    else:
        tensors = {transformers_config.bare(key): value for key, value in tensors.items()}
    entries = registry.audio_table(config)
    assert {e.torch_key for e in entries} == set(tensors)
    got = apply(config, table.to_flax(entries, tensors), waveform()[None])
    assert got.shape == (1, *expected.shape)
    # The two packages order their sums differently, over some twenty layers and up to a thousand samples.
    close(got[0], expected, 4, terms=400, wrong=np.roll(expected, 1, axis=0))


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
@pytest.mark.parametrize("mode", ["group", "layer"])
def test_table_names_every_parameter(kind, mode):
    config, params = tiny(kind, extractor_mode=mode, conv_bias=mode == "layer")
    paths = {tuple(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert paths == {e.flax_path: e.flax_shape for e in registry.audio_table(config)}


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_every_parameter_but_the_mask_vector_matters(kind):
    config, params = tiny(kind)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)
    module = registry.build(config)
    forward = jax.jit(lambda p: module.apply({"params": p}, waveform(4000)[None]))
    base = np.asarray(forward(params))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    for i, (path, leaf) in enumerate(leaves):
        name = "/".join(k.key for k in path)
        changed = [value for _, value in leaves]
        changed[i] = leaf * (1 + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        difference = np.abs(np.asarray(forward(jax.tree.unflatten(treedef, changed))) - base).max()
        if "mask" in name:
            assert difference == 0, name
        elif not name.endswith("k_proj/bias"):  # softmax ignores what is the same for all keys
            assert difference > 1e-5, name


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_masked_padding_changes_nothing(kind):
    config, params = tiny(kind)
    n = 24
    features = np.random.default_rng(0).standard_normal((1, n, config.conv_dim[-1])).astype(np.float32)
    alone = apply(config, params, features, np.array([n]), method="encode")
    garbage = np.full((1, 17, features.shape[2]), 1e3, np.float32)
    padded = apply(config, params, np.concatenate([features, garbage], axis=1), np.array([n]), method="encode")
    close(padded[:, :n], alone, 8, terms=24)  # garbage of 1,000 that leaked in would replace the values


def test_token_counts():
    hubert = registry.geometry(AudioEncoderConfig())
    assert (hubert.hop, hubert.receptive) == (320, 400)
    assert [hubert.tokens(640 * f) for f in (1, 2, 25)] == [1, 3, 49]
    assert hubert.tokens(399) == 0
    mel = registry.geometry(AudioEncoderConfig(kind="log_mel", hidden_size=80))
    assert [mel.tokens(640 * f) for f in (1, 2, 25)] == [2, 4, 50]


def test_relative_buckets_follow_t5():
    buckets = speech_layers.relative_buckets(1200, 320, 800)
    centre = 1199
    assert buckets[centre] == 0
    np.testing.assert_array_equal(buckets[centre - 79 : centre], np.arange(79, 0, -1))
    np.testing.assert_array_equal(buckets[centre + 1 : centre + 80], 160 + np.arange(1, 80))
    assert buckets[centre + 80] == 240 and buckets[centre - 80] == 80
    assert buckets[-1] == 319 and buckets[0] == 159  # everything from 800 on shares the last bucket
    assert np.all(np.diff(buckets[centre + 1 :]) >= 0)


class TestLogMel:
    config = AudioEncoderConfig(kind="log_mel", hidden_size=80, num_mels=80)

    def test_has_no_weights(self):
        assert init_params(self.config, np.random.default_rng(0)) == {}
        assert registry.audio_table(self.config) == []

    def test_sine_lights_its_band_and_silence_is_the_floor(self):
        t = np.arange(6400) / 16000
        tokens = apply(self.config, {}, np.sin(2 * np.pi * 1000 * t).astype(np.float32)[None])[0]
        assert tokens.shape == (20, 80)
        centres = np.argmax(log_mel.mel_filters(80), axis=0) * 16000 / log_mel.FFT
        assert (np.abs(centres[tokens[2:-2].argmax(axis=1)] - 1000) < 40).all()
        power = np.exp(tokens[2:-2].max(axis=1) * log_mel.SCALE + log_mel.CENTRE)
        assert (np.abs(10 * np.log10(power)) < 3).all()  # a full-scale sine is about 0 dB
        silence = apply(self.config, {}, np.zeros((1, 1280), np.float32))
        floor = (np.log(1e-10) - np.log(1e-5)) / 5
        close(silence, np.full(silence.shape, floor), 8, scale=abs(np.log(1e-10)) / 5)

    def test_token_is_centred_on_its_hop(self):
        click = np.zeros((1, 6400), np.float32)
        click[0, 10 * 320 + 160] = 1.0
        energy = apply(self.config, {}, click)[0].mean(axis=1)
        assert energy.argmax() == 10
        # A mean of 80 logarithms of sums of 512 products. A window half a hop to the side would differ by tenths.
        close(energy[9], energy[11], 4, terms=80)

    def test_too_many_bands_are_refused(self):
        with pytest.raises(KeySyncError, match="300 mel bands"):
            log_mel.mel_filters(300)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 5}, "num_heads 5"),
        ({"conv_pos_groups": 7}, "conv_pos_groups 7"),
        ({"conv_dim": (512,) * 6}, "one entry per convolution"),
        ({"extractor_mode": "batch"}, "extractor_mode is 'batch'"),
        ({"feature_projection": False}, "hidden_size 768 must equal conv_dim"),
        ({"kind": "log_mel", "hidden_size": 80, "num_mels": 64}, "num_mels is 64"),
    ],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(KeySyncError, match=message):
        AudioEncoderConfig(**values)
