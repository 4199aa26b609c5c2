"""Ablation (paper Table 2): two stages, keyframes from an image network without temporal layers, each made on its own.

    keysync train --config ablation_image_keyframes --workdir runs/images --config.data.datasets=DATA \\
        --config.init.path=SVD --config.init.vae=MODEL

Windows have one frame. All audio tokens of a sample enter through the noise level's embedding and as context (`to_time_emb_image`).
The identity is a random frame of the clip: frame 0 of a window of one frame is the target itself. The interpolation stage is the
ordinary one.
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import to_dict
from keysync_jax.configs import keyframe
from keysync_jax.training.config import TrainConfig


def train_config() -> TrainConfig:
    config = keyframe.train_config("paper")
    unet = dataclasses.replace(config.stage.unet, num_frames=1, temporal_layers=False, audio_cond_method="to_time_emb_image")
    return dataclasses.replace(
        config,
        stage=dataclasses.replace(config.stage, unet=unet, num_frames=1),
        freeze="none",  # what the rule would freeze is not there
        data=dataclasses.replace(config.data, identity="random"),
    )


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(train_config()))
