"""Names, shapes and configurations of the speech encoders: Hugging Face HuBERT and WavLM, Microsoft WavLM.

Our table uses the names of the published files: Hugging Face's for HuBERT, Microsoft's for WavLM. Other spellings are renamed on
the way in (`rename_hf_hubert`, `rename_hf_wavlm`) and, for a Hugging Face WavLM folder, on the way out (`to_hf_wavlm`).

The vector that replaced masked tokens in pre-training (`masked_spec_embed`, `mask_emb`) is part of the table although no
computation reads it: it is stored with the parameters, so that an exported checkpoint has every key of the one that was read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.weights.table import Entry, Table, conv, fold, linear, norm, raw


def audio_table(config: AudioEncoderConfig) -> Table:
    """One entry per tensor of the encoder; empty for "log_mel", which has no weights."""
    tables = {"hubert": _hubert, "wavlm": _wavlm, "log_mel": lambda _: iter(())}
    return list(tables[config.kind](config))


def _hubert(config: AudioEncoderConfig) -> Iterator[Entry]:
    width = config.hidden_size
    if config.mask_embedding:
        yield from raw("masked_spec_embed", (width,))
    for index, key in enumerate(f"feature_extractor.conv_layers.{i}" for i in range(len(config.conv_dim))):
        yield from _convolution(config, index, f"{key}.conv", f"{key}.layer_norm")
    if config.feature_layer_norm:
        yield from norm("feature_projection.layer_norm", config.conv_dim[-1])
    if config.feature_projection:
        yield from linear("feature_projection.projection", config.conv_dim[-1], width)
    yield from _positional(config, "encoder.pos_conv_embed.conv")
    yield from norm("encoder.layer_norm", width)
    for key in (f"encoder.layers.{i}" for i in range(config.num_layers)):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{key}.attention.{name}", width, width)
        yield from norm(f"{key}.layer_norm", width)
        yield from linear(f"{key}.feed_forward.intermediate_dense", width, config.intermediate_size)
        yield from linear(f"{key}.feed_forward.output_dense", config.intermediate_size, width)
        yield from norm(f"{key}.final_layer_norm", width)


def _wavlm(config: AudioEncoderConfig) -> Iterator[Entry]:
    width = config.hidden_size
    if config.mask_embedding:
        yield from raw("mask_emb", (width,))
    place = "2.1" if config.extractor_mode == "layer" else "2"
    for index, key in enumerate(f"feature_extractor.conv_layers.{i}" for i in range(len(config.conv_dim))):
        yield from _convolution(config, index, f"{key}.0", f"{key}.{place}")
    if config.feature_projection:
        yield from linear("post_extract_proj", config.conv_dim[-1], width)
    yield from _positional(config, "encoder.pos_conv.0")
    for index in range(config.num_layers):
        key = f"encoder.layers.{index}"
        if config.gated_relative_position:
            yield from raw(f"{key}.self_attn.grep_a", (1, config.num_heads, 1, 1))
        if config.relative_position and index == 0:
            bias = f"{key}.self_attn.relative_attention_bias.weight"
            yield Entry(bias, fold(bias, "embedding"), (config.num_buckets, config.num_heads), "same")
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{key}.self_attn.{name}", width, width)
        if config.gated_relative_position:
            yield from linear(f"{key}.self_attn.grep_linear", width // config.num_heads, 8)
        yield from norm(f"{key}.self_attn_layer_norm", width)
        yield from linear(f"{key}.fc1", width, config.intermediate_size)
        yield from linear(f"{key}.fc2", config.intermediate_size, width)
        yield from norm(f"{key}.final_layer_norm", width)
    yield from norm("encoder.layer_norm", width)
    if config.feature_layer_norm:
        yield from norm("layer_norm", config.conv_dim[-1])


def _convolution(config: AudioEncoderConfig, index: int, conv_key: str, norm_key: str) -> Iterator[Entry]:
    channels = config.conv_dim[index - 1] if index else 1
    yield from conv(conv_key, "conv1d", channels, config.conv_dim[index], (config.conv_kernel[index],), bias=config.conv_bias)
    if index == 0 or config.extractor_mode == "layer":
        yield from norm(norm_key, config.conv_dim[index])


def _positional(config: AudioEncoderConfig, key: str) -> Iterator[Entry]:
    width = config.hidden_size
    yield Entry(f"{key}.bias", fold(f"{key}.bias", "bias"), (width,), "same")
    yield from raw(f"{key}.weight_g", (1, 1, config.conv_pos), "conv1d")
    yield from raw(f"{key}.weight_v", (width, width // config.conv_pos_groups, config.conv_pos), "conv1d")


# --- other spellings -------------------------------------------------------------------------------------------------------------

# Weight norm as torch's parametrization stores it -> as it was published.
_PARAMETRIZATION = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

# (Hugging Face, Microsoft) starts of keys, `#` for a number; the first that matches whole segments counts.
_WAVLM_NAMES = (
    ("masked_spec_embed", "mask_emb"),
    ("feature_extractor.conv_layers.#.conv", "feature_extractor.conv_layers.#.0"),
    ("feature_projection.layer_norm", "layer_norm"),
    ("feature_projection.projection", "post_extract_proj"),
    ("encoder.pos_conv_embed.conv", "encoder.pos_conv.0"),
    ("encoder.layers.#.attention.gru_rel_pos_linear", "encoder.layers.#.self_attn.grep_linear"),
    ("encoder.layers.#.attention.gru_rel_pos_const", "encoder.layers.#.self_attn.grep_a"),
    ("encoder.layers.#.attention.rel_attn_embed", "encoder.layers.#.self_attn.relative_attention_bias"),
    ("encoder.layers.#.attention", "encoder.layers.#.self_attn"),
    ("encoder.layers.#.layer_norm", "encoder.layers.#.self_attn_layer_norm"),
    ("encoder.layers.#.feed_forward.intermediate_dense", "encoder.layers.#.fc1"),
    ("encoder.layers.#.feed_forward.output_dense", "encoder.layers.#.fc2"),
)
_HF_CONV_NORM = "feature_extractor.conv_layers.#.layer_norm"
_MICROSOFT_CONV_NORM = {"layer": "feature_extractor.conv_layers.#.2.1", "group": "feature_extractor.conv_layers.#.2"}


def rename_hf_hubert(key: str) -> str:
    """A Hugging Face HuBERT key as the table has it: without the `hubert.` of task models, weight norm under its published names."""
    key = key.removeprefix("hubert.")
    for new, published in _PARAMETRIZATION.items():
        key = key.replace(new, published)
    return key


def rename_hf_wavlm(key: str, extractor_mode: str = "group") -> str:
    """A Hugging Face WavLM key under Microsoft's name, which the table has; keys that are neither's stay as they are.

    Args:
      key: key of `WavLMModel`, or of a task model with its `wavlm.` prefix.
      extractor_mode: as in the configuration; says where Microsoft keeps a convolution's norm.
    """
    key = key.removeprefix("wavlm.")
    for new, published in _PARAMETRIZATION.items():
        key = key.replace(new, published)
    return _translate(key, [(_HF_CONV_NORM, _MICROSOFT_CONV_NORM[extractor_mode]), *_WAVLM_NAMES])


def to_hf_wavlm(key: str) -> str:
    """A Microsoft WavLM key under its Hugging Face name (weight norm as `weight_g`, `weight_v`, which transformers reads)."""
    return _translate(key, [*((name, _HF_CONV_NORM) for name in _MICROSOFT_CONV_NORM.values()), *((m, hf) for hf, m in _WAVLM_NAMES)])


def _translate(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for start, replacement in rules:
        match = re.match(re.escape(start).replace(re.escape("#"), r"(\d+)") + r"(?=\.|$)", key)
        if match:
            return replacement.replace("#", "".join(match.groups())) + key[match.end() :]
    return key


# --- configurations --------------------------------------------------------------------------------------------------------------

_HF_SIZES = {
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "conv_dim": ("conv_dim", (512,) * 7),
    "conv_kernel": ("conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
    "conv_stride": ("conv_stride", (5, 2, 2, 2, 2, 2, 2)),
    "conv_bias": ("conv_bias", False),
    "conv_pos": ("num_conv_pos_embeddings", 128),
    "conv_pos_groups": ("num_conv_pos_embedding_groups", 16),
    "layer_norm_eps": ("layer_norm_eps", 1e-5),
    "extractor_mode": ("feat_extract_norm", "group"),
    "layer_norm_first": ("do_stable_layer_norm", False),
}


def config_from_hf(
    values: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None, source: str = "config.json"
) -> AudioEncoderConfig:
    """Configuration of a Hugging Face HuBERT or WavLM folder.

    Args:
      values: its `config.json` (missing keys take the library's defaults).
      preprocessor: its `preprocessor_config.json`; `do_normalize` there decides about waveform normalisation. Without it HuBERT
        normalises (as hubert-base-ls960 does) and WavLM does not (as wavlm-base-plus).
      source: what to call the file in errors.

    Raises:
      KeySyncError: another model type, or a feature that the encoders here do not have, by name.
    """
    kind = values.get("model_type", "hubert")
    if kind not in ("hubert", "wavlm"):
        raise KeySyncError(f"{source}: model_type is {kind!r}; a HuBERT or WavLM encoder is needed")
    _refuse(values, source, {"hidden_act": "gelu", "feat_extract_activation": "gelu", "conv_pos_batch_norm": False, "add_adapter": False})
    fields = {ours: values.get(theirs, default) for ours, (theirs, default) in _HF_SIZES.items()}
    normalize = (preprocessor or {}).get("do_normalize", kind == "hubert")
    # transformers creates the vector only where masking can happen.
    masked = values.get("mask_time_prob", 0.05) > 0 or values.get("mask_feature_prob", 0.0) > 0
    if kind == "hubert":
        fields["feature_layer_norm"] = values.get("feat_proj_layer_norm", True)
    else:
        fields |= {"num_buckets": values.get("num_buckets", 320), "max_distance": values.get("max_bucket_distance", 800)}
    return AudioEncoderConfig(kind=kind, normalize_waveform=bool(normalize), mask_embedding=masked, **fields)


def config_from_microsoft(values: Mapping[str, Any], source: str = "cfg") -> AudioEncoderConfig:
    """Configuration of a Microsoft WavLM checkpoint (the `cfg` of `WavLM-Base+.pt`; missing keys take that code's defaults).

    Raises:
      KeySyncError: a feature that the encoder here does not have, by name.
    """
    _refuse(values, source, {"activation_fn": "gelu"})
    mode = values.get("extractor_mode", "default")
    if mode not in ("default", "layer_norm"):
        raise KeySyncError(f"{source}: extractor_mode is {mode!r}; supported are default, layer_norm")
    layers = _conv_layers(values.get("conv_feature_layers", "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"), source)
    dims, kernels, strides = zip(*layers, strict=True)
    hidden = values.get("encoder_embed_dim", 768)
    return AudioEncoderConfig(
        kind="wavlm",
        hidden_size=hidden,
        num_layers=values.get("encoder_layers", 12),
        num_heads=values.get("encoder_attention_heads", 12),
        intermediate_size=values.get("encoder_ffn_embed_dim", 3072),
        conv_dim=dims,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=values.get("conv_bias", False),
        conv_pos=values.get("conv_pos", 128),
        conv_pos_groups=values.get("conv_pos_groups", 16),
        num_buckets=values.get("num_buckets", 320),
        max_distance=values.get("max_distance", 1280),
        normalize_waveform=values.get("normalize", False),
        extractor_mode="layer" if mode == "layer_norm" else "group",
        layer_norm_first=values.get("layer_norm_first", False),
        feature_projection=dims[-1] != hidden,
        relative_position=values.get("relative_position_embedding", False),
        gated_relative_position=values.get("gru_rel_pos", False),
    )


def _refuse(values: Mapping[str, Any], source: str, supported: Mapping[str, Any]) -> None:
    for key, value in supported.items():
        if values.get(key, value) != value:
            raise KeySyncError(f"{source}: {key} is {values[key]!r}; only {value!r} is supported")


def _conv_layers(text: str, source: str) -> list[tuple[int, int, int]]:
    """The (width, kernel, stride) list that Microsoft's configuration writes as a Python expression of lists, + and *."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.List):
            return [value(n) for n in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(value(n) for n in node.elts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return value(node.left) * value(node.right)
        raise ValueError(ast.dump(node))

    try:
        layers = value(ast.parse(text, mode="eval").body)
        if not layers or not all(len(layer) == 3 for layer in layers):
            raise ValueError(text)
    except (ValueError, SyntaxError, TypeError) as error:
        raise KeySyncError(f"{source}: conv_feature_layers {text!r} is not a list of (width, kernel, stride)") from error
    return layers
