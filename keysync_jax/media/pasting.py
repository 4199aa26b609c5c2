"""A moving square in a still picture: pasted over a feathered ring, with the seam measured.

Nothing marks what may move: hair and shoulders that the square's edge cuts do, and the picture around it stands. So the ring blends the
two, and how far they are apart there says whether that can be seen.
"""

from __future__ import annotations

import cv2
import numpy as np

from keysync_jax.media.crop import Crop, View

RING = 0.08  # width of the ring, fraction of the square's side
VISIBLE = 8.0  # mean difference in the ring, of 255, from which the edge is seen to swim


class Paster:
    """Pastes squares into one picture.

    Args:
      picture: uint8 `[H, W, 3]` RGB.
      square: where the model's square lies in it.
      size: side of the squares in pixels.

    Attributes:
      seams: mean absolute difference between square and picture in the ring, of 255, one for each paste.
    """

    def __init__(self, picture: np.ndarray, square: Crop | View, size: int):
        self.seams: list[float] = []
        self._picture = picture
        height, width = picture.shape[:2]
        view = View.of(square)
        low = np.clip(np.floor(view.corners.min(axis=0)), 0, [width, height]).astype(int)
        high = np.clip(np.ceil(view.corners.max(axis=0)), 0, [width, height]).astype(int)
        self._place = slice(low[1], high[1]), slice(low[0], high[0])
        self._extent = int(high[0] - low[0]), int(high[1] - low[1])
        # From pixels of the place to pixels of the square, middle to middle.
        onto = view.matrix.copy()
        onto[:, :2] /= size
        onto[:, 2] += onto[:, :2] @ np.full(2, 0.5) - low - 0.5
        self._onto, self._size = onto, size
        # An enlarged square is cubic; a shrunk one is averaged over area first, so that it does not flicker.
        self._shrunk = max(1, round(size / max(view.side, 1)))
        at = (np.arange(size) + 0.5) / size
        edge = np.minimum(at, 1 - at) / RING
        ramp = np.clip(np.minimum(edge[:, None], edge[None, :]), 0, 1).astype(np.float32)
        opacity = cv2.warpAffine(ramp, onto, self._extent, flags=cv2.INTER_LINEAR, borderValue=0.0)
        self._opacity = (opacity * opacity * (3 - 2 * opacity))[..., None]
        self._ring = ((opacity > 0) & (opacity < 1))[..., None]
        self._still = picture[self._place].astype(np.float32)

    def __call__(self, square: np.ndarray) -> np.ndarray:
        """`[size, size, 3]` in [0, 1] to the whole picture, uint8 `[H, W, 3]`."""
        size = self._size // self._shrunk
        onto = self._onto
        if self._shrunk > 1:
            square = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)
            scale = self._size / size
            onto = onto.copy()
            onto[:, 2] += onto[:, :2] @ np.full(2, 0.5 * (scale - 1))
            onto[:, :2] *= scale
        moved = cv2.warpAffine(square.astype(np.float32), onto, self._extent, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        moved = np.clip(moved, 0, 1) * 255
        apart = np.abs(moved - self._still)
        weight = float(self._ring.sum() * 3)
        self.seams.append(float((apart * self._ring).sum() / weight) if weight else 0.0)
        out = self._picture.copy()
        out[self._place] = np.rint(self._still + self._opacity * (moved - self._still)).astype(np.uint8)
        return out

    def figures(self) -> dict[str, float]:
        """The seam over all pastes: its mean and its largest value, of 255."""
        return {"mean": round(float(np.mean(self.seams)), 2), "largest": round(float(np.max(self.seams)), 2)} if self.seams else {}
