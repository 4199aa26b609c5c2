"""A diffusion stage as a function from windows to latents. Both stages are the same operation on different conditions.

A window brings along everything that its latents depend on: conditions, seed, guidance. So windows of many clips, each with its own, go
through the devices together (`Microbatcher`), and noise is keyed by (seed, stage, window index), never by device or batch position.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from keysync_jax.config import StageConfig
from keysync_jax.diffusion import sampler, schedules
from keysync_jax.diffusion.guidance import MAIN, Guidance
from keysync_jax.diffusion.noise import keyed_noise
from keysync_jax.encoders.microbatch import Microbatcher
from keysync_jax.models.conditioning import conditions
from keysync_jax.models.stage import StageModel, cast_matrices

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Everything one window of T frames is generated from (NumPy, unbatched; inside the program with an axis B in front).

    Attributes:
      seed: [] uint32.
      index: [] int32, position among the windows of the clip that this stage makes; with the seed it keys the noise.
      guidance: its scales may differ from window to window; another set of branches is another program.
      latents: scaled. Keyframe stage: identity [h, w, 4]; interpolation: start and end keyframe [2, h, w, 4].
      audio: [T, 2, D], two tokens per frame.
      known: [T, h, w, 4], scaled latents of the source; None where nothing of a source is known.
      mask: [T, h, w, 1], 1 = regenerate; given exactly where `known` is.
      steps: AYS steps (10 means eleven evaluations); each number of steps is a program.
      emotion: valence and arousal [T] by name, for a stage that reads them.
    """

    seed: Any
    index: Any
    guidance: Guidance
    latents: Any
    audio: Any
    known: Any
    mask: Any
    steps: int = dataclasses.field(metadata={"static": True})
    emotion: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class StageSampler(Microbatcher):
    """One diffusion stage: called with `Window`s, it gives the scaled latents `[T, h, w, 4]` of each, in order, finite or not.

    Args:
      config: the stage; its `num_frames` is T.
      params: Flax parameters of `StageModel`, or a function that reads them when the first window comes.
      mesh: devices to share the windows over.
      dtype: compute type of the network; the sampler state is float32.
      microbatch: windows a device computes at once.
      others: parameters of further networks of the same config, by the names under which a guidance asks them (`guidance.WEAK`).

    Attributes:
      networks: the names of the networks that a guidance can ask.
    """

    def __init__(
        self,
        config: StageConfig,
        params: Params | Callable[[], Params],
        mesh: Mesh,
        *,
        dtype: Any = jnp.float32,
        microbatch: int = 1,
        others: Mapping[str, Params | Callable[[], Params]] | None = None,
    ):
        self.config = config
        self.networks = (MAIN, *(others or {}))
        self._model = StageModel(config, dtype=dtype)

        def networks() -> dict[str, Params]:
            given = {MAIN: params} | dict(others or {})
            return {name: cast_matrices(own() if callable(own) else own, dtype) for name, own in given.items()}

        super().__init__(self._sample, networks, mesh, microbatch)

    def _sample(self, params: dict[str, Params], _: Any, windows: Window) -> jax.Array:
        config, model = self.config, self._model
        shape = (config.num_frames, config.latent_size, config.latent_size, config.unet.out_channels)
        noise = keyed_noise(windows.seed, config.stage, windows.index, shape)
        latents = "identity" if config.stage == "keyframe" else "endpoints"
        batch = {"audio": windows.audio, latents: windows.latents, **windows.emotion}
        if windows.known is not None:
            batch |= {"known": windows.known, "mask": windows.mask}
        apply = cast(Callable[..., jax.Array], model.apply)
        networks = {name: functools.partial(apply, {"params": own}) for name, own in params.items()}
        given = conditions(model, {"params": params[MAIN]}, batch)
        return sampler.sample(networks, noise, schedules.ays_sigmas(windows.steps), given, windows.guidance)
