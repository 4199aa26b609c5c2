"""A photo, a picture that is shown for seconds, slides: films of 25 pictures a second, as long as the voice.

Keeping the timestamps of such a source means one position of the mouth a second, or one at all. Slower than two pictures a second is no
camera.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Self

import av
import numpy as np

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.inference.clip_io import Pictures, VideoSource
from keysync_jax.inference.sequences import PictureSequence
from keysync_jax.media import color
from keysync_jax.media.video import Frame, VideoInfo

SLIDE_S = 0.55  # pictures that are shown longer are stills
_LOOKED_AT = 48  # pictures from which that is judged


def as_film(source: VideoSource, voice_s: float) -> VideoSource:
    """The source itself, or a film of it where it is a still, slides, or a sequence of pictures that is shorter than the voice.

    Args:
      source: the clip.
      voice_s: length of the voice in seconds.
    """
    voice = max(1, math.floor(voice_s * FRAME_RATE + 0.5))
    if isinstance(source, PictureSequence):
        count = source.info.frames or 0
        return source if count >= voice else Film(source, voice, "the last picture is held until the voice ends")
    times = _first_times(source)
    if len(times) == 1:
        return Film(source, voice, f"a still picture: shown at {FRAME_RATE} pictures a second for as long as the voice")
    if len(times) > 1 and float(np.median(np.diff(times))) >= SLIDE_S:
        each = float(np.median(np.diff(times)))
        what = f"slides, a picture every {each:.2g} s: written at {FRAME_RATE} pictures a second, as long as the voice"
        return Film(source, voice, what)
    return source


def _first_times(source: VideoSource) -> list[float]:
    """When the first pictures are shown, seconds. Usual videos are known by their second picture."""
    times: list[float] = []
    for frame in source.read():
        times.append(float(frame.time))
        if len(times) >= 2 and times[-1] - times[-2] < SLIDE_S and source.info.average_rate > 2 or len(times) >= _LOOKED_AT:
            break
    return times


class Film:
    """Every picture of a source for as long as it is shown, at 25 pictures a second; the last one until the end.

    Args:
      source: the pictures.
      frames: length of the film.
      note: what is said of it.
    """

    def __init__(self, source: VideoSource, frames: int, note: str):
        self._source, self._note = source, note
        rate = Fraction(FRAME_RATE)
        self.info = dataclasses.replace(
            source.info, average_rate=rate, time_base=1 / rate, frames=frames, duration_s=frames / FRAME_RATE, start_time=Fraction(0),
            bit_rate=None,  # a moving mouth needs more than pictures that stand
        )  # fmt: skip

    def read(self) -> _FilmReader:
        return _FilmReader(self._source.read(), self.info, self._note)


class _FilmReader:
    def __init__(self, pictures: Pictures, info: VideoInfo, note: str):
        self._pictures, self._info, self._note = pictures, info, note
        self._cut_short = False
        self._frames = self._iterate()

    @property
    def notes(self) -> list[str]:
        left = ["pictures that are shown after the voice has ended are left out"] if self._cut_short else []
        return [self._note, *left, *self._pictures.notes]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        return next(self._frames)

    def _iterate(self) -> Iterator[Frame]:
        info, start, first = self._info, 0, Fraction(0)
        length = info.frames or 1
        shown = next(self._pictures, None)
        if shown is not None:
            first = shown.time
        while shown is not None and start < length:
            following = next(self._pictures, None)
            # The first frame that is nearer to the next picture's time.
            stop = length if following is None else min(length, math.ceil((following.time - first) * FRAME_RATE - Fraction(1, 2)))
            for index in range(start, stop):
                picture = _copy(shown.av_frame)
                picture.pts, picture.time_base, picture.duration = index, info.time_base, 1
                yield Frame(index, index, index * info.time_base, picture, info, shown.alpha)
            start = max(start, stop)
            shown = following
        self._cut_short = shown is not None


def _copy(picture: av.VideoFrame) -> av.VideoFrame:
    """The same picture in memory of its own: compositing paints into it."""
    copy = av.VideoFrame(picture.width, picture.height, picture.format.name)
    for own, plane in zip(color.plane_views(copy), color.plane_views(picture), strict=True):
        own[...] = plane
    copy.colorspace, copy.color_range = picture.colorspace, picture.color_range
    return copy
