"""The square in which the model works: as pixels of a frame (`Crop`), or turned and stretched over it (`View`).

The released KeySync weights were trained on 512-pixel crops of HDTF and CelebV, whose squares hold the head with some shoulder: the
face (jaw to jaw, brow to chin) takes a little over half of the side. `fixed_crop` places one square for many frames, so that the crop
itself adds no motion; `placing.py` says where one square does not do.

A `View` is an affine map. It is the one description of pixels that are not square, of heads that lie on their side and of a crop that
follows somebody: cutting out, landmarks, masks and blending all go through it.
"""

from __future__ import annotations

import math
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


class View(NamedTuple):
    """The model's square laid over a picture: the point (u, v) of the square, 0..1, is `corner + u * right + v * down`.

    Attributes:
      corner: (x, y) of the square's top left corner in pixels of the picture.
      right: its upper edge as a vector, pixels.
      down: its left edge as a vector, pixels.
    """

    corner: tuple[float, float]
    right: tuple[float, float]
    down: tuple[float, float]

    @classmethod
    def of(cls, square: Crop | View | tuple[float, float, float]) -> View:
        """A crop as a view; a view as it is."""
        if isinstance(square, View):
            return square
        x0, y0, side = (float(value) for value in square)
        return cls((x0, y0), (side, 0.0), (0.0, side))

    @classmethod
    def around(cls, middle: tuple[float, float], side: float, angle: float = 0.0, aspect: float = 1.0) -> View:
        """A square as people see it.

        Args:
          middle: (x, y) in *shown* pixels, where x is the picture's times `aspect`.
          side: in shown pixels.
          angle: clockwise turn of the square in radians: that of the head that stands upright in it.
          aspect: width over height of a pixel.
        """
        cos, sin = math.cos(angle) * side, math.sin(angle) * side
        x, y = middle[0] - (cos - sin) / 2, middle[1] - (sin + cos) / 2
        return cls((x / aspect, y), (cos / aspect, sin), (-sin / aspect, cos))

    @property
    def matrix(self) -> np.ndarray:
        """float64 `[2, 3]`: from (u, v, 1) to pixels."""
        return np.stack([self.right, self.down, self.corner], axis=1).astype(np.float64)

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height in pixels that the square has when it is not turned."""
        return math.hypot(self.right[0], self.down[0]), math.hypot(self.right[1], self.down[1])

    @property
    def side(self) -> float:
        """Side of the square pixel grid of the same area, in pixels."""
        return math.sqrt(abs(self.right[0] * self.down[1] - self.right[1] * self.down[0]))

    @property
    def angle(self) -> float:
        """Clockwise turn as it is seen, degrees in (-180, 180]."""
        width, height = self.extent
        return math.degrees(math.atan2(self.right[1] / height, self.right[0] / width))

    @property
    def middle(self) -> tuple[float, float]:
        """(x, y) of the middle in pixels."""
        return (
            self.corner[0] + (self.right[0] + self.down[0]) / 2,
            self.corner[1] + (self.right[1] + self.down[1]) / 2,
        )

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the square around the same middle that is not turned, pixels."""
        (x, y), (width, height) = self.middle, self.extent
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    @property
    def corners(self) -> np.ndarray:
        """float64 `[4, 2]`, clockwise from the top left one."""
        return np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]]) @ self.matrix.T

    def unit(self, points: np.ndarray) -> np.ndarray:
        """Pixels `[..., 2]` as (u, v) of the square."""
        matrix = self.matrix
        return (np.asarray(points, np.float64) - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T


def fixed_crop(landmarks: np.ndarray, frame_size: tuple[int, int] | None, margin: float = MARGIN) -> Crop:
    """Square around a face for all frames of a shot.

    Args:
      landmarks: `[N, 68, 2]` in frame pixels; frames that are not finite are left out.
      frame_size: (width, height) of the frame; None: the square is never moved to stay inside.
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
    if frame_size is None:
        return Crop(x0, y0, side)
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


def extract(image: np.ndarray, crop: Crop | View, size: int) -> np.ndarray:
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
    if isinstance(crop, View):
        return _warped(image, crop, size)
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


def _warped(image: np.ndarray, view: View, size: int) -> np.ndarray:
    """`extract` of a view: averages over area along an axis that shrinks, then cubic at the exact place."""
    height, width = image.shape[:2]
    corners = view.corners
    shrink = np.maximum(1.0, np.array(view.extent) / size)
    reach = np.ceil(3 * shrink)  # what the cubic kernel reads around the square
    low = np.maximum(0, np.floor(corners.min(axis=0) - reach)).astype(int)
    high = np.minimum([width, height], np.ceil(corners.max(axis=0) + reach)).astype(int)
    if (low >= high).any():
        raise KeySyncError(f"crop around {view.middle} lies outside the {width}x{height} frame")
    part = image[low[1] : high[1], low[0] : high[0]]
    whole = np.array([part.shape[1], part.shape[0]], np.float64)
    reduced = np.maximum(1, np.round(whole / shrink)).astype(int)
    if (reduced < whole).any():
        part = cv2.resize(part, (int(reduced[0]), int(reduced[1])), interpolation=cv2.INTER_AREA)
    # From the middle of a crop's pixel to that of the part's: pixel i covers [i, i + 1).
    back = view.matrix.copy()
    back[:, 2] += back[:, :2] @ np.full(2, 0.5 / size) - low
    back[:, :2] /= size
    back *= (reduced / whole)[:, None]
    back[:, 2] -= 0.5
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(np.ascontiguousarray(part), back, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def to_crop_space(landmarks: np.ndarray, crop: Crop | View, size: int) -> np.ndarray:
    """Landmarks `[..., 2]` of the frame in the pixels of `extract(..., size)`. The one place where they are scaled."""
    if isinstance(crop, View):
        return crop.unit(landmarks) * size
    return (np.asarray(landmarks) - np.array([crop.x0, crop.y0])) * (size / crop.side)


def from_crop_space(landmarks: np.ndarray, crop: Crop | View, size: int) -> np.ndarray:
    """Inverse of `to_crop_space`."""
    if isinstance(crop, View):
        return np.asarray(landmarks) / size @ crop.matrix[:, :2].T + crop.matrix[:, 2]
    return np.asarray(landmarks) * (crop.side / size) + np.array([crop.x0, crop.y0])
