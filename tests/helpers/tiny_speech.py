"""Tiny speech encoders with random weights, the same in every file, so that a run compiles them once."""

import functools

import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.models.speech.random_params import init_params

SIZES = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 12),
    "conv_kernel": (10, 9, 9),  # a token reads 400 samples, as in the released encoders
    "conv_stride": (5, 8, 8),
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
# The modes differ so that both are run; each further combination would cost compilations.
MODES = {"hubert": "group", "wavlm": "layer", "log_mel": "group"}


@functools.cache
def encoder(kind: str) -> tuple[AudioEncoderConfig, dict]:
    """Configuration and parameters."""
    if kind == "log_mel":
        return AudioEncoderConfig(kind=kind, hidden_size=80, num_mels=80), {}
    config = AudioEncoderConfig(kind=kind, extractor_mode=MODES[kind], normalize_waveform=kind == "hubert", **SIZES)
    return config, init_params(config, np.random.default_rng(3))
