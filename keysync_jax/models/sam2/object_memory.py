"""Memory of SAM 2: how a frame and its mask become a memory, and how a later frame attends to memories."""

from __future__ import annotations

import flax.linen as nn
import jax

from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.sam2.sam2_layers import Attention, gelu, norm, pointwise

Array = jax.Array


class MemoryAttentionLayer(nn.Module):
    config: Sam2Config

    @nn.compact
    def __call__(self, x: Array, memory: Array, place: Array, placed: int, bias: Array | None) -> Array:
        width = self.config.d_model
        y = norm("norm1")(x)
        x = x + Attention(width, 1, rotary=True, name="self_attn")(y, y, y)
        attention = Attention(width, 1, rotary=True, name="cross_attn_image")
        x = x + attention(norm("norm2")(x), memory + place, memory, placed, bias)
        y = nn.relu(nn.Dense(self.config.attention_ff, name="linear1")(norm("norm3")(x)))
        return x + nn.Dense(width, name="linear2")(y)


class MemoryAttention(nn.Module):
    """Features of a frame, told what memories hold."""

    config: Sam2Config

    @nn.compact
    def __call__(self, x: Array, x_place: Array, memory: Array, place: Array, placed: int, bias: Array | None = None) -> Array:
        """One frame.

        Args:
          x, x_place: features of the frame and their position encoding, `[B, N, d_model]`, N the tokens of a square grid.
          memory, place: tokens of memories and what says where and when they are, `[B, M, mem_dim]`.
          placed: how many of the first tokens lie on the grid, a multiple of N; pointers to objects follow.
          bias: `[B, M]`, minus infinity for tokens that do not exist; None: all do.

        Returns:
          `[B, N, d_model]`.
        """
        x = x + 0.1 * x_place
        for i in range(self.config.attention_layers):
            x = MemoryAttentionLayer(self.config, name=f"layers_{i}")(x, memory, place, placed, bias)
        return norm("norm")(x)


class MaskDownsampler(nn.Module):
    """Mask `[B, H, W, 1]` -> `[B, H/16, W/16, d_model]`."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(4):
            name = f"encoder_{3 * i}"
            x = nn.Conv(4 ** (i + 1), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), name=name)(x)
            x = gelu(norm(f"encoder_{3 * i + 1}", 1e-6)(x))
        return pointwise(self.width, "encoder_12")(x)


class ConvNeXtBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        y = nn.Conv(width, (7, 7), padding=((3, 3), (3, 3)), feature_group_count=width, name="dwconv")(x)
        y = nn.Dense(4 * width, name="pwconv1")(norm("norm", 1e-6)(y))
        y = nn.Dense(width, name="pwconv2")(gelu(y))
        return x + self.param("gamma", nn.initializers.constant(1e-6), (width,)) * y


class Fuser(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = ConvNeXtBlock(name=f"layers_{i}")(x)
        return x


class MemoryEncoder(nn.Module):
    """Features `[B, h, w, d_model]` of a frame and its mask `[B, 16h, 16w, 1]`, from -10 to 10 -> a memory `[B, h, w, mem_dim]`."""

    config: Sam2Config

    @nn.compact
    def __call__(self, features: Array, mask: Array) -> Array:
        x = pointwise(self.config.d_model, "pix_feat_proj")(features)
        x = x + MaskDownsampler(self.config.d_model, name="mask_downsampler")(mask)
        x = Fuser(self.config.fuser_layers, name="fuser")(x)
        return pointwise(self.config.mem_dim, "out_proj")(x)
