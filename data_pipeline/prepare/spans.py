"""Which stretches of a shot become clips. Pure functions on flags and integers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """Frames start..stop-1 with the reason why they are left out ("" when they are kept)."""

    start: int
    stop: int
    reason: str = ""

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def usable_spans(face: np.ndarray, alone: np.ndarray, shortest: int) -> list[Span]:
    """Cut a shot into stretches with one face throughout.

    Args:
      face: bool `[N]`, the followed face is known (seen, or filled over a short gap).
      alone: bool `[N]`, no second face of note in the frame.
      shortest: stretches below this length are dropped.

    Returns:
      Spans that cover all N frames in order. Dropped ones say why: "no_face" or "several_faces" where frames are bad; "too_short"
      where a good stretch is too short, or "gaps" when that is because the face vanished in between.
    """
    face, alone = np.asarray(face, bool), np.asarray(alone, bool)
    labels = np.where(~face, 1, np.where(~alone, 2, 0))
    names = {1: "no_face", 2: "several_faces"}
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)] if len(labels) else []
    spans = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        if labels[start]:
            spans.append(Span(start, stop, names[int(labels[start])]))
        elif stop - start < shortest:
            spans.append(Span(start, stop, "too_short" if (start, stop) == (0, len(labels)) else "gaps"))
        else:
            spans.append(Span(start, stop))
    return spans


def cut_long(span: Span, longest: int) -> list[Span]:
    """Nearly equal pieces of at most `longest` frames."""
    count = -(-span.num_frames // longest)
    edges = [span.start + span.num_frames * k // count for k in range(count + 1)]
    return [Span(a, b, span.reason) for a, b in zip(edges[:-1], edges[1:], strict=True)]
