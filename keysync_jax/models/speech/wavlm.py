"""WavLM (Chen et al., 2022): waveform to one token per 20 ms. Parameter paths are those of Microsoft's published checkpoint.

The names in Hugging Face's files are renamed on the way in (`rename_hf_wavlm`) and, for a folder of theirs, on the way out
(`to_hf_wavlm`). Alignment, as in the KeySync reference's offline path (commit cfff7cf): the clip is padded to an even number F of frames,
and its 2F - 1 tokens are stretched to 2F by repeating the first, so that frame f takes tokens 2f - 1 and 2f.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech import speech_layers as layers
from keysync_jax.models.speech import transformers_config as names
from keysync_jax.models.speech.speech_encoder import Moments, Published, SpeechEncoder
from keysync_jax.models.speech.waveform import pad_to_frames, standardise, stretch
from keysync_jax.models.table import Entry, Table, fold, linear, norm, raw

Array = jax.Array


class FeatureExtractor(nn.Module):
    config: AudioEncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, waveform: Array, moments: Moments | None = None, first_only: bool = False) -> Array:
        """Waveform `[B, S]` -> features `[B, N, C]`, or the first convolution's output before its norm."""
        x = waveform[..., None].astype(self.dtype)
        norm = "2_1" if self.config.extractor_mode == "layer" else "2"  # places in the reference's nested nn.Sequential
        for index in range(len(self.config.conv_dim)):
            names = (f"conv_layers_{index}_0", f"conv_layers_{index}_{norm}")
            x = layers.convolution_layer(self.config, index, x, names, self.dtype, moments, first_only)
            if first_only:
                return x
        return x


class EncoderLayer(nn.Module):
    config: AudioEncoderConfig
    index: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array | None) -> tuple[Array, Array | None]:
        config = self.config
        attention = layers.SelfAttention(
            config, config.relative_position and self.index == 0, config.gated_relative_position, self.dtype, name="self_attn"
        )
        fc1 = nn.Dense(config.intermediate_size, dtype=self.dtype, name="fc1")
        fc2 = nn.Dense(config.hidden_size, dtype=self.dtype, name="fc2")
        return layers.transformer_layer(
            config,
            x,
            lambda y: attention(y, mask, bias),
            layers.layer_norm("self_attn_layer_norm", config.layer_norm_eps, self.dtype),
            lambda y: fc2(layers.gelu(fc1(y))),
            layers.layer_norm("final_layer_norm", config.layer_norm_eps, self.dtype),
        )


class Encoder(nn.Module):
    config: AudioEncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """`[B, N, D]`, mask `[B, N]` of tokens that exist -> `[B, N, D]`."""
        return layers.transformer(
            self.config,
            x,
            mask,
            layers.PositionalConv(self.config, self.dtype, name="pos_conv_0"),
            layers.layer_norm("layer_norm", self.config.layer_norm_eps, self.dtype),
            [EncoderLayer(self.config, i, self.dtype, name=f"layers_{i}") for i in range(self.config.num_layers)],
        )


class WavLM(nn.Module):
    """Waveform `[B, S]` (16 kHz) -> tokens `[B, N, D]`, the last layer's output.

    `mask_emb` belongs to pre-training and changes nothing here; it is a parameter so that what was read is written back.
    """

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.feature_extractor = FeatureExtractor(self.config, self.dtype)
        if self.config.feature_layer_norm:
            self.layer_norm = layers.layer_norm(None, self.config.layer_norm_eps, self.dtype)
        if self.config.feature_projection:
            self.post_extract_proj = nn.Dense(self.config.hidden_size, dtype=self.dtype)
        self.encoder = Encoder(self.config, self.dtype)
        if self.config.mask_embedding:
            self.mask_emb = self.param("mask_emb", nn.initializers.uniform(1.0), (self.config.hidden_size,))

    def __call__(self, waveform: Array) -> Array:
        features = self.features(waveform)
        return self.encode(features, jnp.full(len(features), features.shape[1]))

    def first_convolution(self, waveform: Array) -> Array:
        """Input of the norm over time, `[B, S]` -> `[B, N0, C]`."""
        return self.feature_extractor(waveform, first_only=True)

    def features(self, waveform: Array, moments: Moments | None = None) -> Array:
        """Convolutional part: `[B, S]` -> `[B, N, C]`. `moments`: statistics of the clip that the waveform is a block of."""
        return self.feature_extractor(waveform, moments)

    def encode(self, features: Array, count: Array) -> Array:
        """Transformer part: features `[B, N, C]` of which the first `count` `[B]` are real -> tokens `[B, N, D]`."""
        x = features
        if self.config.feature_layer_norm:
            x = self.layer_norm(x)
        if self.config.feature_projection:
            x = self.post_extract_proj(x)
        return self.encoder(x, jnp.arange(x.shape[1]) < count[:, None])


# --- weights and configurations --------------------------------------------------------------------------------------------------

MASK = "mask_emb"
_VARIANCE_EPS = 1e-5


def _table(config: AudioEncoderConfig) -> Table:
    return list(_entries(config))


def _entries(config: AudioEncoderConfig) -> Iterator[Entry]:
    width = config.hidden_size
    if config.mask_embedding:
        yield from raw(MASK, (width,))
    place = "2.1" if config.extractor_mode == "layer" else "2"
    for index, key in enumerate(f"feature_extractor.conv_layers.{i}" for i in range(len(config.conv_dim))):
        yield from names.convolution(config, index, f"{key}.0", f"{key}.{place}")
    if config.feature_projection:
        yield from linear("post_extract_proj", config.conv_dim[-1], width)
    yield from names.positional(config, "encoder.pos_conv.0")
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


def rename_hf_wavlm(key: str, extractor_mode: str = "group") -> str:
    """A Hugging Face WavLM key under Microsoft's name, which the table has; keys that are neither's stay as they are.

    Args:
      key: key of `WavLMModel`, or of a task model with its `wavlm.` prefix.
      extractor_mode: as in the configuration; says where Microsoft keeps a convolution's norm.
    """
    return _translate(names.bare(key), [(_HF_CONV_NORM, _MICROSOFT_CONV_NORM[extractor_mode]), *_WAVLM_NAMES])


def to_hf_wavlm(key: str) -> str:
    """A Microsoft WavLM key under its Hugging Face name (weight norm as `weight_g`, `weight_v`, which transformers reads)."""
    return _translate(key, [*((name, _HF_CONV_NORM) for name in _MICROSOFT_CONV_NORM.values()), *((m, hf) for hf, m in _WAVLM_NAMES)])


def _translate(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for start, replacement in rules:
        match = re.match(re.escape(start).replace(re.escape("#"), r"(\d+)") + r"(?=\.|$)", key)
        if match:
            return replacement.replace("#", "".join(match.groups())) + key[match.end() :]
    return key


def config_from_hf(
    values: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None, source: str = "config.json"
) -> AudioEncoderConfig:
    """Configuration of a Hugging Face WavLM folder, see `registry.config_from_hf`."""
    fields = names.shared_fields(values, preprocessor, source, normalize=False)  # as wavlm-base-plus does
    distances = {"num_buckets": values.get("num_buckets", 320), "max_distance": values.get("max_bucket_distance", 800)}
    return AudioEncoderConfig(kind="wavlm", **fields, **distances)


def config_from_microsoft(values: Mapping[str, Any], source: str = "cfg") -> AudioEncoderConfig:
    """Configuration of a Microsoft WavLM checkpoint (the `cfg` of `WavLM-Base+.pt`; missing keys take that code's defaults).

    Raises:
      KeySyncError: a feature that the encoder here does not have, by name.
    """
    names.refuse(values, source, {"activation_fn": "gelu"})
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


def _is_microsoft(keys: Collection[str], config: Mapping[str, Any]) -> bool:
    own = any(names.bare(key).startswith(("post_extract_proj.", "encoder.pos_conv.")) for key in keys)
    return own and names.has_convolutions(keys, config)


def _is_hf(keys: Collection[str], config: Mapping[str, Any]) -> bool:
    gated = any("rel_attn_embed" in key or "gru_rel_pos" in key for key in keys)
    return names.has_convolutions(keys, config) and (gated or config.get("model_type") == "wavlm")


def normalise(config: AudioEncoderConfig, wav: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the clip, for a model that wants them."""
    return standardise(wav, unbiased=False, eps=_VARIANCE_EPS) if config.normalize_waveform else wav


ENCODER = SpeechEncoder(
    name="wavlm",
    title="WavLM",
    config=AudioEncoderConfig,
    module=WavLM,
    geometry=layers.convolution_geometry,
    first_convolution=layers.first_convolution,
    prepare=lambda config, wav: normalise(config, pad_to_frames(wav, multiple=2)),
    align=stretch,
    table=_table,
    settle=lambda config, keys: dataclasses.replace(config, mask_embedding=MASK in keys),
    published=(
        Published("wavlm_microsoft", "WavLM (Microsoft)", _is_microsoft, lambda key, config: key, config_from_microsoft),
        Published("wavlm", "WavLM (Hugging Face)", _is_hf, lambda key, config: rename_hf_wavlm(key, config.extractor_mode)),
    ),
    from_hf=config_from_hf,
)
