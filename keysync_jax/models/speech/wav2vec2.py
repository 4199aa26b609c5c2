"""wav2vec2 (Baevski et al., 2020) through transformers, for the paper's encoder ablation (Table 3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from keysync_jax.core.clock import SAMPLES_PER_FRAME
from keysync_jax.models.speech.speech_encoder import ColumnEncoder
from keysync_jax.models.speech.torch_encoder import hidden_state, in_frames, load, on_device
from keysync_jax.models.speech.waveform import num_frames, standardise

_VARIANCE_EPS = 1e-7


def _open(folder: str) -> Callable[[np.ndarray], np.ndarray]:
    model, device = on_device(load("wav2vec2", "Wav2Vec2Model", folder))

    def encode(samples: np.ndarray) -> np.ndarray:
        import torch

        frames = num_frames(len(samples))
        wav = np.pad(standardise(samples, unbiased=True, eps=_VARIANCE_EPS), (0, frames * SAMPLES_PER_FRAME - len(samples)))
        return in_frames(hidden_state(model, torch.from_numpy(wav[None]).to(device)), frames)

    return encode


ENCODER = ColumnEncoder("wav2vec2", width_field="hidden_size", open=_open)
