"""A model directory for drawn talkers in miniature: 64-pixel crops, windows of four frames, log-mel voice, random weights."""

from __future__ import annotations

from pathlib import Path

from keysync_jax.config import AudioEncoderConfig, StageConfig, UNetConfig, VAEConfig
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
    unet = {
        "model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "num_head_channels": 32,
        "context_dim": 32, "audio_dim": 32, "num_frames": 4,
    }  # fmt: skip
    shared = {
        "resolution": 64, "latent_size": 8, "num_frames": 4, "audio_encoder": "log_mel", "audio_feature_dim": BANDS,
        "audio_scale": 1.5, "identity_scale": 1.0,
    }  # fmt: skip
    if beside is not None:
        shared |= {"audio_encoder": f"log_mel+{beside.config.kind}", "audio_feature_dim": BANDS + beside.config.hidden_size}
    stages = [
        StageConfig(unet=UNetConfig(in_channels=8, **unet), **shared),
        StageConfig(stage="interpolation", unet=UNetConfig(in_channels=9, **unet), **shared),
    ]
    if image_keyframes:
        image = unet | {"num_frames": 1, "temporal_layers": False, "audio_cond_method": "to_time_emb_image"}
        stages[0] = StageConfig(unet=UNetConfig(in_channels=8, **image), **shared | {"num_frames": 1})
    parts = []
    for seed, config in enumerate(stages):
        tensors = fresh(part_table(config), seed, zero_init=False, gain=NON_DEGENERATE, constants=stage_constants(config))
        parts.append(Part(config.stage, config, tensors, random=True))
    vae = VAEConfig(base_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1, decoder="image")
    parts.append(Part("vae", vae, fresh(part_table(vae), 9, zero_init=False, gain=NON_DEGENERATE, constants=VAE_CONSTANTS), random=True))
    parts.append(Part("audio/log_mel", AudioEncoderConfig(kind="log_mel", hidden_size=BANDS), Tensors({}, "log_mel has no weights")))
    model_directory.save(path, [*parts, *([beside] if beside is not None else [])])
    return path
