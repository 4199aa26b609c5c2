"""LipScore's lip reader: 3-D convolution, ResNet-18 and Conformer (Auto-AVSR), under the names of its `…_updated.pth` file."""

from __future__ import annotations

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.models.metrics.metric_layers import FrozenBatchNorm, max_pool, network_table
from keysync_jax.models.table import Table

SIDE = 88
UNUSED = ("decoder.", "ctc.")
_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class LipReaderConfig:
    """Sizes of the Conformer; those of the published file unless said."""

    adim: int = 768
    aheads: int = 12
    eunits: int = 3072
    elayers: int = 12
    cnn_module_kernel: int = 31


class _Block(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(x: jax.Array, kernel: int, stride: int, name: str) -> jax.Array:
            return nn.Conv(self.features, (kernel,) * 2, stride, padding=kernel // 2, use_bias=False, name=name)(x)

        y = nn.swish(FrozenBatchNorm(name="bn1")(conv(x, 3, self.stride, "conv1")))
        y = FrozenBatchNorm(name="bn2")(conv(y, 3, 1, "conv2"))
        if self.stride > 1:
            x = FrozenBatchNorm(name="downsample_1")(conv(x, 1, self.stride, "downsample_0"))
        return nn.swish(x + y)


class _Trunk(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, features in enumerate((64, 128, 256, 512)):
            x = _Layer(features, 1 if i == 0 else 2, name=f"layer{i + 1}")(x)
        return x.mean((1, 2))


class _Layer(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Torch's keys are `layer1.0.conv1`: the block's number is a module of its own under the layer.
        for i, stride in enumerate((self.stride, 1)):
            x = _Block(self.features, stride, name=f"{i}")(x)
        return x


class _Frontend(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (5, 7, 7), (1, 2, 2), padding=[(2, 2), (3, 3), (3, 3)], use_bias=False, name="frontend3D_0")(x)
        x = nn.swish(FrozenBatchNorm(name="frontend3D_1")(x))
        x = max_pool(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        return _Trunk(name="trunk")(x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:2], 512)


class _RelativeAttention(nn.Module):
    """Attention with relative positions and two biases (Transformer-XL)."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        shape = (self.heads, width // self.heads)
        q, k, v = (nn.Dense(width, name=f"linear_{name}")(x).reshape(batch, length, *shape) for name in "qkv")
        p = nn.Dense(width, use_bias=False, name="linear_pos")(positions).reshape(-1, *shape)
        u, w = (self.param(f"pos_bias_{name}", nn.initializers.normal(), shape) for name in "uv")
        content = jnp.einsum("bihd,bjhd->bhij", q + u, k)
        by_distance = jnp.einsum("bihd,rhd->bhir", q + w, p)
        # Row r of the positions stands for a distance i - j of length - 1 - r.
        row = length - 1 - (np.arange(length)[:, None] - np.arange(length)[None])
        place = jnp.take_along_axis(by_distance, jnp.asarray(row)[None, None], axis=-1)
        weights = nn.softmax((content + place) / math.sqrt(shape[1]))
        return nn.Dense(width, name="linear_out")(jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape))


class _FeedForward(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(x.shape[-1], name="w_2")(nn.relu(nn.Dense(self.hidden, name="w_1")(x)))


class _Convolution(nn.Module):
    kernel: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = nn.glu(nn.Conv(2 * width, (1,), name="pointwise_cov1")(x))
        x = nn.Conv(width, (self.kernel,), padding=self.kernel // 2, feature_group_count=width, name="depthwise_conv")(x)
        x = nn.swish(FrozenBatchNorm(name="norm")(x))
        return nn.Conv(width, (1,), name="pointwise_cov2")(x)


class _ConformerLayer(nn.Module):
    config: LipReaderConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        def norm(name: str, x: jax.Array) -> jax.Array:
            return nn.LayerNorm(_EPSILON, name=name)(x)

        x = x + 0.5 * _FeedForward(self.config.eunits, name="feed_forward_macaron")(norm("norm_ff_macaron", x))
        x = x + _RelativeAttention(self.config.aheads, name="self_attn")(norm("norm_mha", x), positions)
        x = x + _Convolution(self.config.cnn_module_kernel, name="conv_module")(norm("norm_conv", x))
        x = x + 0.5 * _FeedForward(self.config.eunits, name="feed_forward")(norm("norm_ff", x))
        return norm("norm_final", x)


def _positions(length: int, width: int) -> np.ndarray:
    """Sines and cosines `[2 * length - 1, width]` of the distances length - 1 down to 1 - length."""
    distance = np.arange(length - 1, -length, -1, dtype=np.float64)[:, None]
    angle = distance * np.exp(np.arange(0, width, 2) * -(math.log(10000.0) / width))
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(2 * length - 1, width).astype(np.float32)


class _Encoder(nn.Module):
    config: LipReaderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = self.config.adim
        x = nn.Dense(width, name="embed_0")(_Frontend(name="frontend")(x)) * math.sqrt(width)
        positions = jnp.asarray(_positions(x.shape[1], width))
        for i in range(self.config.elayers):
            x = _ConformerLayer(self.config, name=f"encoders_{i}")(x, positions)
        return nn.LayerNorm(_EPSILON, name="after_norm")(x)


class LipReader(nn.Module):
    """Mouths `[B, T, 88, 88, 1]`, normalised grey, to an embedding per frame `[B, T, adim]`."""

    config: LipReaderConfig = LipReaderConfig()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _Encoder(self.config, name="encoder")(x)


def lip_reader_table(config: LipReaderConfig) -> Table:
    table = network_table(LipReader(config), (1, 2, SIDE, SIDE, 1), numbered=True)
    # `w_1` and `w_2` are names of their own in the file.
    return [entry._replace(torch_key=re.sub(r"\.w\.([12])\.", r".w_\1.", entry.torch_key)) for entry in table]
