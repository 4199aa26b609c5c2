"""Kaldi's log-mel filterbank in JAX, as `torchaudio.compliance.kaldi.fbank` computes it with a Povey window and neither dither nor energy.

Frames of 25 ms every 10 ms, whole frames only: frame i sees samples `[160 i, 160 i + 400)` and nothing else, so a clip may be cut anywhere.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.core.clock import SAMPLE_RATE

SHIFT, WINDOW, FFT = 160, 400, 512
_LOWEST, _HIGHEST = 20.0, SAMPLE_RATE / 2
_PREEMPHASIS = 0.97
_FLOOR = float(np.finfo(np.float32).eps)


def log_mel(waveform: jax.Array, bands: int) -> jax.Array:
    """`[B, S]`, 16-bit scale (full scale 32768), to `[B, 1 + (S - 400) // 160, bands]` float32.

    Each frame loses its mean, then the 0.97 of the sample before (the first one its own), then gets the window.
    """
    x = waveform.astype(jnp.float32)
    count = (x.shape[1] - WINDOW) // SHIFT + 1
    frames = x[:, np.arange(count)[:, None] * SHIFT + np.arange(WINDOW)]  # [B, N, 400]
    frames = frames - jnp.mean(frames, axis=-1, keepdims=True)
    before = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    spectrum = jnp.fft.rfft((frames - _PREEMPHASIS * before) * _povey(), FFT)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    mel = jnp.einsum("bnf,fd->bnd", power[..., : FFT // 2], mel_filters(bands), precision="highest")
    return jnp.log(jnp.maximum(mel, _FLOOR))


def _povey() -> np.ndarray:
    return np.power(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / (WINDOW - 1)), 0.85).astype(np.float32)


@functools.cache
def mel_filters(bands: int) -> np.ndarray:
    """Triangles in mel, 1127 ln(1 + f / 700), from 20 to 8000 Hz: `[256, bands]`; the topmost bin of the transform has none."""

    def mel(hertz):
        return 1127 * np.log1p(hertz / 700)

    edges = np.linspace(mel(_LOWEST), mel(_HIGHEST), bands + 2)
    bins = mel(np.arange(FFT // 2) * SAMPLE_RATE / FFT)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
