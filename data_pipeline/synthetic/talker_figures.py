"""Figures about the generator itself: what leaks, how well the measurer measures, what the sound holds. See docs/synthetic.md.

`keysync data figures [-n CLIPS] [--detection]` prints them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.core.clock import FRAME_RATE, SAMPLE_RATE
from keysync_jax.data_pipeline.synthetic.clip import TalkerClip, make_clip
from keysync_jax.data_pipeline.synthetic.detection import format_report, report_detection
from keysync_jax.data_pipeline.synthetic.measure import measure_mouth
from keysync_jax.data_pipeline.synthetic.motion import sample_motion
from keysync_jax.data_pipeline.synthetic.phonemes import articulate, at_frames, sample_phonemes
from keysync_jax.data_pipeline.synthetic.voice import sample_voice, synthesize

MAX_CLIPS = 10_000  # the seeds of the figures lie that far apart
STILL_LANDMARKS = (0, 1, 2, 14, 15, 16, *range(17, 48))  # jaw sides, brows, nose, eyes
CHIN_LANDMARKS = (7, 8, 9)


def box_mask(clip: TalkerClip) -> np.ndarray:
    """The region that dubbing repaints, bool [T, H, W]: rows from landmark 28 down, columns between the jaw's extremes, inclusive."""
    size = clip.frames.shape[1]
    row = np.arange(size)
    x = clip.landmarks[..., 0]
    left, right, top = np.trunc(x.min(1)), np.trunc(x.max(1)), np.trunc(clip.landmarks[:, 28, 1])
    columns = (row[None] >= left[:, None]) & (row[None] <= right[:, None])
    return (row[None] >= top[:, None])[:, :, None] & columns[:, None, :]


def pooled_r2(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared correlation of x [N, T, ...] with y [N, T], each clip centred first, pooled over clips: [...]; 0 where x is constant."""
    x = x - x.mean(1, keepdims=True)
    y = y - y.mean(1, keepdims=True)
    power = (x * x).sum((0, 1)) * (y * y).sum()
    return np.where(power > 1e-9, np.einsum("nt...,nt->...", x, y) ** 2 / np.maximum(power, 1e-9), 0.0)


class Leakage(NamedTuple):
    """Largest R² against the opening of things that must not know it, and (for contrast) of the chin, which must."""

    still_landmarks: float
    jaw_sides: float
    head_motion: float
    pixels_above: float
    pixels_above_mean: float
    chin: float


def leakage(n: int = 24, *, size: int = 64, first_seed: int = 50_000) -> Leakage:
    """R² table over `n` clips of 180 frames. Pixels above landmark 28 are compared on a grid that every clip shares."""
    points, openings, motions, pictures = [], [], [], []
    for seed in range(first_seed, first_seed + n):
        clip = make_clip(seed, size=size)
        move = sample_motion(seed, len(clip.frames))
        points.append(clip.landmarks.astype(np.float64))
        openings.append(clip.opening.astype(np.float64))
        motions.append(np.stack([move.roll, move.yaw, move.pitch, move.zoom, move.blink, *move.shift.T, *move.gaze.T], axis=1))
        top = int(clip.landmarks[:, 28, 1].min())
        pictures.append(clip.frames[:, :top].astype(np.float32).mean(-1))
    rows = min(p.shape[1] for p in pictures)
    landmarks, opening = np.stack(points), np.stack(openings)
    x = landmarks[..., 0]
    above = pooled_r2(np.stack([p[:, :rows] for p in pictures]), opening)
    return Leakage(
        float(pooled_r2(landmarks[:, :, list(STILL_LANDMARKS)], opening).max()),
        float(max(pooled_r2(x.min(2), opening), pooled_r2(x.max(2), opening))),
        float(pooled_r2(np.stack(motions), opening).max()),
        float(above.max()),
        float(above.mean()),
        float(pooled_r2(landmarks[:, :, list(CHIN_LANDMARKS), 1], opening).min()),
    )


class MeasureQuality(NamedTuple):
    """Mean and worst correlation over clips of measured with exact opening and width, and mean absolute error (eye-corner units)."""

    opening_r: float
    width_r: float
    worst_opening_r: float
    worst_width_r: float
    opening_error: float
    width_error: float


def degrade(frames: np.ndarray, blur: float, noise: float, seed: int = 0) -> np.ndarray:
    """Blur (standard deviation in pixels) and noise (in code values), as a lossy decoder would; uint8 in, uint8 out."""
    rng = np.random.default_rng(seed)
    out = np.stack([cv2.GaussianBlur(f, (0, 0), blur) if blur else f for f in frames]).astype(np.float32)
    return np.clip(np.rint(out + noise * rng.standard_normal(out.shape, dtype=np.float32)), 0, 255).astype(np.uint8)


def measure_quality(
    n: int = 24, *, size: int = 128, frames: int = 100, blur: float = 0.0, noise: float = 0.0, first_seed: int = 60_000
) -> MeasureQuality:
    """How well `measure_mouth` reads `n` clips, optionally degraded."""
    scores, errors = [], []
    for seed in range(first_seed, first_seed + n):
        clip = make_clip(seed, frames, size)
        found = measure_mouth(degrade(clip.frames, blur, noise), clip.landmarks)
        scores.append([np.corrcoef(a, b)[0, 1] for a, b in ((found.opening, clip.opening), (found.width, clip.width))])
        errors.append([np.abs(found.opening - clip.opening).mean(), np.abs(found.width - clip.width).mean()])
    mean, worst, error = np.mean(scores, 0), np.min(scores, 0), np.mean(errors, 0)
    return MeasureQuality(*(float(v) for v in (*mean, *worst, *error)))


def _mel_filters(bands: int, fft: int) -> np.ndarray:
    mel = np.linspace(1127 * np.log1p(60 / 700), 1127 * np.log1p(7800 / 700), bands + 2)
    edges = 700 * np.expm1(mel / 1127)
    f = np.fft.rfftfreq(fft, 1 / SAMPLE_RATE)
    rise = (f - edges[:-2, None]) / (edges[1:-1, None] - edges[:-2, None])
    fall = (edges[2:, None] - f) / (edges[2:, None] - edges[1:-1, None])
    return np.maximum(0, np.minimum(rise, fall))


def log_mel(samples: np.ndarray, bands: int = 40) -> np.ndarray:
    """Log-mel spectrum of every frame's own 640 samples, [S] -> [S / 640, bands]."""
    hop = SAMPLE_RATE // FRAME_RATE
    power = np.abs(np.fft.rfft(samples.reshape(-1, hop) * np.hanning(hop), 1024, axis=1)) ** 2
    return np.log(power @ _mel_filters(bands, 1024).T + 1e-8)


class AudioProbe(NamedTuple):
    """What a frame's own sound says about its mouth, on voices never heard: mean r over clips for opening and width; and how
    far loudness alone goes on open frames (it should not)."""

    opening_r: float
    width_r: float
    loudness_r: float


def audio_probe(train: int = 100, held_out: int = 24, *, frames: int = 180, features: int = 1500) -> AudioProbe:
    """Ridge regression on random Fourier features of the log-mel spectrum, trained and judged on different voices."""

    def gather(seeds: range) -> tuple[np.ndarray, np.ndarray]:
        mels, mouths = [], []
        for seed in seeds:
            seconds = frames / FRAME_RATE
            art = articulate(sample_phonemes(seed, seconds), seconds, seed)
            mels.append(log_mel(synthesize(art, sample_voice(seed), seed, frames * SAMPLE_RATE // FRAME_RATE)))
            mouths.append(np.stack([at_frames(art.opening, frames), at_frames(art.width, frames)], axis=1))
        return np.stack(mels), np.stack(mouths)

    x, y = gather(range(70_000, 70_000 + train))
    held_x, held_y = gather(range(80_000, 80_000 + held_out))
    rng = np.random.default_rng(0)
    weight, phase = rng.normal(0, 0.07, (x.shape[-1], features)), rng.uniform(0, 2 * np.pi, features)
    mean, scale = x.mean((0, 1)), x.std((0, 1))

    def lift(mel: np.ndarray) -> np.ndarray:
        flat = ((mel - mean) / scale).reshape(-1, mel.shape[-1])
        return np.concatenate([np.cos(flat @ weight + phase), flat, np.ones((len(flat), 1))], axis=1)

    lifted = lift(x)
    solution = np.linalg.solve(lifted.T @ lifted + np.eye(lifted.shape[1]), lifted.T @ y.reshape(-1, 2))
    guess = (lift(held_x) @ solution).reshape(held_y.shape)
    score = [np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(guess[..., k], held_y[..., k], strict=True)]) for k in range(2)]
    loud = np.log(np.exp(held_x).sum(-1))
    alone = np.mean([np.corrcoef(a[b > 0.2], b[b > 0.2])[0, 1] for a, b in zip(loud, held_y[..., 0], strict=True)])
    return AudioProbe(float(score[0]), float(score[1]), float(alone))


def report_lines(clips: int, *, detection: bool = False) -> Iterator[str]:
    """All figures, a line (or a paragraph) each as soon as it is known.

    Args:
      clips: clips per figure, at most `MAX_CLIPS`.
      detection: also the face detector's rates, which takes minutes.
    """
    start = time.process_time()
    for seed in range(5):
        make_clip(seed)
    yield f"one clip of 180 frames at 128 px: {(time.process_time() - start) / 5:.2f} s of one core\n"
    for name, value in leakage(clips, size=128)._asdict().items():
        yield f"R² against the opening, {name}: {value:.4f}"
    for blur, noise in ((0.0, 0.0), (1.2, 0.0), (1.2, 4.0)):
        q = measure_quality(clips, blur=blur, noise=noise)
        yield f"\nmeasured at blur {blur} px, noise {noise}: " + ", ".join(f"{k} {v:.3f}" for k, v in q._asdict().items())
    yield "\naudio probe: " + ", ".join(f"{k} {v:.3f}" for k, v in audio_probe()._asdict().items())
    if detection:
        yield "\n" + format_report(report_detection(clips))
