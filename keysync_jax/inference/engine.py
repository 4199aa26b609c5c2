"""Two-stage generation: keyframe windows, then the segments between keyframes, each a stream of independent windows.

Both stages are the same operation on different conditions, so one class runs them. Windows go through `Microbatcher`: noise is
keyed by (seed, stage, window index) and never by device or batch position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from keysync_jax.config import StageConfig
from keysync_jax.diffusion import sampler, schedules
from keysync_jax.diffusion.guidance import AudioIdentityGuidance
from keysync_jax.diffusion.inpainting import Conditions
from keysync_jax.diffusion.noise import stream_key
from keysync_jax.encoders.microbatch import Microbatcher
from keysync_jax.models.stage import StageModel, cast_matrices


class Window(NamedTuple):
    """Everything one window of T frames is generated from (NumPy, unbatched)."""

    index: np.ndarray  # [] int32: position in the whole clip; keys the noise
    concat: np.ndarray  # keyframe: identity [h, w, 4]; interpolation: start and end keyframe [h, w, 8]; scaled latents
    audio: np.ndarray  # [T, 2, D] two tokens per frame
    known: np.ndarray  # [T, h, w, 4] scaled latents of the source
    mask: np.ndarray  # [T, h, w, 1], 1 = regenerate


class StageSettings(NamedTuple):
    """What may change between calls without compiling again."""

    seed: np.ndarray | int  # uint32
    audio_scale: np.ndarray | float  # guidance scales, paper Eq. 8
    identity_scale: np.ndarray | float

    @classmethod
    def of(cls, seed: int, audio_scale: float, identity_scale: float) -> StageSettings:
        """Settings in the types that the compiled program takes; the seed is below 2**32."""
        return cls(np.uint32(seed), np.float32(audio_scale), np.float32(identity_scale))


class StageSampler:
    """One diffusion stage, ready to turn windows into latents.

    Args:
      config: the stage; its `num_frames` is T.
      params: Flax parameters of `StageModel`.
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
    ):
        self.config = config
        sigmas = schedules.ays_sigmas(num_steps)
        model = StageModel(config, dtype=dtype)
        shape = (config.num_frames, config.latent_size, config.latent_size, config.unet.out_channels)

        def generate(params: dict[str, Any], settings: StageSettings, windows: Window) -> jax.Array:
            variables = {"params": params}
            key = stream_key(settings.seed, config.stage)
            guidance = AudioIdentityGuidance(settings.audio_scale, settings.identity_scale)
            noise = jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(windows.index)
            tokens = model.apply(variables, windows.audio, method="embed_audio")
            # The network reads identity and endpoint latents unscaled, as SVD did (gt and noise stay scaled).
            conditions = Conditions(windows.concat / config.latent_scale, tokens, windows.known, windows.mask)

            def network(x, c_noise, conditions):
                return model.apply(variables, x, c_noise, conditions.concat, conditions.crossattn)

            return sampler.sample(network, noise, sigmas, conditions, guidance)

        self._run = Microbatcher(generate, cast_matrices(params, dtype), mesh, microbatch)

    def __call__(self, windows: Iterable[Window], settings: StageSettings) -> Iterator[np.ndarray]:
        """Scaled latents `[T, h, w, 4]` per window, in order.

        Raises:
          KeySyncError: the network produced non-finite values, naming the window.
        """
        for number, latents in enumerate(self._run(windows, settings)):
            sampler.require_finite(latents, f"{self.config.stage} window {number}")
            yield latents
