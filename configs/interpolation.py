"""Interpolation stage at full size: 14 consecutive frames whose ends are keyframes, 512-px crops (paper Table 7).

The released checkpoint reads WavLM tokens although the paper says HuBERT; `--config.stage.audio_encoder=hubert` is the paper's.

    keysync inspect --config interpolation
"""

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, to_dict


def get_config() -> ConfigDict:
    stage = StageConfig(stage="interpolation", audio_encoder="wavlm", unet=UNetConfig(in_channels=9))
    return ConfigDict({"stage": to_dict(stage)})
