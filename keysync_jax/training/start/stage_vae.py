"""The VAE beside a stage: found where `config.init` says, checked against the stage, and what it decides of the recipe."""

from __future__ import annotations

import dataclasses

from etils import epath

from keysync_jax.config import StageConfig, VAEConfig
from keysync_jax.converters import assemble_vae, containers, convert, model_directory
from keysync_jax.converters.parts import Part
from keysync_jax.core import assets
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.source.sample import WindowReader
from keysync_jax.training.config import InitConfig, TrainConfig


def located(init: InitConfig) -> InitConfig:
    """With the bundled model's directory in place of "demo". The recipe keeps the word: the package may lie elsewhere on another host."""
    path = assets.resolve(init.path) if init.kind == "model" else init.path
    return dataclasses.replace(init, path=path, vae=assets.resolve(init.vae))


def is_gone(path: str) -> bool:
    """Whether nothing lies at a path; what the hub has is known only when it is read."""
    return not path.startswith("hub:") and not epath.Path(path).exists()


def open_vae(init: InitConfig, missing_ok: bool = False) -> Part | None:
    """The VAE that `init` names itself; None if it names none. What another run began with is for the caller to ask.

    Raises:
      KeySyncError: `init.vae` holds no VAE; a path does not exist, unless `missing_ok`.
    """
    init = located(init)
    path = init.vae or (init.path if init.kind != "scratch" else "")
    if not path or (missing_ok and is_gone(path)):
        return None
    if path.startswith("hub:") or model_directory.is_model_directory(path):
        directory = model_directory.load(path, complete=False)
        if "vae" in directory.parts:
            return Part("vae", directory.vae, directory.tensors("vae"), directory.parts["vae"].random)
        part = None
    else:
        sources = containers.open_sources(path)
        sources = [s for s in sources if s.kind == "diffusers_vae" or (s.kind == "svd" and assemble_vae.has_vae(s))]
        part = assemble_vae.assemble(sources[0], [], convert.Options(), [], set()) if sources else None
    if part is None and init.vae:
        raise KeySyncError(f"config.init.vae: {init.vae} holds no VAE; name a model directory that has one")
    return part


def decided(config: TrainConfig, part: Part | None) -> tuple[TrainConfig, list[str]]:
    """The recipe of a new stage run with what its VAE decides: the latent scale, and the VAE's sizes under `config.vae`.

    Returns:
      The config, and lines that say what was taken from where.

    Raises:
      KeySyncError: the VAE does not fit the stage's latent size, resolution or channels; names both.
    """
    if part is None:
        if config.uses_pixels:
            raise no_vae()
        return at_scale(config, config.vae, config.stage.latent_scale), []
    vae, stage = fitting(part, config.stage), config.stage
    notes = []
    if stage.latent_scale != vae.latent_scale:
        notes.append(f"latent scale {vae.latent_scale:g} instead of {stage.latent_scale:g}: that of {part.tensors.source}")
    return at_scale(config, vae, vae.latent_scale), notes


def continued(config: TrainConfig, stored: TrainConfig, part: Part | None, workdir: str) -> TrainConfig:
    """The recipe of a stage run that goes on: what its workdir says, so that it needs its sources no more.

    Args:
      config: as the recipe says.
      stored: of the workdir.
      part: the VAE that is named now, if another one is.
      workdir: for messages.

    Raises:
      KeySyncError: the VAE does not fit the stage, or makes latents of another scale than the run was trained at.
    """
    if part is not None and fitting(part, config.stage).latent_scale != stored.stage.latent_scale:
        raise KeySyncError(
            f"{part.tensors.source} makes latents of scale {config_of(part).latent_scale:g}, the run in {workdir} was trained at "
            f"{stored.stage.latent_scale:g}: another VAE; take config.init.vae back, or start a new run"
        )
    return at_scale(config, stored.vae, stored.stage.latent_scale)


def config_of(part: Part) -> VAEConfig:
    """The config of a VAE's part."""
    assert isinstance(part.config, VAEConfig)
    return part.config


def fitting(part: Part, stage: StageConfig) -> VAEConfig:
    """The config of a VAE whose latents are those of a stage.

    Raises:
      KeySyncError: they are not; names both.
    """
    vae, where = config_of(part), part.tensors.source
    if vae.latent_channels != stage.unet.out_channels:
        raise KeySyncError(
            f"{where} makes latents of {vae.latent_channels} channels, config.stage.unet.out_channels is {stage.unet.out_channels}"
        )
    if stage.latent_size * vae.downsample_factor != stage.resolution:
        raise KeySyncError(
            f"config.stage.resolution is {stage.resolution}, but latents of config.stage.latent_size={stage.latent_size} are "
            f"{stage.latent_size * vae.downsample_factor} pixels in {where} ({vae.downsample_factor} per cell); change one of them"
        )
    return vae


def no_vae() -> KeySyncError:
    """The error of a pixel loss without a VAE."""
    return KeySyncError("the pixel loss decodes frames: name a model directory with a VAE in config.init.vae, or set loss.pixel_weight=0")


def at_scale(config: TrainConfig, vae: VAEConfig, scale: float) -> TrainConfig:
    """Network and pixel loss see latents of one scale."""
    stage, loss = (dataclasses.replace(part, latent_scale=scale) for part in (config.stage, config.loss))
    return dataclasses.replace(config, stage=stage, loss=loss, vae=vae)


def check_latents(stage: StageConfig, reader: WindowReader) -> None:
    """Refuses data whose latents have another scale than the stage.

    Raises:
      KeySyncError: names the dataset and both scales.
    """
    for store in reader.stores:
        scale = store.info("latent").get("scale")
        if scale is not None and scale != stage.latent_scale:
            raise KeySyncError(
                f"{store.root} holds latents at scale {scale:g}, the stage works at {stage.latent_scale:g}; "
                f"prepare the data with the VAE of config.init.vae"
            )
