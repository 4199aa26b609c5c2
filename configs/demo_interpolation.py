"""The demo's interpolation stage, from the weights of its keyframe stage: 14 consecutive frames between two given ones.

keysync train --config demo_interpolation --workdir runs/interpolation --config.data.datasets=data --config.init.vae=vae_model
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import to_dict
from keysync_jax.configs.demo_keyframe import STAGE, TRAIN, UNET


def get_config() -> ConfigDict:
    stage = dataclasses.replace(STAGE, stage="interpolation", unet=dataclasses.replace(UNET, in_channels=9))
    return ConfigDict(to_dict(dataclasses.replace(TRAIN, stage=stage)))
