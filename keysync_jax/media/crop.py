"""One fixed square crop per shot, in which the model works.

The released KeySync weights were trained on 512-pixel crops of HDTF and CelebV, whose squares hold the head with some shoulder: the
face (jaw to jaw, brow to chin) takes a little over half of the side. The same square is used for a whole shot, so that the crop
itself adds no motion.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media.landmarks import check_landmarks

# Crop side over face size (the larger of the landmarks' width and height, median over the shot): the face spans 1 / 1.75 = 57 %.
MARGIN = 1.75
# The face may travel: every frame's landmarks stay inside the square with at least this part of the side free around them.
MIN_BORDER = 0.06
# The landmarks' box goes from the brows to the chin; a head's middle lies a little above the middle of that box.
RAISE = 0.07  # fraction of the side


class Crop(NamedTuple):
    """Square of a frame: top left corner and side in pixels, all even (chroma planes of 4:2:0 video split at whole samples).

    It may reach beyond the frame, where `extract` repeats the frame's edge.
    """

    x0: int
    y0: int
    side: int


def fixed_crop(landmarks: np.ndarray, frame_size: tuple[int, int], margin: float = MARGIN) -> Crop:
    """Square around a face for all frames of a shot.

    Args:
      landmarks: `[N, 68, 2]` in frame pixels; frames that are not finite are left out.
      frame_size: (width, height) of the frame.
      margin: side over face size.

    Raises:
      KeySyncError: no finite landmarks, or a margin that cuts into the face.
    """
    landmarks = check_landmarks(np.asarray(landmarks))
    known = landmarks[np.isfinite(landmarks).all(axis=(-2, -1))].astype(np.float64)
    if len(known) == 0:
        raise KeySyncError("no frame of this shot has usable landmarks, so no crop can be placed")
    if margin < 1.0:
        raise KeySyncError(f"crop margin is {margin}; it must be at least 1 (side over face size)")
    low, high = known.min(axis=1), known.max(axis=1)
    size = float(np.median((high - low).max(axis=1)))
    # Middle of the places the face goes to, so that both ends of a motion are equally far from the border.
    reach_low, reach_high = low.min(axis=0), high.max(axis=0)
    travel = float((reach_high - reach_low).max())
    side = max(margin * size, travel / (1 - 2 * MIN_BORDER))
    center = (reach_low + reach_high) / 2
    # Raised only as far as the lowest chin keeps its border.
    room = side / 2 - (reach_high[1] - center[1]) - MIN_BORDER * side
    center[1] -= min(RAISE * side, max(0.0, room))
    side = max(2, 2 * int(np.ceil(side / 2)))
    x0, y0 = (2 * int(round((c - side / 2) / 2)) for c in center)
    width, height = frame_size
    # A square that only just leaves the frame is moved back in where it fits: real pixels are better than repeated ones.
    x0, y0 = _moved_inside(x0, side, width, reach_low[0], reach_high[0]), _moved_inside(y0, side, height, reach_low[1], reach_high[1])
    return Crop(x0, y0, side)


def _moved_inside(start: int, side: int, length: int, low: float, high: float) -> int:
    """`start` of a span moved into [0, length) as far as it fits and the face from `low` to `high` keeps its border."""
    wanted = min(max(start, 0), max(0, length - side)) if side <= length else start
    border = MIN_BORDER * side
    wanted = min(max(wanted, high + border - side), low - border)
    return 2 * int(round(wanted / 2))


def extract(image: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """Pixels of a crop, resized to a square.

    Averages over area when shrinking, cubic when enlarging. Outside the frame its edge pixels are repeated.

    Args:
      image: `[H, W]` or `[H, W, C]`, uint8 or float32.
      crop: where.
      size: side of the result in pixels.

    Returns:
      `[size, size]` or `[size, size, C]` of the same type.

    Raises:
      KeySyncError: a crop that lies outside the frame altogether.
    """
    height, width = image.shape[:2]
    x0, y0, side = crop
    rows, cols = slice(max(0, y0), min(height, y0 + side)), slice(max(0, x0), min(width, x0 + side))
    if rows.start >= rows.stop or cols.start >= cols.stop:
        raise KeySyncError(f"crop {tuple(crop)} lies outside the {width}x{height} frame")
    part = image[rows, cols]
    pad = (rows.start - y0, y0 + side - rows.stop, cols.start - x0, x0 + side - cols.stop)
    if any(pad):
        part = cv2.copyMakeBorder(part, *pad, cv2.BORDER_REPLICATE)
    if side == size:
        return np.ascontiguousarray(part)
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_CUBIC)


def to_crop_space(landmarks: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """Landmarks `[..., 2]` of the frame in the pixels of `extract(..., size)`. The one place where they are scaled."""
    return (np.asarray(landmarks) - np.array([crop.x0, crop.y0])) * (size / crop.side)


def from_crop_space(landmarks: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """Inverse of `to_crop_space`."""
    return np.asarray(landmarks) * (crop.side / size) + np.array([crop.x0, crop.y0])
