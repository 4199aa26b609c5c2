"""The U-Net's transformer: spatial attention within frames, temporal attention across them, both reading the audio tokens."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.models import layers
from keysync_jax.models.attention import attention

Array = jax.Array


class MultiHeadAttention(nn.Module):
    """Attention of `[N, L, C]` over itself or over a context `[N, L', D]`; output `[N, L, C]`."""

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        inner = self.num_heads * self.head_dim
        source = x if context is None else context
        q, k, v = (
            layers.dense(inner, name, self.dtype, use_bias=False)(value).reshape(*value.shape[:2], self.num_heads, self.head_dim)
            for name, value in (("to_q", x), ("to_k", source), ("to_v", source))
        )
        out = attention(q, k, v, self.implementation).reshape(*x.shape[:2], inner)
        return layers.dense(x.shape[-1], "to_out_0", self.dtype)(layers.saved(out, "attention"))


class GEGLU(nn.Module):
    """`[..., C]` to `[..., features]`: value times the exact (erf) GELU of the gate."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(layers.dense(2 * self.features, "proj", self.dtype)(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """`[..., C]` to `[..., C]` through a hidden layer of 4C."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]
        return layers.dense(features, "net_2", self.dtype)(GEGLU(4 * features, self.dtype, name="net_0")(x))


class SpatialBlock(nn.Module):
    """Self-attention within each frame, cross-attention to the context, feed-forward."""

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Array, context: Array | None) -> Array:
        """`[B, T, S, C]` and a context `[B, L, D]` (shared by all frames), `[B, T, L, D]` (per frame) or None, to `[B, T, S, C]`."""

        def attend(name: str, x: Array, context: Array | None) -> Array:
            b, t, s, c = x.shape
            if context is not None and context.ndim == 3:
                # Keys and values are the same for all frames: project them once and let all T*S queries of the video read them.
                grouped = x.reshape(b, t * s, c)
            else:
                grouped = x.reshape(b * t, s, c)
                context = None if context is None else context.reshape(b * t, *context.shape[2:])
            layer = MultiHeadAttention(self.num_heads, self.head_dim, self.dtype, self.implementation, name=name)
            return layer(grouped, context).reshape(x.shape)

        x = x + attend("attn1", layers.layer_norm("norm1", self.dtype)(x), None)
        x = x + attend("attn2", layers.layer_norm("norm2", self.dtype)(x), context)
        return x + FeedForward(self.dtype, name="ff")(layers.layer_norm("norm3", self.dtype)(x))


class TemporalBlock(nn.Module):
    """Feed-forward, self-attention along time at each position, cross-attention to the context, feed-forward."""

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Array, context: Array | None) -> Array:
        """`[B, S, T, C]` and a context `[B, L, D]` (or None: self-attention) to `[B, S, T, C]`."""

        def attend(name: str, x: Array, context: Array | None) -> Array:
            b, s, t, c = x.shape
            grouped = x.reshape(b * s, t, c) if context is None else x.reshape(b, s * t, c)  # one projection of the context per video
            layer = MultiHeadAttention(self.num_heads, self.head_dim, self.dtype, self.implementation, name=name)
            return layer(grouped, context).reshape(x.shape)

        x = x + FeedForward(self.dtype, name="ff_in")(layers.layer_norm("norm_in", self.dtype)(x))
        x = x + attend("attn1", layers.layer_norm("norm1", self.dtype)(x), None)
        x = x + attend("attn2", layers.layer_norm("norm2", self.dtype)(x), context)
        return x + FeedForward(self.dtype, name="ff")(layers.layer_norm("norm3", self.dtype)(x))


class SpatialVideoTransformer(nn.Module):
    """`depth` times a spatial and a temporal block, blended; frame positions enter the temporal block only.

    `use_spatial_context` gives the temporal cross-attention the same context; without it, it attends along time once more.
    """

    num_heads: int
    head_dim: int
    depth: int = 1
    use_spatial_context: bool = True
    merge_strategy: str = "learned_with_images"
    merge_factor: float = 0.5
    max_period: float = 10000.0
    dtype: Any = jnp.float32
    implementation: str = "auto"
    temporal: bool = True  # False: spatial blocks alone
    groups: int = layers.NORM_GROUPS

    @nn.compact
    def __call__(self, x: Array, context: Array | None, image_only_indicator: Array | None = None) -> Array:
        """Transforms a video.

        Args:
          x: `[B, T, H, W, C]`.
          context: `[B, L, D]`, shared by all frames, or `[B, T, L, D]`; the temporal attention then reads the first frame's.
          image_only_indicator: `[B, T]`, see `AlphaBlender`.

        Returns:
          `[B, T, H, W, C]`.
        """
        b, t, h, w, c = x.shape
        tokens = layers.group_norm("norm", 1e-6, self.dtype, self.groups)(x).reshape(b, t, h * w, c)
        tokens = layers.dense(self.num_heads * self.head_dim, "proj_in", self.dtype)(tokens)
        if self.temporal:
            # Positions are computed in float32: they are a handful of vectors, added to every token.
            position = layers.sinusoidal_embedding(jnp.arange(t), c, self.max_period)
            position = layers.dense(c, "time_pos_embed_2")(nn.silu(layers.dense(4 * c, "time_pos_embed_0")(position))).astype(self.dtype)
            time_context = None
            if self.use_spatial_context and context is not None:
                time_context = context if context.ndim == 3 else context[:, 0]
            blender = layers.AlphaBlender(self.merge_strategy, self.merge_factor, name="time_mixer")
        options = (self.num_heads, self.head_dim, self.dtype, self.implementation)
        for i in range(self.depth):
            tokens = SpatialBlock(*options, name=f"transformer_blocks_{i}")(tokens, context)
            if not self.temporal:
                continue
            block = TemporalBlock(*options, name=f"time_stack_{i}")
            mixed = block((tokens + position[:, None]).swapaxes(1, 2), time_context).swapaxes(1, 2)
            tokens = blender(tokens, mixed, image_only_indicator)
        return x + layers.dense(c, "proj_out", self.dtype)(tokens).reshape(x.shape)
