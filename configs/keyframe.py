"""Keyframe stage at full size: 14 frames, 13 apart, 512-px crops, from Stable Video Diffusion.

    keysync train --config keyframe --workdir runs/keyframe --config.data.datasets=DATA --config.init.path=SVD --config.init.vae=MODEL
    keysync train --config keyframe:paper --workdir ...        as the paper describes it
    keysync inspect --config keyframe:paper

Preset `released` (the default) is what the reference's scripts run, `paper` what paper Table 7 and its equations say:

    item                            released                                paper
    identity dropout, 10 %          drawn for every frame                   drawn per video ("each condition")
    pixel loss                      over the whole decoded frame            inside the mask (Eq. 6: M multiplies both terms)
    length                          no limit in the scripts; 60,000 here    60,000 steps

Equal in both: HuBERT tokens, learning rate 1e-5 after 1,000 steps of warm-up, AdamW, 32 windows per step, audio dropout 20 %, pixel loss
of weight 1 on one frame, temporal layers and VAE frozen (the paper only says that both begin as SVD).
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, to_dict
from keysync_jax.core.errors import UsageError
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.training.config import DataConfig, DropoutConfig, InitConfig, TrainConfig

PRESETS = ("released", "paper")


def train_config(preset: str = "released") -> TrainConfig:
    """The recipe as a dataclass, for other recipes to start from; `preset` is one of `PRESETS`."""
    config = TrainConfig(
        stage=StageConfig(stage="keyframe", audio_encoder="hubert", unet=UNetConfig(in_channels=8)),
        num_steps=60_000,
        freeze="temporal",
        dropout=DropoutConfig(audio=0.2, identity=0.1, identity_per_frame=True),
        loss=LossConfig(pixel_weight=1.0, pixel_losses=("l2",), mask_pixels=False),
        pixel_frames=1,
        data=DataConfig(batch_size=32, spacing=13, identity="first"),
        init=InitConfig(kind="svd", path="stable-video-diffusion"),
    )
    if preset == "released":
        return config
    if preset == "paper":
        return dataclasses.replace(
            config,
            dropout=dataclasses.replace(config.dropout, identity_per_frame=False),
            loss=dataclasses.replace(config.loss, mask_pixels=True),
        )
    raise UsageError(f"keyframe has no preset {preset!r}; it has {', '.join(PRESETS)}")


def get_config(preset: str = "released") -> ConfigDict:
    return ConfigDict(to_dict(train_config(preset)))
