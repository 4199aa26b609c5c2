"""Opening a media file safely, and which of its video streams is the film."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import av
import av.error
import av.stream
import av.video.stream

from keysync_jax.core.errors import KeySyncError, UsageError

# Formats that FFmpeg would "play" from a plain text file, or that fetch other files.
_NOT_VIDEO_FORMATS = {"tty", "bintext", "xbin", "idf", "adf", "hls", "concat", "sdp", "rtsp", "dash"}
_D = av.stream.Disposition
# A picture for the shelf, a strip of thumbnails, a still beside the film: none is what players show.
_NO_FILM = _D.attached_pic | _D.timed_thumbnails | _D.still_image
# Cameras store a preview in these beside the film itself.
_STILL_CODECS = {"mjpeg", "mjpegb", "png", "bmp", "gif", "tiff", "webp"}


UNREADABLE = "unreadable data, the rest of the file is lost"  # what `read_packets` says of it


class Choice(NamedTuple):
    """A video stream, and what is to be said where there were others.

    Attributes:
      stream: PyAV's stream.
      note: one line; "" where the file has no other.
    """

    stream: av.video.stream.VideoStream
    note: str


def refuse_address(path: str | os.PathLike) -> None:
    """Refuses what is no path but an address in a network, which nothing here fetches.

    Raises:
      KeySyncError: `path` is a URL.
    """
    scheme, mark, _ = os.fspath(path).partition("://")
    if mark and scheme.isalnum() and not os.path.exists(path):
        raise KeySyncError(f"{path}: an address, and nothing is fetched; download the file first and give its path")


def open_container(path: str | os.PathLike):
    """Open a local video file; nothing else is ever fetched.

    Raises:
      KeySyncError: no such file, or none that FFmpeg takes for a video.
    """
    name = os.fspath(path)
    refuse_address(name)
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


def choose_video_stream(container, path: str | os.PathLike, number: int | None = None) -> Choice:
    """The video stream to dub: the one asked for, else what players show.

    Covers, thumbnails and previews are left out. Of the rest the default one is taken, and the largest where none is, or several are.

    Args:
      container: the opened file.
      path: its name, for messages.
      number: position among the file's video streams, from 0.

    Raises:
      UsageError: there is no stream of that number.
      KeySyncError: no video stream, or none whose codec is known.
    """
    streams = list(container.streams.video)
    if number is not None:
        if not 0 <= number < len(streams):
            raise UsageError(f"{path}: --video-stream {number}: the file has {len(streams)} video stream(s), counted from 0")
        if streams[number].codec_context is None:
            raise KeySyncError(f"{path}: the codec of video stream {number} is not known")
        return Choice(streams[number], "")
    films = [stream for stream in streams if not stream.disposition & _NO_FILM]
    known = [stream for stream in films if stream.codec_context is not None]
    if not known:
        raise KeySyncError(f"{path}: the video stream's codec is not known" if films else f"{path}: has no video stream")
    moving = [stream for stream in known if stream.codec_context.name not in _STILL_CODECS and stream.frames != 1] or known
    flagged = [stream for stream in moving if stream.disposition & _D.default]
    # Of equal ones the first: `max` keeps it.
    chosen = max(flagged or moving, key=lambda stream: stream.codec_context.width * stream.codec_context.height)
    if len(films) < 2:
        return Choice(chosen, "")
    listed = ", ".join(f"{streams.index(each)}: {_words(each)}" for each in films)
    why = "the only one that is no preview" if len(moving) == 1 else "the default one" if len(flagged) == 1 else "the largest"
    return Choice(
        chosen, f"video stream {streams.index(chosen)}, {why}, of {len(films)} is dubbed ({listed}); --video-stream chooses another"
    )


def _words(stream) -> str:
    context = stream.codec_context
    return "unknown codec" if context is None else f"{context.name} {context.width}x{context.height}"


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
    yield None, UNREADABLE
    flush = av.Packet()
    flush.stream = stream
    yield flush, None
