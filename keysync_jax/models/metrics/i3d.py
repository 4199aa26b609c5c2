"""I3D (Inception-v1 inflated, Kinetics-400), whose logits FVD compares (Carreira and Zisserman 2017)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.metrics.metric_layers import FrozenBatchNorm, max_pool, network_table
from keysync_jax.models.table import Table

SIDE = 224
LEAST_FRAMES = 9  # 9 -> 5 -> 3 -> 2 at the average pool over two
# Widths of the branches: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after the pool.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


class _Unit(nn.Module):
    features: int
    kernel: int
    epsilon: float
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.features, (self.kernel,) * 3, (self.stride,) * 3, padding="SAME", use_bias=False, name="conv3d")(x)
        return nn.relu(FrozenBatchNorm(self.epsilon, name="bn")(x))


class _Mixed(nn.Module):
    widths: tuple[int, ...]
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def unit(name: str, at: int, kernel: int, x: jax.Array) -> jax.Array:
            return _Unit(self.widths[at], kernel, self.epsilon, name=name)(x)

        pooled = max_pool(x, (3, 3, 3), (1, 1, 1), "SAME")
        parts = [unit("b0", 0, 1, x), unit("b1b", 2, 3, unit("b1a", 1, 1, x)), unit("b2b", 4, 3, unit("b2a", 3, 1, x))]
        return jnp.concatenate([*parts, unit("b3b", 5, 1, pooled)], axis=-1)


class _Logits(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Conv(self.classes, (1, 1, 1), name="conv3d")(x)


class I3d(nn.Module):
    """Clips `[B, T, 224, 224, 3]` in [-1, 1] to pooled features `[B, T', 1024]` and logits averaged over time `[B, 400]`.

    `epsilon` of the batch norm belongs to the file: 1e-5 in `i3d_pretrained_400.pt`, 1e-3 in others. Padding is TensorFlow's SAME.
    """

    epsilon: float = 1e-5
    classes: int = 400

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = _Unit(64, 7, self.epsilon, 2, name="Conv3d_1a_7x7")(x)
        x = max_pool(x, (1, 3, 3), (1, 2, 2), "SAME")
        x = _Unit(64, 1, self.epsilon, name="Conv3d_2b_1x1")(x)
        x = _Unit(192, 3, self.epsilon, name="Conv3d_2c_3x3")(x)
        pools = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}
        for name, widths in _MIXED.items():
            if name in pools:
                x = max_pool(x, *pools[name], "SAME")
            x = _Mixed(widths, self.epsilon, name=name)(x)
        pooled = nn.avg_pool(x, (2, 7, 7), (1, 1, 1), "VALID")
        logits = _Logits(self.classes, name="logits")(pooled)
        return pooled[:, :, 0, 0], logits.mean((1, 2, 3))


def i3d_table() -> Table:
    return network_table(I3d(), (1, LEAST_FRAMES, SIDE, SIDE, 3))


def fvd_pixels(video: jax.Array) -> jax.Array:
    """`[T, H, W, 3]` uint8 to `[T, 224, 224, 3]` in [-1, 1]: shorter side to 224, bilinear without antialias, centre crop (StyleGAN-V).

    Raises:
      KeySyncError: fewer than nine frames.
    """
    frames, height, width, channels = video.shape
    if frames < LEAST_FRAMES:
        raise KeySyncError(f"I3D needs {LEAST_FRAMES} frames or more, got {frames}")
    scale = SIDE / min(height, width)
    size = (SIDE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), SIDE)
    x = jax.image.resize(jnp.asarray(video, jnp.float32) / 255, (frames, *size, channels), "bilinear", antialias=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return x[:, top : top + SIDE, left : left + SIDE] * 2 - 1
