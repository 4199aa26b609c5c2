"""KeyFace's interpolation stage at full size: 14 consecutive frames whose ends are given, no emotion, from Stable Video Diffusion.

    keysync prepare videos/ -o DATA --model MODEL --columns jpeg,wav2vec2,beats --column-weights wav2vec2=W2V2 \\
        --column-weights beats=BEATs.pt
    keysync train --config keyface_interpolation --workdir runs/interpolation --config.data.datasets=DATA --config.init.path=SVD
    keysync inspect --config keyface_interpolation:authors

Preset `released` (the default) is what the released scripts run, `authors` what the scripts of the authors' own runs say, `paper` what a
summary of the paper says (of this stage it gives neither the weight of the lower half nor a pixel loss of its own):

    item                            released        authors         paper
    frozen                          temporal        nothing         not said
    batch                           1 a device      64              not said
    pixel losses                    none            none            l2, perceptual, one frame

Equal in all: the lower half counts twice, learning rate 1e-5, both endpoints of a video dropped together in 10 %, audio in 20 %; wav2vec2
beside BEATs. Sampling leads away from a worse network at scale 2: the checkpoint of a tenth of the run is kept for it
(`checkpoint.weak_at`), and `keysync export` adds it. The scripts have no limit; 120,000 steps and a batch of 32 here.
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import GuidanceConfig, StageConfig, UNetConfig, to_dict
from keysync_jax.core.errors import UsageError
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.training.config import CheckpointConfig, DataConfig, DropoutConfig, InitConfig, TrainConfig

PRESETS = ("released", "authors", "paper")
AUDIO = "wav2vec2+beats"
STEPS = 120_000


def train_config(preset: str = "released") -> TrainConfig:
    """The recipe as a dataclass, for other recipes to start from; `preset` is one of `PRESETS`."""
    config = TrainConfig(
        stage=StageConfig(
            stage="interpolation", system="keyface", audio_encoder=AUDIO, audio_feature_dim=1536, unet=UNetConfig(in_channels=9),
            guidance=GuidanceConfig(kind="auto", scale=2.0),
        ),
        num_steps=STEPS,
        freeze="temporal",
        dropout=DropoutConfig(audio=0.2, identity=0.1, identity_per_frame=False),
        loss=LossConfig(pixel_weight=0.0, lower_weight=2.0),
        data=DataConfig(batch_size=32),
        init=InitConfig(kind="svd", path="stable-video-diffusion"),
        checkpoint=CheckpointConfig(weak_at=STEPS // 10),
    )  # fmt: skip
    if preset == "released":
        return config
    if preset == "authors":
        return dataclasses.replace(config, freeze="none", data=dataclasses.replace(config.data, batch_size=64))
    if preset == "paper":
        return dataclasses.replace(config, loss=LossConfig(pixel_weight=1.0, pixel_losses=("l2", "lpips"), lower_weight=2.0))
    raise UsageError(f"keyface_interpolation has no preset {preset!r}; it has {', '.join(PRESETS)}")


def get_config(preset: str = "released") -> ConfigDict:
    return ConfigDict(to_dict(train_config(preset)))
