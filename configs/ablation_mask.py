"""Ablation (paper Table 4): which region is regenerated. Both stages must be trained with the same mask.

    keysync train --config ablation_mask:mouth --workdir runs/mouth --config.data.datasets=DATA \\
        --config.init.path=SVD --config.init.vae=MODEL
    keysync train --config ablation_mask:mouth_interpolation --workdir runs/mouth_interpolation ...

Presets `box`, `nose_level`, `mouth` and `full`, each also with `_interpolation`:

    box           everything below the eye line, between the sides of the jaw: the paper's mask
    nose_level    the same from the tip of the nose down (the paper does not name the landmark)
    mouth         from the base of the nose to the chin: the mouth alone
    full          the lower part of the picture from the eye line down, in its whole width

The mask is drawn from the landmarks when data are read, so that one dataset serves all of them.
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import MaskConfig, to_dict
from keysync_jax.configs import interpolation, keyframe
from keysync_jax.core.errors import UsageError
from keysync_jax.training.config import TrainConfig

_MASKS = {
    "box": MaskConfig("box", nose_index=28),
    "nose_level": MaskConfig("box", nose_index=30),
    "mouth": MaskConfig("mouth", nose_index=33),
    "full": MaskConfig("full", nose_index=28),
}
PRESETS = (*_MASKS, *(f"{name}_interpolation" for name in _MASKS))


def train_config(preset: str = "box") -> TrainConfig:
    if preset not in PRESETS:
        raise UsageError(f"ablation_mask has no preset {preset!r}; it has {', '.join(PRESETS)}")
    base = interpolation if preset.endswith("_interpolation") else keyframe
    config = base.train_config("paper")
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, mask=_MASKS[preset.removesuffix("_interpolation")]))


def get_config(preset: str = "box") -> ConfigDict:
    return ConfigDict(to_dict(train_config(preset)))
