"""Log-mel spectrogram behind the interface of the speech encoders: two tokens per video frame, no weights.

For training from scratch and for trying the system without anybody's checkpoint; the released models do not use it.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech.speech_encoder import Geometry, SpeechEncoder

Array = jax.Array

HOP = 320  # 20 ms
WINDOW = 400  # 25 ms, centred in its hop: token i sees samples [320 i - 40, 320 i + 360)
FFT = 1024  # zero-padded, so that the narrow low bands hold at least one bin
POWER_FLOOR = 1e-10  # of a full-scale sine, -100 dB
# tokens = (ln(power) - CENTRE) / SCALE: silence is about -2.3, a full-scale sine 2.3, speech lies in between.
CENTRE = math.log(1e-5)
SCALE = 5.0

GEOMETRY = Geometry(HOP, WINDOW, (WINDOW - HOP) // 2)


def mel_filters(bands: int) -> np.ndarray:
    """Triangular filters `[FFT // 2 + 1, bands]`, equally spaced in mel (2595 log10(1 + f / 700)) from 0 to 8000 Hz.

    Their peak is WINDOW / FFT, so that the zero padding of the transform does not change levels.

    Raises:
      KeySyncError: so many bands that one falls between two FFT bins and stays empty.
    """
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    frequency = np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)[:, None]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    if not filters.any(axis=0).all():
        raise KeySyncError(f"{bands} mel bands are too many (some would be empty); use 200 or fewer")
    return (filters * (WINDOW / FFT)).astype(np.float32)


class LogMel(nn.Module):
    """Waveform `[B, S]` (16 kHz, full scale 1) -> tokens `[B, S // 320, D]`, D mel bands; the parameter tree is empty."""

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32

    def __call__(self, waveform: Array) -> Array:
        features = self.features(jnp.pad(waveform, ((0, 0), (GEOMETRY.left, GEOMETRY.left))))
        return self.encode(features, jnp.full(len(features), features.shape[1]))

    def features(self, waveform: Array, moments: None = None) -> Array:
        """Waveform with 40 samples before the first token's hop and after the last one's, `[B, 320 N + 80]` -> `[B, N, D]`."""
        x = waveform.astype(jnp.float32)
        tokens = (x.shape[1] - WINDOW) // HOP + 1
        frames = x[:, np.arange(tokens)[:, None] * HOP + np.arange(WINDOW)]  # [B, N, 400]
        window = np.hanning(WINDOW + 1)[:-1]
        spectrum = jnp.fft.rfft(frames * (window * 2 / window.sum()).astype(np.float32), FFT)  # a full-scale sine peaks at 1
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        mel = jnp.einsum("bnf,fd->bnd", power, mel_filters(self.config.hidden_size), precision="highest")
        return (jnp.log(jnp.maximum(mel, POWER_FLOOR)) - CENTRE) / SCALE

    def encode(self, features: Array, count: Array) -> Array:
        """The spectrogram is the result; there is no transformer."""
        return features.astype(self.dtype)


BANDS = 80  # of the column that `keysync prepare` computes of its own accord


def of_width(width: int) -> AudioEncoderConfig:
    """The configuration with that many bands."""
    return AudioEncoderConfig(kind="log_mel", hidden_size=width, num_mels=width)


ENCODER = SpeechEncoder(
    name="log_mel",
    title="log-mel",
    config=AudioEncoderConfig,
    module=LogMel,
    geometry=lambda config: GEOMETRY,
    of_width=of_width,
    column=AudioEncoderConfig(kind="log_mel", hidden_size=BANDS),  # as it has always been recorded in datasets: num_mels is 0
)
