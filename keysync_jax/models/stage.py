"""One diffusion stage as a module: the audio projection, the network input of the stage, and the U-Net.

The parameter tree mirrors the reference's checkpoint: `model/diffusion_model/...`, `model/learned_mask`,
`conditioner/embedders_2/linear`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import StageConfig, VAEConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.models.initializers import random_params
from keysync_jax.models.stage_inputs import AudioEmbedder, interpolation_input, keyframe_input
from keysync_jax.models.vae import VAE
from keysync_jax.models.video_unet import VideoUNet

Array = jax.Array


class Conditioner(nn.Module):
    """Embedders of the reference's conditioner; only the audio one (number 2) has parameters here."""

    config: StageConfig
    dtype: Any = jnp.float32

    def setup(self):
        features = self.config.unet.context_dim if self.config.audio_linear else None
        self.embedders_2 = AudioEmbedder(features, self.config.audio_merge, self.dtype)

    def __call__(self, audio: Array) -> Array:
        return self.embedders_2(audio)


class Wrapper(nn.Module):
    """The U-Net with the stage's way of feeding it latent conditions."""

    config: StageConfig
    latent_shape: tuple[int, int]
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    def setup(self):
        config = self.config
        channels = config.unet.out_channels
        expected = 2 * channels + (config.stage == "interpolation" and config.add_indicator)
        if config.unet.in_channels != expected:
            given = config.unet.in_channels
            raise KeySyncError(f"StageConfig: a {config.stage} network reads {expected} channels, but unet.in_channels is {given}")
        if config.has_learned_filler:
            initial = {"zeros": nn.initializers.zeros, "ones": nn.initializers.ones, "random": nn.initializers.normal(1.0)}[config.filler]
            self.learned_mask = self.param("learned_mask", initial, (*self.latent_shape, channels), jnp.float32)
        self.diffusion_model = VideoUNet(config.unet, self.dtype, self.attention, self.remat)

    def __call__(self, x: Array, c_noise: Array, conditions: Conditions, image_only_indicator: Array | None) -> Array:
        config, tokens = self.config, conditions.crossattn
        if config.stage == "keyframe":
            inputs = keyframe_input(x, conditions.concat)
        else:
            inputs = interpolation_input(x, conditions.concat, self._filler(), config.add_indicator)
        # The other methods take the audio from the context themselves, or take none.
        audio = tokens if config.unet.audio_cond_method in ("to_time_emb", "to_time_emb_image") else None
        return self.diffusion_model(inputs, c_noise, tokens, audio, conditions.vector, image_only_indicator)

    def _filler(self) -> Array | None:
        config = self.config
        if config.has_learned_filler:
            return self.learned_mask
        if config.filler == "none":
            return None
        value = {"fixed_zeros": 0.0, "fixed_ones": 1.0}[config.filler]
        return jnp.full((*self.latent_shape, config.unet.out_channels), value, jnp.float32)


class StageModel(nn.Module):
    """A keyframe or interpolation network.

    Attributes:
      config: the stage.
      dtype: compute type; parameters are float32 and outputs too.
      attention: see `models.attention.attention`.
      latent_shape: (height, width) of the learned filler where latents are not square; None takes `config.latent_size`.
      remat: what the backward pass keeps, see `models.remat`.
    """

    config: StageConfig
    dtype: Any = jnp.float32
    attention: str = "auto"
    latent_shape: tuple[int, int] | None = None
    remat: str = "none"

    if TYPE_CHECKING:  # it has no mutable collections: what a method returns is all that comes back

        def apply(self, variables: Mapping[str, Any], *args: Any, **options: Any) -> Any: ...

    def setup(self):
        shape = self.latent_shape or (self.config.latent_size, self.config.latent_size)
        self.model = Wrapper(self.config, shape, self.dtype, self.attention, self.remat)
        self.conditioner = Conditioner(self.config, self.dtype)

    def embed_audio(self, audio: Array) -> Array:
        """Speech features `[B, T, 2, D]` to tokens `[B, T, C]` float32. Null audio is zero tokens, not zero features."""
        return self.conditioner(audio).astype(jnp.float32)

    def __call__(self, x: Array, c_noise: Array, conditions: Conditions, image_only_indicator: Array | None = None) -> Array:
        """The network output F, before preconditioning.

        Args:
          x: scaled, preconditioned noisy latents `[B, T, h, w, 4]`.
          c_noise: 0.25 ln(sigma), `[B]` or `[B, T]`.
          conditions: `concat` as the stage reads it (keyframe: identity, interpolation: both ends), `crossattn` from `embed_audio`, and
            `vector` if the U-Net reads one; the known region is not read here.
          image_only_indicator: `[B, T]`, nonzero marks frames that skip the temporal branches.

        Returns:
          `[B, T, h, w, 4]` float32.
        """
        return self.model(x, c_noise, conditions, image_only_indicator)

    def everything(self, x: Array, c_noise: Array, concat: Array, audio: Array, vector: Array | None = None) -> Array:
        """Embeds the audio and runs the network: touches every parameter."""
        return self(x, c_noise, Conditions(concat, self.embed_audio(audio), vector=vector))


def abstract_params(config: StageConfig, latent_shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """Shapes of a stage's parameters (`jax.ShapeDtypeStruct` leaves), without computing anything; about a second at full size."""
    return _copy(_traced_params(config, latent_shape))


# A start asks several times, and tracing takes seconds on a busy core.
@functools.lru_cache(maxsize=8)
def _traced_params(config: StageConfig, latent_shape: tuple[int, int] | None) -> dict[str, Any]:
    model = StageModel(config, latent_shape=latent_shape)
    h, w = latent_shape or (config.latent_size,) * 2
    channels, frames = config.unet.out_channels, min(2, config.num_frames)  # an image network embeds one frame's audio
    concat = (1, h, w, channels) if config.stage == "keyframe" else (1, h, w, 2 * channels)
    shapes: list[tuple[int, ...]] = [(1, frames, h, w, channels), (1,), concat, (1, frames, 2, config.audio_feature_dim)]
    if config.unet.adm_in_channels:
        shapes.append((1, config.unet.adm_in_channels))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, method="everything"), *inputs)["params"]


def init_params(
    config: StageConfig, seed: int, *, zero_init: bool = True, gain: float = 1.0, latent_shape: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Random float32 parameters of a stage as NumPy arrays, initialised as the reference does.

    Args:
      config: the stage.
      seed: each parameter has its own stream.
      zero_init: the reference's zero layers, which make an untrained network output 0; False draws them too, for a network whose
        output visibly depends on its input.
      gain: see `random_params`.
      latent_shape: see `StageModel`.
    """
    shapes = abstract_params(config, latent_shape)
    constants = {"mix_factor": config.unet.merge_factor}
    if config.has_learned_filler:
        constants["learned_mask"] = {"zeros": 0.0, "ones": 1.0, "random": 0.0}[config.filler]
    options = {} if zero_init else {"zero": lambda path: False}
    params = random_params(shapes, seed, gain=gain, constants=constants, **options)
    if config.filler == "random" and config.has_learned_filler:
        mask = params["model"]["learned_mask"]
        mask[:] = np.random.default_rng([seed, 1]).standard_normal(mask.shape, np.float32)
    return params


def cast_matrices(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Kernels in the compute type (they would be cast at each use anyway), everything else as it is; halves bf16 memory."""
    return jax.tree.map_with_path(lambda path, x: x.astype(dtype) if path[-1].key == "kernel" else x, params)


def abstract_vae_params(config: VAEConfig) -> dict[str, Any]:
    """Shapes of the autoencoder's parameters, under `first_stage_model`."""
    return _copy(_traced_vae_params(config))


@functools.lru_cache(maxsize=8)
def _traced_vae_params(config: VAEConfig) -> dict[str, Any]:
    model = VAE(config)
    side = 2 * config.downsample_factor
    images = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)["params"]


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries of its own for every caller."""
    return jax.tree.map(lambda leaf: leaf, tree)


def init_vae_params(config: VAEConfig, seed: int, *, gain: float = 1.0) -> dict[str, Any]:
    """Random float32 parameters of the autoencoder as NumPy arrays, in torch's default ranges."""
    return random_params(abstract_vae_params(config), seed, gain=gain, constants={"mix_factor": 0.0})
