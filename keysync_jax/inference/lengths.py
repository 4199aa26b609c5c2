"""A voice that is longer or shorter than its video: which pictures are shown under it, and when.

`source` and `silence` leave the pictures as they are (and a still or slides become a film, see `stills`); the others are clips made of
the source's pictures, as long as the voice:

    cut_off   the longer of the two ends with the shorter
    loop      the pictures begin again
    bounce    the pictures run back and forth
    remap     every picture is shown, faster or slower
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, Self

import av

from keysync_jax.config import RETIMED
from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.core.errors import KeySyncError
from keysync_jax.inference import stills
from keysync_jax.inference.clip_io import Pictures, VideoFile, VideoSource
from keysync_jax.inference.sequences import PictureSequence
from keysync_jax.media.audio import AudioClip
from keysync_jax.media.completeness import Shortfall
from keysync_jax.media.video import Frame, Keyframe, VideoInfo

_FINE_TICK = Fraction(1, 90000)  # of a clip whose own ticks are too coarse to be stretched
_HELD = 16  # pictures in memory at once where they run backwards


def fitted(source: VideoSource, voice: AudioClip, mismatch: str, from_file: bool = True) -> VideoSource:
    """The clip to dub under a voice.

    Args:
      source: the video.
      voice: the voice.
      mismatch: of `config.MISMATCHES`.
      from_file: it came from a file or files, so a still among them is not an array that somebody meant so.

    Raises:
      KeySyncError: a video that cannot be read.
    """
    if from_file and not (isinstance(source, PictureSequence) and mismatch in RETIMED):
        film = stills.as_film(source, voice.duration_s)
        if film is not source:
            return film
    seconds = Fraction(len(voice.samples), SAMPLE_RATE)
    if mismatch == "cut_off":
        return Shortened(source, seconds)
    return Retimed(source, seconds, mismatch) if mismatch in RETIMED else source


class Shortened:
    """A source that ends after so many seconds, if it has not ended before.

    Args:
      source: the clip.
      seconds: where it ends, on the programme's clock.
    """

    def __init__(self, source: VideoSource, seconds: Fraction):
        self.original, self._seconds, self._seen_whole = source, seconds, False

    @property
    def info(self) -> VideoInfo:
        info, seconds = self.original.info, float(self._seconds)
        if info.duration_s is None or info.duration_s <= seconds:
            return info
        frames = None if info.frames is None else max(1, round(info.frames * seconds / info.duration_s))
        return dataclasses.replace(info, duration_s=seconds, frames=frames)

    def read(self) -> _Reader:
        notes: list[str] = []
        return _Reader(pictures := self.original.read(), notes, self._frames(pictures, notes))

    def _frames(self, pictures: Pictures, notes: list[str]) -> Iterator[Frame]:
        for frame in pictures:
            info = frame.info
            left = self._seconds - (frame.time - info.start_time)
            if left <= 0:
                notes.append(
                    f"the video is longer than the voice and ends with it, after {float(self._seconds):.2f} s (--mismatch cut_off)"
                )
                if not self._seen_whole:  # what a file is like is known at its end: whether it is whole, and its bit rate
                    for _ in pictures:
                        pass
                break
            if frame.av_frame.duration:
                frame.av_frame.duration = max(1, min(frame.av_frame.duration, round(left / info.time_base)))
            yield frame
        self._seen_whole = True


class _Shown(NamedTuple):
    """When a picture of the source is shown, seconds from the first one."""

    start: Fraction
    length: Fraction


class Retimed:
    """The pictures of a source, as long as the voice: again, back and forth, or faster and slower.

    The source is gone through once when the object is made.

    Args:
      source: the clip.
      seconds: length of the result.
      how: "loop", "bounce" or "remap".

    Raises:
      KeySyncError: a source that cannot be read.
    """

    def __init__(self, source: VideoSource, seconds: Fraction, how: str):
        self._source, self._seconds, self._how = source, seconds, how
        self._keyframes: Sequence[Keyframe] = ()
        if isinstance(source, VideoFile):
            reader = source.read(note_keyframes=True)
            self._shown = _times(reader, source.info)
            self._keyframes = list(reader.keyframes)
        else:
            self._shown = _times(source.read(), source.info)
        self._length = self._shown[-1].start + self._shown[-1].length
        self._pace = seconds / self._length if how == "remap" else Fraction(1)
        tick = source.info.time_base
        self._tick = min(tick, _FINE_TICK) if how == "remap" else tick
        self._count = sum(1 for _ in itertools.takewhile(lambda at: at[1] < seconds, self._order()))

    @property
    def info(self) -> VideoInfo:
        info = self._source.info
        return dataclasses.replace(
            info, average_rate=(info.average_rate / self._pace).limit_denominator(1001), time_base=self._tick, start_time=Fraction(0),
            duration_s=float(self._seconds), frames=self._count,
        )  # fmt: skip

    def read(self) -> _Reader:
        given, made = float(self._length), float(self._seconds)
        words = {
            "loop": f"the {given:.2f} s of pictures begin again until the voice ends",
            "bounce": f"the {given:.2f} s of pictures run back and forth until the voice ends",
            "remap": f"the {given:.2f} s of pictures are shown in {made:.2f} s, {given / made:.2f} times as fast",
        }[self._how]
        if self._how != "remap" and made <= given:
            words = f"the pictures end with the voice, after {made:.2f} s of {given:.2f}"
        notes = [f"{words} (--mismatch {self._how})"]
        first = self._source.read()
        return _Reader(first, notes, self._frames(first))

    def _frames(self, first: Pictures) -> Iterator[Frame]:
        info = self.info
        order = self._order()
        for number, frame in enumerate(itertools.islice(self._pictures(first), self._count)):
            _, start, length = next(order)
            stop = min(start + length, self._seconds)
            picture = frame.av_frame
            picture.pts, picture.time_base = round(start / self._tick), self._tick
            picture.duration = max(1, round(stop / self._tick) - picture.pts)
            yield Frame(number, picture.pts, picture.pts * self._tick, picture, info, frame.alpha)

    def _order(self) -> Iterator[tuple[int, Fraction, Fraction]]:
        """Number, start and length in seconds of each picture of the result, without end."""
        at = Fraction(0)
        forth = list(range(len(self._shown)))
        back = forth[-2:0:-1] if self._how == "bounce" else []
        for number in itertools.cycle(forth + back):
            length = self._shown[number].length * self._pace
            yield number, at, length
            at += length

    def _pictures(self, first: Pictures) -> Iterator[Frame]:
        """The source's frames in the order of `_order`."""
        yield from first
        while True:
            if self._how == "bounce":
                yield from self._backwards()
            yield from self._source.read()

    def _backwards(self) -> Iterator[Frame]:
        """From the last but one to the second."""
        stop = len(self._shown) - 1
        while stop > 1:
            start = max(1, stop - _HELD)
            if isinstance(self._source, VideoFile):
                pictures = self._source.read(start, self._keyframes)
            else:
                pictures = itertools.islice(self._source.read(), start, None)
            yield from reversed(list(itertools.islice(pictures, stop - start)))
            stop = start


class _Reader:
    """One pass over frames that are made from those of a source."""

    def __init__(self, pictures: Pictures, own: Sequence[str], frames: Iterator[Frame]):
        self._pictures, self._own, self._frames = pictures, own, frames

    @property
    def notes(self) -> list[str]:
        return [*self._own, *self._pictures.notes]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        return next(self._frames)


def _times(pictures: Pictures, info: VideoInfo) -> list[_Shown]:
    starts: list[Fraction] = []
    last: av.VideoFrame | None = None
    for frame in pictures:
        starts.append(frame.time)
        last = frame.av_frame
    if last is None:
        raise KeySyncError(f"{info.path}: no frame could be decoded; check the file with another player")
    hold = (last.duration or 0) * info.time_base or (starts[-1] - starts[-2] if len(starts) > 1 else 1 / info.average_rate)
    stops = [*starts[1:], starts[-1] + hold]
    return [_Shown(start - starts[0], stop - start) for start, stop in zip(starts, stops, strict=True)]


def file_of(source: VideoSource) -> VideoFile | None:
    """The file whose clock a clip keeps, so that what lies beside its pictures (titles, subtitles, sound) still fits; None for others."""
    inner = source.original if isinstance(source, Shortened) else source
    return inner if isinstance(inner, VideoFile) else None


def shortfall_of(source: VideoSource) -> Shortfall | None:
    """See `VideoFile.shortfall`."""
    file = file_of(source)
    return None if file is None else file.shortfall
