"""The kinds of models that a run can train: a diffusion stage and an autoencoder."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from keysync_jax.config import StageConfig, VAEConfig, to_dict
from keysync_jax.converters.parts import Part
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.source.frames import FrameReader
from keysync_jax.data_pipeline.source.loader import Reader
from keysync_jax.data_pipeline.source.sample import WindowReader
from keysync_jax.diffusion.loss import Perceptual
from keysync_jax.models import conditioning
from keysync_jax.training import data
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.objective import DiffusionObjective, VaeObjective
from keysync_jax.training.start import initial, runs, stage_vae, weights_layout
from keysync_jax.training.start.runs import RunWeights
from keysync_jax.training.start.weights_layout import Weights
from keysync_jax.training.state import Tree, merge
from keysync_jax.training.trainable import SampleMaker, Say, Shapes, Trainable
from keysync_jax.training.watch.samples import AutoencoderSamples, StageSamples


class TrainableStage(Trainable):
    """A diffusion stage: keyframes or interpolation."""

    noise_levels = True
    defining = ("model", "freeze", "stage.")
    switches = ("loss.pixel_weight",)  # the frozen leaves hold the decoder of the pixel loss, or do not
    unread = ("vae.",)

    def __post_init__(self):
        if self.uses_pixels and self.config.pixel_frames < 1:
            raise KeySyncError("loss.pixel_weight is positive but pixel_frames is 0; decode at least one frame")

    @property
    def part(self) -> str:
        return self.config.stage.stage

    @property
    def network(self) -> StageConfig:
        return self.config.stage

    def abstract_model(self) -> Tree:
        return weights_layout.abstract(self.network)

    @property
    def uses_pixels(self) -> bool:
        return self.config.uses_pixels

    @property
    def uses_lpips(self) -> bool:
        return self.config.loss.uses_lpips

    def trained_for(self) -> dict[str, Any]:
        stage = self.config.stage
        face = {"system": stage.system, "emotion_dim": stage.emotion_dim} if stage.system != "keysync" else {}
        return face | {
            "model": stage.stage, "audio_encoder": stage.audio_encoder, "mask": to_dict(stage.mask), "resolution": stage.resolution,
            "latent_size": stage.latent_size, "latent_scale": stage.latent_scale, "num_frames": stage.num_frames,
        }  # fmt: skip

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        return weights_layout.split_stage(params, self.config.freeze)

    def resolved(self, stored: TrainConfig | None, workdir: str) -> tuple[Trainable, list[str]]:
        config, notes = self.config, []
        if stored is not None and stored.model == config.model:
            part = None if config.init == stored.init else self.vae_part(missing_ok=True)
            config = stage_vae.continued(config, stored, part, workdir)
        else:
            config, notes = stage_vae.decided(config, self.vae_part())
        return dataclasses.replace(self, config=config), notes

    def vae_part(self, missing_ok: bool = False) -> Part | None:
        init = self.config.init
        if init.vae or init.kind != "run":
            return stage_vae.open_vae(init, missing_ok)
        # Where that run found its own.
        return None if missing_ok and stage_vae.is_gone(init.path) else of_run(init.path).vae_part(missing_ok)

    def vae_config(self) -> VAEConfig | None:
        """Of the autoencoder that the pixel loss decodes with; None where none is needed."""
        if not self.uses_pixels:
            return None
        part = self.vae_part(missing_ok=True)
        return self.config.vae if part is None else stage_vae.config_of(part)

    def abstract_weights(self) -> Weights:
        params, frozen = self.split(self.abstract_model())
        vae = self.vae_config()
        if vae is not None:
            frozen = merge(frozen, weights_layout.decoder(weights_layout.abstract(vae)))
        return Weights(params, frozen, vae)

    def model_weights(self) -> tuple[Tree, list[str]]:
        return initial.stage_weights(self.config, _start(self.config))

    def initial_weights(self) -> Weights:
        weights = super().initial_weights()
        if not self.uses_pixels:
            return weights
        part = self.vae_part()
        if part is None:
            raise stage_vae.no_vae()
        frozen = merge(weights.frozen, weights_layout.decoder(initial.vae_params(part)))
        note = f"pixel loss: decoder of the VAE of {part.tensors.source}"
        return Weights(weights.params, frozen, stage_vae.config_of(part), (*weights.notes, note))

    def reader(self, split: str | None = None) -> WindowReader:
        return data.window_reader(self.config, split)

    def batch_shapes(self, batch_size: int) -> Shapes:
        stage, frames = self.config.stage, self.config.pixel_frames
        shapes = conditioning.batch_shapes(stage)
        if not self.uses_pixels:
            return _float32(batch_size, shapes)
        shapes["original_frames"] = (frames, stage.resolution, stage.resolution, 3)
        return _float32(batch_size, shapes) | {"original_indices": jax.ShapeDtypeStruct((batch_size, frames), jnp.int32)}

    def check_data(self, reader: Reader) -> None:
        if isinstance(reader, WindowReader):
            stage_vae.check_latents(self.config.stage, reader)

    def objective(self, vae: VAEConfig | None, lpips: Perceptual | None) -> DiffusionObjective:
        return DiffusionObjective(self.config, vae, lpips)

    def samples(self, reader: Reader, mesh: Mesh, say: Say, vae: VAEConfig | None) -> SampleMaker | None:
        return StageSamples(self.config, reader, mesh, say, vae) if isinstance(reader, WindowReader) else None


class TrainableVae(Trainable):
    """The autoencoder, trained on frames of videos."""

    unit = item = "frames"
    decodes_in_network = True
    defining = ("model", "resolution", "vae.")
    unread = ("stage.",)

    def __post_init__(self):
        config, factor = self.config, self.config.vae.downsample_factor
        for name, side in (("resolution", config.resolution), ("data.crop", config.data.crop)):
            if side < 0 or side % factor:
                raise KeySyncError(f"{name} is {side}; the VAE needs a multiple of {factor}")
        if not config.resolution:
            raise KeySyncError("resolution is 0; give the side of the frames")

    @property
    def part(self) -> str:
        return "vae"

    @property
    def network(self) -> VAEConfig:
        return self.config.vae

    def abstract_model(self) -> Tree:
        return weights_layout.abstract(self.network)

    @property
    def uses_lpips(self) -> bool:
        return self.config.vae_loss.lpips_weight > 0

    def trained_for(self) -> dict[str, Any]:
        return {"model": "vae", "resolution": self.config.resolution, "downsample_factor": self.config.vae.downsample_factor}

    def model_weights(self) -> tuple[Tree, list[str]]:
        return initial.vae_weights(self.config, _start(self.config))

    def reader(self, split: str | None = None) -> FrameReader:
        return data.frame_reader(self.config, split)

    def batch_shapes(self, batch_size: int) -> Shapes:
        side = self.config.data.crop or self.config.resolution
        return _float32(batch_size, {"images": (side, side, self.config.vae.in_channels), "mouth": (side, side, 1)})

    def objective(self, vae: VAEConfig | None, lpips: Perceptual | None) -> VaeObjective:
        return VaeObjective(self.config, lpips)

    def samples(self, reader: Reader, mesh: Mesh, say: Say, vae: VAEConfig | None) -> SampleMaker | None:
        return AutoencoderSamples(self.config, reader, mesh, say, vae) if isinstance(reader, FrameReader) else None


TRAINABLES: dict[str, type[Trainable]] = {"stage": TrainableStage, "vae": TrainableVae}  # by `config.model`


def trainable_of(config: TrainConfig) -> Trainable:
    """What a recipe trains.

    Raises:
      KeySyncError: no kind of model is called as `config.model` says, or the recipe does not fit that kind.
    """
    if config.model not in TRAINABLES:
        raise KeySyncError(f"model is {config.model!r}; choose one of {', '.join(TRAINABLES)}")
    return TRAINABLES[config.model](config)


def of_run(workdir: str | os.PathLike) -> Trainable:
    """What a run trains, with its resolved recipe.

    Raises:
      KeySyncError: there is no run, or its recipe is not one.
    """
    return trainable_of(runs.read_config(workdir))


def read_run(workdir: str | os.PathLike, step: int = -1, ema: bool = False) -> RunWeights:
    """The weights of a run; see `runs.read_weights`."""
    return runs.read_weights(workdir, of_run(workdir), step, ema)


def _start(config: TrainConfig) -> RunWeights | None:
    """The weights that a run begins with which begins from a run."""
    init = config.init
    if init.kind != "run":
        return None
    run = read_run(init.path, init.step, init.ema)
    if run.config.model != config.model:
        raise KeySyncError(f"config.init.path: {init.path} trains a {run.config.model}, this run a {config.model}")
    return run


def _float32(batch_size: int, shapes: dict[str, tuple[int, ...]]) -> Shapes:
    return {name: jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32) for name, shape in shapes.items()}
