"""What a job reads and writes: files, or arrays that look like files to the rest of the job.

Frames in memory are pictures in planar RGB on an exact clock, so that faces, crops and compositing treat them as they treat a file's,
and what is not blended comes out as it went in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, Self

import av
import numpy as np

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.sequences import PictureSequence, is_sequence
from keysync_jax.media import audio, color, completeness, video
from keysync_jax.media.completeness import Shortfall
from keysync_jax.media.orientation import Orientation
from keysync_jax.media.provenance import Mark
from keysync_jax.media.streams import refuse_address
from keysync_jax.media.video import Frame, Keyframe, VideoInfo

_PIX_FMT = "gbrp"
_FINEST_RATE = 1_000_000  # denominators of a frame rate given as a float


class Pictures(Iterator[Frame], Protocol):
    """One pass over the frames; `notes` says what had to be repaired so far."""

    @property
    def notes(self) -> Sequence[str]: ...


class VideoSource(Protocol):
    """A clip that can be gone through more than once, always with the same frames."""

    @property
    def info(self) -> VideoInfo: ...

    def read(self) -> Pictures: ...


class VideoSink(Protocol):
    """Takes the frames in order. Leaving it with an exception throws everything away."""

    @property
    def audio_note(self) -> str: ...

    @property
    def seal(self) -> str: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def write(self, frame: av.VideoFrame, alpha: np.ndarray | None = None) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None: ...


class VideoFile:
    """A file.

    Args:
      path: where it is; "-" and pipes are read into a scratch file first.
      video_stream: position among its video streams, from 0; default the one that players show.
      allow_damaged: take a file that breaks off for what is there of it.

    Attributes:
      info: description of the file; its bit rate is known after the first whole pass.
      shortfall: pictures that the file promises and does not hold, after the first whole pass.

    Raises:
      UsageError: no video stream of that number.
      KeySyncError: no video that can be read; a whole pass over a file that breaks off.
    """

    def __init__(self, path: str | os.PathLike, video_stream: int | None = None, allow_damaged: bool = False):
        name, self._spool = _local_file(path)
        self.info = video.probe(name, video_stream)
        self.shortfall: Shortfall | None = None
        self._allow_damaged = allow_damaged
        self._checked = False

    def read(self, start: int = 0, keyframes: Sequence[Keyframe] = (), note_keyframes: bool = False) -> video.VideoReader:
        """One pass, from the start or from picture `start` on; the arguments are those of `video.read`."""
        return video.read(self.info.path, self.info, start, keyframes, note_keyframes, on_end=self._whole_pass)

    def _whole_pass(self, reader: video.VideoReader) -> None:
        if not self._checked:
            self.shortfall, self._checked = completeness.shortfall(self.info, reader.tally), True
            seconds = reader.tally.end - self.info.start_time
            if self.info.bit_rate is None and seconds > 0:
                self.info = dataclasses.replace(self.info, bit_rate=round(8 * reader.tally.bytes / seconds))
        if self.shortfall is not None:
            if not self._allow_damaged:
                completeness.refuse(self.info.path, self.shortfall)
            reader.say(str(self.shortfall))


class FrameArray:
    """Frames in memory.

    Args:
      frames: uint8 `[N, H, W, 3]`, RGB.
      fps: frames per second; frame i is shown at i / fps seconds.

    Raises:
      UsageError: another shape or type, no frame, or no rate.
    """

    def __init__(self, frames: np.ndarray, fps: float | Fraction):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise UsageError(f"frames are {frames.dtype} {list(frames.shape)}; give RGB as uint8 [N, H, W, 3]")
        if not 0 < fps < _FINEST_RATE:
            raise UsageError(f"fps is {fps}; give the frames per second of the clip")
        self.frames = frames
        height, width = frames.shape[1:3]
        info = array_info(width, height, Fraction(fps).limit_denominator(_FINEST_RATE))
        self.info = dataclasses.replace(info, frames=len(frames), duration_s=float(len(frames) / info.average_rate))

    def read(self) -> Pictures:
        return _ArrayReader(self.frames, self.info)


class _ArrayReader:
    notes = ()

    def __init__(self, frames: np.ndarray, info: VideoInfo):
        self._frames = enumerate(frames)
        self._info = info

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        index, rgb = next(self._frames)
        picture = picture_of(rgb)
        picture.pts, picture.time_base = index, self._info.time_base
        return Frame(index, index, index * self._info.time_base, picture, self._info)


class FrameCollector:
    """A sink that keeps the frames in memory.

    Attributes:
      frames: uint8 `[H, W, 3]` each.
    """

    audio_note = "no audio"
    seal = ""
    notes = ()

    def __init__(self, info: VideoInfo):
        self.frames: list[np.ndarray] = []
        self._info = info

    def write(self, frame: av.VideoFrame, alpha: np.ndarray | None = None) -> None:
        self.frames.append(Frame(len(self.frames), 0, Fraction(0), frame, self._info).rgb())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None:
            self.frames.clear()


class Voice(NamedTuple):
    """The new voice: mono at 16 kHz for the network, and the file that the output plays (None: it came as samples)."""

    sound: audio.AudioClip
    path: str | None
    spool: tempfile.TemporaryDirectory | None = None  # holds what came through a pipe for as long as this object lives


def open_video(
    source: str | os.PathLike | np.ndarray,
    fps: float | Fraction | None = None,
    video_stream: int | None = None,
    allow_damaged: bool = False,
) -> VideoSource:
    """A file, or frames uint8 `[N, H, W, 3]` with their rate; `video_stream` and `allow_damaged` are as `VideoFile` takes them.

    Raises:
      UsageError: frames of another kind, or without rate; a rate for a file, which has its own.
      KeySyncError: a file that cannot be read.
    """
    if isinstance(source, np.ndarray):
        if fps is None:
            raise UsageError("frames need fps, their number per second")
        return FrameArray(source, fps)
    refuse_address(source)
    if is_sequence(source) and fps is None:
        return PictureSequence(source)
    if fps is not None:
        raise UsageError(f"fps is for frames in an array; {source} has its own timestamps")
    return VideoFile(source, video_stream, allow_damaged)


def open_voice(
    source: str | os.PathLike | np.ndarray, rate: int | None = None, audio_stream: int | None = None, channel: str = "auto"
) -> Voice:
    """An audio file (or a video's track), or samples `[S]`, full scale 1, with their rate in Hz.

    `audio_stream` and `channel` say what is heard of a file, as `audio.load_audio` takes them.

    Raises:
      UsageError: samples of another kind, or without rate; a rate for a file, which has its own.
      KeySyncError: a file that cannot be read, or samples that are not finite.
    """
    if isinstance(source, np.ndarray):
        if rate is None:
            raise UsageError("samples need rate, their number per second")
        return Voice(audio.from_samples(source, rate), None)
    if rate is not None:
        raise UsageError(f"rate is for samples in an array; {source} has its own")
    name, spool = _local_file(source)
    return Voice(audio.load_audio(name, number=audio_stream, channel=channel), name, spool)


def _local_file(path: str | os.PathLike) -> tuple[str, tempfile.TemporaryDirectory | None]:
    """A file that can be read more than once: the file itself, or what came through "-" or a pipe, in a folder that vanishes again.

    Raises:
      KeySyncError: nothing came, or no space for it.
    """
    name = os.fspath(path)
    if name != "-" and (not os.path.exists(name) or os.path.isfile(name) or os.path.isdir(name)):
        return name, None
    if name == "-" and sys.stdin.isatty():
        raise UsageError("-: nothing is piped in; give a file, or pipe one into the command")
    spool = tempfile.TemporaryDirectory(prefix="keysync-")
    target = os.path.join(spool.name, "piped")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    except OSError as error:
        raise KeySyncError(f"{name}: cannot be read into a scratch file ({error.strerror})") from error
    if not os.path.getsize(target):
        raise KeySyncError(f"{name}: nothing came through; a pipe can be read once, so give video and voice from two places")
    return target, spool


def marks_of(mark: Mark, sink: VideoSink) -> dict[str, str]:
    """For the report: what a finished output says of itself; frames in memory say nothing."""
    written = {} if isinstance(sink, FrameCollector) else {"line": mark.line, "c2pa": sink.seal or "not signed"}
    return written | ({"consent": mark.consent} if mark.consent else {})


def array_info(width: int, height: int, rate: Fraction = Fraction(25)) -> VideoInfo:
    """Description of RGB pictures in memory; one tick of their clock is one frame."""
    return VideoInfo(
        path="frames", width=width, height=height, rotation=0, orientation=Orientation(), display_matrix=(), display_width=width,
        display_height=height, average_rate=rate, time_base=1 / rate, pix_fmt=_PIX_FMT, source_pix_fmt=_PIX_FMT, codec="rawvideo",
        color_space=0, color_range=color.FULL_RANGE, color_primaries=1, color_transfer=1, duration_s=None, frames=None, has_audio=False,
        start_time=Fraction(0), sample_aspect_ratio=Fraction(1), interlaced=False, planes=color.plane_format(_PIX_FMT, 0, 2, width, height),
    )  # fmt: skip


def picture_of(rgb: np.ndarray) -> av.VideoFrame:
    """uint8 `[H, W, 3]` as a picture that compositing edits."""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format=_PIX_FMT)
