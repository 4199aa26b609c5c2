"""Ablation (paper Table 3): whose speech tokens drive the mouth.

    keysync prepare videos/ -o DATA --model MODEL --columns jpeg,sound,wav2vec2,whisper \\
        --column-weights wav2vec2=W2V2 --column-weights whisper=WHISPER
    keysync train --config ablation_audio:wav2vec2 --workdir runs/wav2vec2 --config.data.datasets=DATA \\
        --config.init.path=SVD --config.init.vae=MODEL
    keysync train --config ablation_audio:wav2vec2_interpolation --workdir runs/wav2vec2_interpolation ...

Presets `hubert`, `wavlm`, `wav2vec2` and `whisper`, each also with `_interpolation`. Tokens have 768 numbers (the base models, and
Whisper small); for others set `--config.stage.audio_feature_dim=N`. Dubbing runs all but Whisper itself; a model of that
one is judged on prepared data.
"""

import dataclasses

from ml_collections import ConfigDict

from keysync_jax.config import to_dict
from keysync_jax.configs import interpolation, keyframe
from keysync_jax.core.errors import UsageError
from keysync_jax.training.config import TrainConfig

_ENCODERS = ("hubert", "wavlm", "wav2vec2", "whisper")
PRESETS = (*_ENCODERS, *(f"{name}_interpolation" for name in _ENCODERS))


def train_config(preset: str = "hubert") -> TrainConfig:
    if preset not in PRESETS:
        raise UsageError(f"ablation_audio has no preset {preset!r}; it has {', '.join(PRESETS)}")
    base = interpolation if preset.endswith("_interpolation") else keyframe
    config = base.train_config("paper")
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, audio_encoder=preset.removesuffix("_interpolation")))


def get_config(preset: str = "hubert") -> ConfigDict:
    return ConfigDict(to_dict(train_config(preset)))
