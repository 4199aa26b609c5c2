"""The autoencoder over whole clips: frames to scaled latents and back, in fixed microbatches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keysync_jax.config import VAEConfig
from keysync_jax.diffusion import sampler
from keysync_jax.diffusion.noise import stream_key
from keysync_jax.encoders.microbatch import Microbatcher
from keysync_jax.models.vae import VAE

Params = dict[str, Any]


class LatentCoder:
    """Frames to scaled latents and back, a fixed number of frames at a time, each frame alone (temporal convolutions see one).

    Args:
      config: the autoencoder; its `latent_scale` is the scale.
      params: Flax parameters of `VAE`, or a function that reads them when the first frame comes.
      mesh: devices to share the frames over.
      dtype: compute type of the network.
      microbatch: frames a device computes at once.
    """

    def __init__(
        self, config: VAEConfig, params: Params | Callable[[], Params], mesh: Mesh, *, dtype: Any = jnp.float32, microbatch: int = 4
    ):
        self.config = config
        self._model = VAE(config, dtype=dtype)

        @functools.cache
        def once() -> Params:  # on the devices, for both directions
            return jax.device_put(params() if callable(params) else params, NamedSharding(mesh, PartitionSpec()))

        self._encoder = Microbatcher(self._encode, once, mesh, microbatch)
        self._decoder = Microbatcher(self._decode, once, mesh, microbatch)

    @property
    def together(self) -> int:
        """Frames that all devices take at once."""
        return self._encoder.group

    def _encode(self, params: Params, seed: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, images = batch
        mean, logvar = cast(tuple[jax.Array, jax.Array], self._model.apply({"params": params}, images, method="encode_moments"))
        key = stream_key(seed, "posterior")
        # Training latents are posterior samples (KeySync reference), so conditioning latents are samples too.
        noise = jax.vmap(lambda i, like: jax.random.normal(jax.random.fold_in(key, i), like.shape))(index, mean)
        return (mean + jnp.exp(0.5 * logvar) * noise) * self.config.latent_scale

    def _decode(self, params: Params, _: Any, latents: jax.Array) -> jax.Array:
        single = latents[:, None] / self.config.latent_scale
        return cast(jax.Array, self._model.apply({"params": params}, single, method="decode"))[:, 0]

    def encode(self, frames: Iterable[tuple[int, np.ndarray]], seed: int = 0) -> Iterator[np.ndarray]:
        """(frame index, `[H, W, 3]` in [-1, 1]) to scaled latents `[h, w, 4]`; seed and index key the posterior sample.

        Raises:
          KeySyncError: the network produced non-finite values.
        """
        items = ((np.int32(index), np.asarray(image, np.float32)) for index, image in frames)
        for latent in self._encoder(items, np.uint32(seed)):
            sampler.require_finite(latent, "the VAE encoder's output")
            yield latent

    def decode(self, latents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Scaled latents `[h, w, 4]` to images `[H, W, 3]` in [0, 1].

        Raises:
          KeySyncError: the network produced non-finite values.
        """
        for image in self._decoder(latents):
            sampler.require_finite(image, "the VAE decoder's output")
            yield np.clip((image + 1) / 2, 0, 1)
