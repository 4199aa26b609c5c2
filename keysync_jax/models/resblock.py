"""The U-Net's residual block: a 2-D block per frame, then a temporal one over the clip, blended."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.models import layers

Array = jax.Array


def residual_branch(
    x: Array, emb: Array | None, features: int, epsilon: float, dtype: Any, temporal_kernel: int = 0, groups: int = layers.NORM_GROUPS
) -> Array:
    """norm, SiLU, convolution, embedding, norm, SiLU, convolution, as submodules of the calling module.

    Args:
      x: `[B, T, H, W, C]` for the spatial branch; `[B, T, S, C]` for the temporal one.
      emb: `[B, T, E]` added after the first convolution, or None (the autoencoder has no embedding).
      features: output channels.
      epsilon: of both norms.
      dtype: compute type.
      temporal_kernel: 0 for 3x3 spatial convolutions, else the length of the temporal ones.
      groups: of both norms.

    Returns:
      the branch, without the skip connection, shaped like `x` but for the channels.
    """

    def convolution(name: str) -> nn.Conv:
        return layers.temporal_conv(features, name, dtype, temporal_kernel) if temporal_kernel else layers.conv(features, name, dtype)

    h = nn.silu(layers.group_norm("in_layers_0", epsilon, dtype, groups)(x))
    h = layers.saved(convolution("in_layers_2")(h), "conv")
    if emb is not None:
        shift = layers.dense(features, "emb_layers_1", dtype)(nn.silu(emb))
        h = h + shift.reshape(shift.shape[:2] + (1,) * (h.ndim - 3) + shift.shape[2:])
    h = nn.silu(layers.group_norm("out_layers_0", epsilon, dtype, groups)(h))
    return layers.saved(convolution("out_layers_3")(h), "conv")


class TemporalResBlock(nn.Module):
    """`time_stack` of a residual block: same channels in and out, so the skip connection is the identity."""

    kernel: int = 3
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    groups: int = layers.NORM_GROUPS

    @nn.compact
    def __call__(self, x: Array, emb: Array | None = None) -> Array:
        """`[B, T, S, C]` and `[B, T, E]` to `[B, T, S, C]`."""
        return x + residual_branch(x, emb, x.shape[-1], self.epsilon, self.dtype, self.kernel, self.groups)


class VideoResBlock(nn.Module):
    """Spatial residual block, temporal residual block, and their blend (spatial weight = sigmoid of the mix factor)."""

    features: int
    temporal_kernel: int = 3
    merge_strategy: str = "learned_with_images"
    merge_factor: float = 0.5
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    temporal: bool = True  # False: the spatial block alone
    groups: int = layers.NORM_GROUPS

    @nn.compact
    def __call__(self, x: Array, emb: Array, image_only_indicator: Array | None = None) -> Array:
        """`[B, T, H, W, C]`, `[B, T, E]` and `[B, T]` (or None) to `[B, T, H, W, features]`."""
        skip = x
        if x.shape[-1] != self.features:
            skip = layers.saved(layers.conv(self.features, "skip_connection", self.dtype, kernel=1)(x), "conv")
        spatial = skip + residual_branch(x, emb, self.features, self.epsilon, self.dtype, groups=self.groups)
        if not self.temporal:
            return spatial
        b, t, h, w, c = spatial.shape
        block = TemporalResBlock(self.temporal_kernel, self.epsilon, self.dtype, self.groups, name="time_stack")
        temporal = block(spatial.reshape(b, t, h * w, c), emb).reshape(spatial.shape)
        blender = layers.AlphaBlender(self.merge_strategy, self.merge_factor, name="time_mixer")
        return blender(spatial, temporal, image_only_indicator)
