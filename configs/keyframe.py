"""Keyframe stage at full size: 14 frames, 13 apart, 512-px crops (paper Table 7).

keysync inspect --config keyframe
keysync inspect --config keyframe --config.stage.unet.model_channels=64
"""

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, to_dict


def get_config() -> ConfigDict:
    stage = StageConfig(stage="keyframe", audio_encoder="hubert", unet=UNetConfig(in_channels=8))
    return ConfigDict({"stage": to_dict(stage)})
