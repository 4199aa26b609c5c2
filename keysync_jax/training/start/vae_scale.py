"""The factor between raw latents and the latents that diffusion works on: one over their standard deviation on training frames.

The noise levels of the diffusion assume data of unit variance (Rombach et al. 2022, section G). The figure belongs to the weights, so
it is measured once, when a VAE leaves its training run, and stored in its config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from keysync_jax.config import VAEConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.vae import VAE, sample_posterior
from keysync_jax.training import data
from keysync_jax.training.config import TrainConfig

FRAMES = 512
_BATCH = 16
_FRAMES_PER_CLIP = 8
_DIGITS = 5  # as many as are the same on every machine, and more than the estimate is worth


class LatentScale(NamedTuple):
    """What was measured: `scale` is 1 / `std`, rounded to five digits."""

    scale: float
    mean: float
    std: float
    frames: int


def measure(config: VAEConfig, params: Mapping, images: Iterable[np.ndarray], seed: int = 0) -> LatentScale:
    """Standard deviation of posterior samples over all images, positions and channels; one batch is in memory at a time.

    Args:
      config: the autoencoder.
      params: its parameters, under `first_stage_model`.
      images: batches `[N, H, W, 3]` in [-1, 1]; equal shapes compile once.
      seed: of the posterior samples.

    Raises:
      KeySyncError: no image, or latents that are not finite or all equal.
    """
    model = VAE(config)

    @jax.jit
    def encode(params: Mapping, images: jax.Array, noise: jax.Array) -> jax.Array:
        mean, logvar = model.apply({"params": params}, images, method="encode_moments")
        return sample_posterior(mean, logvar, noise)

    frames = count = 0
    total = squares = 0.0
    for number, batch in enumerate(images):
        n, height, width, _ = batch.shape
        shape = (n, height // config.downsample_factor, width // config.downsample_factor, config.latent_channels)
        noise = np.random.default_rng([seed, number]).standard_normal(shape, np.float32)
        z = np.asarray(encode(params, batch, noise), np.float64)
        frames, count = frames + n, count + z.size
        total, squares = total + z.sum(), squares + np.square(z).sum()
    if not count:
        raise KeySyncError("the latent scale cannot be measured: there is no training frame")
    mean = total / count
    variance = squares / count - mean**2
    if not math.isfinite(variance) or variance <= 0:
        raise KeySyncError(f"the latent scale cannot be measured: latents have mean {mean:.4g} and variance {variance:.4g}")
    std = math.sqrt(variance)
    return LatentScale(float(f"{1 / std:.{_DIGITS}g}"), mean, std, frames)


def training_images(config: TrainConfig, frames: int = FRAMES) -> Iterator[np.ndarray]:
    """Batches of whole training frames of a VAE run, in the order of its seed.

    Raises:
      KeySyncError: the data of the run are not there.
    """
    # Whole frames: that is what latents are computed from, whatever crops the VAE was trained on.
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, crop=0, frames_per_clip=_FRAMES_PER_CLIP))
    reader = data.frame_reader(whole)
    for step in range(-(-frames // _BATCH)):
        yield reader.read([reader.sample(step, row, _BATCH) for row in range(_BATCH)])["images"]


def measure_run(config: TrainConfig, params: Mapping, frames: int = FRAMES, console: Console | None = None) -> LatentScale:
    """`measure` on the training frames of a VAE run, with a progress bar on `console` (default stderr).

    Raises:
      KeySyncError: the data of the run are not there, or latents that are not finite.
    """
    console = console or Console(stderr=True)
    batches = track(training_images(config, frames), "measuring the latent scale", total=-(-frames // _BATCH), console=console)
    return measure(config.vae, params, batches, config.seed)
