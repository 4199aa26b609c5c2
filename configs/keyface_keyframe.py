"""KeyFace's keyframe stage at full size: 14 frames, 13 apart, the whole 512-px square, valence and arousal, from SVD.

    keysync prepare videos/ -o DATA --model MODEL --columns jpeg,emotion,beats --column-weights beats=BEATs.pt
    keysync train --config keyface_keyframe --workdir runs/keyframe --config.data.datasets=DATA --config.init.path=SVD \\
        --config.init.vae=MODEL --config.lpips=VGG
    keysync inspect --config keyface_keyframe:paper

MODEL holds the VAE and WavLM. Preset `released` (the default) is what the released scripts run, `paper` what a summary of the paper says,
`authors` what the scripts of the authors' own runs say:

    item                            released        paper           authors
    weight of the lower half        3               3               2
    pixel losses                    l2, lpips       l2, perceptual  l2
    batch                           1 a device      not said        32 (8 nodes of 4)

Equal in all: learning rate 1e-5 after 1,000 steps of warm-up, AdamW, identity dropout 10 % and audio dropout 20 % per video, temporal
layers frozen, WavLM beside BEATs. Emotion is never dropped; frames without one are neutral. The scripts have no limit, 60,000 steps here;
the batch of all three is 32, as the authors ran it.
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, to_dict
from keysync_jax.core.errors import UsageError
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.training.config import DataConfig, DropoutConfig, InitConfig, TrainConfig

PRESETS = ("released", "paper", "authors")
EMOTION = 256
AUDIO = "wavlm+beats"


def train_config(preset: str = "released") -> TrainConfig:
    """The recipe as a dataclass, for other recipes to start from; `preset` is one of `PRESETS`."""
    config = TrainConfig(
        stage=StageConfig(
            stage="keyframe", system="keyface", audio_encoder=AUDIO, audio_feature_dim=1536, emotion_dim=EMOTION,
            unet=UNetConfig(in_channels=8, adm_in_channels=2 * EMOTION),
        ),
        num_steps=60_000,
        freeze="temporal",
        dropout=DropoutConfig(audio=0.2, identity=0.1, identity_per_frame=False),
        loss=LossConfig(pixel_weight=1.0, pixel_losses=("l2", "lpips"), lower_weight=3.0),
        pixel_frames=1,
        data=DataConfig(batch_size=32, spacing=13, identity="first"),
        init=InitConfig(kind="svd", path="stable-video-diffusion"),
    )  # fmt: skip
    if preset in ("released", "paper"):
        return config
    if preset == "authors":
        return dataclasses.replace(config, loss=dataclasses.replace(config.loss, pixel_losses=("l2",), lower_weight=2.0))
    raise UsageError(f"keyface_keyframe has no preset {preset!r}; it has {', '.join(PRESETS)}")


def get_config(preset: str = "released") -> ConfigDict:
    return ConfigDict(to_dict(train_config(preset)))
