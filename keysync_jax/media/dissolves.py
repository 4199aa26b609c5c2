"""Dissolves and fades: stretches in which one picture becomes another little by little.

In a dissolve every picture is a weighted mean of the two at its ends, with a weight that rises steadily; nothing that moves looks so,
once it has moved by more than its own detail. So for windows of several lengths, the pictures inside are fitted by those at the ends,
and what is left over is compared with what the ends differ by. A fade is the same with a blank end.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

_LONG_SIDE = 16  # pixels of the stored pictures: what moves a little averages out
LENGTHS = (6, 8, 10, 12, 16, 20, 25, 32, 40, 50)  # frames of the windows
MIN_DIFFERENCE = 8.0  # 8-bit levels, root mean square, that the ends must differ by
REST = 0.16  # part of that difference that may be left over
UNLIKE = 0.65  # the ends correlate by less; a lamp that is dimmed changes as steadily, and stays the same picture
DOUBTFUL = 0.4  # from this correlation on, less may be left over
BLANK = 4.0  # standard deviation in levels of a picture that shows nothing
SHOWN = 10.0  # and of one that does
SPACING = 6  # frames between two transitions
MIXED = (0.15, 0.85)  # weights of the new picture between which a face is neither the one nor the other


class Transition(NamedTuple):
    """A dissolve or a fade.

    Attributes:
      start, stop: frames that show both pictures.
      middle: first frame that shows more of the new one.
      fade: one of the two is blank.
    """

    start: int
    stop: int
    middle: int
    fade: bool


class DissolveDetector:
    """Finds dissolves in a stream of pictures; keeps some 400 bytes of each."""

    def __init__(self):
        self._pictures: list[np.ndarray] = []
        self._size: tuple[int, int] | None = None

    def update(self, rgb: np.ndarray) -> None:
        """Take the next picture, uint8 `[h, w, 3]` of any size."""
        if self._size is None:
            scale = _LONG_SIDE / max(rgb.shape[:2])
            self._size = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
        self._pictures.append(cv2.resize(rgb, self._size, interpolation=cv2.INTER_AREA))

    def transitions(self) -> list[Transition]:
        """In order, without overlap."""
        found: list[tuple[float, int, int, Transition]] = []
        for length in LENGTHS:
            for first in range(0, len(self._pictures) - length):
                fit = self._fit(first, length)
                if fit is not None:
                    found.append((fit[0], first, first + length, fit[1]))
        # The window whose ends differ most spans the whole of it; those that overlap it see a part.
        kept: list[tuple[int, int, Transition]] = []
        for _, first, last, transition in sorted(found, key=lambda item: -item[0]):
            if all(last + SPACING <= other_first or other_last + SPACING <= first for other_first, other_last, _ in kept):
                kept.append((first, last, transition))
        return sorted(transition for _, _, transition in kept)

    def _fit(self, first: int, length: int) -> tuple[float, Transition] | None:
        """How much the ends of frames first .. first + length differ, as a dissolve, and the dissolve; None: there is none."""
        window = self._pictures[first : first + length + 1]
        old, new = (picture.astype(np.float32) for picture in (window[0], window[-1]))
        way = new - old
        square = float((way * way).sum())
        if square < MIN_DIFFERENCE**2 * way.size:
            return None
        spreads = old.mean(axis=-1).std(), new.mean(axis=-1).std()
        fade = min(spreads) < BLANK
        alike = 0.0 if fade else _correlation(old, new)
        if max(spreads) < SHOWN or alike > UNLIKE:
            return None
        # Pictures that are alike may be a slow pan or zoom, which is nearly a mean of its ends.
        limit = REST * min(1.0, (1 - alike) / (1 - DOUBTFUL))
        inner = np.stack(window[1:-1]).astype(np.float32) - old
        weights = np.tensordot(inner, way, axes=3) / square
        rest = inner - weights[:, None, None, None] * way
        rests = np.sqrt((rest * rest).sum(axis=(1, 2, 3)) / square)
        steps = np.diff([0.0, *weights, 1.0])
        # It rises all the way, and not all at once.
        if rests.max() > 1.5 * limit or rests.mean() > limit or steps.min() < -0.05 or steps.max() > max(0.4, 3 / length):
            return None
        # Windows that begin before the dissolve or end after it fit as well, but stand still there.
        if steps[0] < 0.25 / length or steps[-1] < 0.25 / length:
            return None
        middle = first + 1 + int(np.searchsorted(np.maximum.accumulate(weights), 0.5))
        mixed = first + 1 + np.flatnonzero((weights > MIXED[0]) & (weights < MIXED[1]))
        if not len(mixed):
            return None
        return float(np.sqrt(square / way.size) * (1 - rests.mean())), Transition(int(mixed[0]), int(mixed[-1]) + 1, middle, bool(fade))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (picture.mean(axis=-1) - picture.mean() for picture in (a, b))
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0
