"""Ablation (paper Table 2): one stage. The keyframe network makes consecutive frames, and no interpolation follows.

    keysync train --config ablation_one_stage --workdir runs/one_stage --config.data.datasets=DATA \\
        --config.init.path=SVD --config.init.vae=MODEL

Everything is the keyframe recipe of the paper but for the frames of a window, which follow each other.
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import to_dict
from keysync_jax.configs import keyframe
from keysync_jax.training.config import TrainConfig


def train_config() -> TrainConfig:
    config = keyframe.train_config("paper")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, spacing=1, min_spacing=1))


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(train_config()))
