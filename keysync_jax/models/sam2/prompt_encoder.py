"""Clicks, boxes and masks as tokens for SAM's mask decoder."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.sam2.sam2_layers import gelu

Array = jax.Array

# Labels of points.
NO_POINT, OUTSIDE, INSIDE, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3


class Token(nn.Module):
    """Learned tokens `[count, width]`, under the name that an embedding has in torch."""

    count: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("weight", nn.initializers.normal(0.02), (self.count, self.width))


class FourierFeatures(nn.Module):
    """Places in the unit square, `[..., 2]` as x, y -> `[..., width]` by a fixed random matrix."""

    width: int

    @nn.compact
    def __call__(self, places: Array | np.ndarray) -> Array:
        matrix = self.param("positional_encoding_gaussian_matrix", nn.initializers.normal(1.0), (2, self.width // 2))
        angle = 2 * math.pi * ((2 * places - 1) @ matrix)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class PromptEncoder(nn.Module):
    config: Sam2Config

    def setup(self):
        width = self.config.d_model
        self.pe_layer = FourierFeatures(width)
        self.point_embeddings = [Token(1, width) for _ in range(4)]
        self.not_a_point_embed = Token(1, width)
        self.no_mask_embed = Token(1, width)
        channels = self.config.prompt_mask_channels
        self.mask_downscaling_0 = nn.Conv(channels // 4, (2, 2), strides=(2, 2), padding="VALID")
        self.mask_downscaling_1 = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
        self.mask_downscaling_3 = nn.Conv(channels, (2, 2), strides=(2, 2), padding="VALID")
        self.mask_downscaling_4 = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
        self.mask_downscaling_6 = nn.Dense(width)

    def points(self, points: Array, labels: Array, size: int) -> Array:
        """Tokens of points and of a padding point behind them.

        Args:
          points: `[B, P, 2]`, x and y in pixels of the square picture that the network sees.
          labels: `[B, P]`: 1 inside, 0 outside, 2 and 3 corners of a box, -1 no point.
          size: side of that picture.

        Returns:
          `[B, P + 1, d_model]`.
        """
        points = jnp.pad(points, ((0, 0), (0, 1), (0, 0)), constant_values=-0.5)
        labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=NO_POINT)[..., None]
        x = self.pe_layer((points + 0.5) / size)
        nothing = self.not_a_point_embed()
        x = jnp.where(labels == NO_POINT, nothing, x)
        for label, token in enumerate(self.point_embeddings):
            x = x + jnp.where(labels == label, token(), 0.0)
        return x

    def no_mask(self) -> Array:
        """What stands for a mask prompt where there is none, `[1, 1, 1, d_model]`."""
        return self.no_mask_embed()[None, None]

    def masks(self, logits: Array) -> Array:
        """A mask prompt: logits `[B, 4h, 4w, 1]` -> `[B, h, w, d_model]`."""
        x = gelu(self.mask_downscaling_1(self.mask_downscaling_0(logits)))
        x = gelu(self.mask_downscaling_4(self.mask_downscaling_3(x)))
        return self.mask_downscaling_6(x)

    def grid(self, height: int, width: int) -> Array:
        """Position encoding `[height, width, d_model]` of the cells of a grid."""
        y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        return self.pe_layer(np.stack([x, y], axis=-1).astype(np.float32))

    def __call__(self, points: Array, labels: Array, logits: Array, size: int) -> tuple[Array, Array, Array, Array]:
        """All of it, for the shapes of the parameters."""
        return self.points(points, labels, size), self.no_mask(), self.masks(logits), self.grid(*logits.shape[1:3])
