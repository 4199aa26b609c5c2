"""The mouth as LipScore's lip reader wants it: landmarks filled and smoothed, the face turned upright, 88x88 grey values (Auto-AVSR)."""

from __future__ import annotations

import cv2
import numpy as np

from keysync_jax.core.errors import KeySyncError

_STABLE = (28, 33, 36, 39, 42, 45, 48, 54)
_SMOOTHED = 6  # frames on either side
_FACE, _PATCH, _INPUT = 256, 96, 88
_FURTHEST = 53  # pixels of the mouth's centre from the middle of the upright face
LEAST_FRAMES = 12
_GREY = np.array([0.2989, 0.587, 0.114], np.float32)
_MEAN, _STD = 0.421, 0.165


def fill_landmarks(points: np.ndarray, detected: np.ndarray) -> np.ndarray:
    """`[T, 68, 2]` with frames that have no face interpolated between their neighbours, and copies at both ends.

    Raises:
      KeySyncError: no frame has a face.
    """
    known = np.flatnonzero(detected)
    if not len(known):
        raise KeySyncError("no frame has a face")
    after = np.clip(np.searchsorted(known, np.arange(len(points))), 0, len(known) - 1)
    before = np.where(known[after] <= np.arange(len(points)), after, np.maximum(after - 1, 0))
    low, high = known[before], known[after]
    share = np.where(high > low, (np.arange(len(points)) - low) / np.maximum(high - low, 1), 0.0)[:, None, None]
    first, last = points[low].astype(np.float64), points[high].astype(np.float64)
    return (first + share * (last - first)).astype(points.dtype)


def _smoothed(points: np.ndarray) -> np.ndarray:
    """Mean of up to 13 frames, moved to the centre of the frame's own points."""
    out = []
    for t, own in enumerate(points):
        k = min(_SMOOTHED, t, len(points) - 1 - t)
        mean = points[t - k : t + k + 1].mean(0)
        out.append(mean + own.mean(0) - mean.mean(0))
    return np.stack(out)


def lip_input(frames: np.ndarray, points: np.ndarray, mean_face: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the lip reader sees `[T, 88, 88, 1]`, and the similarities `[T, 2, 3]` to the upright face.

    Args:
      frames: `[T, H, W, 3]` RGB, 0 to 255.
      points: `[T, 68, 2]` landmarks without gaps.
      mean_face: `[68, 2]` points of a mean face in a square of 256 pixels.

    Raises:
      KeySyncError: fewer than 12 frames, no similarity, or a mouth outside the square.
    """
    if len(frames) < LEAST_FRAMES or len(frames) != len(points):
        raise KeySyncError(f"{len(frames)} frames with {len(points)} sets of landmarks: {LEAST_FRAMES} or more of both are needed")
    stable = list(_STABLE)
    patches, matrices = [], []
    for t, (frame, smooth) in enumerate(zip(frames, _smoothed(points), strict=True)):
        matrix, _ = cv2.estimateAffinePartial2D(smooth[stable], mean_face[stable], method=cv2.LMEDS)
        if matrix is None:
            raise KeySyncError(f"frame {t}: the landmarks fit no upright face")
        face = cv2.warpAffine(frame.astype(np.float32), matrix, (_FACE, _FACE))
        centre = (smooth[48:68] @ matrix[:, :2].T + matrix[:, 2]).mean(0)
        if np.abs(centre - _FACE / 2).max() > _FURTHEST:
            raise KeySyncError(f"frame {t}: the mouth lies outside the square of the upright face")
        left, top = (int(round(float(np.clip(c - _PATCH // 2, 0, _FACE)))) for c in centre)
        right, bottom = (int(round(float(np.clip(c + _PATCH // 2, 0, _FACE)))) for c in centre)
        margin = (_PATCH - _INPUT) // 2
        patch = face[top:bottom, left:right][margin : margin + _INPUT, margin : margin + _INPUT] / np.float32(255)
        patches.append(((patch @ _GREY - _MEAN) / _STD)[..., None])
        matrices.append(matrix)
    return np.stack(patches).astype(np.float32), np.stack(matrices)
