"""Two-stage generation: keyframe windows, then the segments between keyframes, each a stream of independent windows.

Both stages are the same operation on different conditions, so one class runs them. Windows go through `Microbatcher`: noise is
keyed by (seed, stage, window index) and never by device or batch position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from keysync_jax.config import StageConfig
from keysync_jax.diffusion import sampler, schedules
from keysync_jax.diffusion.guidance import MAIN, Guidance, of_stage
from keysync_jax.diffusion.noise import stream_key
from keysync_jax.encoders.microbatch import Microbatcher
from keysync_jax.models.conditioning import conditions
from keysync_jax.models.stage import StageModel, cast_matrices


class Window(NamedTuple):
    """Everything one window of T frames is generated from (NumPy, unbatched)."""

    index: np.ndarray  # [] int32: position in the whole clip; keys the noise
    latents: np.ndarray  # keyframe: identity [h, w, 4]; interpolation: start and end keyframe [2, h, w, 4]; scaled
    audio: np.ndarray  # [T, 2, D] two tokens per frame
    known: np.ndarray  # [T, h, w, 4] scaled latents of the source
    mask: np.ndarray  # [T, h, w, 1], 1 = regenerate


class StageSettings(NamedTuple):
    """What may change between calls without compiling again."""

    seed: np.ndarray | int  # uint32
    guidance: Guidance  # its scales; another set of branches is another program

    @classmethod
    def of(cls, seed: int, config: StageConfig) -> StageSettings:
        """A seed below 2**32 and a stage's guidance, without the branches that cannot matter at its scales."""
        return cls(np.uint32(seed), of_stage(config).needed())


class StageSampler:
    """One diffusion stage, ready to turn windows into latents.

    Args:
      config: the stage; its `num_frames` is T.
      params: Flax parameters of `StageModel`.
      others: parameters of further networks of the same config, by the names under which a guidance asks them (`guidance.WEAK`).
      mesh: devices to share the windows over.
      num_steps: AYS steps (10 means eleven evaluations).
      dtype: compute type of the network; the sampler state is float32.
      microbatch: windows a device computes at once.
    """

    def __init__(
        self,
        config: StageConfig,
        params: dict[str, Any],
        mesh: Mesh,
        *,
        num_steps: int = 10,
        dtype: Any = jnp.float32,
        microbatch: int = 1,
        others: Mapping[str, dict[str, Any]] | None = None,
    ):
        self.config = config
        sigmas = schedules.ays_sigmas(num_steps)
        model = StageModel(config, dtype=dtype)
        shape = (config.num_frames, config.latent_size, config.latent_size, config.unet.out_channels)

        def generate(params: dict[str, Any], settings: StageSettings, windows: Window) -> jax.Array:
            key = stream_key(settings.seed, config.stage)
            noise = jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(windows.index)
            latents = {"identity" if config.stage == "keyframe" else "endpoints": windows.latents}
            given = conditions(model, {"params": params[MAIN]}, windows._asdict() | latents)
            networks = {name: functools.partial(model.apply, {"params": own}) for name, own in params.items()}
            return sampler.sample(networks, noise, sigmas, given, settings.guidance)

        networks = {MAIN: cast_matrices(params, dtype)} | {name: cast_matrices(own, dtype) for name, own in (others or {}).items()}
        self._run = Microbatcher(generate, networks, mesh, microbatch)

    def __call__(self, windows: Iterable[Window], settings: StageSettings) -> Iterator[np.ndarray]:
        """Scaled latents `[T, h, w, 4]` per window, in order.

        Raises:
          KeySyncError: the network produced non-finite values, naming the window.
        """
        for number, latents in enumerate(self._run(windows, settings)):
            sampler.require_finite(latents, f"{self.config.stage} window {number}")
            yield latents
