"""Names, shapes and configurations of the speech encoders."""

import json
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models import table
from keysync_jax.models.speech import registry, transformers_config, wavlm

MANIFESTS = Path(__file__).parents[2] / "golden" / "manifests"
FULL = {"hubert": AudioEncoderConfig(), "wavlm": AudioEncoderConfig(kind="wavlm", normalize_waveform=False)}
TINY = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8,) * 7,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}


@pytest.mark.parametrize(("kind", "manifest", "count"), [("hubert", "hubert_base_ls960", 211), ("wavlm", "wavlm_base_plus", 248)])
def test_full_size_tables_match_the_manifests(kind, manifest, count):
    stored = json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]
    assert {e.torch_key: list(e.torch_shape) for e in registry.audio_table(FULL[kind])} == {k: v["shape"] for k, v in stored.items()}
    assert len(stored) == count


def test_configurations_of_the_manifests():
    def config(name):
        return json.loads((MANIFESTS / f"{name}.json").read_text())["meta"]["config"]

    assert registry.config_from_hf(config("hubert_base_ls960")) == FULL["hubert"]
    assert wavlm.config_from_microsoft(config("wavlm_base_plus")) == FULL["wavlm"]
    assert registry.config_from_hf({"model_type": "wavlm"}) == FULL["wavlm"]


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
@pytest.mark.parametrize(
    "variant", [{}, {"extractor_mode": "layer", "conv_bias": True}, {"mask_embedding": False, "feature_layer_norm": False}]
)
def test_round_trip_is_exact_and_names_are_unique(kind, variant):
    entries = registry.audio_table(AudioEncoderConfig(kind=kind, **TINY, **variant))
    rng = np.random.default_rng(0)
    tensors = {e.torch_key: rng.standard_normal(e.torch_shape).astype(np.float32) for e in entries}
    assert len(tensors) == len(entries) == len({e.flax_path for e in entries})
    back = dict(table.to_torch(entries, table.to_flax(entries, tensors)))
    assert list(back) == [e.torch_key for e in entries]
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value)


def test_flax_paths_follow_the_torch_names():
    paths = {e.torch_key: "/".join(e.flax_path) for e in registry.audio_table(FULL["wavlm"])}
    assert paths["encoder.pos_conv.0.weight_v"] == "encoder/pos_conv_0/weight_v"
    assert paths["feature_extractor.conv_layers.0.2.weight"] == "feature_extractor/conv_layers_0_2/scale"
    assert paths["encoder.layers.11.self_attn.grep_a"] == "encoder/layers_11/self_attn/grep_a"
    assert paths["encoder.layers.0.self_attn.relative_attention_bias.weight"].endswith("relative_attention_bias/embedding")
    hubert = {e.torch_key: e for e in registry.audio_table(FULL["hubert"])}
    assert hubert["encoder.pos_conv_embed.conv.weight_v"].flax_shape == (128, 48, 768)
    assert hubert["feature_extractor.conv_layers.1.conv.weight"].flax_shape == (3, 512, 512)


@pytest.mark.parametrize("mode", ["group", "layer"])
def test_wavlm_names_there_and_back(mode):
    keys = [e.torch_key for e in registry.audio_table(AudioEncoderConfig(kind="wavlm", extractor_mode=mode, conv_bias=True, **TINY))]
    renamed = [wavlm.to_hf_wavlm(key) for key in keys]
    assert len(set(renamed)) == len(keys)
    assert [wavlm.rename_hf_wavlm(key, mode) for key in renamed] == keys
    assert [wavlm.rename_hf_wavlm(f"wavlm.{key}", mode) for key in renamed] == keys
    # Apart from what only WavLM has, a Hugging Face WavLM is named like a Hugging Face HuBERT.
    hubert = {e.torch_key for e in registry.audio_table(AudioEncoderConfig(extractor_mode=mode, conv_bias=True, **TINY))}
    extra = {key for key in renamed if "gru_rel_pos" in key or "rel_attn_embed" in key}
    assert set(renamed) - extra == hubert
    assert len(extra) == 2 * 3 + 1


def test_both_spellings_of_weight_norm():
    for rename, prefix, target in (
        (transformers_config.bare, "hubert.", "encoder.pos_conv_embed.conv."),
        (wavlm.rename_hf_wavlm, "wavlm.", "encoder.pos_conv.0."),
    ):
        for key, leaf in (
            ("parametrizations.weight.original0", "weight_g"),
            ("parametrizations.weight.original1", "weight_v"),
            ("weight_g", "weight_g"),
            ("bias", "bias"),
        ):
            assert rename(f"encoder.pos_conv_embed.conv.{key}") == target + leaf
            assert rename(f"{prefix}encoder.pos_conv_embed.conv.{key}") == target + leaf
    assert wavlm.rename_hf_wavlm("lm_head.weight") == "lm_head.weight"


def test_microsoft_configuration():
    config = wavlm.config_from_microsoft(
        {
            "conv_feature_layers": "[(16, 10, 5)] + [(32,3,2)] * 4 + 2 * [(24,2,2)]",
            "encoder_embed_dim": 24,
            "encoder_attention_heads": 3,
            "conv_pos_groups": 4,
            "extractor_mode": "layer_norm",
            "layer_norm_first": True,
            "normalize": True,
            "encoder_layerdrop": 0.05,
        }
    )
    assert config.conv_dim == (16, 32, 32, 32, 32, 24, 24) and config.conv_stride == (5, 2, 2, 2, 2, 2, 2)
    assert (config.extractor_mode, config.layer_norm_first, config.normalize_waveform) == ("layer", True, True)
    assert not config.feature_projection and not config.relative_position and not config.gated_relative_position
    assert config.max_distance == 1280
    keys = {e.torch_key for e in registry.audio_table(config)}
    assert "post_extract_proj.weight" not in keys and not any("grep" in key or "relative" in key for key in keys)
    assert "feature_extractor.conv_layers.6.2.1.weight" in keys


def test_preprocessor_decides_about_normalisation():
    assert not registry.config_from_hf({"model_type": "hubert"}, {"do_normalize": False}).normalize_waveform
    assert registry.config_from_hf({"model_type": "wavlm"}, {"do_normalize": True}).normalize_waveform


@pytest.mark.parametrize(
    ("read", "values", "message"),
    [
        (registry.config_from_hf, {"model_type": "whisper"}, "'whisper'; a HuBERT or WavLM or wav2vec2"),
        (registry.config_from_hf, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (registry.config_from_hf, {"conv_pos_batch_norm": True}, "conv_pos_batch_norm is True"),
        (registry.config_from_hf, {"model_type": "wavlm", "add_adapter": True}, "add_adapter is True"),
        (wavlm.config_from_microsoft, {"activation_fn": "glu"}, "activation_fn is 'glu'"),
        (wavlm.config_from_microsoft, {"extractor_mode": "conv2d"}, "extractor_mode is 'conv2d'"),
        (wavlm.config_from_microsoft, {"conv_feature_layers": "__import__('os').getcwd()"}, "conv_feature_layers"),
        (wavlm.config_from_microsoft, {"conv_feature_layers": "[(512, 10)]"}, "conv_feature_layers"),
    ],
)
def test_unsupported_features_are_refused_by_name(read, values, message):
    with pytest.raises(KeySyncError, match=message):
        read(values)
