"""Where one shot ends and the next begins.

The detector of the dub. Preparing training data uses PySceneDetect instead, which must be installed apart because it depends on
`opencv-python`, which would overwrite the headless OpenCV; a dub must not need that, and it also asks for cuts at the exact frame in
short clips, where this detector compares each frame with the one before and asks whether the change stands out from the changes
around it. A fast head, which changes many frames in a row, is no cut; a picture that comes back within a few frames is a flash, a
dropped-in black frame or a glitch, and no cut either. Slow dissolves and fades have no first frame and are not reported; a face that
jumps or vanishes in one ends its track in any case.

Whatever detector found a cut, `same_view` says whether it is none, because a face merely opened or closed its mouth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import cv2
import numpy as np

from keysync_jax.media.faces import Face

_LONG_SIDE = 64  # pixels of the compared pictures; small enough that grain and small motion average out
_BLUR = 1.5  # sigma in these pixels
# A talking head in a wide frame changes by 0.3 levels from frame to frame, at most 1.1; the same head in another pose, 2 and more.
MIN_CHANGE = 2.0  # smallest change that can be a cut, in 8-bit levels (mean over the picture, luma and chroma)
RATIO_QUIET = 4.0  # how often it must exceed the changes on its quieter side
RATIO_BUSY = 2.0  # and on its busier side, which rules out the ends of fades and pans
NEIGHBOURS = 4  # frames on either side that count as "around"
FLASH_FRAMES = 5  # a picture that returns within this many frames has not been cut away
FLASH_LIKENESS = 0.45  # and differs from what it was by less than this part of the jump
MIN_SHOT = 5  # frames; of two cuts closer together the stronger one counts
# Picture change that is a cut whatever the face does: a mouth alone stays far below.
_CERTAIN_CUT = 15.0
_UPPER_FACE = slice(17, 36)  # brows and nose: what speech does not move, blinks neither
_SAME_PLACE = 0.05  # face sizes


def same_view(change: float, before: Sequence[Face], after: Sequence[Face]) -> bool:
    """Whether what looks like a cut is one face, filling the picture, that opened or closed its mouth in a single frame.

    Such a frame changes as many pixels as a jump cut in a wide shot. But it leaves brows, eyes and nose where they were; and where a
    real cut does that too, going on across it does no harm.

    Args:
      change: `picture_change` between the two frames.
      before: faces of the last frame before the supposed cut.
      after: faces of the first frame after it.
    """
    if change >= _CERTAIN_CUT or len(before) != len(after) or not before:
        return False
    a, b = (max(faces, key=lambda face: face.area) for faces in (before, after))
    moved = np.linalg.norm(a.landmarks[_UPPER_FACE] - b.landmarks[_UPPER_FACE], axis=-1).mean()
    return bool(moved < _SAME_PLACE * np.sqrt(a.area))


def picture_change(before: np.ndarray, after: np.ndarray) -> float:
    """How much one picture differs from another of the same size, uint8 RGB `[h, w, 3]`: see `ShotDetector.change`."""
    size = _reduced_size(before)
    return _difference(_reduced(before, size), _reduced(after, size))


class ShotDetector:
    """Finds hard cuts in a stream of pictures; memory does not grow beyond one number per frame.

    Feed every frame in order with `update`; ask for `cuts` or `shots` at the end.
    """

    def __init__(self):
        self._recent: deque[np.ndarray] = deque(maxlen=FLASH_FRAMES + 2)
        self._changes: list[float] = []  # change from frame i - 1 to frame i; 0 for the first
        self._returns: list[float] = []  # smallest difference of frames i .. i + FLASH_FRAMES from frame i - 1
        self._return_frames: list[int] = []  # the frame that is closest
        self._size: tuple[int, int] | None = None

    def update(self, rgb: np.ndarray, index: int) -> None:
        """Take the next picture.

        Args:
          rgb: uint8 `[h, w, 3]`, of any size; a thumbnail is enough.
          index: its number in the video; frames come in order from 0.

        Raises:
          ValueError: a frame out of order.
        """
        if index != len(self._changes):
            raise ValueError(f"frame {index} given, frame {len(self._changes)} expected")
        if self._size is None:
            self._size = _reduced_size(rgb)
        picture = _reduced(rgb, self._size)
        self._changes.append(_difference(self._recent[-1], picture) if self._recent else 0.0)
        self._returns.append(np.inf)
        self._return_frames.append(index)
        self._recent.append(picture)
        # Frames back to which this one could be the return: frame b + 1 .. b + FLASH_FRAMES follow a jump after frame b.
        for back in range(2, len(self._recent)):
            jump = index - back + 1
            distance = _difference(self._recent[-1 - back], picture)
            if distance < self._returns[jump]:
                self._returns[jump] = distance
                self._return_frames[jump] = index

    @property
    def cuts(self) -> list[int]:
        """First frames of new shots, ascending, without frame 0."""
        changes = np.array(self._changes)
        candidates = [i for i in range(1, len(changes)) if self._stands_out(changes, i)]
        skipped = set()
        for i in candidates:
            if i not in skipped and self._returns[i] < FLASH_LIKENESS * changes[i]:
                skipped.update(range(i, self._return_frames[i] + 1))
        kept: list[int] = []
        for i in candidates:
            if i in skipped:
                continue
            if kept and i - kept[-1] < MIN_SHOT:
                if changes[i] > changes[kept[-1]]:
                    kept[-1] = i
                continue
            kept.append(i)
        return kept

    def change(self, index: int) -> float:
        """How much the picture changed into frame `index`: 8-bit levels of luma and chroma together, mean over the picture."""
        return self._changes[index]

    @property
    def shots(self) -> list[tuple[int, int]]:
        """(first frame, frame after the last) of each shot; [] without frames."""
        edges = [0, *self.cuts, len(self._changes)]
        return [(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]

    @staticmethod
    def _stands_out(changes: np.ndarray, i: int) -> bool:
        """Whether the change into frame i is a jump against the changes before and after it."""
        if changes[i] < MIN_CHANGE:
            return False
        before, after = changes[max(1, i - NEIGHBOURS) : i], changes[i + 1 : i + 1 + NEIGHBOURS]
        # The upper quartile passes over one other jump in the stretch (a flash's end) and over repeated frames, which change nothing.
        levels = [float(np.percentile(part, 75, method="lower")) for part in (before, after) if len(part)]
        return not levels or (changes[i] >= RATIO_QUIET * min(levels) and changes[i] >= RATIO_BUSY * max(levels))


def _reduced_size(rgb: np.ndarray) -> tuple[int, int]:
    """(width, height) of the compared pictures."""
    scale = _LONG_SIDE / max(rgb.shape[:2])
    return max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))


def _reduced(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb), (0, 0), _BLUR).astype(np.float32)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the picture of the summed absolute differences of luma and both chroma channels."""
    return float(np.abs(a - b).sum(axis=-1).mean())
