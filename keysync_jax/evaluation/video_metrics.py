"""Figures of any real video: how open the mouth is over time, how often it leaks, how sharp the picture is.

LipLeak (KeySync paper, section 4): a video whose mouth moves is dubbed with silence, and the leak is the fraction of frames in which the
result's mouth aspect ratio (MAR, gap over width) is above 0.25. The paper does not name the landmarks; here the inner lips count,
`(|61-67| + |62-66| + |63-65|) / (3 |60-64|)`, with two alternatives. Landmarks come from the face backends a dub uses.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import laplace

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import write_atomically, write_text
from keysync_jax.evaluation.lip_metrics import correlation
from keysync_jax.media import faces, video
from keysync_jax.media.landmarks import check_landmarks

THRESHOLD = 0.25  # of the paper's LipLeak
SWEEP = tuple(round(0.05 * k, 2) for k in range(1, 13))
# Pairs of points whose mean distance is the gap, and the pair whose distance is the width.
RATIOS = {
    "inner": (((61, 67), (62, 66), (63, 65)), (60, 64)),
    "inner centre": (((62, 66),), (60, 64)),
    "outer": (((51, 57),), (48, 54)),
}
_MOUTH_MARGIN = 0.25  # of the mouth's width, on every side of the box in which the mouth's sharpness is taken


class FrameFigures(NamedTuple):
    """One row per frame of a video; NaN where no face was found.

    Attributes:
      time: seconds.
      ratios: mouth aspect ratio by kind (see `RATIOS`).
      sharpness: variance of the Laplacian of the whole frame.
      mouth_sharpness: the same in a box around the lips.
    """

    time: np.ndarray
    ratios: dict[str, np.ndarray]
    sharpness: np.ndarray
    mouth_sharpness: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """bool `[T]`: frames with a face."""
        return np.isfinite(self.ratios["inner"])


def mouth_ratio(landmarks: np.ndarray, kind: str = "inner") -> np.ndarray:
    """Mouth aspect ratio `[...]` of landmarks `[..., 68, 2]`: 0 when shut, near 1 when as high as wide.

    Raises:
      UsageError: no such kind.
      KeySyncError: not 68 landmarks.
    """
    if kind not in RATIOS:
        raise UsageError(f"no mouth aspect ratio called {kind!r}: choose {', '.join(RATIOS)}")
    landmarks = check_landmarks(np.asarray(landmarks, np.float64))
    gaps, (left, right) = RATIOS[kind]

    def distance(a: int, b: int) -> np.ndarray:
        return np.linalg.norm(landmarks[..., a, :] - landmarks[..., b, :], axis=-1)

    return np.mean([distance(a, b) for a, b in gaps], axis=0) / np.maximum(distance(left, right), 1e-9)


def lip_leak(ratios: np.ndarray, threshold: float = THRESHOLD) -> float:
    """Fraction of the frames with a face whose ratio `[T]` is above `threshold`.

    Raises:
      KeySyncError: no frame with a face.
    """
    known = ratios[np.isfinite(ratios)]
    if not known.size:
        raise KeySyncError("no frame has a face, so there is no mouth to measure")
    return float((known > threshold).mean())


def laplacian_variance(gray: np.ndarray) -> float:
    """Variance of the 3x3 Laplacian (centre -4, four neighbours 1, edges mirrored) of `[H, W]` in 0..255: higher is sharper."""
    return float(laplace(np.asarray(gray, np.float32), mode="mirror").var(dtype=np.float64))


def to_gray(rgb: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601), rounded to whole code values as 8-bit grayscale is, of `[..., 3]` uint8."""
    return np.rint(rgb @ np.array([0.299, 0.587, 0.114], np.float32))


def mouth_box(landmarks: np.ndarray, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the lips (48-67) with a quarter of their width around them, inside the frame; may be empty."""
    lips = landmarks[48:68]
    low, high = lips.min(axis=0), lips.max(axis=0)
    margin = _MOUTH_MARGIN * (high[0] - low[0])
    x0, y0 = np.floor(np.maximum(low - margin, 0)).astype(int)
    x1, y1 = np.ceil(np.minimum(high + margin, (width, height))).astype(int)
    return slice(y0, max(y0, y1)), slice(x0, max(x0, x1))


def read_figures(
    path: str | os.PathLike, backend: faces.FaceBackend, face: str = "largest", tick: Callable[[], None] = lambda: None
) -> FrameFigures:
    """Every frame's figures, the face followed as a dub follows it.

    Args:
      path: any video.
      backend: an open landmark detector.
      face: which face of several.
      tick: called after each frame of each of the two passes.

    Raises:
      KeySyncError: unreadable video, or no face in any frame.
    """
    from keysync_jax.inference.analysis import analyse

    analysis = analyse(path, backend, face, tick)
    count = analysis.num_frames
    sharpness, mouth = np.full(count, np.nan), np.full(count, np.nan)
    ratios = {kind: np.full(count, np.nan) for kind in RATIOS}
    for frame in video.read(path, analysis.info):
        gray = to_gray(frame.rgb())
        sharpness[frame.index] = laplacian_variance(gray)
        shot = analysis.shot_of(frame.index)
        position = frame.index - shot.start
        if shot.faces.detected[position]:
            points = shot.faces.landmarks[position]
            for kind in RATIOS:
                ratios[kind][frame.index] = mouth_ratio(points, kind)
            rows, columns = mouth_box(points, *gray.shape)
            if min(rows.stop - rows.start, columns.stop - columns.start) >= 3:
                mouth[frame.index] = laplacian_variance(gray[rows, columns])
        tick()
    return FrameFigures(np.array([float(t) for t in analysis.times]), ratios, sharpness, mouth)


def summarize(figures: FrameFigures, kind: str = "inner", threshold: float = THRESHOLD) -> dict[str, Any]:
    """JSON-ready summary of one video."""
    ratios = figures.ratios[kind]
    known = ratios[figures.found]
    return {
        "frames": len(ratios),
        "frames_with_face": int(figures.found.sum()),
        "mouth_ratio": kind,
        "threshold": threshold,
        "open": lip_leak(ratios, threshold),
        "open_by_ratio": {name: lip_leak(values, threshold) for name, values in figures.ratios.items()},
        "sweep": {f"{bound:g}": lip_leak(ratios, bound) for bound in SWEEP},
        "ratio_mean": float(known.mean()),
        "ratio_std": float(known.std()),
        "ratio_max": float(known.max()),
        "sharpness": float(figures.sharpness.mean()),
        "mouth_sharpness": float(np.nanmean(figures.mouth_sharpness)) if np.isfinite(figures.mouth_sharpness).any() else float("nan"),
    }


def compare(generated: FrameFigures, reference: FrameFigures, kind: str = "inner", threshold: float = THRESHOLD) -> dict[str, Any]:
    """Generated against reference at the same times, so that the two may have different rates; the shorter one decides how far.

    Every frame of the generated video is compared with the reference's frame nearest in time since the first; all figures are over these
    frames. `frames_apart` counts generated frames after the reference's end, less reference frames after the generated video's.

    Raises:
      KeySyncError: no frame in which both have a face.
    """
    nearest, matched = _at_same_times(generated.time, reference.time)
    _, back = _at_same_times(reference.time, generated.time)
    both = matched & generated.found & reference.found[nearest]
    if both.sum() < 2:
        raise KeySyncError("the two videos have fewer than two frames in which both show a face; are they of the same clip?")
    pair = _take(generated, np.flatnonzero(both)), _take(reference, nearest[both])
    ours, theirs = (figures.ratios[kind] for figures in pair)
    first, second = (summarize(figures, kind, threshold) for figures in pair)
    return {
        "frames_compared": int(both.sum()),
        "frames_apart": int((~matched).sum()) - int((~back).sum()),
        "ratio_r": correlation(ours, theirs),
        "ratio_difference": float(np.abs(ours - theirs).mean()),
        **{f"{key}_difference": first[key] - second[key] for key in ("open", "ratio_mean", "sharpness", "mouth_sharpness")},
    }


def frame_step(time: np.ndarray) -> float:
    """Seconds from one frame to the next (the median); 1/25 for a single frame."""
    return float(np.median(np.diff(time))) if len(time) > 1 else 0.04


def _at_same_times(time: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every frame of one video the index of the other's frame nearest in time, and whether the two are on screen together."""
    # Middles of the frames: a frame of 40 ms holds both of 20 ms.
    mine, others = (each - each[0] + frame_step(each) / 2 for each in (time, other))
    after = np.clip(np.searchsorted(others, mine), 1, max(len(others) - 1, 1))
    before = after - 1
    after = np.minimum(after, len(others) - 1)
    nearest = np.where(np.abs(others[after] - mine) < np.abs(others[before] - mine), after, before)
    # Half a frame of the coarser video, and a little for time stamps in milliseconds.
    return nearest, np.abs(others[nearest] - mine) <= 0.55 * max(frame_step(time), frame_step(other))


def _take(figures: FrameFigures, index: np.ndarray) -> FrameFigures:
    return FrameFigures(
        figures.time[index],
        {name: values[index] for name, values in figures.ratios.items()},
        figures.sharpness[index],
        figures.mouth_sharpness[index],
    )


def write_series(path: str | os.PathLike, figures: FrameFigures) -> None:
    """The figures of every frame as .csv or .json, whole or not at all; an empty field or null where no face was found.

    Raises:
      UsageError: another extension.
      KeySyncError: it cannot be written.
    """
    path = Path(path)
    columns = {
        "time": figures.time,
        **{f"ratio_{name.replace(' ', '_')}": values for name, values in figures.ratios.items()},
        "sharpness": figures.sharpness,
        "mouth_sharpness": figures.mouth_sharpness,
    }
    rows = {name: [None if np.isnan(v) else round(float(v), 5) for v in values] for name, values in columns.items()}
    if check_series(path) == ".json":
        write_text(path, json.dumps(rows) + "\n")
        return

    def write(file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8") as lines:
            table = csv.writer(lines, lineterminator="\n")
            table.writerow(["frame", *rows])
            for number, values in enumerate(zip(*rows.values(), strict=True)):
                table.writerow([number, *("" if value is None else value for value in values)])

    write_atomically(path, write)


def check_series(path: str | os.PathLike) -> str:
    """The extension of a series file, refused before the work if it is not one of ours."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".json"):
        raise UsageError(f"--series {path}: write .csv or .json")
    return suffix
