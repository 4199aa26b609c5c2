"""Writing the dubbed video: the source's timestamps, pixel format, colour tags and rotation, with the given sound.

The file is written under a temporary name beside its place and renamed when it is complete, so an exception leaves nothing behind.
The same frames give the same bytes: encoders run with a fixed number of threads and muxers without dates or random ids.

Encoders: H.264 for 8-bit and for 10-bit 4:2:2 and 4:4:4, HEVC for 10-bit 4:2:0, for 12 bits, gray and RGB. Neither has odd widths or
heights with subsampled chroma: 8-bit pictures of that kind are VP9, and where that does not go (.mov, more bits) they are written
with full chroma and a note. With `lossless` the same without loss, and FFV1 in .mkv, which takes everything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
from av.video.frame import PictureType

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import check_target, temporary_beside
from keysync_jax.media import color
from keysync_jax.media.soundtrack import Soundtrack
from keysync_jax.media.video import Frame, VideoInfo

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
DEFAULT_CRF = 16.0  # visually transparent; the whole picture is encoded once more, so it must not show
DEFAULT_PRESET = "fast"  # quality at a given CRF hardly depends on it; "medium" costs half as much again
_THREADS = 4  # fixed, because the bytes that x264 and x265 write depend on it
_X265_DELAY = 2  # frames that x265 reorders over
_HDR_SIDE_DATA = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL", "DYNAMIC_HDR_PLUS", "DOVI_METADATA")
_MOVIE_TIMESCALE = 48_000  # edit lists of .mp4 and .mov are at least this fine


@dataclass(frozen=True)
class Encoding:
    """How pictures are encoded: FFmpeg encoder, its pixel format and options, sample entry tag, and a note where the format changes."""

    codec: str
    pix_fmt: str
    options: dict[str, str]
    tag: str = ""
    note: str = ""


def check_output(path: str | os.PathLike) -> Path:
    """Refuse an output file that could not be written, before any work is done.

    Raises:
      UsageError, KeySyncError: the extension is not a supported container, or as `files.check_target`.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise UsageError(f"{path}: cannot write {path.suffix or 'a file without extension'}; use one of {', '.join(CONTAINERS)}")
    check_target(path, "the output")
    return path


def choose_encoding(
    info: VideoInfo, extension: str, crf: float = DEFAULT_CRF, lossless: bool = False, preset: str = DEFAULT_PRESET
) -> Encoding:
    """Encoder, pixel format and options for the source's pixel format in a container ('.mp4', '.mov' or '.mkv')."""
    fmt, pix_fmt = info.planes, info.pix_fmt
    note = ""
    odd = bool(info.width % (1 << fmt.log2_w) or info.height % (1 << fmt.log2_h))
    plain = pix_fmt.replace("yuvj", "yuv")
    if lossless and extension == ".mkv" and pix_fmt != "gbrp":  # FFV1 packs 8-bit RGB otherwise
        return Encoding("ffv1", plain, {"level": "3", "slicecrc": "1"})
    if odd and fmt.bits == 8 and extension != ".mov":
        options = {"deadline": "good", "cpu-used": "4", "row-mt": "1", "profile": "0" if fmt.log2_h else "1"}
        options |= {"lossless": "1"} if lossless else {"crf": f"{crf * 63 / 51:.0f}"}
        return Encoding("libvpx-vp9", plain, options, note=f"{info.width}x{info.height} with {plain} chroma is encoded as VP9")
    if odd:
        full_chroma = f"{'yuvj' if pix_fmt.startswith('yuvj') else 'yuv'}444p{'' if fmt.bits == 8 else f'{fmt.bits}le'}"
        note = f"{info.width}x{info.height} {pix_fmt} does not fit H.264 or HEVC; written as {full_chroma}"
        pix_fmt = full_chroma
    preset = "veryfast" if lossless else preset
    if fmt.family != "yuv" or fmt.bits == 12 or (fmt.bits == 10 and (fmt.log2_w, fmt.log2_h) == (1, 1)):
        rate = "lossless=1" if lossless else f"crf={crf:g}"
        options = {"preset": preset, "x265-params": f"log-level=none:info=0:frame-threads=2:{rate}"}
        return Encoding("libx265", pix_fmt, options, "hvc1", note)
    # The macroblock tree of x264 gives other bytes from run to run on CPUs with AVX-512 (seen at 160x96 and 320x240).
    options = {"preset": preset, "mbtree": "0"} | ({"qp": "0"} if lossless else {"crf": f"{crf:g}"})
    if info.interlaced and info.height % 4 == 0:
        options["flags"] = "+ildct+ilme"
    return Encoding("libx264", pix_fmt, options, "", note)


class VideoWriter:
    """Context manager that writes frames and sound; nothing stands under `path` until it has ended without an exception.

    Args:
      path: output file, .mp4, .mov or .mkv.
      info: description of the source; its size, time base, pixel format, colour tags and display matrix are taken over.
      crf: constant rate factor, lower is better and larger.
      lossless: encode without loss; planes come back bit-exact.
      preset: speed of x264 and x265.
      audio: sound or video file with the voice, None for none.
      audio_start: seconds on the video's clock where the sound begins; default the source's `start_time`.
      duration_s: seconds after `audio_start` where the sound is cut; default where the last frame ends.

    Raises:
      UsageError, KeySyncError: as `check_output`; sound that cannot be read; an encoder that refuses the pictures.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        info: VideoInfo,
        *,
        crf: float = DEFAULT_CRF,
        lossless: bool = False,
        preset: str = DEFAULT_PRESET,
        audio: str | os.PathLike | None = None,
        audio_start: Fraction | None = None,
        duration_s: float | None = None,
    ):
        self.path = check_output(path)
        self.info = info
        extension = self.path.suffix.lower()
        self.encoding = choose_encoding(info, extension, crf, lossless, preset)
        self.frames_written = 0
        self._audio_start = info.start_time if audio_start is None else audio_start
        self._duration = None if duration_s is None else Fraction(duration_s)
        self._temporary = temporary_beside(self.path)
        self._held: av.VideoFrame | None = None
        self._step = max(1, round(1 / (info.average_rate * info.time_base)))
        self._durations: dict[int, int] = {}
        self._packet: av.Packet | None = None
        self._first_dts = 0
        self._begin = self._end = info.start_time
        self._rounded = False
        self._hdr_lost = False
        self._soundtrack: Soundtrack | None = None
        try:
            # Absolute, because FFmpeg takes what stands before a colon in a relative name for a protocol.
            target = os.path.abspath(self._temporary)
            self._container = av.open(target, "w", format=CONTAINERS[extension], options=self._muxer_options(extension))
        except (av.error.FFmpegError, OSError) as error:
            raise KeySyncError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            self._stream = self._add_video_stream()
            if audio is not None:
                self._soundtrack = Soundtrack(self._container, extension, audio, self._audio_start)
        except BaseException:
            self.abort()
            raise

    def _muxer_options(self, extension: str) -> dict[str, str]:
        options = {"fflags": "+bitexact"}
        if extension == ".mkv":
            # Sound that begins before zero (codec priming) must not push the pictures later.
            return options | {"avoid_negative_ts": "disabled"}
        ticks = self.info.time_base.denominator
        edit_ticks = ticks * -(-_MOVIE_TIMESCALE // ticks)
        return options | {"video_track_timescale": str(ticks), "movie_timescale": str(edit_ticks), "movflags": "+faststart"}

    def _add_video_stream(self):
        info, encoding = self.info, self.encoding
        stream = self._container.add_stream(encoding.codec, rate=info.average_rate, options=dict(encoding.options))
        assert isinstance(stream, av.VideoStream)  # as every codec of ours gives
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = info.width, info.height, encoding.pix_fmt
        context.time_base = info.time_base
        context.thread_count, context.thread_type = _THREADS, "FRAME"
        context.sample_aspect_ratio = info.sample_aspect_ratio
        context.colorspace, context.color_range = info.color_space, info.color_range
        context.color_primaries, context.color_trc = info.color_primaries, info.color_transfer
        if encoding.tag and self.path.suffix.lower() != ".mkv":
            context.codec_tag = encoding.tag
        if info.display_matrix:
            stream.set_display_matrix(info.display_matrix)
        return stream

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def audio_note(self) -> str:
        """What was done with the sound; complete after `close`."""
        return self._soundtrack.note if self._soundtrack is not None else "no audio"

    @property
    def notes(self) -> list[str]:
        """What the container or the encoder could not keep of the source, one line each."""
        notes = [self.encoding.note] if self.encoding.note else []
        if self._rounded:
            notes.append("Matroska stores whole milliseconds: timestamps are rounded to the nearest")
        if self._hdr_lost:
            notes.append("HDR mastering metadata is not written; the colour tags (primaries, transfer, matrix) are")
        return notes

    def write(self, frame: Frame | av.VideoFrame) -> None:
        """Append a picture in `info.pix_fmt` and stored orientation, with its `pts` in `info.time_base`.

        Raises:
          KeySyncError: the encoder or the disk refuses it.
          ValueError: its timestamp is not after the one before.
        """
        picture = frame.av_frame if isinstance(frame, Frame) else frame
        if self._held is not None:
            self._step = _pts(picture) - _pts(self._held)
            if self._step <= 0:
                raise ValueError(f"frame at pts {picture.pts} comes after pts {self._held.pts}")
            self._encode(self._held, self._step)
        self._held = picture

    def close(self) -> None:
        """Finish the file and put it in its place."""
        try:
            if self._held is None:
                raise KeySyncError(f"{self.path}: no frame was written")
            self._encode(self._held, self._held.duration or self._step)
            self._held = None
            self._mux(lambda: self._stream.encode(None), last=True)
            if self._soundtrack is not None:
                end = self._end if self._duration is None else self._audio_start + self._duration
                self._soundtrack.finish(end)
                self._soundtrack.close()
            self._container.close()
            os.replace(self._temporary, self.path)
        except (av.error.FFmpegError, OSError) as error:
            self.abort()
            raise KeySyncError(f"{self.path}: could not be completed ({error.strerror})") from error
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Throw away what was written; harmless after `close`."""
        if self._soundtrack is not None:
            self._soundtrack.close()
        try:
            self._container.close()
        except (av.error.FFmpegError, OSError):
            pass  # the file is thrown away; what made it fail is what the caller gets to see
        finally:
            self._temporary.unlink(missing_ok=True)

    def _encode(self, picture: av.VideoFrame, duration: int) -> None:
        info = self.info
        stamp = _pts(picture)
        if picture.format.name != self.encoding.pix_fmt:
            same_layout = picture.format.name.replace("yuvj", "yuv") == self.encoding.pix_fmt
            if same_layout:
                picture = color.relabel(picture, self.encoding.pix_fmt)
            else:
                picture = picture.reformat(format=self.encoding.pix_fmt, threads=color.SWSCALE_THREADS)
            picture.pts = stamp
        picture.time_base = info.time_base
        picture.pict_type = PictureType.NONE  # else the encoder repeats the decoder's choice of key frames
        self._durations[stamp] = duration
        if not self.frames_written:
            self._begin = stamp * info.time_base
            self._hdr_lost = any(picture.side_data.get(name) is not None for name in _HDR_SIDE_DATA)
        self._end = (stamp + duration) * info.time_base
        if self.path.suffix.lower() == ".mkv" and (stamp * info.time_base * 1000).denominator != 1:
            self._rounded = True
        self.frames_written += 1
        self._mux(lambda: self._stream.encode(picture))

    def _mux(self, encode, last: bool = False) -> None:
        """Take packets from the encoder; one is kept back, because the last of all is treated differently."""
        try:
            for packet in encode():
                if self.frames_written <= _X265_DELAY and self.encoding.codec == "libx265":
                    packet.dts = packet.pts  # x265 leaves it unset when it never fills its reordering delay
                packet.duration = self._durations.pop(_pts(packet))
                if self._packet is None:
                    self._first_dts = _dts(packet)
                else:
                    self._mux_one(self._packet)
                self._packet = packet
            if last and self._packet is not None:
                if self.path.suffix.lower() != ".mkv":
                    # .mp4 and .mov take the length of a track from decoding times, whose last step is the last packet's duration.
                    length = round((self._end - self._begin) / self.info.time_base)
                    self._packet.duration = max(1, length - (_dts(self._packet) - self._first_dts))
                self._mux_one(self._packet)
        except (av.error.FFmpegError, OSError) as error:
            what = f"{self.encoding.codec}, {self.info.width}x{self.info.height} {self.encoding.pix_fmt}"
            raise KeySyncError(f"{self.path}: could not be written ({error.strerror}; {what})") from error

    def _mux_one(self, packet: av.Packet) -> None:
        reached = _dts(packet) * self.info.time_base
        self._container.mux(packet)
        if self._soundtrack is not None:
            limit = reached if self._duration is None else min(reached, self._audio_start + self._duration)
            self._soundtrack.advance(limit)


def _pts(item: av.VideoFrame | av.Packet) -> int:
    if item.pts is None:
        raise ValueError("a picture without a timestamp cannot be written")
    return item.pts


def _dts(packet: av.Packet) -> int:
    return _pts(packet) if packet.dts is None else packet.dts
