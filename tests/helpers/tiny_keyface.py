"""A KeyFace model directory in miniature: 64-pixel squares, windows of four frames, log-mel voice, random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tiny

from keysync_jax.config import AudioEncoderConfig, GuidanceConfig, StageConfig
from keysync_jax.converters import model_directory
from keysync_jax.converters.fresh import NON_DEGENERATE, VAE_CONSTANTS, fresh, stage_constants
from keysync_jax.converters.lazy import Tensors
from keysync_jax.converters.parts import Part, part_table

EMOTION = 8
KEYFRAME = dataclasses.replace(
    tiny.KEYFRAME, system="keyface", emotion_dim=EMOTION, unet=dataclasses.replace(tiny.UNET, adm_in_channels=2 * EMOTION)
)
INTERPOLATION = dataclasses.replace(tiny.INTERPOLATION, system="keyface", guidance=GuidanceConfig("auto", scale=2.0))


def make(path: Path, *, weak: bool = True) -> Path:
    """Write the directory, with or without the worse interpolation network."""
    parts: list[Part] = []
    configs: list[tuple[str, StageConfig]] = [("keyframe", KEYFRAME), ("interpolation", INTERPOLATION)]
    for seed, (name, config) in enumerate([*configs, *([("interpolation_bad", INTERPOLATION)] if weak else [])]):
        table = part_table(config, name=name)
        tensors = fresh(table, seed, zero_init=False, gain=NON_DEGENERATE, constants=stage_constants(config))
        parts.append(Part(name, config, tensors, random=True))
    vae = tiny.VAE
    parts.append(Part("vae", vae, fresh(part_table(vae), 9, zero_init=False, gain=NON_DEGENERATE, constants=VAE_CONSTANTS), random=True))
    parts.append(Part("audio/log_mel", AudioEncoderConfig(kind="log_mel", hidden_size=tiny.MELS), Tensors({}, "log_mel has no weights")))
    model_directory.save(path, parts)
    return path
