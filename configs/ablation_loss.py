"""Ablation (paper Table 9 and its text): what is minimised besides the latent error.

    keysync train --config ablation_loss:latent --workdir runs/latent --config.data.datasets=DATA \\
        --config.init.path=SVD
    keysync train --config ablation_loss:l2_lpips --workdir runs/l2_lpips ... --config.init.vae=MODEL --config.lpips=VGG

Presets:

    latent      the latent error alone
    l2          and the squared error of one decoded frame, inside the mask: the paper's
    l2_whole    the same over the whole frame, as the released code computes it
    l1          the absolute error of the frame instead
    lpips       the perceptual distance of the frame instead (docs/training.md says where the weights come from)
    l2_lpips    both; the paper reports that the perceptual term harms the mouth
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import to_dict
from keysync_jax.configs import keyframe
from keysync_jax.core.errors import UsageError
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.training.config import TrainConfig

_LOSSES = {
    "latent": LossConfig(pixel_weight=0.0),
    "l2": LossConfig(pixel_weight=1.0, mask_pixels=True),
    "l2_whole": LossConfig(pixel_weight=1.0),
    "l1": LossConfig(pixel_weight=1.0, pixel_losses=("l1",), mask_pixels=True),
    "lpips": LossConfig(pixel_weight=1.0, pixel_losses=("lpips",), mask_pixels=True),
    "l2_lpips": LossConfig(pixel_weight=1.0, pixel_losses=("l2", "lpips"), mask_pixels=True),
}
PRESETS = tuple(_LOSSES)


def train_config(preset: str = "l2") -> TrainConfig:
    if preset not in PRESETS:
        raise UsageError(f"ablation_loss has no preset {preset!r}; it has {', '.join(PRESETS)}")
    return dataclasses.replace(keyframe.train_config("paper"), loss=_LOSSES[preset])


def get_config(preset: str = "l2") -> ConfigDict:
    return ConfigDict(to_dict(train_config(preset)))
