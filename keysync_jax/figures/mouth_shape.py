"""Figures of 68 landmarks: distance between two mouths, four ratios of opening, alignment for identity networks."""

from __future__ import annotations

import numpy as np

from keysync_jax.core.errors import KeySyncError

MOUTH = slice(48, 68)
# Where an ArcFace network wants eyes, nose tip and mouth corners in its 112-pixel picture (insightface).
ARCFACE_112 = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
LEAK_THRESHOLDS = np.arange(1, 13) * 0.05


def landmark_distance(pred: np.ndarray, truth: np.ndarray, points: slice = MOUTH) -> np.ndarray:
    """LMD by frame `[T]`, pixels: mean distance of the points `[T, 68, 2]` after each set is centred on its own mean (ER-NeRF).

    Raises:
      KeySyncError: the two are not `[T, 68, 2]` of one length.
    """
    if pred.shape != truth.shape or pred.shape[1:] != (68, 2):
        raise KeySyncError(f"landmarks of shapes {pred.shape} and {truth.shape}: [T, 68, 2] of one length are needed")
    a, b = np.asarray(pred[:, points], np.float64), np.asarray(truth[:, points], np.float64)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return np.linalg.norm(a - b, axis=-1).mean(1)


def eye_distance(points: np.ndarray) -> np.ndarray:
    """Distance of the outer eye corners by frame `[T]`, pixels."""
    return _distance(points, 36, 45)


def mouth_ratios(points: np.ndarray) -> dict[str, np.ndarray]:
    """Four ratios of opening by frame `[T]` of `[T, 68, 2]`; `drowsiness` is far above the others for a shut mouth."""
    width = _distance(points, 60, 64)
    return {
        "inner": (_distance(points, 61, 67) + _distance(points, 62, 66) + _distance(points, 63, 65)) / (3 * width),
        "inner_centre": _distance(points, 62, 66) / width,
        "outer": _distance(points, 51, 57) / _distance(points, 48, 54),
        "drowsiness": (_distance(points, 50, 58) + _distance(points, 52, 56)) / (2 * _distance(points, 48, 54)),
    }


def leak_sweep(ratio: np.ndarray, thresholds: np.ndarray = LEAK_THRESHOLDS) -> np.ndarray:
    """Share of frames whose mouth ratio is above each threshold, .05 to .60 by default."""
    return (np.asarray(ratio)[None] > np.asarray(thresholds)[:, None]).mean(1)


def similarity(points: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Least-squares rotation, scale and shift `[2, 3]` from `points` `[N, 2]` to `template` `[N, 2]` (Umeyama 1991), no mirror."""
    points, template = np.asarray(points, np.float64), np.asarray(template, np.float64)
    from_mean, to_mean = points.mean(0), template.mean(0)
    a, b = points - from_mean, template - to_mean
    spread = (a * a).sum()
    if spread == 0:
        raise KeySyncError("all points coincide: no similarity maps them")
    # In the plane the best rotation with scale is a complex number.
    real, imaginary = (a * b).sum() / spread, (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / spread
    matrix = np.array([[real, -imaginary], [imaginary, real]])
    return np.concatenate([matrix, (to_mean - matrix @ from_mean)[:, None]], axis=1)


def _distance(points: np.ndarray, i: int, j: int) -> np.ndarray:
    return np.linalg.norm(np.asarray(points[:, i], np.float64) - points[:, j], axis=-1)
