"""How the head moves: pose, blinks, gaze and expression over time, none of which knows anything of the voice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from keysync_jax.core.clock import FRAME_RATE

_TAG = 0x3071


class Motion(NamedTuple):
    """Per-frame trajectories, float32 [T] (gaze [T, 2]).

    shift: head translation in frame widths [T, 2]; roll, yaw, pitch in radians; zoom a factor near 1; blink 0 open .. 1 shut;
    gaze in eye widths; valence and arousal in -1..1 (all zero unless expressions are asked for).
    """

    shift: np.ndarray
    roll: np.ndarray
    yaw: np.ndarray
    pitch: np.ndarray
    zoom: np.ndarray
    blink: np.ndarray
    gaze: np.ndarray
    valence: np.ndarray
    arousal: np.ndarray


def _wander(rng: np.random.Generator, frames: int, fastest: float, fps: int = FRAME_RATE) -> np.ndarray:
    """Smooth random curve of about unit deviation: sinusoids of random phase between 0.05 Hz and `fastest` Hz."""
    time = np.arange(frames) / fps
    frequency = np.exp(rng.uniform(np.log(0.05), np.log(fastest), 6))
    weight = rng.normal(0, 1, 6) / np.sqrt(1 + (frequency / 0.25) ** 2)
    phase = rng.uniform(0, 2 * np.pi, 6)
    curve = (weight[:, None] * np.sin(2 * np.pi * frequency[:, None] * time + phase[:, None])).sum(0)
    return curve / np.sqrt((weight**2).sum() / 2)


def _blinks(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Blinks every 1.5 to 6 s: shut in two frames, open again in four."""
    profile = np.array([0.45, 0.95, 1.0, 0.7, 0.35, 0.1])
    blink = np.zeros(frames + len(profile))
    at = int(rng.integers(5, 100))
    while at < frames:
        blink[at : at + len(profile)] = np.maximum(blink[at : at + len(profile)], profile)
        at += int(rng.integers(38, 150))
    return blink[:frames]


def _gaze(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Fixations of 0.4 to 2.5 s with jumps between them, mostly at the camera."""
    gaze = np.zeros((frames, 2))
    at = 0
    while at < frames:
        length = int(rng.integers(10, 62))
        target = rng.normal(0, 1, 2) * ((0.11, 0.03) if rng.random() < 0.4 else (0.025, 0.012))
        gaze[at : at + length] = np.clip(target, (-0.18, -0.06), (0.18, 0.06))
        at += length
    return gaze


def sample_motion(motion_seed: int, frames: int, *, amount: float = 1.0, emotion: bool = False) -> Motion:
    """Motion of one clip; a pure function of its arguments.

    Args:
        amount: scales head pose and translation (0 holds the head still); blinks and gaze stay.
        emotion: draw slow valence and arousal curves; otherwise both are zero.
    """
    rng = np.random.default_rng(np.random.SeedSequence([_TAG, motion_seed]))
    liveliness = amount * rng.uniform(0.5, 1.2)
    shift = np.stack([0.013 * _wander(rng, frames, 0.5), 0.009 * _wander(rng, frames, 0.6)], axis=1) * liveliness
    roll = liveliness * 0.038 * _wander(rng, frames, 0.5) + amount * rng.normal(0, 0.015)
    yaw = liveliness * 0.065 * _wander(rng, frames, 0.5) + amount * rng.normal(0, 0.03)
    pitch = liveliness * 0.045 * _wander(rng, frames, 0.7)
    zoom = 1 + liveliness * 0.014 * _wander(rng, frames, 0.3)
    blink, gaze = _blinks(rng, frames), _gaze(rng, frames)
    feelings = np.random.default_rng(np.random.SeedSequence([_TAG, 1, motion_seed]))
    if emotion:
        valence, arousal = (np.tanh(feelings.normal(0, 0.6) + 0.6 * _wander(feelings, frames, 0.2)) for _ in range(2))
    else:
        valence, arousal = np.zeros(frames), np.zeros(frames)
    limit = np.array([0.03, 0.022])
    curves = (
        np.clip(shift, -limit, limit),
        np.clip(roll, -0.09, 0.09),
        np.clip(yaw, -0.18, 0.18),
        np.clip(pitch, -0.12, 0.12),
        np.clip(zoom, 0.96, 1.04),
        blink,
        gaze,
        valence,
        arousal,
    )
    return Motion(*(c.astype(np.float32) for c in curves))
