"""The autoencoder: a 2-D encoder, and a temporal or a plain 2-D decoder (SVD's first stage and Stable Diffusion's KL autoencoder)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.config import VAEConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models import layers
from keysync_jax.models.attention import attention
from keysync_jax.models.remat import rematerialised
from keysync_jax.models.resblock import TemporalResBlock

Array = jax.Array

_EPSILON = 1e-6  # of all 2-D norms here; the temporal blocks use 1e-5
_LOGVAR_RANGE = (-30.0, 20.0)


def sample_posterior(mean: Array, logvar: Array, noise: Array) -> Array:
    """A draw from the encoder's Gaussian, given standard normal noise of the same shape."""
    return mean + jnp.exp(0.5 * logvar) * noise


class ResnetBlock(nn.Module):
    """2-D residual block without an embedding; with `temporal_kernel`, followed by a temporal one and their blend.

    Here the sigmoid of the mix factor weights the temporal branch, the opposite of the U-Net's blender.
    """

    features: int
    temporal_kernel: int = 0
    dtype: Any = jnp.float32
    groups: int = layers.NORM_GROUPS

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, H, W, C]` (or `[N, H, W, C]` without the temporal part) to the same with `features` channels."""
        h = layers.conv(self.features, "conv1", self.dtype)(nn.silu(layers.group_norm("norm1", _EPSILON, self.dtype, self.groups)(x)))
        h = layers.saved(h, "conv")
        h = layers.conv(self.features, "conv2", self.dtype)(nn.silu(layers.group_norm("norm2", _EPSILON, self.dtype, self.groups)(h)))
        if x.shape[-1] != self.features:
            x = layers.conv(self.features, "nin_shortcut", self.dtype, kernel=1)(x)
        x = x + layers.saved(h, "conv")
        if not self.temporal_kernel:
            return x
        b, t, height, width, c = x.shape
        block = TemporalResBlock(self.temporal_kernel, 1e-5, self.dtype, self.groups, name="time_stack")
        temporal = block(x.reshape(b, t, height * width, c)).reshape(x.shape)
        factor = self.param("mix_factor", nn.initializers.zeros, (1,), jnp.float32)
        return layers.mix(temporal, x, jax.nn.sigmoid(factor.astype(jnp.float32)), x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of each frame of `[..., H, W, C]`."""

    dtype: Any = jnp.float32
    implementation: str = "auto"
    groups: int = layers.NORM_GROUPS

    @nn.compact
    def __call__(self, x: Array) -> Array:
        height, width, c = x.shape[-3:]
        normed = layers.group_norm("norm", _EPSILON, self.dtype, self.groups)(x)
        q, k, v = (layers.dense(c, name, self.dtype)(normed).reshape(-1, height * width, 1, c) for name in ("q", "k", "v"))
        out = layers.saved(attention(q, k, v, self.implementation), "attention").reshape(x.shape)
        return x + layers.dense(c, "proj_out", self.dtype)(out)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    temporal_kernel: int = 0
    dtype: Any = jnp.float32
    implementation: str = "auto"
    groups: int = layers.NORM_GROUPS

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResnetBlock(x.shape[-1], self.temporal_kernel, self.dtype, self.groups, name="block_1")(x)
        x = AttentionBlock(self.dtype, self.implementation, self.groups, name="attn_1")(x)
        return ResnetBlock(x.shape[-1], self.temporal_kernel, self.dtype, self.groups, name="block_2")(x)


class EncoderDownsample(nn.Module):
    """3x3 convolution with stride 2, padded by one row and column at the bottom and right only."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return layers.conv(x.shape[-1], "conv", self.dtype, stride=2, pad=(0, 1))(x)


class Level(nn.Module):
    """One resolution of the encoder (`resample` "downsample") or decoder ("upsample"); "" at the last one."""

    features: int
    num_blocks: int
    resample: str = ""
    temporal_kernel: int = 0
    dtype: Any = jnp.float32
    groups: int = layers.NORM_GROUPS
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.num_blocks):
            x = rematerialised(ResnetBlock, self.remat)(self.features, self.temporal_kernel, self.dtype, self.groups, name=f"block_{i}")(x)
        if self.resample == "downsample":
            x = EncoderDownsample(self.dtype, name="downsample")(x)
        elif self.resample == "upsample":
            x = layers.Upsample(self.dtype, name="upsample")(x)
        return x


class Encoder(nn.Module):
    """`[N, H, W, in_channels]` to moments `[N, h, w, 2 * latent_channels]`."""

    config: VAEConfig
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype = self.config, self.dtype
        x = layers.conv(config.base_channels, "conv_in", dtype)(x)
        last = len(config.channel_mult) - 1
        for i, mult in enumerate(config.channel_mult):
            resample = "downsample" if i < last else ""
            width, groups = config.base_channels * mult, config.norm_groups
            x = Level(width, config.num_res_blocks, resample, dtype=dtype, groups=groups, name=f"down_{i}")(x)
        x = Middle(dtype=dtype, implementation=self.implementation, groups=config.norm_groups, name="mid")(x)
        x = nn.silu(layers.group_norm("norm_out", _EPSILON, dtype, config.norm_groups)(x))
        return layers.conv(2 * config.latent_channels, "conv_out", dtype)(x)


class TemporalOutput(layers.Conv):
    """The temporal decoder's last layer: a 3x3 convolution per frame, then one along time between the image channels."""

    temporal_kernel: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = super().__call__(x)
        b, t, h, w, c = y.shape
        mixed = layers.temporal_conv(c, "time_mix_conv", self.dtype, self.temporal_kernel)(y.reshape(b, t, h * w, c))
        return mixed.reshape(y.shape)


class Decoder(nn.Module):
    """`[B, T, h, w, latent_channels]` to `[B, T, H, W, out_channels]`; frames mix only in the temporal decoder."""

    config: VAEConfig
    dtype: Any = jnp.float32
    implementation: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(self, z: Array) -> Array:
        config, dtype = self.config, self.dtype
        kernel = config.video_kernel_size[0] if config.decoder == "temporal" else 0
        widths = [config.base_channels * mult for mult in config.channel_mult]
        x = layers.conv(widths[-1], "conv_in", dtype)(z)
        groups = config.norm_groups
        x = Middle(kernel, dtype, self.implementation, groups, name="mid")(x)
        for i in reversed(range(len(widths))):
            resample = "upsample" if i else ""
            x = Level(widths[i], config.num_res_blocks + 1, resample, kernel, dtype, groups, self.remat, name=f"up_{i}")(x)
        x = nn.silu(layers.group_norm("norm_out", _EPSILON, dtype, config.norm_groups)(x))
        if not kernel:
            return layers.conv(config.out_channels, "conv_out", dtype)(x)
        pad = ((1, 1), (1, 1))
        return TemporalOutput(config.out_channels, (3, 3), padding=pad, dtype=dtype, temporal_kernel=kernel, name="conv_out")(x)


class FirstStage(nn.Module):
    """Encoder, decoder and the 1x1 convolutions around the latent, under the names of the reference."""

    config: VAEConfig
    dtype: Any = jnp.float32
    implementation: str = "auto"
    remat: str = "none"

    def setup(self):
        config, dtype = self.config, self.dtype
        self.encoder = Encoder(config, dtype, self.implementation)
        self.decoder = Decoder(config, dtype, self.implementation, self.remat)
        if config.quant_conv:
            self.quant_conv = layers.Conv(2 * config.latent_channels, (1, 1), dtype=dtype)
        if config.post_quant_conv:
            self.post_quant_conv = layers.Conv(config.latent_channels, (1, 1), dtype=dtype)

    def moments(self, images: Array) -> Array:
        moments = self.encoder(images.astype(self.dtype))
        return self.quant_conv(moments) if self.config.quant_conv else moments

    def decode(self, z: Array) -> Array:
        z = z.astype(self.dtype)
        return self.decoder(self.post_quant_conv(z) if self.config.post_quant_conv else z)

    def __call__(self, images: Array) -> Array:
        return self.decode(jnp.split(self.moments(images), 2, axis=-1)[0][:, None])


class VAE(nn.Module):
    """The autoencoder; parameters lie under `first_stage_model`. A part that is not used needs no parameters.

    Attributes:
      config: sizes and which parts there are.
      dtype: compute type (float32 is what the reference runs).
      attention: see `models.attention.attention`.
      remat: what the backward pass keeps of the decoder's residual blocks, see `models.remat`.
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    if TYPE_CHECKING:  # it has no mutable collections: what a method returns is all that comes back

        def apply(self, variables: Mapping[str, Any], *args: Any, **options: Any) -> Any: ...

    def setup(self):
        self.first_stage_model = FirstStage(self.config, self.dtype, self.attention, self.remat)

    def raw_moments(self, images: Array) -> Array:
        """Images `[N, H, W, 3]` in [-1, 1] to mean and unclamped log variance side by side, `[N, h, w, 2 * latent]` float32."""
        if images.ndim != 4 or images.shape[-1] != self.config.in_channels:
            raise KeySyncError(f"the VAE encodes images [N, H, W, {self.config.in_channels}], not {images.shape}")
        return self.first_stage_model.moments(images).astype(jnp.float32)

    def encode_moments(self, images: Array) -> tuple[Array, Array]:
        """Images `[N, H, W, 3]` in [-1, 1] to the posterior's mean (its mode) and log variance, raw latents `[N, h, w, 4]` float32.

        Multiply by the latent scale before diffusion. H and W may be odd: each halving rounds down.
        """
        mean, logvar = jnp.split(self.raw_moments(images), 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOGVAR_RANGE)

    def decode(self, z: Array) -> Array:
        """Raw latents `[B, T, h, w, 4]` (divided by the latent scale) to images `[B, T, H, W, 3]` float32, about [-1, 1], not clipped.

        The temporal decoder mixes the T frames; T = 1 decodes each alone, as the released pipeline does.
        """
        if z.ndim != 5 or z.shape[-1] != self.config.latent_channels:
            raise KeySyncError(f"the VAE decodes latents [B, T, h, w, {self.config.latent_channels}], not {z.shape}")
        return self.first_stage_model.decode(z).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Encode to the mode and decode each image alone: `[N, H, W, 3]` to `[N, 1, H, W, 3]`."""
        return self.decode(self.encode_moments(images)[0][:, None])
