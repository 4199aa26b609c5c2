"""The parts of a model directory: their names, their tables, and a part on its way to disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from keysync_jax import config as configs
from keysync_jax.config import AUDIO_ENCODERS, STAGES, WEAK_PARTS, GuidanceConfig, SpeechEncoderConfig, StageConfig, VAEConfig
from keysync_jax.converters import sgm
from keysync_jax.converters.lazy import Tensors
from keysync_jax.models.speech import registry
from keysync_jax.models.table import Table

DECODER, ENCODER = f"{sgm.VAE_PREFIX}decoder.", f"{sgm.VAE_PREFIX}encoder."
# The whole KL autoencoder that interpolation's conditioner may carry and never uses.
KL_PREFIX = "conditioner.embedders.0.encoder"
# Under this name our files say which part they are and with which config: header text of safetensors, entry of a torch file.
SELF_DESCRIPTION = "keysync"

PartConfig = StageConfig | VAEConfig | SpeechEncoderConfig
C = TypeVar("C", bound=PartConfig, covariant=True)


@dataclasses.dataclass(frozen=True)
class Part(Generic[C]):
    """One part to be written.

    Attributes:
      name: "keyframe", "interpolation", "interpolation_bad", "vae" or "audio/<encoder>".
      config: what it is.
      tensors: torch key -> array in the reference's names; empty for an encoder without weights.
      random: whether all of it is drawn at random.
      fresh: keys that were drawn at random in an otherwise trained part.
    """

    name: str
    config: C
    tensors: Tensors
    random: bool = False
    fresh: tuple[str, ...] = ()


def audio_part_name(encoder: str) -> str:
    return f"audio/{encoder}"


def audio_part_names(stage: StageConfig) -> tuple[str, ...]:
    """The parts of the speech encoders that a stage was trained with."""
    return tuple(map(audio_part_name, stage.audio_encoders))


def part_table(config: PartConfig, vae_halves: Sequence[str] = ("encoder", "decoder"), name: str = "") -> Table:
    """Entries of a part's parameters; `vae_halves` chooses among a VAE's, and the `name` of a weak network leaves out the projection."""
    if isinstance(config, StageConfig):
        return sgm.network_table(config) if name in WEAK_PARTS else sgm.stage_table(config)
    if isinstance(config, VAEConfig):
        return sgm.vae_table(config, parts=vae_halves)
    return registry.audio_table(config)


def kl_table(config: VAEConfig) -> Table:
    """Entries of the plain KL autoencoder (2-D decoder, both 1x1 convolutions) of a VAE's sizes, under `KL_PREFIX`."""
    return sgm.vae_table(dataclasses.replace(config, decoder="image", quant_conv=True, post_quant_conv=True), KL_PREFIX)


def first_stage_encoder_table(config: VAEConfig) -> Table:
    """Entries of the encoder that an engine's first stage may carry; it has no quant_conv."""
    return sgm.vae_table(dataclasses.replace(config, quant_conv=False), parts=("encoder",))


def describe(name: str, config: PartConfig, random: bool) -> dict[str, Any]:
    """What a file says about itself; `described` reads it."""
    values = configs.to_dict(config)
    if isinstance(config, StageConfig) and config.guidance == GuidanceConfig():
        del values["guidance"]  # so that versions from before it read the file
    if isinstance(config, StageConfig):
        for field in ("system", "emotion_dim"):  # likewise
            if getattr(config, field) == getattr(StageConfig, field):
                del values[field]
    return {"part": name, "config": values, "random": random}


def config_class(name: str) -> type[PartConfig]:
    return (
        StageConfig
        if name in (*STAGES, *WEAK_PARTS)
        else VAEConfig
        if name == "vae"
        else registry.ENCODERS[name.removeprefix("audio/")].config
    )


def is_part_name(name: str) -> bool:
    return name in (*STAGES, *WEAK_PARTS, "vae") or name in map(audio_part_name, AUDIO_ENCODERS)


def described(description: Any, where: str) -> PartConfig | None:
    """The config in a file's self-description; None if there is none of ours.

    Raises:
      KeySyncError: unknown keys or wrong values in it.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("config"), Mapping):
        return None
    name = description.get("part")
    if not isinstance(name, str) or not is_part_name(name):
        return None
    return configs.from_dict(config_class(name), dict(description["config"]), where)
