"""Small pieces shared by the networks: layers with torch's conventions, sinusoidal embeddings, resampling, blending.

Everything is channels last. Parameters are float32; `dtype` is the type of the computation, and normalisation statistics are
always float32. Names follow the reference's state dict (see `weights.table`), so they are given explicitly.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

NORM_GROUPS = 32  # groups of a GroupNorm unless a config says otherwise (small networks do)


def batch_over_mesh(x: Array) -> Array:
    """Keeps the batch, the first axis of `[B, ..., C]`, over the mesh axes `data` and `fsdp`; without such a mesh, `x` itself.

    Parameters lie over `fsdp` too, and left alone the partitioner would carry their layout over to the activations, which are much
    larger, and exchange those all the time. With the outputs of all layers fixed, it gathers the parameters of each layer instead.
    Two-dimensional inputs (the positions of the frames) have no batch axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.shape or "fsdp" not in mesh.shape or x.ndim < 3:
        return x
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if parts == 1 or x.shape[0] % parts or mesh.manual_axes:  # within `shard_map`, arrays are those of one device
        return x
    unconstrained = jax.sharding.PartitionSpec.UNCONSTRAINED  # `tensor` may split heads
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(("data", "fsdp"), *[unconstrained] * (x.ndim - 1)))


class Dense(nn.Dense):
    """Linear layer whose output keeps its batch over the mesh."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return batch_over_mesh(super().__call__(x))


class Conv(nn.Conv):
    """Convolution whose output keeps its batch over the mesh."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return batch_over_mesh(super().__call__(x))


def dense(features: int, name: str, dtype: Any = jnp.float32, use_bias: bool = True) -> nn.Dense:
    """Linear layer over the last axis."""
    return Dense(features, use_bias=use_bias, dtype=dtype, name=name)


def conv(
    features: int, name: str, dtype: Any = jnp.float32, kernel: int = 3, stride: int = 1, pad: tuple[int, int] | None = None
) -> nn.Conv:
    """2-D convolution over `[..., H, W, C]`; `pad` (before, after) is the same for both axes and defaults to torch's `kernel // 2`."""
    pad = (kernel // 2, kernel // 2) if pad is None else pad
    return Conv(features, (kernel, kernel), strides=(stride, stride), padding=(pad, pad), dtype=dtype, name=name)


def temporal_conv(features: int, name: str, dtype: Any = jnp.float32, kernel: int = 3) -> nn.Conv:
    """Convolution along time of `[B, T, S, C]` (S = any flattened space), zero padded at the ends of the clip.

    A 3-D convolution with kernel (k, 1, 1) is this 2-D one; XLA runs it several times faster on GPUs.
    """
    return Conv(features, (kernel, 1), padding=((kernel // 2, kernel // 2), (0, 0)), dtype=dtype, name=name)


def group_norm(name: str, epsilon: float, dtype: Any = jnp.float32, groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """GroupNorm that pools over the last three axes.

    On `[B, T, H, W, C]` these are the H, W and group of each frame; on `[B, T, H*W, C]` the T, H, W and group of each video.
    """
    return nn.GroupNorm(groups, epsilon=epsilon, reduction_axes=(-3, -2, -1), use_fast_variance=False, dtype=dtype, name=name)


def layer_norm(name: str, dtype: Any = jnp.float32) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


def saved(x: Array, kind: str) -> Array:
    """Tags a tensor for rematerialisation policies: "conv" or "attention" outputs are worth keeping, the rest is cheap to redo."""
    return checkpoint_name(x, kind)


def sinusoidal_embedding(positions: Array, features: int, max_period: float = 10000.0) -> Array:
    """`[...]` positions or noise levels to `[..., features]`: cosines, then sines, of geometrically spaced frequencies, float32."""
    half = features // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, [(0, 0)] * (embedding.ndim - 1) + [(0, features % 2)])


def upsample_nearest(x: Array) -> Array:
    """`[..., H, W, C]` to `[..., 2H, 2W, C]`."""
    return x.repeat(2, axis=-3).repeat(2, axis=-2)


class Downsample(nn.Module):
    """Strided 3x3 convolution of the U-Net: `[..., H, W, C]` to half the size, padded by 1 on all sides."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return saved(conv(x.shape[-1], "op", self.dtype, stride=2)(x), "conv")


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a 3x3 convolution: `[..., H, W, C]` to `[..., 2H, 2W, C]`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return saved(conv(x.shape[-1], "conv", self.dtype)(upsample_nearest(x)), "conv")


def mix(first: Array, second: Array, weight: Array, like: Array) -> Array:
    """`weight * first + (1 - weight) * second` in float32, with `weight` `[1]` or `[B, T]`, in the type of `like`."""
    if weight.ndim == 2:
        weight = weight.reshape(weight.shape + (1,) * (first.ndim - 2))
    return (weight * first + (1.0 - weight) * second).astype(like.dtype)


class AlphaBlender(nn.Module):
    """The U-Net's blend of a spatial and a temporal branch: `alpha * spatial + (1 - alpha) * temporal`.

    `strategy`: "fixed" takes alpha = mix_factor as it is, "learned" its sigmoid, "learned_with_images" its sigmoid except where the
    indicator marks a still image, which takes the spatial branch alone.
    """

    strategy: str = "learned_with_images"
    init_factor: float = 0.5

    @nn.compact
    def __call__(self, spatial: Array, temporal: Array, image_only_indicator: Array | None = None) -> Array:
        """Blends two tensors `[B, T, ...]`; the indicator is `[B, T]`, nonzero = still image, None = video throughout."""
        factor = self.param("mix_factor", nn.initializers.constant(self.init_factor), (1,), jnp.float32).astype(jnp.float32)
        if self.strategy == "fixed":
            alpha = jax.lax.stop_gradient(factor)  # a buffer in the reference, not a parameter
        else:
            alpha = jax.nn.sigmoid(factor)
        if self.strategy == "learned_with_images" and image_only_indicator is not None:
            alpha = jnp.where(image_only_indicator != 0, 1.0, alpha)
        return mix(spatial, temporal, alpha, spatial)
