"""Writing the dubbed video: the source's pictures on a clock that begins with them, with the given sound and what else the source holds.

Time zero of the output is the earliest of the source's picture and its own sound; every stamp is the source's less that. Colour tags,
rotation, pixel shape and field order are taken over; which encoder and pixel format, says `encoding`.

The file is written under a temporary name beside its place and renamed when it is complete, so an exception leaves nothing behind.
The same frames give the same bytes: encoders run with a fixed number of threads and muxers without dates or random ids.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.video.frame import PictureType

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import check_target, temporary_beside
from keysync_jax.media.conversion import convert
from keysync_jax.media.encoding import CONTAINERS, DEFAULT_PRESET, choose_encoding
from keysync_jax.media.extras import Extras
from keysync_jax.media.provenance import Mark
from keysync_jax.media.soundtrack import Soundtrack
from keysync_jax.media.video import Frame, VideoInfo

_THREADS = 4  # fixed, because the bytes that x264 and x265 write depend on it
_X265_DELAY = 2  # frames that x265 reorders over
_MOVIE_TIMESCALE = 48_000  # edit lists of .mp4 and .mov are at least this fine
_FINE_TICKS = 90_000  # a second, where the clock's zero is no whole tick of the source
_MILLISECONDS = {"matroska", "webm"}
_TOP_FIRST, _BOTTOM_FIRST = 2, 3  # AVFieldOrder


def check_output(path: str | os.PathLike) -> Path:
    """Refuse an output file that could not be written, before any work is done.

    Raises:
      UsageError, KeySyncError: the extension is not a supported container, or as `files.check_target`.
    """
    path = Path(path)
    if str(path) in ("-", "/dev/stdout"):
        raise UsageError(f"{path}: the output must be a file, since its beginning is written last; name one that ends in .mp4")
    if path.suffix.lower() not in CONTAINERS:
        raise UsageError(f"{path}: cannot write {path.suffix or 'a file without extension'}; use one of {', '.join(CONTAINERS)}")
    check_target(path, "the output")
    return path


class VideoWriter:
    """Context manager that writes frames and sound; nothing stands under `path` until it has ended without an exception.

    Attributes:
      seal: how the file was signed, in words, "" where it was not; complete after `close`.

    Args:
      path: output file, one of `encoding.CONTAINERS`; a link stays one, and the file behind it is written.
      info: description of the source; its size, time base, pixel format, colour tags and display matrix are taken over.
      crf: constant rate factor, lower is better and larger; default what the source's bit rate allows (`choose_encoding`).
      lossless: encode without loss; planes come back bit-exact.
      preset: speed of x264 and x265.
      codec, pix_fmt: as `choose_encoding` takes them.
      audio: sound or video file with the voice, None for none.
      audio_stream: position among that file's audio streams, from 0; default the one that players choose.
      audio_start: seconds on the output's clock where the sound begins.
      duration_s: seconds after `audio_start` where the sound is cut; default where the last frame ends.
      language: of the voice (ISO 639-2), where its file does not say it.
      extras: also take over the source's titles, chapters, timecode, subtitles and data.
      keep_audio: also take over the source's own sound, as further tracks.
      mark: what the file says of itself.

    Raises:
      UsageError, KeySyncError: as `check_output` and `choose_encoding`; sound that cannot be read; an encoder that refuses the pictures.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        info: VideoInfo,
        *,
        crf: float | None = None,
        lossless: bool = False,
        preset: str = DEFAULT_PRESET,
        codec: str | None = None,
        pix_fmt: str | None = None,
        audio: str | os.PathLike | None = None,
        audio_stream: int | None = None,
        audio_start: Fraction = Fraction(0),
        duration_s: float | None = None,
        language: str | None = None,
        extras: bool = False,
        keep_audio: bool = False,
        mark: Mark | None = None,
    ):
        self.path = check_output(path)
        self.info = info
        self._extension = self.path.suffix.lower()
        self._muxer = CONTAINERS[self._extension]
        self.encoding = choose_encoding(info, self._extension, crf, lossless, preset, codec, pix_fmt)
        self.frames_written = 0
        self.seal, self._mark = "", mark
        self._audio_start = audio_start
        self._duration = None if duration_s is None else Fraction(duration_s)
        self._target = self.path.resolve()
        self._temporary = temporary_beside(self._target)
        self._held: tuple[av.VideoFrame, np.ndarray | None] | None = None
        self._step = max(1, round(1 / (info.average_rate * info.time_base)))
        self._set_clock()
        self._durations: dict[int, int] = {}
        self._packet: av.Packet | None = None
        self._last_dts: int | None = None
        self._first_dts = 0
        self._begin = self._end = 0
        self._rounded = False
        self._soundtrack: Soundtrack | None = None
        self._extras: Extras | None = None
        try:
            # Absolute, because FFmpeg takes what stands before a colon in a relative name for a protocol.
            target = os.path.abspath(self._temporary)
            self._container = av.open(target, "w", format=self._muxer, options=self._muxer_options())
        except (av.error.FFmpegError, OSError) as error:
            raise KeySyncError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            self._stream = self._add_video_stream()
            if audio is not None:
                self._soundtrack = Soundtrack(
                    self._container, self._extension, audio, self._audio_start, number=audio_stream, language=language
                )
            if extras:
                self._extras = Extras(self._container, self._extension, info, self._stream, keep_audio)
            if mark is not None:
                mark.describe(self._container.metadata)
        except BaseException:
            self.abort()
            raise

    def _set_clock(self) -> None:
        """Ticks of the output: the source's, or parts of them where the clock's zero lies between two."""
        tick, zero = self.info.time_base, self.info.start_time
        self._finer = 1 if (zero / tick).denominator == 1 else -(-_FINE_TICKS * tick.numerator // tick.denominator)
        self._tick = tick / self._finer
        self._zero = round(zero / self._tick)

    def _muxer_options(self) -> dict[str, str]:
        options = {"fflags": "+bitexact"}
        if self._muxer in _MILLISECONDS:
            # Sound that begins before zero (codec priming) must not push the pictures later.
            return options | {"avoid_negative_ts": "disabled"}
        ticks = self._tick.denominator
        edit_ticks = ticks * -(-_MOVIE_TIMESCALE // ticks)
        return options | {"video_track_timescale": str(ticks), "movie_timescale": str(edit_ticks), "movflags": "+faststart"}

    def _add_video_stream(self):
        info, encoding = self.info, self.encoding
        stream = self._container.add_stream(encoding.codec, rate=info.average_rate, options=dict(encoding.options))
        assert isinstance(stream, av.VideoStream)  # as every codec of ours gives
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = info.width, info.height, encoding.pix_fmt
        context.time_base = self._tick
        context.thread_count, context.thread_type = 1 if encoding.one_thread else _THREADS, "FRAME"
        context.sample_aspect_ratio = info.sample_aspect_ratio
        context.colorspace, context.color_range = encoding.color_space, encoding.color_range
        context.color_primaries, context.color_trc = info.color_primaries, info.color_transfer
        if encoding.tag and self._muxer not in _MILLISECONDS:
            context.codec_tag = encoding.tag
        if info.interlaced:
            context.field_order = _BOTTOM_FIRST if info.bottom_first else _TOP_FIRST
        if encoding.keeps_alpha and self._muxer in _MILLISECONDS:
            stream.metadata["alpha_mode"] = "1"
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
        """What changed or could not be kept of the source, one line each."""
        notes = list(self.encoding.notes)
        if self._rounded:
            notes.append("Matroska stores whole milliseconds: timestamps are rounded to the nearest")
        mastering = self.info.mastering
        if (mastering.display or mastering.light_level) and self.encoding.codec not in ("libx264", "libx265"):
            notes.append("HDR mastering metadata is not written by this codec; the colour tags (primaries, transfer, matrix) are")
        if mastering.dynamic:
            notes.append(f"dynamic HDR metadata ({', '.join(mastering.dynamic)}) is not written: it describes the source's own pictures")
        if self._extras is not None:
            notes += self._extras.notes
        return notes

    def write(self, frame: Frame | av.VideoFrame, alpha: np.ndarray | None = None) -> None:
        """Append a picture in `info.pix_fmt` and stored orientation, with its `pts` in `info.time_base`.

        Args:
          frame: the picture; its `duration`, if set, says how long the last one is shown.
          alpha: its opacity uint16 `[h, w]` up to `color.OPAQUE`; a `Frame` brings its own.

        Raises:
          KeySyncError: the encoder or the disk refuses it.
          ValueError: its timestamp is not after the one before.
        """
        picture = frame.av_frame if isinstance(frame, Frame) else frame
        alpha = frame.alpha if isinstance(frame, Frame) and alpha is None else alpha
        if self._held is not None:
            held, held_alpha = self._held
            self._step = _pts(picture) - _pts(held)
            if self._step <= 0:
                raise ValueError(f"frame at pts {picture.pts} comes after pts {held.pts}")
            self._encode(held, held_alpha, self._step)
        self._held = picture, alpha

    def close(self) -> None:
        """Finish the file and put it in its place."""
        try:
            if self._held is None:
                raise KeySyncError(f"{self.path}: no frame was written")
            last, alpha = self._held
            self._encode(last, alpha, last.duration or self._step)
            self._held = None
            self._mux(lambda: self._stream.encode(None), last=True)
            end = self._end * self._tick
            if self._soundtrack is not None:
                self._soundtrack.finish(end if self._duration is None else self._audio_start + self._duration)
                self._soundtrack.close()
            if self._extras is not None:
                self._extras.finish(end)
                self._extras.close()
            self._container.close()
            if self._mark is not None and self._mark.signature is not None:
                self.seal = self._mark.signature.seal(self._temporary, self._target, self._mark)
            os.replace(self._temporary, self._target)
        except (av.error.FFmpegError, OSError) as error:
            self.abort()
            raise KeySyncError(f"{self.path}: could not be completed ({error.strerror})") from error
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Throw away what was written; harmless after `close`."""
        for part in (self._soundtrack, self._extras):
            if part is not None:
                part.close()
        try:
            self._container.close()
        except (av.error.FFmpegError, OSError):
            pass  # the file is thrown away; what made it fail is what the caller gets to see
        finally:
            self._temporary.unlink(missing_ok=True)

    def _encode(self, picture: av.VideoFrame, alpha: np.ndarray | None, duration: int) -> None:
        info, encoding = self.info, self.encoding
        stamp = _pts(picture) * self._finer - self._zero
        if picture.format.name != encoding.pix_fmt:
            picture = convert(picture, info.planes, encoding.pix_fmt, encoding.color_space, alpha)
        picture.pts, picture.time_base = stamp, self._tick
        picture.pict_type = PictureType.NONE  # else the encoder repeats the decoder's choice of key frames
        self._durations[stamp] = duration * self._finer
        if not self.frames_written:
            self._begin = stamp
        self._end = stamp + duration * self._finer
        if self._muxer in _MILLISECONDS and (stamp * self._tick * 1000).denominator != 1:
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
                if self._muxer not in _MILLISECONDS:
                    self._place_last(self._packet)
                self._mux_one(self._packet)
        except (av.error.FFmpegError, OSError) as error:
            what = f"{self.encoding.codec}, {self.info.width}x{self.info.height} {self.encoding.pix_fmt}"
            raise KeySyncError(f"{self.path}: could not be written ({error.strerror}; {what})") from error

    def _place_last(self, packet: av.Packet) -> None:
        """Let a track of .mp4 or .mov be as long as its pictures are shown.

        Its length counts from decoding times and ends with the last packet's duration. The last packet decoded need not be the last
        picture shown, so it keeps its own duration, and is decoded as much earlier as the track would be longer.
        """
        own = packet.duration or 0
        wanted = self._first_dts + (self._end - self._begin) - own
        earliest = _dts(packet) if self._last_dts is None else self._last_dts + 1
        packet.dts = max(earliest, min(wanted, _pts(packet)))

    def _mux_one(self, packet: av.Packet) -> None:
        self._last_dts = _dts(packet)
        reached = self._last_dts * self._tick
        self._container.mux(packet)
        if self._soundtrack is not None:
            self._soundtrack.advance(reached if self._duration is None else min(reached, self._audio_start + self._duration))
        if self._extras is not None:
            self._extras.advance(reached)


def _pts(item: av.VideoFrame | av.Packet) -> int:
    if item.pts is None:
        raise ValueError("a picture without a timestamp cannot be written")
    return item.pts


def _dts(packet: av.Packet) -> int:
    return _pts(packet) if packet.dts is None else packet.dts
