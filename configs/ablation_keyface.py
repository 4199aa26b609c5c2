"""Ablations of KeyFace, each the released recipe with one thing changed.

    keysync train --config ablation_keyface:labels --workdir runs/labels --config.data.datasets=DATA --config.init.path=SVD ...

Presets:

    labels                      each frame's emotion is the nearest of eight classes instead of valence and arousal
    speech                      keyframes hear WavLM alone, without BEATs, which hears laughter and sighs
    speech_interpolation        the same of interpolation, which hears wav2vec2 alone
    even                        keyframes whose lower half counts as much as the upper one
    even_interpolation          the same of interpolation
    one_network                 interpolation without autoguidance; a trained model needs no second run: keysync animate --autoguidance 1
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import GuidanceConfig, to_dict
from keysync_jax.configs import keyface_interpolation, keyface_keyframe
from keysync_jax.core.errors import UsageError
from keysync_jax.training.config import CheckpointConfig, TrainConfig

PRESETS = ("labels", "speech", "speech_interpolation", "even", "even_interpolation", "one_network")


def train_config(preset: str = "labels") -> TrainConfig:
    if preset not in PRESETS:
        raise UsageError(f"ablation_keyface has no preset {preset!r}; it has {', '.join(PRESETS)}")
    second = preset.endswith("_interpolation") or preset == "one_network"
    config = (keyface_interpolation if second else keyface_keyframe).train_config()
    match preset.removesuffix("_interpolation"):
        case "labels":
            return dataclasses.replace(config, data=dataclasses.replace(config.data, emotion="labels"))
        case "speech":
            encoder = config.stage.audio_encoders[0]
            return dataclasses.replace(config, stage=dataclasses.replace(config.stage, audio_encoder=encoder, audio_feature_dim=768))
        case "even":
            return dataclasses.replace(config, loss=dataclasses.replace(config.loss, lower_weight=1.0))
    stage = dataclasses.replace(config.stage, guidance=GuidanceConfig(kind="none"))
    return dataclasses.replace(config, stage=stage, checkpoint=CheckpointConfig())


def get_config(preset: str = "labels") -> ConfigDict:
    return ConfigDict(to_dict(train_config(preset)))
