"""Hiera (Ryali et al., 2023) and the feature pyramid over it: a picture to features at strides 4, 8 and 16."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.sam2.sam2_layers import Mlp, attend, norm, pointwise, resize

Array = jax.Array


def _pool(x: Array) -> Array:
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def to_windows(x: Array, side: int) -> Array:
    """`[B, H, W, C]` -> `[B * windows, side, side, C]`; zeros fill the last windows up and take part in attention, as in the reference."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % side), (0, -w % side), (0, 0)))
    rows, cols = x.shape[1] // side, x.shape[2] // side
    return x.reshape(b, rows, side, cols, side, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, c)


def from_windows(x: Array, height: int, width: int) -> Array:
    """The inverse: `[B * windows, side, side, C]` -> `[B, height, width, C]`."""
    side = x.shape[1]
    rows, cols = -(-height // side), -(-width // side)
    x = x.reshape(-1, rows, cols, side, side, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * side, cols * side, x.shape[-1])[:, :height, :width]


class WindowAttention(nn.Module):
    """Self-attention within `[B, H, W, C]`; queries are pooled to half the side where a stage starts."""

    width: int
    heads: int
    pool: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, _ = x.shape
        q, k, v = jnp.split(nn.Dense(3 * self.width, name="qkv")(x), 3, axis=-1)
        if self.pool:
            q = _pool(q)
        height, width = q.shape[1:3]
        q, k, v = (y.reshape(b, -1, self.heads, self.width // self.heads) for y in (q, k, v))
        return nn.Dense(self.width, name="proj")(attend(q, k, v).reshape(b, height, width, self.width))


class Block(nn.Module):
    """A block of Hiera; `window` 0 attends to the whole picture."""

    width: int
    heads: int
    window: int
    starts_stage: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shortcut, x = x, norm("norm1", 1e-6)(x)
        if self.starts_stage:
            shortcut = _pool(nn.Dense(self.width, name="proj")(x))
        if self.window:
            x = to_windows(x, self.window)
        x = WindowAttention(self.width, self.heads, self.starts_stage, name="attn")(x)
        if self.window:
            x = from_windows(x, *shortcut.shape[1:3])
        x = shortcut + x
        return x + Mlp((4 * self.width, self.width), exact_gelu=True, name="mlp")(norm("norm2", 1e-6)(x))


class PatchEmbed(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Conv(self.width, (7, 7), strides=(4, 4), padding=((3, 3), (3, 3)), name="proj")(x)


class Hiera(nn.Module):
    """Picture `[B, H, W, 3]` -> the outputs of the four stages, `[B, H/4, W/4, C]` to `[B, H/32, W/32, 8C]`."""

    config: Sam2Config

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        config = self.config
        x = PatchEmbed(config.embed_dim, name="patch_embed")(x)
        side = config.window_spec[0]
        background = self.param("pos_embed", nn.initializers.normal(0.02), (1, config.embed_dim, *config.background))
        window = self.param("pos_embed_window", nn.initializers.normal(0.02), (1, config.embed_dim, side, side))
        height, width = x.shape[1:3]
        place = resize(background, height, width, cubic=True) + jnp.tile(window, (1, 1, height // side, width // side))
        x = x + place.transpose(0, 2, 3, 1)
        outputs = []
        stage, ends = 0, config.stage_ends
        for i in range(sum(config.stages)):
            # A stage's first block still has the windows of the stage before; pooling makes them those of its own.
            window_side = 0 if i in config.global_att_blocks else config.window_spec[stage]
            starts = i - 1 in ends
            stage += starts
            heads = config.num_heads * 2**stage
            x = Block(config.stage_dims[stage], heads, window_side, starts, name=f"blocks_{i}")(x)
            if i in ends:
                outputs.append(x)
        return outputs


class Lateral(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return pointwise(self.width, "conv")(x)


class Neck(nn.Module):
    """Four stages -> three levels of `d_model` channels, finest first; only the coarsest kept level hears from the one above."""

    width: int

    @nn.compact
    def __call__(self, stages: list[Array]) -> list[Array]:
        # The reference numbers its convolutions from the coarsest level.
        levels = [Lateral(self.width, name=f"convs_{len(stages) - 1 - i}")(x) for i, x in enumerate(stages)]
        above = levels[3].repeat(2, axis=1).repeat(2, axis=2)
        return [levels[0], levels[1], levels[2] + above]


class ImageEncoder(nn.Module):
    """Picture `[B, H, W, 3]` -> levels of strides 4, 8 and 16, each `[B, H/s, W/s, d_model]`."""

    config: Sam2Config

    def setup(self):
        self.trunk = Hiera(self.config)
        self.neck = Neck(self.config.d_model)

    def __call__(self, x: Array) -> list[Array]:
        return self.neck(self.trunk(x))

    def stages(self, x: Array) -> list[Array]:
        """Outputs of the trunk alone."""
        return self.trunk(x)
