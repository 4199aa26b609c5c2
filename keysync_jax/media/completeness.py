"""Whether a file holds all the pictures that it promises: a copy that broke off half way is no success.

Three witnesses. The container's own structure says whether bytes are missing (boxes, chunks, segments that end beyond the file's end).
Its header says how many pictures there are, or when the last one ends. Where it cannot say (transport streams, a file that is still
being written), the source's own sound says how long the film is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import av
import av.error

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media.streams import open_container
from keysync_jax.media.video_info import VideoInfo

_LEAST_PICTURES = 5  # fewer may be missing: cameras and joined files miscount by one or two
_LEAST_SHARE = Fraction(1, 50)


class Tally(NamedTuple):
    """What a pass over a whole file met.

    Attributes:
      packets: packets of the video stream with data in them.
      bytes: their size.
      pictures: pictures that came out.
      end: when the last of them ends, in seconds on the file's clock.
      damaged: whether anything could not be read or decoded.
    """

    packets: int
    bytes: int
    pictures: int
    end: Fraction
    damaged: bool


class Shortfall(NamedTuple):
    """Pictures that came and pictures that were promised, and by what."""

    pictures: int
    promised: int
    witness: str

    def __str__(self) -> str:
        missing = self.promised - self.pictures
        return f"the file breaks off: {self.pictures} of {self.promised} pictures could be read, {missing} are missing ({self.witness})"


def shortfall(info: VideoInfo, tally: Tally) -> Shortfall | None:
    """More than 2 % of the pictures, and at least five, that a file promises and does not hold; None for a whole one.

    Damage inside a file of full length is no shortfall: pictures after it reach the end.

    Args:
      info: description of the file.
      tally: of a whole pass.
    """
    if info.end_time is not None:
        end, witness = info.end_time, "its header says so"
        if info.promised is not None and _few(info.promised - tally.packets, info.promised) and not tally.damaged:
            return None
        if is_whole(info.path, info.container) and not tally.damaged:
            return None  # the last picture is held, or another stream is longer
    else:
        heard = sound_end(info)
        if heard is None:
            return None
        end, witness = heard, f"its own sound ends at {float(heard - info.start_time):.2f} s"
    missing = round((end - tally.end) * info.average_rate)
    promised = tally.pictures + max(missing, 0)
    if info.promised is not None and info.end_time is not None and info.promised > tally.pictures:
        promised = info.promised
    if _few(missing, promised):
        return None
    return Shortfall(tally.pictures, promised, witness)


def refuse(path: str | os.PathLike, found: Shortfall) -> None:
    """Raises KeySyncError with both numbers."""
    raise KeySyncError(f"{path}: {found}; get the whole file, or dub what is there with --allow-damaged")


def _few(missing: int, promised: int) -> bool:
    return missing < _LEAST_PICTURES or missing <= _LEAST_SHARE * promised


def sound_end(info: VideoInfo) -> Fraction | None:
    """When the source's own sound ends, in seconds on the file's clock; None without sound. One pass over the packets."""
    end = None
    with open_container(info.path) as container:
        streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
        if not streams:
            return None
        demuxer = container.demux(streams)
        while True:
            try:
                packet = next(demuxer)
            except (StopIteration, av.error.FFmpegError):
                return end
            if packet.size and packet.pts is not None:
                until = Fraction(packet.pts + (packet.duration or 0)) * Fraction(packet.time_base)
                end = until if end is None else max(end, until)


def is_whole(path: str | os.PathLike, container: str) -> bool | None:
    """Whether the bytes reach as far as the container's structure says; None where it does not say.

    Args:
      path: the file.
      container: FFmpeg's name of its format.
    """
    names = set(container.split(","))
    for known, ends in _STRUCTURES.items():
        if known in names:
            with open(path, "rb") as file:
                size = os.path.getsize(path)
                end = ends(file, size)
                return None if end is None else end <= size
    return None


def _boxes_end(file: BinaryIO, size: int) -> int:
    """Where the last box of an ISO base media file ends (ISO/IEC 14496-12, 4.2)."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length == 0 or length < 8:  # to the end of the file, or padding
            return size
        at += length
    return at


def _riff_end(file: BinaryIO, size: int) -> int | None:
    """Where the last RIFF chunk of an AVI or WAV file ends; long AVI files have several."""
    at = 0
    while at + 12 <= size:
        file.seek(at)
        head = file.read(12)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF":
            break
        if length in (0, 0xFFFFFFFF):  # written as a stream
            return None
        at += 8 + length + length % 2
    return at - 1 if at == size + 1 else at  # the pad byte may be left out at the very end


def _segment_end(file: BinaryIO, size: int) -> int | None:
    """Where Matroska's segment ends (RFC 8794, RFC 9559); None where it was written with an unknown size."""
    at = 0
    while at + 12 <= size:
        file.seek(at)
        head = file.read(12)
        width = 9 - head[0].bit_length() if head[0] else 9
        if width > 4:
            return None
        name, head = head[:width], head[width:]
        wide = 9 - head[0].bit_length() if head[0] else 9
        if wide > 8:
            return None
        length = int.from_bytes(head[:wide], "big") & ((1 << 7 * wide) - 1)
        begin = at + width + wide
        if name == b"\x18\x53\x80\x67":
            return None if length == (1 << 7 * wide) - 1 else begin + length
        at = begin + length
    return None


_STRUCTURES: dict[str, Callable[[BinaryIO, int], int | None]] = {
    "mp4": _boxes_end,
    "avi": _riff_end,
    "wav": _riff_end,
    "matroska": _segment_end,
}
