"""Pieces that the parts of SAM 2 share: norms, MLPs, attention, position encodings and torch's resampling as matrices."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def norm(name: str, epsilon: float = 1e-5) -> nn.LayerNorm:
    """LayerNorm over channels; with `epsilon` 1e-6 also the reference's LayerNorm2d, since everything here is channels last."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


def gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=False)


def pointwise(features: int, name: str) -> nn.Dense:
    """A 1 x 1 convolution."""
    return nn.Dense(features, name=name)


class Mlp(nn.Module):
    """Linear layers of the given widths with `activation` between them: `[..., C]` -> `[..., widths[-1]]`."""

    widths: tuple[int, ...]
    exact_gelu: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"layers_{i}")(x)
            if i < len(self.widths) - 1:
                x = gelu(x) if self.exact_gelu else nn.relu(x)
        return x


def attend(q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
    """Softmax attention `[..., N, H, D]`, `[..., M, H, D]` twice -> `[..., N, H, D]`; `bias` `[..., M]` is added to all scores."""
    scores = jnp.einsum("...nhd,...mhd->...hnm", q, k) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias[..., None, None, :]
    return jnp.einsum("...hnm,...mhd->...nhd", jax.nn.softmax(scores, axis=-1), v)


class Attention(nn.Module):
    """Attention whose inner width is `width`; with a grid's rotary encoding when `rotary` is set.

    With it, queries are the tokens of a square grid, and keys are any number of such grids, then tokens without a place.
    """

    width: int
    heads: int
    rotary: bool = False

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array, placed: int | None = None, bias: Array | None = None) -> Array:
        """`[B, N, C]`, `[B, M, C']` twice -> `[B, N, C]`; the first `placed` keys (None: all) lie on the queries' grid."""
        out = q.shape[-1]
        q, k, v = (nn.Dense(self.width, name=f"{name}_proj")(x) for name, x in (("q", q), ("k", k), ("v", v)))
        if self.rotary:
            side = math.isqrt(q.shape[-2])
            placed = k.shape[-2] if placed is None else placed
            q = rotate(q, self.heads, side)
            k = jnp.concatenate([rotate(k[..., :placed, :], self.heads, side), k[..., placed:, :]], axis=-2)
        q, k, v = (x.reshape(*x.shape[:-1], self.heads, -1) for x in (q, k, v))
        x = attend(q, k, v, bias)
        return nn.Dense(out, name="out_proj")(x.reshape(*x.shape[:-2], -1))


@functools.lru_cache(maxsize=32)
def _turns(width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine `[side * side, width / 2]` of axial RoPE (base 10000): the first half of the pairs turns with x, the rest with y."""
    frequency = 1.0 / 10000.0 ** (np.arange(0, width, 4)[: width // 4] / width)
    y, x = np.divmod(np.arange(side * side), side)
    angle = np.concatenate([np.outer(x, frequency), np.outer(y, frequency)], axis=-1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: Array, heads: int, side: int) -> Array:
    """Turns neighbouring channels of `[..., r * side * side, C]` by their token's place, grid after grid."""
    cos, sin = _turns(x.shape[-1] // heads, side)
    grids = x.shape[-2] // (side * side)
    pairs = x.reshape(*x.shape[:-2], grids, side * side, heads, -1, 2)
    cos, sin = cos[:, None, :], sin[:, None, :]
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


@functools.lru_cache(maxsize=32)
def sine_grid(height: int, width: int, features: int) -> np.ndarray:
    """Sine position encoding `[height, width, features]` of DETR, normalised to 2 pi, y before x."""
    half = features // 2
    period = 10000.0 ** (2 * (np.arange(half) // 2) / half)

    def along(count: int) -> np.ndarray:
        angle = (np.arange(1, count + 1) / (count + 1e-6) * 2 * math.pi)[:, None] / period
        return np.stack([np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])], axis=-1).reshape(count, -1)

    y = np.broadcast_to(along(height)[:, None], (height, width, half))
    x = np.broadcast_to(along(width)[None], (height, width, half))
    return np.concatenate([y, x], axis=-1).astype(np.float32)


def sine_of(positions: Array, features: int) -> Array:
    """Sines, then cosines, `[..., features]` of positions `[...]`; frequencies come in pairs, as in the grid's encoding."""
    half = features // 2
    period = (10000.0 ** (2 * (np.arange(half) // 2) / half)).astype(np.float32)
    angle = positions[..., None] / period
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _linear_taps(t: np.ndarray) -> np.ndarray:
    return np.stack([1 - t, t])


def _cubic_taps(t: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.75 (torch's; jax.image has -0.5)."""
    a = -0.75

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])


@functools.lru_cache(maxsize=64)
def resampling(target: int, source: int, cubic: bool = False) -> np.ndarray:
    """Matrix `[target, source]` of torch's `interpolate` (half-pixel centres, edges repeated, no antialiasing)."""
    at = (np.arange(target) + 0.5) * source / target - 0.5
    if not cubic:
        at = np.maximum(at, 0)  # where torch clamps a linear position
    low = np.floor(at).astype(int)
    taps = (_cubic_taps if cubic else _linear_taps)(at - low)
    first = low - (1 if cubic else 0)
    matrix = np.zeros((target, source))
    for i, weights in enumerate(taps):
        np.add.at(matrix, (np.arange(target), np.clip(first + i, 0, source - 1)), weights)
    return matrix.astype(np.float32)


def resize(x: Array, height: int, width: int, cubic: bool = False) -> Array:
    """Planes `[..., H, W]` -> `[..., height, width]`, as torch's `interpolate` gives them."""
    if x.shape[-2:] == (height, width):
        return x
    rows, cols = resampling(height, x.shape[-2], cubic), resampling(width, x.shape[-1], cubic)
    return jnp.einsum("yh,...hw,xw->...yx", rows, x, cols)
