"""Where one shot ends and the next begins.

The detector of the dub. Preparing training data uses PySceneDetect instead, which must be installed apart because it depends on
`opencv-python`, which would overwrite the headless OpenCV; a dub must not need that, and it also asks for cuts at the exact frame in
short clips, where this detector compares each picture with the one before and asks whether the change stands out from the changes
around it. What counts is the time that lies between two *different* pictures: a web camera at 8 pictures a second in a file of 25, a
picture that freezes while the world goes on, and pictures that were dropped all change by more at once, and none of it is a cut. A fast
head, which changes many frames in a row, is no cut; a picture that comes back within a few frames is a flash, a dropped-in black frame
or a glitch, and no cut either. Slow dissolves and fades have no first frame: `dissolves.py` finds them. `cuts.py` adds what is known
of the faces.

Whatever detector found a cut, `same_view` says whether it is none, because a face merely opened or closed its mouth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy.ndimage import percentile_filter

from keysync_jax.media.faces import Face

_LONG_SIDE = 64  # pixels of the compared pictures; small enough that grain and small motion average out
_BLUR = 1.5  # sigma in these pixels
# A talking head in a wide frame changes by 0.3 levels from frame to frame, at most 1.1; the same head in another pose, 2 and more.
MIN_CHANGE = 2.0  # smallest change that can be a cut, in 8-bit levels (mean over the picture, luma and chroma)
NEIGHBOURS = 8  # different pictures on either side that count as "around"
# How often a change must exceed the median change around it, and the largest but one (which rules out the ends of fades and pans, and
# dropped pictures); of a slow camera's, which move by more from one to the next, less often.
RATIO_MEDIAN, RATIO_LARGE = 5.0, 3.2
SLOW_RATIO_MEDIAN, SLOW_RATIO_LARGE = 2.0, 1.55
HELD_RATIO_MEDIAN, HELD_RATIO_LARGE = 3.5, 2.2  # between the two
FRAME_S = 0.04  # time that one step takes in a usual video
HELD_STEPS, SLOW_STEPS = 2, 3  # of these, from which pictures are held, and a camera is slow
# A picture repeats the one before where it changes by less than this many levels, or this part of what changes nearby are.
REPEAT, REPEAT_SHARE = 0.12, 0.05
MOST_STEPS = 5  # a head's place changes in proportion to time for so long; then it stays about where it is
FREEZE_STEPS = (
    5  # so long, and so many times as long as pictures around it, a picture is held: what follows is motion unless it is another view
)
FREEZE_RATIO = 2.5
SLIDE_STEPS, SLIDE_CHANGE = 13, 6.0  # pictures that are all shown longer are slides: a change of so many levels is another one
OTHER_VIEW = 0.35  # pictures that correlate by less show something else
_LEAST_LEVEL = 0.3  # changes around a cut count at least so much: nothing stands out from noise
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


class Jump(NamedTuple):
    """The change from one picture to the next different one.

    Attributes:
      frame: the first frame of the new picture.
      steps: how long the picture before was shown, in units of 40 ms.
      usual: the same of the pictures around it.
      change: how much it is, see `ShotDetector.change`.
      to_median, to_large: the same over the median of the changes around it, and over the largest but one; as if they took as long.
      same: correlation of the two pictures.
    """

    frame: int
    steps: float
    usual: float
    change: float
    to_median: float
    to_large: float
    same: float

    @property
    def after_freeze(self) -> bool:
        """Whether the picture before was held much longer than others."""
        return self.steps >= FREEZE_STEPS and self.steps >= FREEZE_RATIO * self.usual

    @property
    def slow(self) -> bool:
        """Whether all pictures around are shown for more than a frame."""
        return self.usual >= HELD_STEPS

    @property
    def stands_out(self) -> bool:
        """Whether it is a cut, as far as pictures alone say."""
        if self.change < MIN_CHANGE:
            return False
        if self.after_freeze:
            return self.same < OTHER_VIEW
        if self.usual > SLIDE_STEPS:
            return self.change >= SLIDE_CHANGE
        if self.usual >= SLOW_STEPS:
            return self.to_median >= SLOW_RATIO_MEDIAN and self.to_large >= SLOW_RATIO_LARGE
        if self.slow:
            return self.to_median >= HELD_RATIO_MEDIAN and self.to_large >= HELD_RATIO_LARGE
        return self.to_median >= RATIO_MEDIAN and self.to_large >= RATIO_LARGE


class ShotDetector:
    """Finds hard cuts in a stream of pictures; memory does not grow beyond a few numbers per frame.

    Feed every frame in order with `update`; ask for `cuts` or `shots` at the end.
    """

    def __init__(self):
        self._recent: deque[np.ndarray] = deque(maxlen=FLASH_FRAMES + 2)
        self._times: list[float] = []
        self._changes: list[float] = []  # change from frame i - 1 to frame i; 0 for the first
        self._same: list[float] = []  # correlation of frames i - 1 and i
        self._returns: list[float] = []  # smallest difference of frames i .. i + FLASH_FRAMES from frame i - 1
        self._return_frames: list[int] = []  # the frame that is closest
        self._size: tuple[int, int] | None = None

    def update(self, rgb: np.ndarray, index: int, time: float | None = None) -> None:
        """Take the next picture.

        Args:
          rgb: uint8 `[h, w, 3]`, of any size; a thumbnail is enough.
          index: its number in the video; frames come in order from 0.
          time: when it is shown, seconds; without it, frames are 40 ms apart.

        Raises:
          ValueError: a frame out of order.
        """
        if index != len(self._changes):
            raise ValueError(f"frame {index} given, frame {len(self._changes)} expected")
        if self._size is None:
            self._size = _reduced_size(rgb)
        picture = _reduced(rgb, self._size)
        self._changes.append(_difference(self._recent[-1], picture) if self._recent else 0.0)
        self._same.append(_correlation(self._recent[-1], picture) if self._recent else 1.0)
        self._times.append(index * FRAME_S if time is None else time)
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
        return self.kept(jump.frame for jump in self.jumps() if jump.stands_out)

    def jumps(self) -> list[Jump]:
        """Every change from one picture to a different one, measured by those around it."""
        changes = np.array(self._changes)
        frames = self._different(changes)
        steps = np.diff(np.array(self._times)[[0, *frames]]) / FRAME_S if frames else np.zeros(0)
        # A time that a file gets wrong (repeated, or a gap of minutes) is none.
        steps = np.clip(steps, 1, 1000)
        linear = np.minimum(steps, MOST_STEPS)
        rates = np.array([changes[frame] for frame in frames]) / np.maximum(linear, 1)
        jumps = []
        for k, frame in enumerate(frames):
            around = [n for n in range(max(0, k - NEIGHBOURS), min(len(frames), k + NEIGHBOURS + 1)) if n != k]
            levels = np.maximum(rates[around] * linear[k], _LEAST_LEVEL)
            usual = float(np.median(steps[around])) if around else steps[k]
            if len(levels):
                median = float(np.median(levels))
                # Other cuts, a shot away, say nothing of motion.
                far = np.array([abs(frames[n] - frame) >= MIN_SHOT for n in around])
                calm = levels[~(far & (levels > RATIO_MEDIAN * median))]
                large = float(np.sort(calm)[-min(2, len(calm))])
            else:
                median = large = _LEAST_LEVEL
            jumps.append(
                Jump(frame, float(steps[k]), usual, changes[frame], changes[frame] / median, changes[frame] / large, self._same[frame])
            )
        return jumps

    def kept(self, candidates: Iterable[int]) -> list[int]:
        """Those cuts, ascending, that are no flashes and not too close together."""
        candidates, changes = list(candidates), self._changes
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

    def _different(self, changes: np.ndarray) -> list[int]:
        """Frames that do not repeat the one before, without frame 0."""
        if len(changes) < 2:
            return []
        nearby = percentile_filter(changes, 90, size=25, mode="nearest")
        different = changes >= np.maximum(REPEAT, REPEAT_SHARE * nearby)
        return [int(frame) for frame in np.flatnonzero(different) if frame]


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


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of the luma of two reduced pictures, -1 to 1; 1 where nothing is to be seen in either."""
    a, b = (picture[..., 0] - picture[..., 0].mean() for picture in (a, b))
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else float(np.array_equal(a, b))
