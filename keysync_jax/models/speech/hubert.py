"""HuBERT (Hsu et al., 2021): waveform to one token per 20 ms. Parameter paths are those of the published Hugging Face checkpoint.

Alignment, as in the KeySync reference's offline path (commit cfff7cf): a clip of F frames gives 2F - 1 tokens, of which frame f takes
tokens 2f and 2f + 1; the last one is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.models.speech import speech_layers as layers
from keysync_jax.models.speech import transformers_config as names
from keysync_jax.models.speech.speech_encoder import Moments, Published, SpeechEncoder
from keysync_jax.models.speech.waveform import pad_to_frames, standardise
from keysync_jax.models.table import Entry, Table, linear, norm, raw

Array = jax.Array


class ConvLayer(nn.Module):
    config: AudioEncoderConfig
    index: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, moments: Moments | None, before_norm: bool) -> Array:
        return layers.convolution_layer(self.config, self.index, x, ("conv", "layer_norm"), self.dtype, moments, before_norm)


class FeatureExtractor(nn.Module):
    config: AudioEncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, waveform: Array, moments: Moments | None = None, first_only: bool = False) -> Array:
        """Waveform `[B, S]` -> features `[B, N, C]`, or the first convolution's output before its norm."""
        x = waveform[..., None].astype(self.dtype)
        for index in range(len(self.config.conv_dim)):
            x = ConvLayer(self.config, index, self.dtype, name=f"conv_layers_{index}")(x, moments, first_only)
            if first_only:
                return x
        return x


class FeatureProjection(nn.Module):
    config: AudioEncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.config.feature_layer_norm:
            x = layers.layer_norm("layer_norm", self.config.layer_norm_eps, self.dtype)(x)
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, name="projection")(x) if self.config.feature_projection else x


class PositionEmbedding(nn.Module):
    config: AudioEncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return layers.PositionalConv(self.config, self.dtype, name="conv")(x)


class FeedForward(nn.Module):
    config: AudioEncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = layers.gelu(nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="intermediate_dense")(x))
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, name="output_dense")(x)


class EncoderLayer(nn.Module):
    config: AudioEncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array | None) -> tuple[Array, Array | None]:
        attention = layers.SelfAttention(self.config, dtype=self.dtype, name="attention")
        return layers.transformer_layer(
            self.config,
            x,
            lambda y: attention(y, mask),
            layers.layer_norm("layer_norm", self.config.layer_norm_eps, self.dtype),
            FeedForward(self.config, self.dtype, name="feed_forward"),
            layers.layer_norm("final_layer_norm", self.config.layer_norm_eps, self.dtype),
        )


class Encoder(nn.Module):
    config: AudioEncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """`[B, N, D]`, mask `[B, N]` of tokens that exist -> `[B, N, D]`."""
        stack = [EncoderLayer(self.config, self.dtype, name=f"layers_{i}") for i in range(self.config.num_layers)]
        return layers.transformer(
            self.config,
            x,
            mask,
            PositionEmbedding(self.config, self.dtype, name="pos_conv_embed"),
            layers.layer_norm("layer_norm", self.config.layer_norm_eps, self.dtype),
            stack,
        )


class Hubert(nn.Module):
    """Waveform `[B, S]` (16 kHz, already normalised) -> tokens `[B, N, D]`, the last hidden state.

    `masked_spec_embed` belongs to pre-training and changes nothing here; it is a parameter so that what was read is written back.
    """

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.feature_extractor = FeatureExtractor(self.config, self.dtype)
        self.feature_projection = FeatureProjection(self.config, self.dtype)
        self.encoder = Encoder(self.config, self.dtype)
        if self.config.mask_embedding:
            self.masked_spec_embed = self.param("masked_spec_embed", nn.initializers.uniform(1.0), (self.config.hidden_size,))

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
        mask = jnp.arange(features.shape[1]) < count[:, None]
        return self.encoder(self.feature_projection(features), mask)


# --- weights and configurations --------------------------------------------------------------------------------------------------

MASK = "masked_spec_embed"
_VARIANCE_EPS = 1e-7


def _table(config: AudioEncoderConfig) -> Table:
    return list(_entries(config))


def _entries(config: AudioEncoderConfig) -> Iterator[Entry]:
    width = config.hidden_size
    if config.mask_embedding:
        yield from raw(MASK, (width,))
    for index, key in enumerate(f"feature_extractor.conv_layers.{i}" for i in range(len(config.conv_dim))):
        yield from names.convolution(config, index, f"{key}.conv", f"{key}.layer_norm")
    if config.feature_layer_norm:
        yield from norm("feature_projection.layer_norm", config.conv_dim[-1])
    if config.feature_projection:
        yield from linear("feature_projection.projection", config.conv_dim[-1], width)
    yield from names.positional(config, "encoder.pos_conv_embed.conv")
    yield from norm("encoder.layer_norm", width)
    for key in (f"encoder.layers.{i}" for i in range(config.num_layers)):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{key}.attention.{name}", width, width)
        yield from norm(f"{key}.layer_norm", width)
        yield from linear(f"{key}.feed_forward.intermediate_dense", width, config.intermediate_size)
        yield from linear(f"{key}.feed_forward.output_dense", config.intermediate_size, width)
        yield from norm(f"{key}.final_layer_norm", width)


def config_from_hf(
    values: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None, source: str = "config.json"
) -> AudioEncoderConfig:
    """Configuration of a Hugging Face HuBERT folder, see `registry.config_from_hf`."""
    fields = names.shared_fields(values, preprocessor, source, normalize=True)  # as hubert-base-ls960 does
    return AudioEncoderConfig(kind="hubert", feature_layer_norm=values.get("feat_proj_layer_norm", True), **fields)


def prepare(config: AudioEncoderConfig, wav: np.ndarray) -> np.ndarray:
    """The waveform `[S]` as HuBERT reads it, `[640 F]`: normalised before the padding, unlike in the reference's raw pipeline."""
    return pad_to_frames(normalise(config, wav))


def normalise(config: AudioEncoderConfig, wav: np.ndarray) -> np.ndarray:
    """Zero mean and unit (unbiased) variance over the clip, for a model that wants them."""
    return standardise(wav, unbiased=True, eps=_VARIANCE_EPS) if config.normalize_waveform else wav


ENCODER = SpeechEncoder(
    name="hubert",
    title="HuBERT",
    config=AudioEncoderConfig,
    module=Hubert,
    geometry=layers.convolution_geometry,
    first_convolution=layers.first_convolution,
    prepare=prepare,
    table=_table,
    settle=lambda config, keys: dataclasses.replace(config, mask_embedding=MASK in keys),
    published=(Published("hubert", "HuBERT (Hugging Face)", names.has_convolutions, lambda key, config: names.bare(key)),),
    from_hf=config_from_hf,
)
