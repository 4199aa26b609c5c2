"""HuBERT (Hsu et al., 2021): waveform to one token per 20 ms. Parameter paths are those of the published Hugging Face checkpoint."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.speech import speech_layers as layers
from keysync_jax.speech.speech_layers import Moments

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
    def __call__(self, x: Array, mask: Array, bias: None) -> tuple[Array, None]:
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
