"""Text that is part of the pictures (subtitles, captions) where the mouth is painted: it would be painted over, so it is said.

Burned-in text is bright strokes of one shade that stand still while the picture moves on: many small shapes of like height in a row, longer
than a mouth. What shines by chance (teeth, a collar, a lamp) lacks one of these.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.media.crop import Crop, View

LONG_SIDE = 640  # pixels of the pictures that are looked at
STEADY = 8  # frames in a row that a stroke stands still; a third of a second, the shortest subtitle
SPACING = 4  # frames between two looks for rows
_STROKE = 13  # pixels: thicker strokes are no text of a size that is read
_BRIGHT, _CONTRAST = 165, 45  # 8-bit levels of a stroke, and over what surrounds it
_SHADES = 30.0  # levels by which the letters of a row differ at most
_LETTERS = 5  # shapes of a row
_HEIGHTS = (4, 60)  # pixels of a letter
_LIKE = 0.5  # a row's letters differ from its middle one by less than this part of its height, in place and in height
_ROW = 4.0  # heights of a letter that a row is long at least
_WIDE = 0.4  # and this part of the painted region's width
_INSIDE = 3  # letters of it that reach into the region


class TextRange(NamedTuple):
    """Frames `start` to `stop` (left out) that show text in the painted region."""

    start: int
    stop: int


def around(region: np.ndarray, view: Crop | View) -> np.ndarray:
    """Corners float64 `[4, 2]`, (x, y) in the picture's pixels, around the cells bool `[h, w]` of the model's square that are painted."""
    rows, columns = np.nonzero(region)
    if not len(rows):
        return np.zeros((4, 2))
    top, bottom = rows.min() / region.shape[0], (rows.max() + 1) / region.shape[0]
    left, right = columns.min() / region.shape[1], (columns.max() + 1) / region.shape[1]
    square = [(left, top, 1), (right, top, 1), (right, bottom, 1), (left, bottom, 1)]
    return np.asarray(square) @ View.of(view).matrix.T


class TextWatch:
    """Looks for burned-in text in a stream of pictures; keeps two small pictures, however long the stream is."""

    def __init__(self):
        self._age: np.ndarray | None = None
        self._seen = 0
        self._ranges: list[TextRange] = []

    def update(self, index: int, rgb: np.ndarray, corners: np.ndarray) -> None:
        """Take the next picture.

        Args:
          index: its number; a number that is left out begins anew.
          rgb: uint8 `[H, W, 3]`.
          corners: float `[4, 2]`, (x, y) in its pixels around what is painted.
        """
        scale = min(1.0, LONG_SIDE / max(rgb.shape[:2]))
        small = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else rgb
        gray = cv2.max(cv2.max(small[..., 0], small[..., 1]), small[..., 2])  # yellow is as bright as white
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (_STROKE, _STROKE))
        bright = cv2.inRange(gray, np.array(_BRIGHT), np.array(255))
        strokes = cv2.bitwise_and(bright, cv2.inRange(cv2.morphologyEx(gray, cv2.MORPH_TOPHAT, kernel), np.array(_CONTRAST), np.array(255)))
        age = self._age
        if age is None or age.shape != strokes.shape or index != self._seen + 1:
            age = np.zeros_like(strokes)
        # Frames in a row, up to 255; `strokes` is 0 or 255.
        self._age = age = np.asarray(cv2.bitwise_and(cv2.add(age, np.ones_like(age)), strokes))
        self._seen = index
        if index % SPACING == 0 and self._has_row(age >= STEADY, gray, np.asarray(corners, np.float64) * scale):
            start = index - STEADY + 1
            if self._ranges and self._ranges[-1].stop >= start - SPACING:
                start = self._ranges.pop().start
            self._ranges.append(TextRange(max(0, start), index + 1))

    @property
    def ranges(self) -> list[TextRange]:
        """Where text was found, in order; to a few frames."""
        return list(self._ranges)

    def _has_row(self, steady: np.ndarray, gray: np.ndarray, corners: np.ndarray) -> bool:
        count, labels, stats, middles = cv2.connectedComponentsWithStats(steady.astype(np.uint8), connectivity=8)
        heights = stats[:, cv2.CC_STAT_HEIGHT]
        letters = np.flatnonzero((heights >= _HEIGHTS[0]) & (heights <= _HEIGHTS[1]) & (np.arange(count) > 0))
        if len(letters) < _LETTERS:
            return False
        (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
        left, width = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_WIDTH]
        inside = (left + width > x0) & (left < x1) & (middles[:, 1] >= y0) & (middles[:, 1] < y1)
        total = np.bincount(labels.ravel(), gray.ravel().astype(np.float64), count)
        shades = total / np.maximum(stats[:, cv2.CC_STAT_AREA], 1)
        for middle in letters[inside[letters]]:
            height = heights[middle]
            like = letters[
                (np.abs(middles[letters, 1] - middles[middle, 1]) < _LIKE * height)
                & (np.abs(heights[letters] - height) < _LIKE * height)
                & (np.abs(shades[letters] - shades[middle]) < _SHADES)
            ]
            length = (left + width)[like].max() - left[like].min() if len(like) else 0
            if len(like) >= _LETTERS and inside[like].sum() >= _INSIDE and length >= max(_ROW * height, _WIDE * (x1 - x0)):
                return True
        return False
