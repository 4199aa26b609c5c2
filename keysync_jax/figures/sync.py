"""LSE-C, LSE-D and the offset from SyncNet's features, and the cepstra that SyncNet hears (python_speech_features' defaults)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.signal

from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.core.errors import KeySyncError

_WINDOW, _STEP, _FFT, _FILTERS, _CEPSTRA, _LIFTER = 400, 160, 512, 26, 13, 22
_PREEMPHASIS = 0.97


def mfcc(samples: np.ndarray) -> np.ndarray:
    """13 mel cepstra of every 10 ms `[F, 13]`, float64: 25 ms windows without a window function, c0 the log energy.

    Args:
      samples: `[S]` at 16 kHz on the scale of 16-bit integers.

    Raises:
      KeySyncError: there is no sample.
    """
    if not len(samples):
        raise KeySyncError("no sound: cepstra of an empty signal are not defined")
    signal = np.asarray(samples, np.float64)
    signal = np.concatenate([signal[:1], signal[1:] - _PREEMPHASIS * signal[:-1]])
    frames = 1 if len(signal) <= _WINDOW else 1 + -(-(len(signal) - _WINDOW) // _STEP)
    padded = np.pad(signal, (0, max(0, (frames - 1) * _STEP + _WINDOW - len(signal))))
    windows = padded[np.arange(frames)[:, None] * _STEP + np.arange(_WINDOW)]
    power = np.abs(np.fft.rfft(windows, _FFT)) ** 2 / _FFT
    tiny = np.finfo(np.float64).eps
    energy = power.sum(1)
    energy = np.where(energy == 0, tiny, energy)
    mel = power @ _filterbank().T
    mel = np.log(np.where(mel == 0, tiny, mel))
    cepstra = np.asarray(scipy.fft.dct(mel, type=2, axis=1, norm="ortho"))[:, :_CEPSTRA]
    cepstra *= 1 + _LIFTER / 2 * np.sin(np.pi * np.arange(_CEPSTRA) / _LIFTER)
    cepstra[:, 0] = np.log(energy)
    return cepstra


def _filterbank() -> np.ndarray:
    """26 triangles `[26, 257]`, evenly spaced in mel from 0 Hz to 8 kHz, corners on whole bins."""
    mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), _FILTERS + 2)
    bins = np.floor((_FFT + 1) * 700 * (10 ** (mel / 2595) - 1) / SAMPLE_RATE).astype(int)
    bank = np.zeros((_FILTERS, _FFT // 2 + 1))
    for row, (low, middle, high) in enumerate(zip(bins, bins[1:], bins[2:], strict=False)):
        bank[row, low:middle] = (np.arange(low, middle) - low) / max(middle - low, 1)
        bank[row, middle:high] = (high - np.arange(middle, high)) / max(high - middle, 1)
    return bank


class Synchrony(NamedTuple):
    """What SyncNet says of a clip of N windows.

    `distances` is `[2 * vshift + 1, N]` by shift and window, `mean` `[2 * vshift + 1]`; `lse_d` the least mean, `lse_c` the median of the
    means less the least; `offset` in frames; `framewise` `[N]` the confidence of each window at the best shift, median of 9.
    """

    distances: np.ndarray
    mean: np.ndarray
    lse_d: float
    lse_c: float
    offset: int
    framewise: np.ndarray


def synchrony(lip: np.ndarray, audio: np.ndarray, vshift: int = 15) -> Synchrony:
    """Distances of lip features `[N, d]` to audio features `[N, d]` at every shift up to `vshift` frames (joonson/syncnet_python).

    Outside the clip the audio's features are zeros, as in the reference; 1e-6 is added to every difference.

    Raises:
      KeySyncError: no window, or the two differ in shape.
    """
    lip, audio = np.asarray(lip, np.float64), np.asarray(audio, np.float64)
    if lip.shape != audio.shape or lip.ndim != 2 or not len(lip):
        raise KeySyncError(f"lip features {lip.shape} and audio features {audio.shape}: [N, d] of one shape are needed")
    padded = np.pad(audio, ((vshift, vshift), (0, 0)))
    shifts = range(2 * vshift + 1)
    distances = np.stack([np.linalg.norm(lip - padded[s : s + len(lip)] + 1e-6, axis=1) for s in shifts])
    mean = distances.mean(1)
    best = int(mean.argmin())
    middle = float(np.median(mean))
    framewise = scipy.signal.medfilt(np.pad(middle - distances[best], 4), 9)[4:-4]
    return Synchrony(distances, mean, float(mean[best]), middle - float(mean[best]), vshift - best, framewise)
