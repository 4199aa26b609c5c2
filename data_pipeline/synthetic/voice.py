"""What is heard: a source-filter synthesizer driven by the articulation, 16 kHz mono.

Excitation (glottal pulses, noise) is shaped frame by frame in the short-time Fourier domain: 20 ms Hann windows every 5 ms, a
cascade of formant resonators whose frequencies follow opening and width. The voiced spectrum is normalised to constant power
before loudness is applied, so an open vowel is no louder than a close one: loudness tells nothing about the mouth.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.data_pipeline.synthetic.phonemes import CONTROL_RATE, Articulation, audio_generator

_HOP = SAMPLE_RATE // CONTROL_RATE
_WINDOW = 4 * _HOP
_FFT = 8 * _HOP  # twice the window: formants ring into the padding instead of wrapping around


@dataclasses.dataclass(frozen=True)
class Voice:
    """One speaker. F0 in Hz, `tract` scales all formants, `tilt_db` is the source's slope per octave, levels in dB full scale."""

    f0: float
    tract: float
    tilt_db: float
    breath: float
    level_db: float
    room_db: float
    room_slope: float


def sample_voice(audio_seed: int, room_db: float | None = None) -> Voice:
    """The speaker of an audio seed; formants and F0 are correlated as in people. `room_db` overrides the room's noise level."""
    rng = audio_generator(audio_seed, 1)
    f0 = float(np.exp(rng.uniform(np.log(88), np.log(240))))
    tract = 0.92 + 0.20 * (np.log(f0) - np.log(88)) / np.log(240 / 88) + rng.uniform(-0.05, 0.05)
    level = rng.uniform(-26, -18)
    room = rng.uniform(-72, -46) if room_db is None else room_db
    return Voice(
        f0,
        float(tract),
        float(rng.uniform(-11, -7)),
        float(rng.uniform(0.01, 0.06)),
        float(level),
        float(room),
        float(rng.uniform(0.2, 1.4)),
    )


def formants(opening: np.ndarray, width: np.ndarray, tract: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F1, F2, F3 in Hz of an articulation: F1 by opening, F2 by width (rounded back vowels low, spread front vowels high)."""
    f1 = 260 + 600 * opening
    f2 = 720 + 1500 * width + 330 * opening * (1 - 1.5 * width)
    f3 = np.maximum(2350 + 450 * width, f2 + 350)
    return f1 * tract, f2 * tract, f3 * tract


def _resonance(frequency: np.ndarray, centre: np.ndarray, bandwidth: float) -> np.ndarray:
    """Squared magnitude of a two-pole resonator with unit gain at 0 Hz; frequency [F], centre [N] -> [N, F]."""
    c2 = (centre * centre)[:, None]
    f2 = (frequency * frequency)[None]
    return c2 * c2 / ((c2 - f2) ** 2 + (bandwidth * bandwidth) * f2 + 1.0)


def _voiced_envelope(art: Articulation, voice: Voice, frequency: np.ndarray) -> np.ndarray:
    """Power spectrum [N, F] of the voiced part, unit mean power per row."""
    f1, f2, f3 = formants(art.opening, art.width, voice.tract)
    power = _resonance(frequency, f1, 80) * _resonance(frequency, f2, 110) * _resonance(frequency, f3, 160)
    fixed = _resonance(frequency, np.array([3500 * voice.tract, 4500 * voice.tract], np.float32), 220).prod(0)
    tilt = (1 + (frequency / 250) ** 2) ** (voice.tilt_db / 6.02)
    power *= (fixed * tilt * (frequency > 50))[None]
    power /= power.mean(1, keepdims=True) + 1e-12
    # Nasal murmur: strong low resonance, weak everything else; /n/ keeps a second resonance that tells it from /m/.
    murmur = _resonance(frequency, np.array([270.0 * voice.tract], np.float32), 90)[0] * tilt * (frequency > 50)
    murmur = murmur + 0.01 * murmur.max() * np.exp(-(((frequency - 1050 * voice.tract) / 160) ** 2))
    murmur /= murmur.mean()
    nasal = art.nasal[:, None]
    # Voicing behind shut lips is muffled to the same low hum.
    shut = np.clip(1 - art.opening / 0.06, 0, 1)[:, None]
    muffle = np.maximum(nasal, shut)
    return power * (1 - muffle) + murmur[None] * muffle


def _noise_envelope(art: Articulation, frequency: np.ndarray) -> np.ndarray:
    """Power spectrum [N, F] of the frication noise: a band with soft skirts, unit mean power per row."""
    low, high = art.band[:, :1], art.band[:, 1:]
    power = 1 / ((1 + np.exp((low - frequency) / 220)) * (1 + np.exp((frequency - high) / 350)))
    return power / (power.mean(1, keepdims=True) + 1e-12)


def _pulses(f0: np.ndarray, samples: int) -> np.ndarray:
    """Glottal impulses [samples] of F0 [N] at the control rate, placed between samples by linear splitting, unit mean power."""
    time = np.arange(samples, dtype=np.float64)
    rate = np.interp(time, (np.arange(len(f0)) + 0.5) * _HOP, f0.astype(np.float64)) / SAMPLE_RATE
    phase = np.cumsum(rate)
    at = np.flatnonzero(np.diff(np.floor(phase)) > 0)
    part = (np.floor(phase[at + 1]) - phase[at]) / rate[at + 1]
    train = np.zeros(samples + 1)
    height = np.sqrt(1 / rate[at + 1])
    np.add.at(train, at, height * (1 - part))
    np.add.at(train, at + 1, height * part)
    return train[:samples]


def _shape(excitation: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Filter [S] by per-frame magnitude [N, F] with overlap-add; N·hop = S."""
    padded = np.pad(excitation.astype(np.float32), (_WINDOW // 2 - _HOP // 2, _WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][: len(gain)]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(_WINDOW) + 0.5) / _WINDOW)).astype(np.float32) / 2
    pad = (_FFT - _WINDOW) // 2
    block = np.zeros((len(gain), _FFT), np.float32)
    block[:, pad : pad + _WINDOW] = frames * window
    shaped = np.fft.irfft(np.fft.rfft(block, axis=1) * gain, n=_FFT, axis=1).astype(np.float32)
    pieces = shaped.reshape(len(gain), _FFT // _HOP, _HOP)
    out = np.zeros((len(gain) + _FFT // _HOP, _HOP), np.float32)
    for k in range(_FFT // _HOP):
        out[k : k + len(gain)] += pieces[:, k]
    start = pad + _WINDOW // 2 - _HOP // 2
    return out.reshape(-1)[start : start + len(excitation)]


def room_noise(audio_seed: int, samples: int, voice: Voice) -> np.ndarray:
    """Stationary coloured noise [samples] at the voice's room level; all zeros when the level is -inf."""
    if np.isneginf(voice.room_db):
        return np.zeros(samples, np.float32)
    white = audio_generator(audio_seed, 3).standard_normal(samples)
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    colour = (np.maximum(frequency, 60) / 1000) ** (-voice.room_slope / 2)
    noise = np.fft.irfft(np.fft.rfft(white) * colour, n=samples)
    return (noise / noise.std() * 10 ** (voice.room_db / 20)).astype(np.float32)


def synthesize(art: Articulation, voice: Voice, audio_seed: int, samples: int) -> np.ndarray:
    """Speech of an articulation plus room noise: float32 [samples] in (-1, 1) at 16 kHz."""
    if samples == 0:
        return np.zeros(0, np.float32)
    frequency = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE).astype(np.float32)
    rng = audio_generator(audio_seed, 2)
    source = _pulses(voice.f0 * art.pitch, samples) + voice.breath * rng.standard_normal(samples)
    hiss = rng.standard_normal(samples)
    voiced = _shape(source, np.sqrt(_voiced_envelope(art, voice, frequency)) * art.voice[:, None])
    fricative = _shape(hiss, np.sqrt(_noise_envelope(art, frequency)) * art.noise[:, None])
    speech = (voiced + fricative) * 10 ** (voice.level_db / 20)
    out = speech + room_noise(audio_seed, samples, voice)
    return (0.98 * np.tanh(out / 0.98)).astype(np.float32)
