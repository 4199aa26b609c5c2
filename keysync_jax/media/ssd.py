"""Boxes from the outputs of a single-shot detector: anchors, decoding, and suppression that averages (Liu et al. 2016; mediapipe)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.media.faces import box_iou

_LARGEST_LOGIT = 100.0


class Detection(NamedTuple):
    """One object. Coordinates are fractions of the detector's square input, until it is placed."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    points: np.ndarray  # [K, 2], (x, y)
    score: float

    def placed(self, origin: np.ndarray, extent: np.ndarray) -> Detection:
        """The same in pixels of the picture in which the square lies at `origin` with `extent` (both `[2]`)."""
        corners = np.reshape(self.box, (2, 2)) * extent + origin
        return Detection(tuple(corners.ravel().tolist()), self.points * extent + origin, self.score)


def anchor_centres(grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Anchor centres `[N, 2]`, (x, y) in fractions, of (cells a side, anchors a cell) grids, one after another."""
    parts = []
    for side, repeats in grids:
        y, x = np.divmod(np.arange(side * side), side)
        parts.append(np.repeat((np.stack([x, y], -1) + 0.5) / side, repeats, axis=0))
    return np.concatenate(parts)


def decode(raw: np.ndarray, logits: np.ndarray, anchors: np.ndarray, size: int, least: float) -> list[Detection]:
    """Detections above a score, the surest first.

    Args:
      raw: `[N, 4 + 2 K]`: centre x, y, width, height, then K points, in pixels of the input and relative to the anchors.
      logits: `[N]`.
      anchors: `[N, 2]`.
      size: side of the input in pixels.
      least: lowest score.
    """
    scores = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -_LARGEST_LOGIT, _LARGEST_LOGIT)))
    chosen = np.flatnonzero(scores >= least)
    out = []
    for i in chosen[np.argsort(-scores[chosen], kind="stable")]:
        values = raw[i].reshape(-1, 2).astype(np.float64) / size
        centre, extent = values[0] + anchors[i], values[1]
        low, high = centre - extent / 2, centre + extent / 2
        if (extent > 0).all():
            out.append(Detection((low[0], low[1], high[0], high[1]), values[2:] + anchors[i], float(scores[i])))
    return out


def suppress(detections: Sequence[Detection], overlap: float) -> list[Detection]:
    """One detection per object: those that overlap the surest one by more than `overlap` (IoU) are averaged with it by score."""
    left, out = list(detections), []
    while left:
        best = left[0]
        near = [d for d in left if d is best or box_iou(d.box, best.box) > overlap]
        weights = np.array([d.score for d in near])
        box = np.average([d.box for d in near], axis=0, weights=weights)
        points = np.average([d.points for d in near], axis=0, weights=weights)
        out.append(Detection(tuple(box.tolist()), points, best.score))
        left = [d for d in left if all(d is not other for other in near)]
    return out


def letterboxed(rgb: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture in the middle of a black square.

    Args:
      rgb: uint8 `[H, W, 3]`.
      size: side of the square in pixels.

    Returns:
      uint8 `[size, size, 3]`, and the `[2]` origin and `[2]` extent of that square in pixels of the picture (`[2, 2]`).
    """
    height, width = rgb.shape[:2]
    side = max(height, width)
    origin = np.array([(width - side) / 2, (height - side) / 2])
    scale = size / side
    square = warped(rgb, np.array([[1 / scale, 0, origin[0]], [0, 1 / scale, origin[1]]]), size, cv2.BORDER_CONSTANT)
    return square, np.array([origin, [side, side]])


def warped(rgb: np.ndarray, back: np.ndarray, size: int, border: int) -> np.ndarray:
    """Bilinear samples of a picture on a square grid, at positions rounded to 1/32 pixel.

    mediapipe's OpenCV rounds so; newer ones do not, and a strongly shrunk picture shows the difference.

    Args:
      rgb: uint8 `[H, W, 3]`.
      back: `[2, 3]`, from the grid's pixels to the picture's.
      size: side of the grid.
      border: OpenCV's name of what lies outside.
    """
    y, x = np.mgrid[:size, :size].astype(np.float64)
    at = (back[:, :2] @ np.stack([x.ravel(), y.ravel()]) + back[:, 2:]).reshape(2, size, size).astype(np.float32)
    whole, part = cv2.convertMaps(at[0], at[1], cv2.CV_16SC2)
    return cv2.remap(rgb, whole, part, cv2.INTER_LINEAR, borderMode=border)
