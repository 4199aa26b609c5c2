"""Training loss: weighted latent error of the denoiser, plus an error in pixels on a few decoded frames (paper Eqs. 4 to 6)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keysync_jax.config import SVD_LATENT_SCALE
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.preconditioning import v_weighting

_ERRORS: dict[str, Callable[[jax.Array], jax.Array]] = {"l2": jnp.square, "l1": jnp.abs}

# Distance of images [N, H, W, 3] in [-1, 1], [N]; see `training.lpips`.
Perceptual = Callable[[jax.Array, jax.Array], jax.Array]
_PERCEPTUAL = "lpips"

# Unscaled latents [N, 1, h, w, 4] -> images [N, 1, H, W, 3] in [-1, 1]: every frame is decoded alone.
Decoder = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is penalized and how much. Defaults are the latent term alone (the released interpolation stage)."""

    latent_loss: str = "l2"  # "l2" | "l1"
    upper_weight: float = 1.0  # factor on the upper half of the latent rows
    lower_weight: float = 1.0  # factor on the lower half, where the mouth is
    pixel_weight: float = 0.0  # 1 for the keyframe stage (paper Table 7, lambda_2)
    pixel_losses: tuple[str, ...] = ("l2",)  # any of "l2", "l1", "lpips"; their sum counts
    mask_pixels: bool = False  # restrict the pixel term to the mask (the paper's Eq. 6; the released code does not)
    latent_scale: float = SVD_LATENT_SCALE

    def __post_init__(self):
        for name, known in ((self.latent_loss, [*_ERRORS]), *((name, [*_ERRORS, _PERCEPTUAL]) for name in self.pixel_losses)):
            if name not in known:
                raise KeySyncError(f"loss {name!r} is not known; choose from {', '.join(known)}")
        for name in ("pixel_weight", "upper_weight", "lower_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise KeySyncError(f"loss.{name} is {getattr(self, name)}; it must be finite and not negative")
        if self.pixel_weight > 0 and not self.pixel_losses:
            raise KeySyncError("loss.pixel_losses is empty but loss.pixel_weight is positive; name one, or set loss.pixel_weight=0")

    @property
    def uses_lpips(self) -> bool:
        return self.pixel_weight > 0 and _PERCEPTUAL in self.pixel_losses


class PixelTargets(NamedTuple):
    """Frames to compare in pixels. The same frame numbers are taken from every video of the batch.

    Attributes:
      indices: which of the T frames `[n]`, integer.
      frames: their pixels `[B, n, H, W, 3]` in [-1, 1].
    """

    indices: jax.Array
    frames: jax.Array


class Losses(NamedTuple):
    """The total and its parts.

    Attributes:
      latent: latent term of each frame `[B, T]`.
      pixels: weighted pixel term of each kind, scalars (empty without a pixel loss).
      per_frame: `[B, T]`, the latent term plus all pixel terms; its mean is the training loss.
      denoised: the prediction `[B, T, h, w, 4]`.
    """

    latent: jax.Array
    pixels: dict[str, jax.Array]
    per_frame: jax.Array
    denoised: jax.Array

    @property
    def mean(self) -> jax.Array:
        return jnp.mean(self.per_frame)


def noised(latents: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """Clean latents `[B, T, h, w, 4]` with standard normal noise of the same shape at the level of each video, sigma `[B]`."""
    return latents + noise * _per_video(sigma, latents)


def prediction_loss(
    denoised: jax.Array,
    latents: jax.Array,
    sigma: jax.Array,
    masks: jax.Array | None,
    config: LossConfig = LossConfig(),
    *,
    decode: Decoder | None = None,
    pixels: PixelTargets | None = None,
    lpips: Perceptual | None = None,
) -> Losses:
    """Compares a prediction with the clean latents and, if asked for, with pixels.

    The mask enters through the prediction only: outside it the prediction equals the source, so the error there is zero, but the
    means divide by all elements.

    Args:
      denoised: prediction `[B, T, h, w, 4]`, scaled latents.
      latents: target, same shape.
      sigma: noise level of each video `[B]`.
      masks: `[B, T, h, w, 1]`, 1 = generated, None = everything is; read only with `config.mask_pixels`.
      config: terms and weights.
      decode: VAE decoder for the pixel term; its parameters may be frozen, gradients flow through it into the prediction. It is
        recomputed in the backward pass.
      pixels: frames for the pixel term; needed if `config.pixel_weight` is positive.
      lpips: perceptual distance; needed if `config.pixel_losses` names it. Outside the mask, with `config.mask_pixels`, it compares
        the source with itself.

    Raises:
      KeySyncError: the pixel term is on but `decode`, `pixels` or `lpips` is missing.
    """
    weight = v_weighting(sigma)  # [B]
    rows = _row_weights(denoised.shape[2], config)
    error = _ERRORS[config.latent_loss](denoised - latents) * rows[:, None, None]
    latent = weight[:, None] * jnp.mean(error, axis=(2, 3, 4))
    terms: dict[str, jax.Array] = {}
    if config.pixel_weight > 0:
        if decode is None or pixels is None:
            raise KeySyncError("the pixel loss needs a VAE decoder and the source frames; set pixel_weight to 0 to train without it")
        terms = _pixel_terms(denoised, weight, masks, config, decode, pixels, lpips)
    return Losses(latent, terms, latent + sum(terms.values()), denoised)


def _pixel_terms(
    denoised: jax.Array,
    weight: jax.Array,
    masks: jax.Array | None,
    config: LossConfig,
    decode: Decoder,
    pixels: PixelTargets,
    lpips: Perceptual | None,
) -> dict[str, jax.Array]:
    chosen = jnp.take(denoised, pixels.indices, axis=1)  # [B, n, h, w, 4]
    single = chosen.reshape(-1, 1, *chosen.shape[2:]) / config.latent_scale
    # The decoder's activations at full resolution would outweigh everything else kept for the backward pass.
    images = jnp.clip(jax.checkpoint(decode)(single).astype(jnp.float32), -1.0, 1.0).reshape(pixels.frames.shape)
    difference = images - pixels.frames
    if config.mask_pixels and masks is not None:
        mask = jnp.take(masks, pixels.indices, axis=1)
        height, width = (images.shape[i] // mask.shape[i] for i in (2, 3))
        difference = difference * jnp.repeat(jnp.repeat(mask, height, axis=2), width, axis=3)
    terms = {
        name: config.pixel_weight * jnp.mean(_per_video(weight, difference) * _ERRORS[name](difference))
        for name in config.pixel_losses
        if name in _ERRORS
    }
    if config.uses_lpips:
        if lpips is None:
            raise KeySyncError("the pixel loss 'lpips' needs weights; name their folder in config.lpips or drop it from loss.pixel_losses")
        shape = (-1, *pixels.frames.shape[2:])
        # Recomputed like the decoder: VGG's first layers are as large as its last.
        distance = jax.checkpoint(lpips)((pixels.frames + difference).reshape(shape), pixels.frames.reshape(shape))
        terms[_PERCEPTUAL] = config.pixel_weight * jnp.mean(weight[:, None] * distance.reshape(pixels.frames.shape[:2]))
    return terms


def _per_video(values: jax.Array, like: jax.Array) -> jax.Array:
    """`[B]` shaped to broadcast over `[B, ...]`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _row_weights(height: int, config: LossConfig) -> jax.Array:
    """Factor of each latent row `[h]`; the lower half starts at row h // 2."""
    return jnp.where(jnp.arange(height) < height // 2, config.upper_weight, config.lower_weight)
