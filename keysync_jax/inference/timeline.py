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
from keysync_jax.core.errors import UsageError

_LONGEST_S = 1e6


class Part(NamedTuple):
    """Of a programme, what is to be dubbed, in model frames: those from `first` on, up to `stop` (None: to the end).

    The voice begins with the first of them, so a part's ends lie on the model's clock.
    """

    first: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """`A:B` in seconds, each may be missing; None is everything.

        Raises:
          UsageError: something else, or an empty part.
        """
        if text is None:
            return cls()
        try:
            start, stop = (float(value) if value else None for value in map(str.strip, text.split(":")))
        except ValueError:
            raise UsageError(f"--range {text}: give A:B in seconds, for example 12.5:20, or 12.5: to the end") from None
        if any(value is not None and not 0 <= value < _LONGEST_S for value in (start, stop)):
            raise UsageError(f"--range {text}: seconds count from the beginning of the video and are not negative")
        part = cls(model_frame(Fraction(start or 0.0)), None if stop is None else model_frame(Fraction(stop)))
        if part.stop is not None and part.stop <= part.first:
            raise UsageError(f"--range {text}: the part is empty; its end comes {1 / FRAME_RATE:.2f} s or more after its beginning")
        return part

    @property
    def start_s(self) -> Fraction:
        """Where the part, and the voice in it, begins."""
        return Fraction(self.first, FRAME_RATE)

    def covered(self, heard: int) -> range:
        """Model frames in which a voice of `heard` model frames sounds."""
        end = self.first + heard
        return range(self.first, end if self.stop is None else min(end, self.stop))


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
