"""What a video file holds: opening it safely, and a description made from its headers and first picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import av.error
import av.stream
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import color
from keysync_jax.media.orientation import Orientation

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


def probe(path: str | os.PathLike) -> VideoInfo:
    """Describe a video file by opening it and decoding its first picture.

    Raises:
      KeySyncError: no such file, not a video, no video stream, or no picture in it.
    """
    with open_container(path) as container:
        stream = video_stream(container, path)
        first = _first_picture(container, stream)
        if first is None:
            raise KeySyncError(f"{path}: the video stream holds no picture that can be decoded; the file is empty or damaged")
        return _describe(path, container, stream, first)


def read_packets(container, stream) -> Iterator[tuple[av.Packet | None, str | None]]:
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


def open_container(path: str | os.PathLike):
    """Open a local video file; nothing else is ever fetched.

    Raises:
      KeySyncError: no such file, or none that FFmpeg takes for a video.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise KeySyncError(f"{name}: no such file")
    if os.path.isdir(name):
        raise KeySyncError(f"{name}: is a folder, not a video file")
    if os.path.getsize(name) == 0:
        raise KeySyncError(f"{name}: the file is empty")
    try:
        # Absolute, because FFmpeg takes what stands before a colon in a relative name for a protocol.
        container = av.open(os.path.abspath(name), options={"protocol_whitelist": "file"})
    except PermissionError as error:
        raise KeySyncError(f"{name}: no permission to read it") from error
    except av.error.FFmpegError as error:
        raise KeySyncError(f"{name}: not a complete video file ({error.strerror}); give .mp4, .mov, .mkv or the like") from error
    if _NOT_VIDEO_FORMATS & set(container.format.name.split(",")):
        container.close()
        raise KeySyncError(f"{name}: not a video file; give .mp4, .mov, .mkv or the like")
    return container


def video_stream(container, path):
    """First video stream that is not a cover picture."""
    pictures = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    for stream in streams:
        if stream.codec_context is not None:
            return stream
    raise KeySyncError(f"{path}: the video stream's codec is not known" if streams else f"{path}: has no video stream")


def _first_picture(container, stream) -> av.VideoFrame | None:
    for packet, error in read_packets(container, stream):
        if packet is None or error is not None:
            continue
        try:
            pictures = packet.decode()
        except av.error.FFmpegError:
            continue
        if pictures:
            return pictures[0]
    return None


def _describe(path, container, stream, first: av.VideoFrame) -> VideoInfo:
    time_base = _time_base(stream)
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
            start = min(start, max(audio.start_time * _time_base(audio), Fraction(0)))
    return start


def _duration(container, stream, time_base: Fraction) -> float | None:
    if stream.duration:
        return float(stream.duration * time_base)
    if container.duration:
        return container.duration / av.time_base
    return None


def _time_base(stream) -> Fraction:
    time_base = _fraction(stream.time_base)
    if time_base is None:
        raise KeySyncError(f"{stream.container.name}: the stream does not say what its timestamps count; the file is damaged")
    return time_base


def _fraction(ratio) -> Fraction | None:
    """PyAV gives Fraction or its own rational type, depending on its version; None where unknown or zero."""
    if ratio is None or not ratio.denominator or not ratio.numerator:
        return None
    return Fraction(ratio.numerator, ratio.denominator)
