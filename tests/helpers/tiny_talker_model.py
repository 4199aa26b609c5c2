"""A model directory for drawn talkers in miniature: 64-pixel crops, windows of four frames, log-mel voice, random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tiny

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.converters import model_directory
from keysync_jax.converters.fresh import NON_DEGENERATE, VAE_CONSTANTS, fresh, stage_constants
from keysync_jax.converters.lazy import Tensors
from keysync_jax.converters.parts import Part, part_table

BANDS = 80


def make(path: Path, *, image_keyframes: bool = False, beside: Part | None = None) -> Path:
    """Write the directory; its stages carry no copy of the decoder, as the bundled model's do not.

    Args:
      path: where.
      image_keyframes: keyframes from a network without temporal layers, as `configs/ablation_image_keyframes.py` trains it.
      beside: a further speech encoder, whose tokens the stages read beside log-mel.
    """
    audio = {"audio_feature_dim": BANDS}
    if beside is not None:
        audio = {"audio_encoder": f"log_mel+{beside.config.kind}", "audio_feature_dim": BANDS + beside.config.hidden_size}
    stages = [dataclasses.replace(stage, **audio, audio_scale=1.5, identity_scale=1.0) for stage in tiny.STAGES.values()]
    if image_keyframes:
        unet = dataclasses.replace(tiny.UNET, num_frames=1, temporal_layers=False, audio_cond_method="to_time_emb_image")
        stages[0] = dataclasses.replace(stages[0], unet=unet, num_frames=1)
    parts = []
    for seed, config in enumerate(stages):
        tensors = fresh(part_table(config), seed, zero_init=False, gain=NON_DEGENERATE, constants=stage_constants(config))
        parts.append(Part(config.stage, config, tensors, random=True))
    vae = tiny.VAE
    parts.append(Part("vae", vae, fresh(part_table(vae), 9, zero_init=False, gain=NON_DEGENERATE, constants=VAE_CONSTANTS), random=True))
    parts.append(Part("audio/log_mel", AudioEncoderConfig(kind="log_mel", hidden_size=BANDS), Tensors({}, "log_mel has no weights")))
    model_directory.save(path, [*parts, *([beside] if beside is not None else [])])
    return path
