"""Video files as a stream of upright pictures with exact timestamps.

`probe` describes a file, `read` decodes it. Any container, codec, size, rotation tag, constant or variable frame rate that FFmpeg
(inside PyAV's wheel) can decode. Timestamps stay what the file says, as fractions; nothing is resampled to a frame rate here. One
picture is in memory at a time, apart from the few that the decoder keeps. Every pass over a file gives the same sequence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from keysync_jax.errors import KeySyncError
from keysync_jax.media import color
from keysync_jax.media.orientation import Orientation

# A timestamp that falls back by more than this is a restart of the clock (joined transport streams); less is a repeated stamp.
_CLOCK_RESTART_S = 1
# Formats that FFmpeg would "play" from a plain text file, or that fetch other files.
_NOT_VIDEO_FORMATS = {"tty", "bintext", "xbin", "idf", "adf", "hls", "concat", "sdp", "rtsp", "dash"}
_DEFAULT_RATE = Fraction(25)  # of a stream that states none (single pictures)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
      path: the file.
      width: stored width in pixels, before rotation.
      height: stored height.
      rotation: anticlockwise turn in degrees (0, 90, 180 or 270) that makes the picture upright.
      orientation: the same with mirroring.
      display_matrix: the nine integers of the file's display matrix, () without one.
      display_width: width of the upright picture in pixels.
      display_height: height of the upright picture.
      average_rate: frames per second on average.
      time_base: seconds per tick of `Frame.pts`.
      pix_fmt: pixel format of the frames that `read` gives; one that compositing edits in place.
      source_pix_fmt: pixel format in the file.
      codec: name of the video codec.
      color_space: H.273 matrix number, 2 where the file does not say.
      color_range: 1 limited, 2 full, 0 where the file does not say.
      color_primaries: H.273 primaries number.
      color_transfer: H.273 transfer number.
      duration_s: length in seconds as stated by the file, None where it does not say.
      frames: number of frames as stated or estimated from the duration, None where unknown. Only `read` knows for sure.
      has_audio: whether there is an audio stream.
      start_time: zero of the file's clock in seconds: the first picture or, where an audio stream starts earlier, the first sample.
        A voice track belongs to the pictures from this time on.
      sample_aspect_ratio: width of a pixel over its height.
      interlaced: whether the first picture is interlaced.
      planes: meaning of the planes in `pix_fmt`.
    """

    path: str
    width: int
    height: int
    rotation: int
    orientation: Orientation
    display_matrix: tuple[int, ...]
    display_width: int
    display_height: int
    average_rate: Fraction
    time_base: Fraction
    pix_fmt: str
    source_pix_fmt: str
    codec: str
    color_space: int
    color_range: int
    color_primaries: int
    color_transfer: int
    duration_s: float | None
    frames: int | None
    has_audio: bool
    start_time: Fraction
    sample_aspect_ratio: Fraction
    interlaced: bool
    planes: color.PlaneFormat


@dataclass(frozen=True)
class Frame:
    """One decoded picture.

    Attributes:
      index: position in the sequence, from 0.
      pts: presentation time in ticks of `info.time_base`; strictly increasing.
      time: the same in seconds.
      av_frame: the picture as decoded, in `info.pix_fmt` and stored orientation; carries `pts`.
      info: description of the file.
    """

    index: int
    pts: int
    time: Fraction
    av_frame: av.VideoFrame
    info: VideoInfo

    def rgb(self) -> np.ndarray:
        """Upright 8-bit RGB `[H, W, 3]` through the file's own matrix and range. HDR transfer curves stay as they are."""
        return np.ascontiguousarray(self.info.orientation.upright(color.frame_to_rgb(self.av_frame, self.info.planes)))

    def thumbnail(self, long_side: int = 160) -> np.ndarray:
        """Upright 8-bit RGB scaled down (never up) to `long_side` pixels; several times cheaper than `rgb`."""
        scale = min(1.0, long_side / max(self.info.width, self.info.height))
        width, height = (max(1, round(scale * side)) for side in (self.info.width, self.info.height))
        small = color.frame_to_rgb(self.av_frame, self.info.planes, width, height)
        return np.ascontiguousarray(self.info.orientation.upright(small))

    def planes(self) -> list[np.ndarray]:
        """Planes `[h, w]` in stored orientation, uint8 or uint16: views of the decoder's memory, to be read only."""
        return color.plane_views(self.av_frame)


def probe(path: str | os.PathLike) -> VideoInfo:
    """Describe a video file by opening it and decoding its first picture.

    Raises:
      KeySyncError: no such file, not a video, no video stream, or no picture in it.
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        first = _first_picture(container, stream)
        if first is None:
            raise KeySyncError(f"{path}: the video stream holds no picture that can be decoded; the file is empty or damaged")
        return _describe(path, container, stream, first)


def read(path: str | os.PathLike, info: VideoInfo | None = None) -> VideoReader:
    """Decode a video from its first picture to its last. `info` saves probing the file again."""
    return VideoReader(info if info is not None else probe(path))


class VideoReader:
    """Iterator over the frames of a file; `notes` says what had to be repaired. Close it, or use `with`, when stopping early.

    Missing timestamps are continued from the frame before, repeated ones move one tick on, and a clock that restarts is continued.
    Damaged data is concealed or skipped by the decoder. What it conceals depends on how its threads meet, so decoding starts strict
    on several threads, and at the first damage the file is decoded anew, leniently, on one thread: a damaged file, too, gives the
    same pictures on every pass.
    """

    def __init__(self, info: VideoInfo):
        self.info = info
        self._counts: dict[str, list] = {}
        self._pictures = self._iterate()

    def __iter__(self) -> VideoReader:
        return self

    def __next__(self) -> Frame:
        return next(self._pictures)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Stop decoding and release the file."""
        self._pictures.close()

    @property
    def notes(self) -> list[str]:
        """What was found wrong so far and what was done about it, one line each."""
        lines = [f"{n} x {what}, first at {float(at):.3f} s" for what, (n, at) in self._counts.items()]
        if self.info.pix_fmt != self.info.source_pix_fmt:
            lines.insert(0, f"pixel format {self.info.source_pix_fmt} is edited and written as {self.info.pix_fmt}")
        return lines

    def _note(self, what: str, at: Fraction) -> None:
        self._counts.setdefault(what, [0, at])[0] += 1

    def _iterate(self) -> Iterator[Frame]:
        yielded = 0
        try:
            for frame in self._stamped(threaded=True):
                yielded += 1
                yield frame
        except _DamageError as damage:
            self._counts.clear()
            self._note("damaged data, decoded as far as it can be repaired", damage.at)
            for frame in self._stamped(threaded=False):
                if frame.index >= yielded:
                    yielded += 1
                    yield frame
        if not yielded:
            raise KeySyncError(f"{self.info.path}: no picture could be decoded; the file is damaged")

    def _stamped(self, threaded: bool) -> Iterator[Frame]:
        """Frames with strictly increasing timestamps."""
        info = self.info
        step = max(1, round(1 / (info.average_rate * info.time_base)))
        restart = int(_CLOCK_RESTART_S / info.time_base)
        last, shift = None, 0
        for index, picture in enumerate(self._decoded(threaded)):
            stamp = picture.pts if picture.pts is not None else picture.dts
            if stamp is None:
                stamp = 0 if last is None else last + step
                self._note("frame without a timestamp, placed one frame time after the one before", stamp * info.time_base)
            else:
                stamp += shift
            if last is not None and stamp < last - restart:
                shift += last + step - stamp
                stamp = last + step
                self._note("restart of the clock, continued without a gap", stamp * info.time_base)
            elif last is not None and stamp <= last:
                stamp = last + 1
                self._note("repeated timestamp, moved on by the smallest step", stamp * info.time_base)
            last = stamp
            picture = self._as_described(picture, stamp * info.time_base)
            picture.pts, picture.time_base = stamp, info.time_base
            yield Frame(index, stamp, stamp * info.time_base, picture, info)

    def _as_described(self, picture: av.VideoFrame, at: Fraction) -> av.VideoFrame:
        """The picture in the size and format that the file began with."""
        info = self.info
        if (picture.width, picture.height) != (info.width, info.height):
            self._note(f"picture of another size, scaled to {info.width}x{info.height}", at)
        elif picture.format.name not in (info.source_pix_fmt, info.pix_fmt):
            self._note(f"picture of another pixel format, converted to {info.pix_fmt}", at)
        if (picture.width, picture.height, picture.format.name) == (info.width, info.height, info.pix_fmt):
            return picture
        return picture.reformat(width=info.width, height=info.height, format=info.pix_fmt, threads=color.SWSCALE_THREADS)

    def _decoded(self, threaded: bool) -> Iterator[av.VideoFrame]:
        """Pictures as the decoder gives them. With threads, the first sign of damage ends it with `_DamageError`."""
        with _open(self.info.path) as container:
            stream = _video_stream(container, self.info.path)
            if threaded:
                stream.thread_type = "AUTO"
                stream.codec_context.options = {"err_detect": "explode"}
            else:
                stream.thread_count = 1
            at = self.info.start_time
            for packet, error in _packets(container, stream):
                pictures = []
                if error is None:
                    try:
                        pictures = packet.decode()
                    except av.error.EOFError:
                        return
                    except av.error.FFmpegError:
                        error = "damaged packet, skipped"
                if error is not None:
                    if threaded:
                        raise _DamageError(at)
                    self._note(error, at)
                for picture in pictures:
                    if picture.is_corrupt:
                        if threaded:
                            raise _DamageError(at)
                        self._note("damaged picture, used as the decoder repaired it", at)
                    if picture.pts is not None:
                        at = picture.pts * self.info.time_base
                    yield picture


class _DamageError(Exception):
    """Damaged data met while decoding on several threads, after the picture at `at` seconds."""

    def __init__(self, at: Fraction):
        super().__init__(f"damaged data after {float(at):.3f} s")
        self.at = at


def _packets(container, stream) -> Iterator[tuple[av.Packet | None, str | None]]:
    """Packets of a stream, then the empty one that drains the decoder; a file that breaks off is drained, too."""
    demuxer = container.demux(stream)
    while True:
        try:
            packet = next(demuxer)
        except StopIteration:
            return
        except av.error.FFmpegError:
            break
        yield packet, None
    yield None, "unreadable data, the rest of the file is lost"
    flush = av.Packet()
    flush.stream = stream
    yield flush, None


def _open(path: str | os.PathLike):
    name = os.fspath(path)
    if not os.path.exists(name):
        raise KeySyncError(f"{name}: no such file")
    if os.path.isdir(name):
        raise KeySyncError(f"{name}: is a folder, not a video file")
    if os.path.getsize(name) == 0:
        raise KeySyncError(f"{name}: the file is empty")
    try:
        container = av.open(name, options={"protocol_whitelist": "file"})
    except PermissionError as error:
        raise KeySyncError(f"{name}: no permission to read it") from error
    except av.error.FFmpegError as error:
        raise KeySyncError(f"{name}: not a complete video file ({error.strerror}); give .mp4, .mov, .mkv or the like") from error
    if _NOT_VIDEO_FORMATS & set(container.format.name.split(",")):
        container.close()
        raise KeySyncError(f"{name}: not a video file; give .mp4, .mov, .mkv or the like")
    return container


def _video_stream(container, path):
    """First video stream that is not a cover picture."""
    pictures = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & pictures and stream.codec_context is not None:
            return stream
    raise KeySyncError(f"{path}: has no video stream")


def _first_picture(container, stream) -> av.VideoFrame | None:
    for packet, error in _packets(container, stream):
        if error is not None:
            continue
        try:
            pictures = packet.decode()
        except av.error.FFmpegError:
            continue
        if pictures:
            return pictures[0]
    return None


def _describe(path, container, stream, first: av.VideoFrame) -> VideoInfo:
    time_base = _fraction(stream.time_base)
    side_data = first.side_data.get("DISPLAYMATRIX")
    matrix = tuple(np.frombuffer(side_data, np.int32).tolist()) if side_data is not None else ()
    orientation = Orientation.from_matrix(matrix)
    upright = (first.height, first.width) if orientation.transpose else (first.width, first.height)
    source_format = first.format.name
    pix_fmt = color.working_format(source_format)
    full_by_name = source_format.startswith("yuvj") or pix_fmt.startswith("gbrp")
    color_range = color.FULL_RANGE if full_by_name else int(first.color_range)
    rate = _fraction(stream.average_rate or stream.guessed_rate) or _DEFAULT_RATE
    duration = _duration(container, stream, time_base)
    return VideoInfo(
        path=os.fspath(path),
        width=first.width,
        height=first.height,
        rotation=orientation.rotation,
        orientation=orientation,
        display_matrix=matrix,
        display_width=upright[0],
        display_height=upright[1],
        average_rate=rate,
        time_base=time_base,
        pix_fmt=pix_fmt,
        source_pix_fmt=source_format,
        codec=stream.codec_context.name,
        color_space=int(first.colorspace),
        color_range=color_range,
        color_primaries=int(first.color_primaries),
        color_transfer=int(first.color_trc),
        duration_s=duration,
        frames=stream.frames or (round(duration * rate) if duration else None),
        has_audio=bool(container.streams.audio),
        start_time=_start_time(container, first, time_base),
        sample_aspect_ratio=_fraction(stream.sample_aspect_ratio) or Fraction(1),
        interlaced=bool(first.interlaced_frame),
        planes=color.plane_format(pix_fmt, int(first.colorspace), color_range, first.width, first.height),
    )


def _start_time(container, first: av.VideoFrame, time_base: Fraction) -> Fraction:
    stamp = first.pts if first.pts is not None else first.dts
    start = stamp * time_base if stamp is not None else Fraction(0)
    for audio in container.streams.audio:
        if audio.start_time is not None and audio.time_base is not None:
            # A start before zero is the priming of the codec, which is never heard.
            start = min(start, max(audio.start_time * _fraction(audio.time_base), Fraction(0)))
    return start


def _duration(container, stream, time_base: Fraction) -> float | None:
    if stream.duration:
        return float(stream.duration * time_base)
    if container.duration:
        return container.duration / av.time_base
    return None


def _fraction(ratio) -> Fraction | None:
    """PyAV gives Fraction or its own rational type, depending on its version; None where unknown or zero."""
    if ratio is None or not ratio.denominator or not ratio.numerator:
        return None
    return Fraction(ratio.numerator, ratio.denominator)
