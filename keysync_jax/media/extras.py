"""What a file holds beside its pictures: titles, chapters, timecode, subtitles, data, and its own sound where it is wanted.

All of it is moved onto the output's clock. Packets are copied; text subtitles change their wrapping where the container has another one.
What the output's container cannot hold is named.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import av
import av.error
import av.stream

from keysync_jax.media.encoding import CONTAINERS
from keysync_jax.media.soundtrack import Soundtrack
from keysync_jax.media.streams import open_container
from keysync_jax.media.video_info import VideoInfo

# Of the file and its encoder, not of the film.
_NOT_OF_THE_FILM = {"major_brand", "minor_version", "compatible_brands", "encoder", "software", "duration", "timecode"}
_OF_THE_STATISTICS = re.compile(r"(bps|number_of_frames|number_of_bytes|_statistics_.*|duration)(-\w+)?$", re.IGNORECASE)
_TIMECODE = re.compile(r"(\d\d):(\d\d):(\d\d)([:;.])(\d\d)$")
# Text that only needs another wrapping: what the container calls it.
_TEXT = {"subrip", "mov_text", "webvtt", "text"}
_TEXT_IN = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}


class Extras:
    """Streams and descriptions of a source inside an output container, fed as the video advances.

    Args:
      output: the output container, before anything is written to it.
      extension: its file name extension.
      info: the source.
      stream: the output's video stream, which gets the source's tags.
      keep_audio: take over the source's own sound.

    Attributes:
      notes: what is kept, changed and left out, one line each.
    """

    def __init__(self, output, extension: str, info: VideoInfo, stream, keep_audio: bool):
        self.notes: list[str] = []
        self._output, self._muxer, self._info = output, CONTAINERS[extension], info
        self._kept: dict[int, tuple[Any, str, str]] = {}  # by index in the source: output stream, its codec, and the source's
        self._sounds: list[Soundtrack] = []
        self._input = open_container(info.path)
        try:
            self._describe(stream)
            self._add_streams()
            if keep_audio:
                self._add_sound(extension)
            self._packets: Iterator[Any] = self._demuxed()
            self._waiting = next(self._packets, None)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the source file."""
        self._input.close()
        for sound in self._sounds:
            sound.close()

    def advance(self, until: Fraction) -> None:
        """Write what begins before `until` seconds on the output's clock."""
        for sound in self._sounds:
            sound.advance(until)
        while self._waiting is not None:
            packet = self._waiting
            if packet.pts * Fraction(packet.time_base) - self._info.start_time >= until:
                return
            self._write(packet)
            self._waiting = next(self._packets, None)

    def finish(self, end: Fraction) -> None:
        """Write the rest, up to the end of the video."""
        for sound in self._sounds:
            sound.finish(end)
        self.advance(end)

    def _describe(self, stream) -> None:
        self._output.metadata.update(_of_the_film(self._input.metadata))
        stream.metadata.update(_of_the_film(self._input.streams[self._info.stream].metadata))
        self._add_chapters()
        if code := self._timecode():
            stream.metadata["timecode"] = code

    def _add_chapters(self) -> None:
        moved = []
        for chapter in self._input.chapters():
            tick: Fraction = chapter["time_base"] or Fraction(1, 1000)
            zero = round(self._info.start_time / tick)
            if (end := chapter["end"] - zero) > 0:
                moved.append({**chapter, "start": max(0, chapter["start"] - zero), "end": end})
        if moved:
            self._output.set_chapters(moved)

    def _timecode(self) -> str:
        """The timecode of the output's time zero; "" where the source has none."""
        info = self._info
        film = self._input.streams[info.stream]
        places: list[tuple[Any, Any, Any]] = [(stream.metadata, stream.start_time, stream.time_base) for stream in self._input.streams.data]
        places += [(film.metadata, film.start_time, film.time_base), (self._input.metadata, film.start_time, film.time_base)]
        for metadata, start, tick in places:
            code = next((value for key, value in metadata.items() if key.lower() == "timecode"), "")
            if _TIMECODE.match(code):
                begins = start * Fraction(tick) if start is not None else info.start_time
                return moved_timecode(code, info.start_time - begins, info.average_rate)
        return ""

    def _add_streams(self) -> None:
        left_out: list[str] = []
        for stream in self._input.streams:
            if stream.index == self._info.stream or stream.type == "audio":
                continue
            if stream.type == "video":
                if stream.disposition & av.stream.Disposition.attached_pic:
                    left_out.append("cover picture")
                continue  # which of several is dubbed has been said
            if _is_timecode(stream) or self._is_chapter_text(stream):
                continue
            if stream.type == "attachment":
                left_out.append(f"attachment {stream.metadata.get('filename', stream.index)}")
                continue
            codec = _codec_name(stream)
            wanted = _TEXT_IN[self._muxer] if codec in _TEXT and not self._holds(stream) else codec
            if wanted == codec and not self._holds(stream):
                left_out.append(f"{stream.type} stream {stream.index} ({codec})")
                continue
            made = self._output.add_stream_from_template(stream) if wanted == codec else self._output.add_mux_stream(wanted)
            made.metadata.update(_of_the_film(stream.metadata))
            made.disposition = stream.disposition
            self._kept[stream.index] = made, wanted, codec
            if wanted != codec:
                self.notes.append(f"subtitles {stream.index} ({codec}) are written as {wanted}")
        if left_out:
            self.notes.append(f"not kept, since the output's container does not hold it: {', '.join(left_out)}")

    def _holds(self, stream) -> bool:
        """Whether the output's container takes a stream as it is: tried on an empty file in memory."""
        try:
            with av.open(io.BytesIO(), "w", format=self._muxer) as trial:
                trial.add_stream_from_template(stream)
                trial.start_encoding()
        except (av.error.FFmpegError, ValueError):
            return False
        return True

    def _is_chapter_text(self, stream) -> bool:
        """Whether a track holds the names of chapters: QuickTime has one, which the muxer writes anew."""
        chapters = self._input.chapters()
        if not chapters or "mp4" not in self._input.format.name or _codec_name(stream) not in ("bin_data", "mov_text"):
            return False
        names = {chapter["metadata"].get("title", "").encode() for chapter in chapters}
        with open_container(self._info.path) as again:
            same = again.streams[stream.index]
            texts = {_plain(bytes(packet)) for packet in again.demux(same) if packet.size}
        return bool(texts) and texts <= names

    def _add_sound(self, extension: str) -> None:
        for number, stream in enumerate(self._input.streams.audio):
            if stream.codec_context is None:
                self.notes.append(f"audio stream {number} of the source is not kept: its codec is not known")
                continue
            sound = Soundtrack(
                self._output, extension, self._info.path, Fraction(0), number=number, language=stream.metadata.get("language"), main=False
            )
            self._sounds.append(sound)
            self.notes.append(f"the source's own sound {number} is kept as a further track: {sound.note}")

    def _demuxed(self) -> Iterator[Any]:
        streams = [self._input.streams[index] for index in self._kept]
        if not streams:
            return
        demuxer = self._input.demux(streams)
        while True:
            try:
                packet = next(demuxer)
            except (StopIteration, av.error.FFmpegError):
                return
            if packet.size and packet.pts is not None:
                yield packet

    def _write(self, packet: Any) -> None:
        made, codec, given = self._kept[packet.stream.index]
        tick = Fraction(packet.time_base)
        stamp = packet.pts - round(self._info.start_time / tick)
        if stamp < 0:
            return  # before the film
        if codec != given:
            data = _rewrapped(bytes(packet), given, codec)
            if not data:
                return  # the empty text that says that nothing is shown
            changed = av.Packet(data)
            changed.duration, changed.time_base, changed.is_keyframe = packet.duration, tick, True
            packet = changed
        packet.pts = packet.dts = stamp
        packet.stream = made
        self._output.mux(packet)


def moved_timecode(code: str, by: Fraction, rate: Fraction) -> str:
    """A timecode `HH:MM:SS:FF` some seconds later (or earlier), at a frame rate; with `;` it drops two or four numbers a minute.

    SMPTE ST 12-1.
    """
    hours, minutes, seconds, mark, frames = _TIMECODE.match(code).groups()  # type: ignore[union-attr]
    whole = round(rate)
    drop = 2 * whole // 30 if mark != ":" and whole % 30 == 0 else 0
    total = ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * whole + int(frames)
    past = int(hours) * 60 + int(minutes)
    total -= drop * (past - past // 10)
    day = 24 * 3600 * whole - drop * (1440 - 144)
    total = (total + round(by * rate)) % day
    if drop:
        tens, rest = divmod(total, 600 * whole - 9 * drop)
        total += 9 * drop * tens + (drop * ((rest - drop) // (60 * whole - drop)) if rest >= drop else 0)
    seconds_past, frame = divmod(total, whole)
    return f"{seconds_past // 3600:02}:{seconds_past // 60 % 60:02}:{seconds_past % 60:02}{mark}{frame:02}"


def _of_the_film(metadata: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value for key, value in metadata.items() if key.lower() not in _NOT_OF_THE_FILM and not _OF_THE_STATISTICS.match(key.lower())
    }


def _codec_name(stream) -> str:
    context = stream.codec_context
    return context.codec.canonical_name if context is not None else getattr(stream, "name", None) or "unknown"


def _is_timecode(stream) -> bool:
    return any(key.lower() == "timecode" for key in stream.metadata)


def _plain(data: bytes) -> bytes:
    """The text of a sample of timed text, whose length stands before it (3GPP TS 26.245)."""
    return data[2 : 2 + int.from_bytes(data[:2], "big")]


def _rewrapped(data: bytes, given: str, wanted: str) -> bytes:
    """A text subtitle in the wrapping of another codec; b"" for no text."""
    text = _plain(data) if given == "mov_text" else data
    if wanted != "mov_text" or not text:
        return text
    plain = re.sub(rb"<[^>]*>|\{\\[^}]*\}", b"", text)
    return len(plain).to_bytes(2, "big") + plain
