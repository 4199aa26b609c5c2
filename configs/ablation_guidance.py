"""Ablation (paper Table 8): how conditions are strengthened when sampling.

    keysync train --config ablation_guidance:plain --workdir runs/plain --config.data.datasets=DATA \\
        --config.init.path=SVD --config.init.vae=MODEL

Presets `separate` (audio 5, identity 2: the paper's) and `plain` (both together at 2: classifier-free guidance, which is what the two
scales are when they are equal). Training is the same; the scales are stored with the model and used for its sample pictures. A trained
model needs no second training for this ablation: `keysync dub --audio-scale 2 --identity-scale 2`.
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import to_dict
from keysync_jax.configs import keyframe
from keysync_jax.core.errors import UsageError
from keysync_jax.training.config import TrainConfig

_SCALES = {"separate": (5.0, 2.0), "plain": (2.0, 2.0)}
PRESETS = tuple(_SCALES)


def train_config(preset: str = "separate") -> TrainConfig:
    if preset not in PRESETS:
        raise UsageError(f"ablation_guidance has no preset {preset!r}; it has {', '.join(PRESETS)}")
    config = keyframe.train_config("paper")
    audio, identity = _SCALES[preset]
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, audio_scale=audio, identity_scale=identity))


def get_config(preset: str = "separate") -> ConfigDict:
    return ConfigDict(to_dict(train_config(preset)))
