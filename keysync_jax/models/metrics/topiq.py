"""TOPIQ without reference: ResNet-50 and a head that looks from coarse to fine (Chen et al. 2024, "TOPIQ"), under the published names."""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.models.metrics.metric_layers import FrozenBatchNorm, max_pool, network_table
from keysync_jax.models.table import Table

_WIDTH, _HEADS, _HIDDEN, _GRID = 256, 4, 1024, 32
_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
_gelu = functools.partial(nn.gelu, approximate=False)
# In the file and read by nothing: the self-attention of the layers that attend across scales.
UNUSED = re.compile(r"attn_blks\.\d+\.layers\.0\.self_attn\.")


class _Bottleneck(nn.Module):
    features: int
    stride: int
    widen: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def unit(x: jax.Array, number: int, features: int, kernel: int, stride: int = 1) -> jax.Array:
            x = nn.Conv(features, (kernel,) * 2, stride, padding=kernel // 2, use_bias=False, name=f"conv{number}")(x)
            return FrozenBatchNorm(name=f"bn{number}")(x)

        y = nn.relu(unit(x, 1, self.features, 1))
        y = unit(nn.relu(unit(y, 2, self.features, 3, self.stride)), 3, 4 * self.features, 1)
        if self.widen:
            x = nn.Conv(4 * self.features, (1, 1), self.stride, use_bias=False, name="downsample_0")(x)
            x = FrozenBatchNorm(name="downsample_1")(x)
        return nn.relu(x + y)


class _ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False, name="conv1")(x)
        x = nn.relu(FrozenBatchNorm(name="bn1")(x))
        levels = [x]
        x = max_pool(x, (3, 3), (2, 2), (1, 1))
        for i, (features, blocks) in enumerate(_STAGES):
            for j in range(blocks):
                x = _Bottleneck(features, 2 if i and not j else 1, not j, name=f"layer{i + 1}_{j}")(x)
            levels.append(x)
        return levels


class _GatedPool(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = jnp.split(nn.Conv(2 * x.shape[-1], (1, 1), name="splitconv")(x), 2, axis=-1)
        gate = _gelu(nn.Conv(64, (1, 1), name="weight_blk_0")(second))
        gate = _gelu(nn.Conv(64, (3, 3), padding=1, name="weight_blk_2")(gate))
        return _gelu(first) * nn.sigmoid(nn.Conv(1, (3, 3), padding=1, name="weight_blk_4")(gate))


class _Attention(nn.Module):
    """Multi-head attention with the three projections of the inputs in one matrix, as torch stores it `[3 E, E]`."""

    @nn.compact
    def __call__(self, query: jax.Array, memory: jax.Array) -> jax.Array:
        weight = self.param("in_proj_weight", nn.initializers.normal(0.02), (3 * _WIDTH, _WIDTH))
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * _WIDTH,))
        given = zip((query, memory, memory), jnp.split(weight, 3), jnp.split(bias, 3), strict=True)
        q, k, v = ((x @ w.T + b).reshape(*x.shape[:2], _HEADS, -1) for x, w, b in given)
        return nn.Dense(_WIDTH, name="out_proj")(nn.dot_product_attention(q, k, v).reshape(query.shape))


class _AttentionLayer(nn.Module):
    """Pre-norm layer over tokens `[B, n, 256]`; with a `memory` it attends there."""

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None = None) -> jax.Array:
        def norm(number: int, x: jax.Array) -> jax.Array:
            return nn.LayerNorm(1e-5, name=f"norm{number}")(x)

        if memory is None:
            y = norm(1, x)
            x = x + _Attention(name="self_attn")(y, y)
        else:
            x = x + _Attention(name="multihead_attn")(norm(1, x), norm(2, memory))
        y = norm(2 if memory is None else 3, x)
        return x + nn.Dense(_WIDTH, name="linear2")(_gelu(nn.Dense(_HIDDEN, name="linear1")(y)))


@functools.lru_cache(maxsize=64)
def _bicubic(size: int, out: int) -> np.ndarray:
    """`[out, size]` weights of torch's bicubic resize: a = -.75, no antialias, edges repeated."""
    a, matrix = -0.75, np.zeros((out, size))
    for row in range(out):
        at = (row + 0.5) * size / out - 0.5
        low = int(np.floor(at))
        for tap in range(low - 1, low + 3):
            d = abs(at - tap)
            near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            matrix[row, min(max(tap, 0), size - 1)] += near if d <= 1 else far
    return matrix.astype(np.float32)


@functools.lru_cache(maxsize=64)
def _bins(size: int, out: int) -> np.ndarray:
    """`[out, size]` weights of torch's adaptive mean: bins from floor(i n / m) to ceil((i + 1) n / m), which overlap."""
    matrix = np.zeros((out, size))
    for row in range(out):
        low, high = row * size // out, -(-(row + 1) * size // out)
        matrix[row, low:high] = 1 / (high - low)
    return matrix.astype(np.float32)


class Topiq(nn.Module):
    """Pictures `[N, H, W, 3]` in [0, 1] to one score each `[N]`, higher is better."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        levels = _ResNet50(name="semantic_model")((x - _MEAN) / _STD)
        height, width = levels[-1].shape[1:3]
        half = _WIDTH // 2
        rows = self.param("h_emb", nn.initializers.normal(), (1, half, _GRID, 1))
        columns = self.param("w_emb", nn.initializers.normal(), (1, half, 1, _GRID))
        grid = jnp.concatenate([jnp.broadcast_to(e[0], (half, _GRID, _GRID)) for e in (rows, columns)])
        place = _resized(grid, height, width)
        tokens = []
        for i in reversed(range(len(levels))):
            y = _GatedPool(name=f"weight_pool_{i}")(levels[i])
            own = place
            if y.shape[1] > height and y.shape[2] > width:
                y = jnp.einsum("bhwc,ih,jw->bijc", y, _bins(y.shape[1], height), _bins(y.shape[2], width))
            elif y.shape[1:3] != (height, width):
                own = _resized(grid, *y.shape[1:3])
            y = _gelu(nn.Conv(_WIDTH, (1, 1), name=f"dim_reduce_{i}_0")(y)) + own
            tokens.append(_AttentionLayer(name=f"sa_attn_blks_{i}_layers_0")(y.reshape(len(y), -1, _WIDTH)))
        query = tokens[0]
        for i, memory in enumerate(tokens[1:]):
            query = _AttentionLayer(name=f"attn_blks_{i}_layers_0")(query, memory)
        y = _AttentionLayer(name="attn_pool")(query).mean(1)
        for norm, linear in ((0, 1), (3, 4)):
            y = nn.LayerNorm(1e-5, name=f"score_linear_{norm}")(y)
            y = _gelu(nn.Dense(_WIDTH, name=f"score_linear_{linear}")(y))
        return nn.Dense(1, name="score_linear_6")(y)[:, 0]


def _resized(grid: jax.Array, height: int, width: int) -> jax.Array:
    """Position of every token `[height, width, 256]` from the stored `[256, 32, 32]`."""
    return jnp.einsum("chw,ih,jw->ijc", grid, _bicubic(_GRID, height), _bicubic(_GRID, width))


def topiq_table() -> Table:
    table = network_table(Topiq(), (1, 64, 64, 3))
    return [entry._replace(torch_key=_published(entry.torch_key)) for entry in table]


def _published(key: str) -> str:
    """`sa_attn_blks_0_layers_0.norm1` is `sa_attn_blks.0.layers.0.norm1` in the file."""
    return re.sub(r"_(\d+)(?=[_.])", r".\1", key).replace("_layers.", ".layers.")


def shorter_side_to(pictures: jax.Array | np.ndarray, side: int) -> jax.Array:
    """`[N, H, W, 3]` with the shorter side at `side`, bilinear with antialias."""
    height, width = pictures.shape[1:3]
    size = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    return jax.image.resize(pictures, (len(pictures), *size, 3), "bilinear")
