"""InceptionV3 as the FID uses it, under the names of `pt_inception-2015-12-05-6726825d.pth` (Szegedy et al. 2016; mseitzer/pytorch-fid)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from keysync_jax.models.metrics.metric_layers import FrozenBatchNorm, max_pool, network_table
from keysync_jax.models.table import Table

SIDE = 299
UNUSED = ("fc.weight", "fc.bias")


class _Unit(nn.Module):
    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.features, self.kernel, self.stride, padding=self.padding, use_bias=False, name="conv")(x)
        return nn.relu(FrozenBatchNorm(1e-3, name="bn")(x))


def _chain(x: jax.Array, *units: tuple) -> jax.Array:
    """Units `(name, features, height, width[, stride, padding])` one after the other; SAME pads odd kernels as torch does."""
    for name, features, height, width, *rest in units:
        x = _Unit(features, (height, width), *rest, name=name)(x)
    return x


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class _Small(nn.Module):
    """Mixed_5b to Mixed_5d."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate(
            [
                _chain(x, ("branch1x1", 64, 1, 1)),
                _chain(x, ("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)),
                _chain(x, ("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)),
                _chain(_average(x), ("branch_pool", self.pool_features, 1, 1)),
            ],
            axis=-1,
        )


class _ReduceFirst(nn.Module):
    """Mixed_6a."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        double = (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3, 2, "VALID"))
        parts = [_chain(x, ("branch3x3", 384, 3, 3, 2, "VALID")), _chain(x, *double), max_pool(x, (3, 3), (2, 2))]
        return jnp.concatenate(parts, axis=-1)


class _Long(nn.Module):
    """Mixed_6b to Mixed_6e: factorised 7x7 convolutions."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.inner
        double = [("branch7x7dbl_1", c, 1, 1), ("branch7x7dbl_2", c, 7, 1), ("branch7x7dbl_3", c, 1, 7), ("branch7x7dbl_4", c, 7, 1)]
        return jnp.concatenate(
            [
                _chain(x, ("branch1x1", 192, 1, 1)),
                _chain(x, ("branch7x7_1", c, 1, 1), ("branch7x7_2", c, 1, 7), ("branch7x7_3", 192, 7, 1)),
                _chain(x, *double, ("branch7x7dbl_5", 192, 1, 7)),
                _chain(_average(x), ("branch_pool", 192, 1, 1)),
            ],
            axis=-1,
        )


class _ReduceSecond(nn.Module):
    """Mixed_7a."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        long = (("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, 1, 7), ("branch7x7x3_3", 192, 7, 1))
        parts = [
            _chain(x, ("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3, 2, "VALID")),
            _chain(x, *long, ("branch7x7x3_4", 192, 3, 3, 2, "VALID")),
            max_pool(x, (3, 3), (2, 2)),
        ]
        return jnp.concatenate(parts, axis=-1)


class _Wide(nn.Module):
    """Mixed_7b and Mixed_7c; the last pools by the largest, the one before by the mean."""

    pool_largest: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _chain(x, ("branch3x3_1", 384, 1, 1))
        two = _chain(x, ("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 3))
        pooled = max_pool(x, (3, 3), (1, 1), (1, 1)) if self.pool_largest else _average(x)
        parts = [
            _chain(x, ("branch1x1", 320, 1, 1)),
            *(_chain(one, (f"branch3x3_2{side}", 384, *kernel)) for side, kernel in (("a", (1, 3)), ("b", (3, 1)))),
            *(_chain(two, (f"branch3x3dbl_3{side}", 384, *kernel)) for side, kernel in (("a", (1, 3)), ("b", (3, 1)))),
            _chain(pooled, ("branch_pool", 192, 1, 1)),
        ]
        return jnp.concatenate(parts, axis=-1)


class Inception(nn.Module):
    """Pictures `[N, 299, 299, 3]` in [-1, 1] to the features of the FID `[N, 2048]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _chain(x, ("Conv2d_1a_3x3", 32, 3, 3, 2, "VALID"), ("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID"), ("Conv2d_2b_3x3", 64, 3, 3))
        x = max_pool(x, (3, 3), (2, 2))
        x = _chain(x, ("Conv2d_3b_1x1", 80, 1, 1), ("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"))
        x = max_pool(x, (3, 3), (2, 2))
        for name, features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _Small(features, name=name)(x)
        x = _ReduceFirst(name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = _Long(inner, name=name)(x)
        x = _ReduceSecond(name="Mixed_7a")(x)
        x = _Wide(False, name="Mixed_7b")(x)
        return _Wide(True, name="Mixed_7c")(x).mean((1, 2))


def inception_table() -> Table:
    return network_table(Inception(), (1, SIDE, SIDE, 3))


def fid_pixels(pictures: ArrayLike) -> jax.Array:
    """`[N, H, W, 3]` uint8 to `[N, 299, 299, 3]` in [-1, 1], bilinear without antialias."""
    x = jnp.asarray(pictures, jnp.float32) / 255
    return jax.image.resize(x, (len(x), SIDE, SIDE, x.shape[-1]), "bilinear", antialias=False) * 2 - 1
