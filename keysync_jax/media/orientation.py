"""How stored pictures are turned upright: the rotation and mirroring that a file's display matrix asks for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Orientation(NamedTuple):
    """How a stored picture is turned upright: transpose, then mirror columns and rows. Covers rotation by 90 degrees and mirroring."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def upright(self, stored: np.ndarray) -> np.ndarray:
        """View of `stored` `[h, w, ...]` turned upright."""
        out = stored.swapaxes(0, 1) if self.transpose else stored
        return out[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def stored(self, upright: np.ndarray) -> np.ndarray:
        """Inverse of `upright`."""
        out = upright[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
        return out.swapaxes(0, 1) if self.transpose else out

    def stored_box(self, box: tuple[float, float, float], width: int, height: int) -> tuple[float, float, float]:
        """Square (x0, y0, side) of an upright `width` x `height` picture as (x0, y0, side) of the stored one."""
        x0, y0, side = box
        if self.flip_x:
            x0 = width - x0 - side
        if self.flip_y:
            y0 = height - y0 - side
        return (y0, x0, side) if self.transpose else (x0, y0, side)

    @property
    def rotation(self) -> int:
        """Anticlockwise turn in degrees: 0, 90, 180 or 270. A mirrored picture counts as mirrored left to right after the turn."""
        if self.transpose:
            return 90 if self.flip_y or not self.flip_x else 270
        return 180 if self.flip_y else 0

    @classmethod
    def from_matrix(cls, matrix: tuple[int, ...]) -> Orientation:
        """Nearest of the eight orientations to a display matrix (ISO/IEC 14496-12: x' = a x + c y, y' = b x + d y, y down)."""
        if not matrix:
            return cls()
        a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)
