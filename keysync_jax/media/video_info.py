"""What a video file holds: a description made from its headers and first picture."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.error
import av.stream
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import color, hdr
from keysync_jax.media.orientation import Orientation
from keysync_jax.media.streams import choose_video_stream, open_container, read_packets

_DEFAULT_RATE = Fraction(25)  # of a stream that states none (single pictures)
# Formats whose header says when the film ends; for others FFmpeg looks at what is there, or guesses from the bit rate.
_STATES_END = {"mp4", "matroska", "avi", "asf", "flv", "mxf"}
_BOTTOM_FIRST = {3, 4}  # AVFieldOrder: BB, and TB, which is stored top first and shown bottom first
_ALPHA_DECODERS = {"vp9": "libvpx-vp9", "vp8": "libvpx"}  # FFmpeg's own decoders leave the transparency of WebM out


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
      stream: index of the stream in the file.
      choice: what to say where the file has several video streams, "" else.
      container: FFmpeg's name of the file's format.
      profile: of the codec, as FFmpeg calls it; "" where unknown.
      bottom_first: of an interlaced picture: the lower field is shown first.
      end_time: when the film ends by the file's header, in seconds on the file's clock; None where the container cannot say.
      end_is_own: whether `end_time` is of this stream alone, and exact.
      promised: number of pictures by the file's header, None where it does not say.
      bit_rate: of the pictures, bits per second; None where it is not known (yet).
      stamps_are_decode_times: timestamps follow the order of decoding (AVI with B pictures).
      has_alpha: whether pictures have a transparency.
      decoder: name of the decoder that is needed, "" for FFmpeg's own choice.
      mastering: HDR mastering metadata.
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
    stream: int = 0
    choice: str = ""
    container: str = ""
    profile: str = ""
    bottom_first: bool = False
    end_time: Fraction | None = None
    end_is_own: bool = False
    promised: int | None = None
    bit_rate: int | None = None
    stamps_are_decode_times: bool = False
    has_alpha: bool = False
    decoder: str = ""
    mastering: hdr.Mastering = hdr.Mastering()


def probe(path: str | os.PathLike, video_stream: int | None = None) -> VideoInfo:
    """Describe a video file by opening it and decoding its first picture.

    Args:
      path: the file.
      video_stream: position among its video streams, from 0; default the one that players show.

    Raises:
      UsageError: no video stream of that number.
      KeySyncError: no such file, not a video, no video stream, or no picture in it.
    """
    with open_container(path) as container:
        stream, choice = choose_video_stream(container, path, video_stream)
        decoder = _ALPHA_DECODERS.get(stream.codec_context.name, "") if _tag(stream.metadata, "alpha_mode") == "1" else ""
        first = _first_picture(container, stream, make_decoder(stream, decoder))
        if first is None:
            raise KeySyncError(f"{path}: the video stream holds no picture that can be decoded; the file is empty or damaged")
        return _describe(path, container, stream, first, choice, decoder)


def make_decoder(stream, name: str) -> Any:
    """What decodes a stream's packets: its own context, or one of the decoder named."""
    if not name:
        return stream.codec_context
    context = av.CodecContext.create(name, "r")
    context.extradata = stream.codec_context.extradata
    return context


def _first_picture(container, stream, decoder) -> av.VideoFrame | None:
    for packet, error in read_packets(container, stream):
        if packet is None or error is not None:
            continue
        try:
            pictures = decoder.decode(packet if packet.size else None)
        except av.error.FFmpegError:
            continue
        if pictures:
            return pictures[0]
    return None


def _describe(path, container, stream, first: av.VideoFrame, choice: str, decoder: str) -> VideoInfo:
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
    end, own = _end_time(container, stream, time_base)
    context = stream.codec_context
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
        codec=context.name,
        color_space=int(first.colorspace),
        color_range=color_range,
        color_primaries=int(first.color_primaries),
        color_transfer=int(first.color_trc),
        duration_s=duration,
        frames=stream.frames or (round(duration * rate) if duration else None),
        has_audio=bool(container.streams.audio),
        start_time=_start_time(container, stream, first, time_base),
        sample_aspect_ratio=_fraction(stream.sample_aspect_ratio) or Fraction(1),
        interlaced=bool(first.interlaced_frame),
        planes=color.plane_format(pix_fmt, int(first.colorspace), color_range, first.width, first.height),
        stream=stream.index,
        choice=choice,
        container=container.format.name,
        profile=context.profile or "",
        bottom_first=int(context.field_order) in _BOTTOM_FIRST or context.name == "dvvideo",  # DV is always so and does not say it
        end_time=end,
        end_is_own=own,
        promised=stream.frames or None if end is not None else None,
        bit_rate=context.bit_rate or None if "mp4" in container.format.name else None,  # elsewhere it is a wish, not a measurement
        stamps_are_decode_times=container.format.name == "avi" and bool(context.has_b_frames),
        has_alpha=bool(decoder) or _has_alpha(first, context.name),
        decoder=decoder,
        mastering=hdr.of_picture(first),
    )


def _has_alpha(first: av.VideoFrame, codec: str) -> bool:
    if not color.has_alpha(first.format.name):
        return False
    # GIF and palettes are always decoded with a transparency; most have none.
    return codec not in ("gif", "bmp") and not first.format.has_palette or bool((color.alpha_of(first) < color.OPAQUE).any())


def _end_time(container, stream, time_base: Fraction) -> tuple[Fraction | None, bool]:
    """When the film ends by the header, and whether that is of this stream alone and exact."""
    names = set(container.format.name.split(","))
    if not names & _STATES_END or "mp4" in names and not stream.frames:  # fragments: nothing is promised
        return None, False
    start = stream.start_time * time_base if stream.start_time is not None else Fraction(0)
    if "avi" in names and stream.frames and stream.average_rate:  # FFmpeg shortens the duration of a file that breaks off
        return start + stream.frames / Fraction(stream.average_rate), True
    if stream.duration:
        return start + stream.duration * time_base, bool(names & {"mp4", "avi"})
    if stated := _tag(stream.metadata, "duration"):
        if found := re.match(r"(\d+):(\d+):(\d+(?:\.\d+)?)$", stated):
            hours, minutes, seconds = found.groups()
            length = 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
            # mkvmerge counts from the stream's first picture, FFmpeg from zero.
            return length + (start if _tag(stream.metadata, "_statistics_writing_app") else 0), True
    if container.duration:
        return Fraction(container.duration, av.time_base), len(container.streams) == 1
    return None, False


def _tag(metadata, name: str) -> str:
    """A tag in whatever case it is written, with or without a language behind it; "" where there is none."""
    return next((value for key, value in metadata.items() if key.lower().split("-")[0] == name), "")


def _start_time(container, stream, first: av.VideoFrame, time_base: Fraction) -> Fraction:
    stamp = first.pts if first.pts is not None else first.dts
    if container.format.name == "avi" and stream.start_time is not None:  # a picture's stamp may be when it is decoded
        stamp = stream.start_time
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
