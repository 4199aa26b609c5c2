"""The quality gate on drawn dubs, good ones and spoiled ones: how many of each are marked, and by which measure.

    python tests/scenarios/gate_drawn.py [-n 40] [--frames 150] [--size 128] [--detector]

A dub is drawn: a talker's face and motion with another voice's mouth, which is what a perfect dub of the first clip looks like. Spoiled
ones are the same with one thing wrong. Mouths are read from the drawing's own landmarks, or with `--detector` by the landmark detector that
a batch uses. Prints a table; exit status 1 if more than 5 % of the good ones are marked or less than 90 % of the spoiled ones caught.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.batch import gate
from keysync_jax.batch.gate_figures import PictureFigures
from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.evaluation.video_metrics import mouth_ratio
from keysync_jax.media import faces

# What is spoiled, and the figures of which one has to say so.
SPOILS = {
    "voice 5 frames late": {"voice_lag"},
    "voice 5 frames early": {"voice_lag"},
    "another voice": {"voice_r", "voice_lag"},
    "mouth frozen": {"movement"},
    "blurred": {"sharpness"},
    "flickering": {"flicker"},
    "bright seam": {"seam"},
    "open in silence": {"open_in_silence"},
}


class Dub(NamedTuple):
    """A drawn dub: source and result frames `[T, H, W, 3]`, landmarks of both `[T, 68, 2]`, the voice `[S]`, opacity of the region."""

    source: np.ndarray
    result: np.ndarray
    had: np.ndarray
    has: np.ndarray
    samples: np.ndarray
    alpha: np.ndarray


def draw(number: int, frames: int, size: int) -> Dub:
    """A good dub."""
    before = make_clip(1000 + number, frames=frames, size=size)
    after = make_clip(1000 + number, frames=frames, size=size, audio_seed=5000 + number)
    alpha = _region(after.landmarks, size)
    weight = alpha[..., None]
    result = np.rint(weight * after.frames + (1 - weight) * before.frames).astype(np.uint8)
    return Dub(before.frames, result, before.landmarks, after.landmarks, after.samples, alpha)


def _region(landmarks: np.ndarray, size: int) -> np.ndarray:
    """A soft box around the lower face `[H, W]`, the same in every frame."""
    low, high = landmarks[:, 2:15].min(axis=(0, 1)), landmarks[:, 2:15].max(axis=(0, 1))
    top = landmarks[:, 30, 1].min()
    hard = np.zeros((size, size), np.float32)
    hard[int(top) : int(high[1]), int(low[0]) : int(high[0])] = 1
    inside = cv2.distanceTransform((hard > 0).astype(np.uint8), cv2.DIST_L2, 5)
    return np.clip(inside / (0.06 * size), 0, 1)


def spoil(dub: Dub, how: str, number: int) -> Dub:
    """The same with one thing wrong."""
    result, has, samples = dub.result.copy(), dub.has.copy(), dub.samples
    weight = dub.alpha[..., None]
    if how.startswith("voice 5"):
        samples = np.roll(samples, (-1 if how.endswith("late") else 1) * 5 * 640)
    elif how == "another voice":
        samples = make_clip(9000 + number, frames=len(result), size=48).samples
    elif how == "mouth frozen":
        # The mouth of the first frame on every frame, moved along with the head: in landmarks, its shape stays.
        has[:, 48:] = dub.has[0, 48:] - dub.has[0, 30] + dub.has[:, 30][:, None]
    elif how == "blurred":
        blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.02 * frame.shape[0]) for frame in result])
        result = np.rint(weight * blurred + (1 - weight) * result).astype(np.uint8)
    elif how == "flickering":
        sign = np.where(np.arange(len(result)) % 2, 6.0, -6.0)[:, None, None, None]
        result = np.clip(result + sign * weight, 0, 255).astype(np.uint8)
    elif how == "bright seam":
        edge = ((dub.alpha > 0) & (cv2.erode((dub.alpha > 0).astype(np.uint8), np.ones((3, 3), np.uint8)) == 0))[..., None]
        result = np.clip(result + 40.0 * edge, 0, 255).astype(np.uint8)
    elif how == "open in silence":
        # The mouth hangs open wherever the voice pauses.
        count = len(samples) // 640
        loud = gate.loudness_db(samples, count)
        for frame in np.flatnonzero(loud < loud.max() - 30):
            gap = 0.5 * np.linalg.norm(has[frame, 60] - has[frame, 64])
            has[frame, 65:68, 1] = has[frame, [63, 62, 61], 1] + gap
    return Dub(dub.source, result, dub.had, has, samples, dub.alpha)


def figures(dub: Dub, backend: faces.FaceBackend | None = None) -> dict[str, float]:
    """What the gate measures; with a detector the mouths are read from the pictures."""
    pictures, openings = PictureFigures(), {}
    for number, (before, after) in enumerate(zip(dub.source, dub.result, strict=True)):
        pictures.add(number, before, after, dub.alpha, dub.had[number])
        if backend is None:
            openings[number] = float(mouth_ratio(dub.has[number]))
        else:
            found = gate.same_face(backend.detect(after), dub.had[number])
            openings[number] = float("nan") if found is None else float(mouth_ratio(found.landmarks))
    times = [Fraction(number, 25) for number in range(len(dub.source))]
    return {"painted": 1.0} | pictures.figures() | gate.voice_figures(openings, times, dub.samples)


def run(count: int, frames: int, size: int, backend: faces.FaceBackend | None = None) -> Iterator[tuple[str, set[str], dict[str, float]]]:
    """(what was wrong, the figures that missed, all figures); good dubs are "". With a detector, only what pictures show is spoiled."""
    seen = [how for how in SPOILS if backend is None or how not in ("mouth frozen", "open in silence")]
    for number in range(count):
        dub = draw(number, frames, size)
        found = figures(dub, backend)
        yield "", set(gate.missed(found)), found
        how = seen[number % len(seen)]
        found = figures(spoil(dub, how, number), backend)
        yield how, set(gate.missed(found)), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=40)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--detector", action="store_true")
    args = parser.parse_args()
    backend = faces.open_backend() if args.detector else None
    total, caught = Counter[str](), Counter[str]()
    values: dict[str, list[float]] = {}
    for how, missed, found in run(args.n, args.frames, args.size, backend):
        total[how] += 1
        caught[how] += bool(missed & SPOILS[how]) if how else bool(missed)
        if not how:
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        if (not how and missed) or (how and not missed & SPOILS[how]):
            print(f"  {how or 'good'}: {sorted(missed)} " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    print("good dubs, 5th, 50th and 95th percentile:")
    for name, each in values.items():
        print(f"  {name:<16} " + " ".join(f"{value:8.3f}" for value in np.percentile(each, (5, 50, 95))))
    print(f"good dubs marked: {caught['']} of {total['']}")
    for how in SPOILS:
        if total[how]:
            print(f"{how:<22} caught {caught[how]} of {total[how]}")
    spoiled = sum(total[how] for how in SPOILS)
    kept = sum(caught[how] for how in SPOILS)
    print(f"spoiled caught: {kept} of {spoiled}")
    return int(caught[""] > 0.05 * total[""] or kept < 0.9 * spoiled)


if __name__ == "__main__":
    sys.exit(main())
