"""What is said: a random phoneme sequence and the articulation that voice and mouth share.

Opening and width are relative (0..1) here; the identity turns them into lengths. Formants follow the articulation of the moment
(F1 rises with the opening, F2 with the width), so sound and mouth agree through every transition and not only at targets.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from keysync_jax.core.clock import FRAME_RATE

CONTROL_RATE = 200  # articulation samples per second
REST_WIDTH = 0.45
_TAG = 0xA0D10


class Sound(NamedTuple):
    """Targets of one phoneme. Amplitudes are relative to a vowel; the noise band is in Hz."""

    opening: float
    width: float
    seconds: tuple[float, float]
    voice: float = 0.0
    noise: float = 0.0
    band: tuple[float, float] = (300.0, 3000.0)
    nasal: float = 0.0
    closure: bool = False


VOWELS = {
    "aa": Sound(1.00, 0.50, (0.13, 0.28), 1.0),
    "ae": Sound(0.82, 0.78, (0.13, 0.26), 1.0),
    "ah": Sound(0.66, 0.52, (0.11, 0.22), 1.0),
    "ao": Sound(0.76, 0.24, (0.13, 0.26), 1.0),
    "eh": Sound(0.56, 0.74, (0.11, 0.24), 1.0),
    "er": Sound(0.44, 0.34, (0.11, 0.24), 1.0),
    "ih": Sound(0.38, 0.82, (0.10, 0.19), 1.0),
    "iy": Sound(0.28, 1.00, (0.11, 0.24), 1.0),
    "ow": Sound(0.50, 0.12, (0.13, 0.26), 1.0),
    "uw": Sound(0.24, 0.00, (0.11, 0.24), 1.0),
}
CONSONANTS = {
    "m": Sound(0.0, REST_WIDTH, (0.09, 0.15), 0.45, nasal=1.0, closure=True),
    "b": Sound(0.0, REST_WIDTH, (0.08, 0.13), 0.12, closure=True),
    "p": Sound(0.0, REST_WIDTH, (0.09, 0.14), 0.0, closure=True),
    "n": Sound(0.24, 0.60, (0.06, 0.12), 0.55, nasal=0.6),
    "l": Sound(0.34, 0.55, (0.06, 0.11), 0.7),
    "f": Sound(0.07, 0.55, (0.07, 0.13), 0.0, 0.28, (1200.0, 7600.0)),
    "s": Sound(0.13, 0.72, (0.07, 0.14), 0.0, 0.55, (4200.0, 7600.0)),
    "sh": Sound(0.18, 0.14, (0.07, 0.14), 0.0, 0.6, (1900.0, 5200.0)),
    "z": Sound(0.14, 0.70, (0.06, 0.12), 0.4, 0.35, (4200.0, 7600.0)),
    "h": Sound(0.46, 0.50, (0.05, 0.09), 0.0, 0.35, (500.0, 4200.0)),
}
LAUGH = {
    "laugh_in": Sound(0.34, 0.86, (0.06, 0.09), 0.0, 0.4, (500.0, 4200.0)),
    "laugh": Sound(0.62, 0.88, (0.09, 0.13), 1.0, 0.12, (500.0, 4200.0)),
}
SILENCE = Sound(0.0, REST_WIDTH, (0.15, 0.6), closure=True)
_CLOSURES = ("m", "b", "p")
_INVENTORY = {**VOWELS, **CONSONANTS, **LAUGH, "sil": SILENCE}


@dataclasses.dataclass(frozen=True)
class Phoneme:
    """One spoken segment: times in seconds, `closure` for m, b, p; `gain_db` is its loudness, drawn without regard to the sound."""

    name: str
    start: float
    end: float
    opening: float
    width: float
    gain_db: float
    closure: bool

    def to_dict(self) -> dict[str, object]:
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in dataclasses.asdict(self).items()}


class Articulation(NamedTuple):
    """Trajectories at `CONTROL_RATE`, all float32 [N]; the noise band is [N, 2] in Hz; `pitch` is a factor on the speaker's F0."""

    opening: np.ndarray
    width: np.ndarray
    voice: np.ndarray
    noise: np.ndarray
    band: np.ndarray
    nasal: np.ndarray
    pitch: np.ndarray


def audio_generator(audio_seed: int, part: int) -> np.random.Generator:
    """Independent stream `part` of an audio seed (0 text, 1 speaker, 2 excitation, 3 room), so that no part shifts another."""
    return np.random.default_rng(np.random.SeedSequence([_TAG, part, audio_seed]))


def sample_phonemes(
    audio_seed: int, seconds: float, *, pause_share: float = 0.14, long_silence: float = 0.3, laughter: float = 0.0
) -> list[Phoneme]:
    """Random phrases separated by pauses, filling `seconds`.

    Args:
        pause_share: expected share of time in pauses between phrases.
        long_silence: probability that the clip holds one silent stretch of 1.2 to 2.4 s (only if it is longer than 4 s).
        laughter: probability that a phrase is laughter.
    """
    rng = audio_generator(audio_seed, 0)
    rate = rng.uniform(0.85, 1.15)  # speaking rate of this voice
    phonemes: list[Phoneme] = []
    now = 0.0
    stretch_at = rng.uniform(0.2, 0.6) * seconds if rng.random() < long_silence and seconds > 4 else np.inf

    def add(name: str, length: float, gain_db: float, opening: float | None = None, width: float | None = None) -> None:
        nonlocal now
        if now >= seconds:
            return
        sound = _INVENTORY[name]
        phonemes.append(
            Phoneme(
                name,
                now,
                min(now + length, seconds),
                sound.opening if opening is None else opening,
                sound.width if width is None else width,
                gain_db,
                name in _CLOSURES,
            )
        )
        now += length

    def say(name: str, phrase_gain: float) -> None:
        sound = _INVENTORY[name]
        opening, width = sound.opening, sound.width
        if not sound.closure:
            opening = float(np.clip(opening * rng.uniform(0.85, 1.1) + rng.normal(0, 0.03), 0.03, 1.0))
            width = float(np.clip(width + rng.normal(0, 0.06), 0, 1))
        add(name, rng.uniform(*sound.seconds) * rate, float(np.clip(phrase_gain + rng.normal(0, 3.5), -13, 8)), opening, width)

    vowels, consonants = list(VOWELS), list(CONSONANTS)
    odds = np.array([1.6 if c in _CLOSURES else 1.0 for c in consonants])
    odds /= odds.sum()
    add("sil", rng.uniform(0.05, 0.4), 0.0)
    while now < seconds:
        started = now
        phrase_gain = rng.normal(0, 3.0)
        if rng.random() < laughter:
            for _ in range(int(rng.integers(4, 9))):
                say("laugh_in", phrase_gain)
                say("laugh", phrase_gain)
        else:
            for _ in range(int(rng.integers(3, 9))):  # syllables
                if rng.random() < 0.85:
                    say(str(rng.choice(consonants, p=odds)), phrase_gain)
                say(str(rng.choice(vowels)), phrase_gain)
                if rng.random() < 0.15:
                    say(str(rng.choice(consonants, p=odds)), phrase_gain)
                if now >= seconds:
                    break
        pause = rng.uniform(0.5, 1.5) * (now - started) * pause_share / (1 - pause_share)
        if now > stretch_at:
            pause, stretch_at = rng.uniform(1.2, 2.4), np.inf
        if now < seconds:
            add("sil", float(np.clip(pause, 0.12, 2.4)), 0.0)
    return phonemes


def _smooth(x: np.ndarray, seconds: float) -> np.ndarray:
    """Hann-weighted moving average over `seconds` along axis 0, edges repeated."""
    half = max(1, int(round(seconds * CONTROL_RATE / 2)))
    window = np.hanning(2 * half + 3)[1:-1]
    padded = np.pad(x, (half, half), mode="edge")
    return np.convolve(padded, window / window.sum(), mode="valid")


def articulate(phonemes: list[Phoneme], seconds: float, pitch_seed: int) -> Articulation:
    """Phonemes to smooth trajectories: coarticulated targets, lips truly shut through every closure and silence.

    A smoothed target alone never reaches zero in a 100 ms closure, so a gate shuts the mouth for the whole segment and opens
    over the 50 ms around it.
    """
    count = int(round(seconds * CONTROL_RATE))
    time = (np.arange(count) + 0.5) / CONTROL_RATE
    columns = {name: np.zeros(count) for name in ("opening", "voice", "noise", "low", "high", "nasal", "pitch")}
    columns["width"] = np.full(count, REST_WIDTH)
    columns["pitch"] += 1
    columns["low"] += 1500.0
    columns["high"] += 6000.0
    gate = np.ones(count)
    for item in phonemes:
        sound = _INVENTORY[item.name]
        first, last = int(np.ceil(item.start * CONTROL_RATE - 0.5)), int(np.ceil(item.end * CONTROL_RATE - 0.5))
        part = slice(max(first, 0), min(last, count))
        level = 10 ** (item.gain_db / 20)
        columns["opening"][part] = item.opening
        columns["width"][part] = item.width
        columns["voice"][part] = sound.voice * level
        columns["noise"][part] = sound.noise * level
        columns["nasal"][part] = sound.nasal
        columns["low"][part], columns["high"][part] = sound.band
        if item.name.startswith("laugh"):
            columns["pitch"][part] = 1.45
        if sound.closure:
            # Reach 5 ms beyond the edges: neighbours at video frame centres must not read a half-open lip as a closure.
            distance = np.maximum(np.maximum(item.start - time, time - item.end), 0)
            ramp = np.clip((distance - 0.005) / (0.05 if item.closure else 0.07), 0, 1)
            gate = np.minimum(gate, ramp * ramp * (3 - 2 * ramp))
        if item.name in ("p", "b"):  # the burst that ends the closure
            burst = slice(max(last, 0), min(last + (5 if item.name == "p" else 2), count))
            columns["noise"][burst] += 0.3 * level if item.name == "p" else 0.12 * level
    rng = audio_generator(pitch_seed, 4)
    # Intonation: a slow wander and a little jitter, unrelated to what is said.
    wander = _smooth(rng.normal(0, 1, count), 0.8)
    pitch = columns["pitch"] * np.exp(0.16 * wander / max(wander.std(), 1e-6) * 0.7 + 0.006 * _smooth(rng.normal(0, 1, count), 0.02))
    opening = _smooth(columns["opening"], 0.10) * gate
    voice, noise = _smooth(columns["voice"], 0.025), _smooth(columns["noise"], 0.02)
    band = np.stack([_smooth(columns["low"], 0.02), _smooth(columns["high"], 0.02)], axis=1)
    arrays = (opening, _smooth(columns["width"], 0.10), voice, noise, band, _smooth(columns["nasal"], 0.02), pitch)
    return Articulation(*(a.astype(np.float32) for a in arrays))


def at_frames(trajectory: np.ndarray, frames: int, fps: int = FRAME_RATE) -> np.ndarray:
    """Value at the centre of every video frame, [N] -> [frames]: the middle of the 40 ms of sound that belongs to the frame."""
    time = (np.arange(frames) + 0.5) / fps
    return np.interp(time, (np.arange(len(trajectory)) + 0.5) / CONTROL_RATE, trajectory).astype(np.float32)
