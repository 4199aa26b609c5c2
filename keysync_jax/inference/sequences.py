"""Pictures in a folder, or files that a pattern names, as a clip of 25 pictures a second."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Self

import av.error

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import video
from keysync_jax.media.video import Frame

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".dpx", ".exr", ".jp2", ".ppm"}
_NUMBER = re.compile(r"%0?\d*d")


def is_sequence(path: str | os.PathLike) -> bool:
    """Whether a name stands for several pictures: a folder, or a pattern such as `shot_%04d.png` or `shot_*.png`."""
    name = os.fspath(path)
    return os.path.isdir(name) or not os.path.exists(name) and bool(_NUMBER.search(name) or "*" in name)


class PictureSequence:
    """The pictures of a folder or pattern in the order of the numbers in their names, each shown for 40 ms.

    Args:
      path: see `is_sequence`.

    Attributes:
      paths: of the pictures, in order.

    Raises:
      KeySyncError: no picture there, or the first one cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.paths = _pictures(os.fspath(path))
        first = video.probe(self.paths[0])
        count, rate = len(self.paths), Fraction(FRAME_RATE)
        self.info = dataclasses.replace(
            first, average_rate=rate, time_base=1 / rate, frames=count, duration_s=count / FRAME_RATE, start_time=Fraction(0)
        )

    def read(self) -> _SequenceReader:
        return _SequenceReader(self.paths, self.info)


class _SequenceReader:
    def __init__(self, paths: list[str], info: video.VideoInfo):
        self.notes: list[str] = [f"{len(paths)} pictures, shown at {FRAME_RATE} pictures a second"]
        self._info = info
        self._frames = self._iterate(paths)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        return next(self._frames)

    def _iterate(self, paths: list[str]) -> Iterator[Frame]:
        for index, path in enumerate(paths):
            with video.read(path, dataclasses.replace(self._info, path=path)) as reader:
                try:
                    frame = next(reader)
                except (StopIteration, av.error.FFmpegError) as error:
                    raise KeySyncError(f"{path}: cannot be read as a picture; remove it from the sequence") from error
                self.notes += [f"{path}: {note}" for note in reader.notes if note not in " ".join(self.notes)]
            picture = frame.av_frame
            picture.pts, picture.time_base, picture.duration = index, self._info.time_base, 1
            yield Frame(index, index, index * self._info.time_base, picture, self._info, frame.alpha)


def _pictures(name: str) -> list[str]:
    if os.path.isdir(name):
        found = [os.path.join(name, entry) for entry in os.listdir(name)]
    else:
        found = glob.glob(_NUMBER.sub("*", name))
        if _NUMBER.search(name):
            exact = re.compile(re.sub(re.escape("\0"), r"\\d+", re.escape(_NUMBER.sub("\0", name))))
            found = [path for path in found if exact.fullmatch(path)]
    found = [path for path in found if os.path.splitext(path)[1].lower() in _SUFFIXES]
    if not found:
        raise KeySyncError(f"{name}: no pictures there; give a folder of .png or .jpg files, a pattern such as shot_%04d.png, or a video")
    return sorted(found, key=_in_order)


def _in_order(path: str) -> list[tuple[int, int | str]]:
    """Numbers in a name count as numbers: 9 before 10."""
    parts = re.split(r"(\d+)", os.path.basename(path))
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]
