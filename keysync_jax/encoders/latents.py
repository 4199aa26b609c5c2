"""The autoencoder over whole clips: frames to scaled latents and back, in fixed microbatches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from keysync_jax.config import VAEConfig
from keysync_jax.diffusion import sampler
from keysync_jax.diffusion.noise import stream_key
from keysync_jax.encoders.microbatch import Microbatcher
from keysync_jax.models.vae import VAE


class LatentCoder:
    """Frames to scaled latents and back, a fixed number of frames at a time, each frame alone (temporal convolutions see one).

    Args:
      config: the autoencoder; its `latent_scale` is the scale.
      params: Flax parameters of `VAE`.
      mesh: devices to share the frames over.
      dtype: compute type of the network.
      microbatch: frames a device computes at once.
    """

    def __init__(self, config: VAEConfig, params: dict[str, Any], mesh: Mesh, *, dtype: Any = jnp.float32, microbatch: int = 4):
        model = VAE(config, dtype=dtype)
        scale = config.latent_scale

        def encode(params, seed, batch):
            index, images = batch
            key = stream_key(seed, "posterior")
            mean, logvar = model.apply({"params": params}, images, method="encode_moments")
            # Training latents are posterior samples (KeySync reference), so conditioning latents are samples too.
            noise = jax.vmap(lambda i, like: jax.random.normal(jax.random.fold_in(key, i), like.shape))(index, mean)
            return (mean + jnp.exp(0.5 * logvar) * noise) * scale

        def decode(params, _, latents):
            return model.apply({"params": params}, latents[:, None] / scale, method="decode")[:, 0]

        self._encode = Microbatcher(encode, params, mesh, microbatch)
        self._decode = Microbatcher(decode, params, mesh, microbatch)

    def encode(self, frames: Iterable[tuple[int, np.ndarray]], seed: int = 0) -> Iterator[np.ndarray]:
        """(frame index, `[H, W, 3]` in [-1, 1]) to scaled latents `[h, w, 4]`; seed and index key the posterior sample.

        Raises:
          KeySyncError: the network produced non-finite values.
        """
        items = ((np.int32(index), np.asarray(image, np.float32)) for index, image in frames)
        for latent in self._encode(items, np.uint32(seed)):
            sampler.require_finite(latent, "the VAE encoder's output")
            yield latent

    def decode(self, latents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Scaled latents `[h, w, 4]` to images `[H, W, 3]` in [0, 1].

        Raises:
          KeySyncError: the network produced non-finite values.
        """
        for image in self._decode(latents):
            sampler.require_finite(image, "the VAE decoder's output")
            yield np.clip((image + 1) / 2, 0, 1)
