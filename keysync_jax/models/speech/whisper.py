"""Whisper's encoder (Radford et al., 2022) through transformers, for the paper's encoder ablation (Table 3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.models.speech.speech_encoder import ColumnEncoder
from keysync_jax.models.speech.torch_encoder import hidden_state, in_frames, load, on_device
from keysync_jax.models.speech.waveform import TOKENS_PER_FRAME, num_frames

_SECONDS = 30  # what the encoder reads at once


def _open(folder: str) -> Callable[[np.ndarray], np.ndarray]:
    model = load("whisper", "WhisperModel", folder).get_encoder()
    import transformers  # after `load`, which says how to get it

    extractor = transformers.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    model, device = on_device(model)

    def encode(samples: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(samples), _SECONDS * SAMPLE_RATE):
            piece = samples[start : start + _SECONDS * SAMPLE_RATE]
            mel = extractor(piece, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features.to(device)
            parts.append(hidden_state(model, mel)[: TOKENS_PER_FRAME * num_frames(len(piece))])
        return in_frames(np.concatenate(parts), num_frames(len(samples)))

    return encode


ENCODER = ColumnEncoder("whisper", width_field="d_model", open=_open)
