"""WavLM (Chen et al., 2022): waveform to one token per 20 ms. Parameter paths are those of Microsoft's published checkpoint."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.speech import speech_layers as layers
from keysync_jax.speech.speech_layers import Moments

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
