"""Layers that the wav2vec2-style speech encoders share.

HuBERT and WavLM are the same network (a stack of strided convolutions over the waveform, a convolutional position embedding and a
transformer) under different parameter names, WavLM with a relative position bias on top. What they share stands here; the names
are in `hubert` and `wavlm`. Activations are `[B, N, C]`, channels last; N counts tokens of one hop (320 samples, 20 ms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.models.speech.speech_encoder import FirstConvolution, Geometry, Moments

Array = jax.Array


class Transformer(Protocol):
    """What the transformer layers read of a configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def conv_pos(self) -> int: ...
    @property
    def conv_pos_groups(self) -> int: ...
    @property
    def num_buckets(self) -> int: ...
    @property
    def max_distance(self) -> int: ...
    @property
    def layer_norm_first(self) -> bool: ...


NORM_EPS = 1e-5  # of the norms inside the convolution stack, whatever the configuration says about the others


def convolution_geometry(config: AudioEncoderConfig) -> Geometry:
    hop, receptive = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        receptive += (kernel - 1) * hop
        hop *= stride
    return Geometry(hop, receptive)


def first_convolution(config: AudioEncoderConfig) -> FirstConvolution | None:
    """The first convolution, if its norm is one over time."""
    return FirstConvolution(config.conv_kernel[0], config.conv_stride[0], config.conv_dim[0]) if config.extractor_mode == "group" else None


def gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=False)  # the checkpoints were trained with the erf form


def layer_norm(name: str | None, epsilon: float, dtype: jnp.dtype) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class TimeNorm(nn.Module):
    """Group norm with one channel per group: every channel is normalised over time, in float32.

    Over a whole clip the statistics are those of the clip; a caller that streams the clip in blocks gives them as `moments`, which
    is what makes block by block equal to a single pass.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, moments: Moments | None = None) -> Array:
        """x `[B, N, C]`, moments `[C]` -> `[B, N, C]`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        if moments is None:
            moments = Moments(x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True))
        y = (x - moments.mean) * jax.lax.rsqrt(moments.variance + NORM_EPS)
        return (y * scale + bias).astype(self.dtype)


def convolution_layer(
    config: AudioEncoderConfig,
    index: int,
    x: Array,
    names: tuple[str, str],
    dtype: jnp.dtype,
    moments: Moments | None = None,
    before_norm: bool = False,
) -> Array:
    """One strided convolution, its norm if it has one, and GELU: `[B, S, C]` -> `[B, (S - k) // s + 1, C']`.

    To be called inside a compact module, whose children get the `names` of convolution and norm. `moments` stand in for the
    statistics of the first layer's norm over time; `before_norm` stops after the convolution.
    """
    x = nn.Conv(
        config.conv_dim[index],
        (config.conv_kernel[index],),
        (config.conv_stride[index],),
        padding="VALID",
        use_bias=config.conv_bias,
        dtype=dtype,
        name=names[0],
    )(x)
    if before_norm:
        return x
    if config.extractor_mode == "layer":
        x = layer_norm(names[1], NORM_EPS, dtype)(x)
    elif index == 0:
        x = TimeNorm(dtype, name=names[1])(x, moments)
    return gelu(x)


class PositionalConv(nn.Module):
    """Grouped convolution over tokens with weight norm over its kernel positions (torch's `weight_norm(dim=2)`).

    The weight is `g * v / |v|`, the norm taken over channels separately for each kernel position.
    """

    config: Transformer
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, N, D]` -> `[B, N, D]`, with zeros around the clip and, for an even kernel, the surplus last position dropped."""
        config = self.config
        kernel, width = config.conv_pos, config.hidden_size
        v = self.param("weight_v", nn.initializers.normal(2 / math.sqrt(kernel * width)), (kernel, width // config.conv_pos_groups, width))
        g = self.param("weight_g", lambda _: jnp.linalg.norm(v, axis=(1, 2), keepdims=True))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        weight = g * v / jnp.linalg.norm(v, axis=(1, 2), keepdims=True)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            weight.astype(self.dtype),
            window_strides=(1,),
            padding=[(kernel // 2, kernel // 2 - (kernel + 1) % 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=config.conv_pos_groups,
        )
        return gelu(y + bias.astype(self.dtype))


class RelativeBias(nn.Module):
    """Learned attention bias per head and distance bucket; parameter `embedding` `[buckets, heads]`."""

    config: Transformer

    @nn.compact
    def __call__(self, length: int) -> Array:
        """Bias `[H, N, N]` (query, key) for N = length, float32."""
        config = self.config
        embedding = self.param("embedding", nn.initializers.glorot_normal(), (config.num_buckets, config.num_heads))
        by_distance = embedding[relative_buckets(length, config.num_buckets, config.max_distance)]  # [2N - 1, H]
        position = jnp.arange(length)
        return jnp.moveaxis(by_distance[position[None, :] - position[:, None] + length - 1], -1, 0)


class SelfAttention(nn.Module):
    """Multi-head self-attention, for WavLM and BEATs with a relative position bias.

    A layer that is handed no bias makes it of its own table (`owns_bias`) and hands it to the next. `gated` layers scale it per head and
    query with a gate (`grep_linear`, `grep_a`) of their input, or of the projected query (`gate_reads_query`), whether or not there is a
    bias to scale: the checkpoints always carry the gate's parameters.
    """

    config: Transformer
    owns_bias: bool = False
    gated: bool = False
    dtype: jnp.dtype = jnp.float32
    gate_reads_query: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array | None = None) -> tuple[Array, Array | None]:
        """x `[B, N, D]`, mask `[B, N]` of keys that exist, bias `[H, N, N]` -> (`[B, N, D]`, the ungated bias for the next layer)."""
        config = self.config
        heads = (*x.shape[:2], config.num_heads, config.hidden_size // config.num_heads)
        if self.owns_bias and (bias is None or self.is_initializing()):
            bias = RelativeBias(config, name="relative_attention_bias")(x.shape[1])
        q, k, v = (nn.Dense(config.hidden_size, dtype=self.dtype, name=f"{n}_proj")(x).reshape(heads) for n in "qkv")
        gate = self._gate(q if self.gate_reads_query else x.reshape(heads)) if self.gated else 1.0
        scaled = None if bias is None else gate * bias[None]
        # Sequences are at most one window, where the plain form (softmax in float32) is the fast one.
        y = jax.nn.dot_product_attention(q, k, v, bias=scaled, mask=mask[:, None, None, :], implementation="xla")
        return nn.Dense(config.hidden_size, dtype=self.dtype, name="out_proj")(y.reshape(x.shape)), bias

    def _gate(self, x: Array) -> Array:
        """Layer input, or query, per head `[B, N, H, d]` -> scale of the bias `[B, H, N, 1]`, float32."""
        y = nn.Dense(8, dtype=self.dtype, name="grep_linear")(x).astype(jnp.float32)
        a = self.param("grep_a", nn.initializers.ones, (1, self.config.num_heads, 1, 1))
        y = nn.sigmoid(y.reshape(*y.shape[:-1], 2, 4).sum(axis=-1))  # [B, N, H, 2]
        update, reset = jnp.split(jnp.moveaxis(y, 1, 2), 2, axis=-1)
        return update * (reset * a - 1.0) + 2.0


def transformer_layer(
    config: AudioEncoderConfig,
    x: Array,
    attention: Callable[[Array], tuple[Array, Array | None]],
    attention_norm: nn.Module,
    feed_forward: Callable[[Array], Array],
    final_norm: nn.Module,
) -> tuple[Array, Array | None]:
    """Residual wiring of one layer: norms after each half (base models), or before (`layer_norm_first`)."""
    y, bias = attention(attention_norm(x) if config.layer_norm_first else x)
    if config.layer_norm_first:
        x = x + y
        return x + feed_forward(final_norm(x)), bias
    x = attention_norm(x + y)
    return final_norm(x + feed_forward(x)), bias


# Tokens, mask of those that exist and the last layer's bias -> tokens and the bias for the next layer.
Layer = Callable[[Array, Array, Array | None], tuple[Array, Array | None]]


def transformer(
    config: Transformer,
    x: Array,
    mask: Array,
    position: Callable[[Array], Array],
    norm: nn.Module,
    layers: Sequence[Layer],
) -> Array:
    """Position embedding, layers and the norm before or after them; `[B, N, D]` -> `[B, N, D]`.

    Tokens that `mask` `[B, N]` says do not exist are zero for the convolution, exactly like the padding around a clip, so that a
    padded clip gives the same tokens as the clip alone.
    """
    x = jnp.where(mask[..., None], x, 0)
    x = x + position(x)
    if not config.layer_norm_first:
        x = norm(x)
    bias = None
    for layer in layers:
        x, bias = layer(x, mask, bias)
    return norm(x) if config.layer_norm_first else x


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance key - query from -(length - 1) to length - 1, `[2 * length - 1]` int32.

    Half of the buckets are for positive distances; of each half, the first half holds one distance each, the rest grow
    logarithmically up to `max_distance` (T5's scheme). The rounding is that of float32, as in the reference.
    """
    distance = np.arange(-(length - 1), length)
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    ratio = np.float32(np.maximum(size, 1)) / np.float32(exact)
    scaled = np.log(ratio.astype(np.float64)).astype(np.float32) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + np.trunc(scaled).astype(np.int64), half - 1)
    return ((distance > 0) * half + np.where(size < exact, size, far)).astype(np.int32)
