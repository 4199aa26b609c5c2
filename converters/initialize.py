"""`keysync init`: a model directory with random weights, for trying the tools and for measuring the full-size model."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from keysync_jax.config import (
    MODEL_SIZES,
    SYSTEMS,
    WEAK_PARTS,
    AudioEncoderConfig,
    GuidanceConfig,
    SpeechEncoderConfig,
    StageConfig,
    UNetConfig,
    VAEConfig,
)
from keysync_jax.converters import model_directory
from keysync_jax.converters.byte_progress import byte_progress
from keysync_jax.converters.fresh import NON_DEGENERATE, VAE_CONSTANTS, fresh, stage_constants
from keysync_jax.converters.lazy import Tensors, from_params
from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.converters.parts import Part, PartConfig, audio_part_name, part_table
from keysync_jax.converters.shapes import RELEASED_ENCODERS
from keysync_jax.core.errors import UsageError
from keysync_jax.models.speech import registry
from keysync_jax.models.speech.beats import BeatsConfig
from keysync_jax.models.speech.random_params import init_params


def configurations(size: str, mode: str = "keysync") -> tuple[dict[str, StageConfig], VAEConfig, list[SpeechEncoderConfig]]:
    """Stages, VAE and speech encoders of a size; `mode` is one of `config.SYSTEMS`.

    "full" is the released layout. "tiny" has a 128-pixel crop, 16x16 latents, a two-level U-Net with attention (on the lower level and
    in the middle: on the upper one it would double the time), a VAE of width 32 and two-layer speech encoders.

    Raises:
      UsageError: no such size.
    """
    if mode not in SYSTEMS:
        raise UsageError(f"mode {mode!r}: choose one of {', '.join(SYSTEMS)}")
    if size == "full":
        if mode == "keyface":
            return _keyface_stages({}, {}, emotion=256, width=768), VAEConfig(), _keyface_encoders({}, {"num_classes": 527})
        stages = {
            "keyframe": StageConfig(),
            "interpolation": StageConfig(stage="interpolation", unet=UNetConfig(in_channels=9), audio_encoder="wavlm"),
        }
        return stages, VAEConfig(), [AudioEncoderConfig(), AudioEncoderConfig(kind="wavlm", normalize_waveform=False)]
    if size != "tiny":
        raise UsageError(f"size {size!r}: choose one of {', '.join(MODEL_SIZES)}")
    sizes: dict[str, Any] = {
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "num_head_channels": 32,
        "context_dim": 32,
        "audio_dim": 32,
    }
    shared: dict[str, Any] = {"resolution": 128, "latent_size": 16, "audio_feature_dim": 32}
    stages = {
        "keyframe": StageConfig(unet=UNetConfig(**sizes), **shared),
        "interpolation": StageConfig(stage="interpolation", unet=UNetConfig(in_channels=9, **sizes), audio_encoder="wavlm", **shared),
    }
    layers: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 64,
        "conv_pos": 16,
        "conv_pos_groups": 4,
    }
    encoder: dict[str, Any] = {**layers, "conv_dim": (16,) * 7}
    vae = VAEConfig(base_channels=32, channel_mult=(1, 1, 1, 1))
    if mode == "keyface":
        patches = {**layers, "patch_width": 24, "num_classes": 8}
        return _keyface_stages(sizes, shared, emotion=16, width=32), vae, _keyface_encoders(encoder, patches)
    return stages, vae, [AudioEncoderConfig(**encoder), AudioEncoderConfig(kind="wavlm", normalize_waveform=False, **encoder)]


def _keyface_stages(sizes: dict[str, Any], shared: dict[str, Any], emotion: int, width: int) -> dict[str, StageConfig]:
    """KeyFace's stages: emotion and WavLM beside BEATs for keyframes, wav2vec2 beside BEATs and autoguidance between them."""
    shared = shared | {"system": "keyface", "audio_feature_dim": 2 * width}
    encoders = RELEASED_ENCODERS["keyface"]
    return {
        "keyframe": StageConfig(
            unet=UNetConfig(adm_in_channels=2 * emotion, **sizes), emotion_dim=emotion, audio_encoder=encoders["keyframe"], **shared
        ),
        "interpolation": StageConfig(
            stage="interpolation", unet=UNetConfig(in_channels=9, **sizes), audio_encoder=encoders["interpolation"],
            guidance=GuidanceConfig(kind="auto", scale=2.0), **shared,
        ),
    }  # fmt: skip


def _keyface_encoders(convolutional: dict[str, Any], patches: dict[str, Any]) -> list[SpeechEncoderConfig]:
    return [
        AudioEncoderConfig(kind="wavlm", normalize_waveform=False, **convolutional),
        AudioEncoderConfig(kind="wav2vec2", **convolutional),
        BeatsConfig(**patches),
    ]


def initialize(
    size: str, output: str | os.PathLike, *, mode: str = "keysync", seed: int = 0, force: bool = False, console: Console | None = None
) -> ModelDirectory:
    """Writes random weights, marked as such in every config.json, tensor by tensor.

    Args:
      size: "tiny" (megabytes) or "full" (the released layout, about 14 GB).
      output: model directory to write.
      mode: "keysync", which dubs, or "keyface", which animates a picture; its worse interpolation network is drawn, too.
      seed: each tensor has its own stream, so the same seed gives the same bytes.
      force: replace an existing model directory.
      console: where the warning goes; default stderr.

    Raises:
      UsageError: no such size or mode, or a negative seed.
      KeySyncError: the folder is in use.
    """
    if seed < 0:
        raise UsageError(f"seed is {seed}; it must not be negative")
    console = console or Console(stderr=True)
    stages, vae_config, encoders = configurations(size, mode)
    vae = _random(part_table(vae_config), seed, VAE_CONSTANTS)
    decoder = {e.torch_key: vae.info(e.torch_key) for e in part_table(vae_config, ("decoder",))}
    parts: list[Part[PartConfig]] = []
    for name, config in stages.items():
        # The stages must not be twins: their shared layers would agree by accident.
        own = _random(part_table(config), seed + (name == "interpolation") * 1_000_003, stage_constants(config))
        parts.append(Part(name, config, own.updated(decoder), random=True))
    for name, stage in WEAK_PARTS.items():
        if (config := stages[stage]).guidance.kind == "auto":
            table = part_table(config, name=name)
            parts.append(Part(name, config, _random(table, seed + 2_000_003, stage_constants(config)), random=True))
    parts.append(Part("vae", vae_config, vae, random=True))
    for config in encoders:
        parts.append(Part(audio_part_name(config.kind), config, _random_encoder(config, seed), random=True))
    with byte_progress(console, "random weights", sum(part.tensors.nbytes for part in parts)) as advance:
        directory = model_directory.save(output, parts, notes=[f"random weights, size {size}, seed {seed}"], force=force, progress=advance)
    path = escape(directory.path)  # a folder's name may hold brackets
    noise = "mouths are" if mode == "keysync" else "pictures are"
    warning = f"[bold yellow]{path} holds RANDOM weights[/bold yellow] (size {size}): for trying the tools; {noise} noise"
    console.print(warning, highlight=False, soft_wrap=True)
    return directory


def _random(table, seed: int, constants: dict[str, float]) -> Tensors:
    # The reference's zero layers are drawn too, or the network would answer 0 to everything.
    return fresh(table, seed, zero_init=False, gain=NON_DEGENERATE, constants=constants)


def _random_encoder(config: SpeechEncoderConfig, seed: int) -> Tensors:
    params = init_params(config, np.random.default_rng([seed, len(config.kind)]))
    return from_params(registry.audio_table(config), params, config.kind)
