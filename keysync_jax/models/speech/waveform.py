"""Waveforms and tokens against the video's clock, in NumPy: 640 samples of 16 kHz sound and two tokens to a frame of 40 ms."""

from __future__ import annotations

import numpy as np

from keysync_jax.core.clock import SAMPLES_PER_FRAME

TOKENS_PER_FRAME = 2


def num_frames(samples: int) -> int:
    """Video frames at 25 fps that this many samples cover, the last one perhaps in part."""
    return -(-samples // SAMPLES_PER_FRAME)


def pad_to_frames(wav: np.ndarray, multiple: int = 1) -> np.ndarray:
    """Zeros behind, up to a multiple of that many frames."""
    unit = SAMPLES_PER_FRAME * multiple
    return np.pad(wav, (0, -len(wav) % unit))


def standardise(wav: np.ndarray, unbiased: bool, eps: float) -> np.ndarray:
    """Zero mean and unit variance over the whole array: `(x - mean) / sqrt(var + eps)`, statistics in float64."""
    mean = wav.mean(dtype=np.float64)
    blocks = (wav[i : i + 1_000_000] for i in range(0, len(wav), 1_000_000))  # a float64 copy of hours of audio would be gigabytes
    squares = sum(float(np.square(block - mean, dtype=np.float64).sum()) for block in blocks)
    variance = squares / max(len(wav) - int(unbiased), 1)
    out = wav.astype(np.float32) - np.float32(mean)
    out /= np.float32(np.sqrt(variance + eps))
    return out


def fill(tokens: np.ndarray, slots: int) -> np.ndarray:
    """Zero tokens behind, or surplus ones cut: `[N, D]` -> `[slots, D]`."""
    return np.pad(tokens[:slots], ((0, max(0, slots - len(tokens))), (0, 0)))


def stretch(tokens: np.ndarray, slots: int) -> np.ndarray:
    """Nearest-neighbour resampling as torch does it: slot i takes token floor(i * N / slots). `[N, D]` -> `[slots, D]`."""
    return tokens[np.arange(slots) * len(tokens) // slots]


def pair(tokens: np.ndarray) -> np.ndarray:
    """`[2F, D]` -> `[F, 2, D]`."""
    return tokens.reshape(-1, TOKENS_PER_FRAME, tokens.shape[-1])
