"""Source time against model time, in exact fractions.

The model lives on a 25 fps axis: model frame k stands for the instant k/25 s and hears the 40 ms of audio that start there. A
source frame shows the model frame nearest to its own timestamp, whatever the source's rate, so timestamps never change and
audio and mouth cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from keysync_jax.core.clock import FRAME_RATE, model_frame


class Run(NamedTuple):
    """A stretch of one shot that is generated in one piece."""

    shot: int
    start: int  # first source frame
    stop: int  # one past the last source frame
    first: int  # model frame of `start`
    sources: tuple[int, ...]  # per model frame, the source frame that conditions it

    @property
    def num_frames(self) -> int:
        return len(self.sources)

    def row(self, time: Fraction) -> int:
        """Position within the run of the model frame that a source frame at `time` shows; may be ≥ `num_frames` past the audio."""
        return model_frame(time) - self.first


def make_run(shot: int, start: int, stop: int, times: Sequence[Fraction], num_audio_frames: int) -> Run:
    """The model frames of source frames [start, stop), cut where the audio ends; `sources` is empty if it ends before.

    Args:
      shot: index of the shot, for reports.
      start, stop: source frame range.
      times: presentation time of every source frame of the clip, seconds, increasing.
      num_audio_frames: model frames that the new voice covers.
    """
    first, last = model_frame(times[start]), model_frame(times[stop - 1])
    sources = []
    at = start
    for k in range(first, min(last + 1, num_audio_frames)):
        instant = Fraction(k, FRAME_RATE)
        while at + 1 < stop and abs(times[at + 1] - instant) <= abs(times[at] - instant):
            at += 1
        sources.append(at)
    return Run(shot, start, stop, first, tuple(sources))
