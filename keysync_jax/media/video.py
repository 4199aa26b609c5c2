"""Video files as a stream of upright pictures with exact timestamps.

`probe` describes a file, `read` decodes it. Any container, codec, size, rotation tag, constant or variable frame rate that FFmpeg
(inside PyAV's wheel) can decode. Timestamps stay what the file says, as fractions; nothing is resampled to a frame rate here. Two
pictures are in memory at a time, apart from the few that the decoder keeps. Every pass over a file gives the same sequence.

A pass may begin in the middle, by seeking. Containers lie about what lies where (edit lists, decoding order, clocks that restart,
streams without an index), so a pass from the start first notes some keyframes, each with a checksum of its picture; a later pass
goes to one of these, and counts on from it only if the very same picture came out. Otherwise it reads from the start.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import av.error
import cv2
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import color
from keysync_jax.media.completeness import Tally, is_whole
from keysync_jax.media.streams import UNREADABLE, open_container, read_packets
from keysync_jax.media.video_info import VideoInfo, make_decoder, probe

# A timestamp that falls back by more than this is a restart of the clock (joined transport streams); less is a repeated stamp.
_CLOCK_RESTART_S = 1
_SHORT_RESTART_S = Fraction(1, 4)  # also a restart, where it leads back to the beginning: short files that were joined
_KEYFRAME_GAP_S = 0.5  # keyframes noted are at least this far apart: every picture of some codecs is one
# Seconds before a keyframe at which seeking aims: formats that seek by decoding time overshoot by the delay of reordered pictures.
_SEEK_BACK_S = (0, 1, 4)
_DAMAGED_DATA = "damaged data, decoded as far as it can be repaired"
_DAMAGED_PACKET = "damaged packet, skipped"
_DAMAGED_PICTURE = "damaged picture, used as the decoder repaired it"
_DAMAGE_NOTES = {_DAMAGED_DATA, _DAMAGED_PACKET, _DAMAGED_PICTURE, UNREADABLE}


@dataclass(frozen=True)
class Frame:
    """One decoded picture.

    Attributes:
      index: position in the sequence, from 0.
      pts: presentation time in ticks of `info.time_base`; strictly increasing.
      time: the same in seconds.
      av_frame: the picture as decoded, in `info.pix_fmt` and stored orientation; carries `pts`, and as `duration` how long it is shown.
      info: description of the file.
      alpha: its opacity uint16 `[h, w]` in stored orientation, up to `color.OPAQUE`; None for a file without.
    """

    index: int
    pts: int
    time: Fraction
    av_frame: av.VideoFrame
    info: VideoInfo
    alpha: np.ndarray | None = None

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


class Keyframe(NamedTuple):
    """A picture at which decoding can begin, as a pass from the start met it.

    Attributes:
      index: its position in the sequence.
      pts: its presentation time in ticks, as stored in the file.
      checksum: CRC-32 of its planes.
    """

    index: int
    pts: int
    checksum: int


def read(
    path: str | os.PathLike,
    info: VideoInfo | None = None,
    start: int = 0,
    keyframes: Sequence[Keyframe] = (),
    note_keyframes: bool = False,
    on_end: Callable[[VideoReader], None] = lambda _: None,
) -> VideoReader:
    """Decode a video from its first picture, or from picture `start`, to its last.

    Args:
      path: the file.
      info: what `probe` said; saves probing again.
      start: index of the first frame wanted. Frames have the index, time and content that they have when read from the start; a
        `start` behind the last frame gives none.
      keyframes: what an earlier pass over the same file noted; without them `start` is reached by decoding everything before it.
      note_keyframes: fill `VideoReader.keyframes`.
      on_end: called when a pass from the start is over, after the last frame; what it raises ends the pass.
    """
    return VideoReader(info if info is not None else probe(path), start, keyframes, note_keyframes, on_end)


class VideoReader:
    """Iterator over the frames of a file; `notes` says what had to be repaired. Close it, or use `with`, when stopping early.

    Missing timestamps are continued from the frame before, repeated ones move one tick on, and a clock that restarts is continued.
    Damaged data is concealed or skipped by the decoder. What it conceals depends on how its threads meet, so decoding starts strict
    on several threads, and at the first damage the file is decoded anew, leniently, on one thread: a damaged file, too, gives the
    same pictures on every pass.

    Attributes:
      info: description of the file.
      keyframes: where later passes may begin, as far as this one has come; only with `note_keyframes`.
      tally: what a pass from the start has met so far.
    """

    def __init__(
        self,
        info: VideoInfo,
        start: int = 0,
        keyframes: Sequence[Keyframe] = (),
        note_keyframes: bool = False,
        on_end: Callable[[VideoReader], None] = lambda _: None,
    ):
        self.info = info
        self.keyframes: list[Keyframe] = []
        self._note_keyframes = note_keyframes
        self._start = start
        self._origin = max((k for k in keyframes if 0 < k.index <= start), default=None)
        self._counts: dict[str, list] = {}
        self._said: list[str] = []
        self._on_end = on_end
        self.tally = Tally(0, 0, 0, info.start_time, False)
        self._pictures: Generator[Frame, None, None] = self._iterate()

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
        # Against the output's clock, which begins where the source does.
        zero = self.info.start_time
        lines = [f"{n} x {what}, first at {float(at - zero):.3f} s" for what, (n, at) in self._counts.items()]
        lines += self._said
        if self.info.choice:
            lines.insert(0, self.info.choice)
        if self.info.pix_fmt != self.info.source_pix_fmt:
            lines.insert(0, f"pixel format {self.info.source_pix_fmt} is edited and written as {self.info.pix_fmt}")
        return lines

    def say(self, note: str) -> None:
        """Add a line to `notes`."""
        self._said.append(note)

    def _note(self, what: str, at: Fraction) -> None:
        self._counts.setdefault(what, [0, at])[0] += 1

    def _iterate(self) -> Generator[Frame, None, None]:
        following, any_picture = self._start, False
        attempts: list[tuple[bool, Keyframe | None]] = [(True, None), (False, None)]
        if self._origin is not None:
            attempts.insert(0, (True, self._origin))
        for threaded, origin in attempts:
            try:
                for frame in self._timed(threaded, origin):
                    any_picture = True
                    if frame.index >= following:
                        following = frame.index + 1
                        yield frame
                break
            except _NotReachedError:
                continue
            except _DamageError as damage:
                self._counts.clear()
                if origin is None:  # else the pass from the start says what is wrong with the file
                    self._note(_DAMAGED_DATA, damage.at)
        if not any_picture:
            raise KeySyncError(f"{self.info.path}: no picture could be decoded; the file is damaged")
        if origin is None:
            self.tally = self.tally._replace(damaged=bool(self._counts.keys() & _DAMAGE_NOTES))
            self._on_end(self)

    def _timed(self, threaded: bool, origin: Keyframe | None) -> Iterator[Frame]:
        """Frames that know how long they are shown, in `av_frame.duration`."""
        self.tally = Tally(0, 0, 0, self.info.start_time, False)
        held: Frame | None = None
        for frame in self._stamped(threaded, origin):
            if held is not None:
                yield self._shown(held, frame.pts - held.pts)
            held = frame
        if held is not None:
            yield self._shown(held, self._last_hold(held))

    def _shown(self, frame: Frame, ticks: int) -> Frame:
        packet_ticks = frame.av_frame.duration or ticks
        frame.av_frame.duration = ticks
        # Where the file may break off, a picture is no longer than its packet says.
        end = frame.time + min(ticks, packet_ticks) * self.info.time_base
        self.tally = self.tally._replace(pictures=self.tally.pictures + 1, end=end)
        return frame

    def _last_hold(self, last: Frame) -> int:
        """Ticks that the last picture is shown: up to where the file says that the film ends, else as long as its packet says."""
        info = self.info
        if info.end_time is not None and info.end_is_own and not self._shifted and is_whole(info.path, info.container) is not False:
            ticks = round(info.end_time / info.time_base) - last.pts
            if ticks > 0:
                return ticks
        return last.av_frame.duration or self._step

    def _stamped(self, threaded: bool, origin: Keyframe | None) -> Iterator[Frame]:
        """Frames with strictly increasing timestamps, from the start or from a keyframe on."""
        info = self.info
        step = self._step = max(1, round(1 / (info.average_rate * info.time_base)))
        self._shifted = False
        restart = int(_CLOCK_RESTART_S / info.time_base)
        again = int(_SHORT_RESTART_S / info.time_base)
        last, shift, first = None, 0, None
        self.keyframes.clear()
        for index, picture in enumerate(self._decoded(threaded, origin), origin.index if origin else 0):
            stored, can_begin, begins_anew = picture.pts, picture.key_frame, False
            stamp = picture.pts if picture.pts is not None else picture.dts
            if stamp is None:
                stamp = 0 if last is None else last + step
                self._note("frame without a timestamp, placed one frame time after the one before", stamp * info.time_base)
            else:
                first = stamp if first is None else first
                # Back at the beginning, and not by a mere repetition.
                begins_anew = last is not None and abs(stamp - first) < again < last - stamp - shift
                stamp += shift
            if last is not None and (stamp < last - restart or begins_anew):
                shift += last + step - stamp
                stamp = last + step
                self._shifted = True
                self._note("restart of the clock, continued without a gap", stamp * info.time_base)
            elif last is not None and stamp <= last:
                stamp = last + 1
                self._note("repeated timestamp, moved on by the smallest step", stamp * info.time_base)
            duration = picture.duration
            alpha = self._alpha(picture)
            picture = self._as_described(picture, stamp * info.time_base)
            if origin is not None and last is None and _checksum(picture) != origin.checksum:
                raise _NotReachedError
            last = stamp
            picture.pts, picture.time_base, picture.duration = stamp, info.time_base, duration
            if self._note_keyframes and can_begin and stamp == stored:
                if not self.keyframes or (stamp - self.keyframes[-1].pts) * info.time_base >= _KEYFRAME_GAP_S:
                    self.keyframes.append(Keyframe(index, stamp, _checksum(picture)))
            yield Frame(index, stamp, stamp * info.time_base, picture, info, alpha)

    def _alpha(self, picture: av.VideoFrame) -> np.ndarray | None:
        info = self.info
        if not info.has_alpha:
            return None
        if not color.has_alpha(picture.format.name):
            return np.full((info.height, info.width), color.OPAQUE, np.uint16)
        alpha = color.alpha_of(picture)
        size = (info.width, info.height)
        return alpha if alpha.shape == size[::-1] else cv2.resize(alpha, size, interpolation=cv2.INTER_AREA)

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

    def _decoded(self, threaded: bool, origin: Keyframe | None) -> Iterator[av.VideoFrame]:
        """Pictures as the decoder gives them. With threads, the first sign of damage ends it with `_DamageError`."""
        with open_container(self.info.path) as container:
            stream = container.streams[self.info.stream]
            decoder = make_decoder(stream, self.info.decoder)
            if threaded:
                decoder.thread_type = "AUTO"
                decoder.options = {"err_detect": "explode"}
            else:
                decoder.thread_count = 1
            if origin is None:
                yield from self._checked(decoder, [], read_packets(container, stream), threaded)
            else:
                yield from self._checked(decoder, *self._sought(container, stream, decoder, origin), threaded)

    def _sought(self, container, stream, decoder, origin: Keyframe) -> tuple[list[av.VideoFrame], Iterator]:
        """The pictures of one packet from a keyframe on, and the packets that follow it."""
        for back in _SEEK_BACK_S:
            try:
                container.seek(origin.pts - int(back / self.info.time_base), stream=stream, backward=True, any_frame=False)
            except av.error.FFmpegError:  # not in this format
                break
            if decoder is not stream.codec_context:
                decoder.flush_buffers()  # seeking does it for the stream's own
            packets = read_packets(container, stream)
            for packet, error in packets:
                pictures = []
                if packet is not None and error is None:
                    # What comes out between a seek's landing and the keyframe may lack its references: it is not used.
                    with contextlib.suppress(av.error.FFmpegError):
                        pictures = _decode(decoder, packet)
                pictures = [p for p in pictures if p.pts is not None and p.pts >= origin.pts]
                if pictures and pictures[0].pts == origin.pts:
                    return pictures, packets
                if pictures:
                    break
        raise _NotReachedError

    def _checked(self, decoder, pictures: list[av.VideoFrame], packets: Iterator, threaded: bool) -> Iterator[av.VideoFrame]:
        """Decoded `pictures`, then those of the packets to come."""
        at = self.info.start_time
        stamps: list[int] = []  # of packets whose pictures have not come yet
        for packet, error in itertools.chain([(None, None)], packets):
            if packet is not None and error is None:
                if packet.size:
                    self.tally = self.tally._replace(packets=self.tally.packets + 1, bytes=self.tally.bytes + packet.size)
                    if packet.dts is not None:
                        heapq.heappush(stamps, packet.dts)
                try:
                    pictures = _decode(decoder, packet)
                except av.error.EOFError:
                    return
                except av.error.FFmpegError:
                    error = _DAMAGED_PACKET
            if error is not None:
                if threaded:
                    raise _DamageError(at)
                self._note(error, at)
                pictures = []
            for picture in pictures:
                if picture.is_corrupt:
                    if threaded:
                        raise _DamageError(at)
                    self._note(_DAMAGED_PICTURE, at)
                if self.info.stamps_are_decode_times and stamps:
                    picture.pts = heapq.heappop(stamps)  # the n-th picture shown has the n-th of the stamps
                if picture.pts is not None:
                    at = picture.pts * self.info.time_base
                yield picture


def _decode(decoder, packet: av.Packet) -> list[av.VideoFrame]:
    """Pictures that a packet lets out; the empty one drains the decoder."""
    return decoder.decode(packet if packet.size else None)


class _NotReachedError(Exception):
    """Seeking did not lead to the keyframe that is known to be there."""


class _DamageError(Exception):
    """Damaged data met while decoding on several threads, after the picture at `at` seconds."""

    def __init__(self, at: Fraction):
        super().__init__(f"damaged data after {float(at):.3f} s")
        self.at = at


def _checksum(picture: av.VideoFrame) -> int:
    """CRC-32 of the samples of a picture in an editable format, without the padding of its rows."""
    value = 0
    for plane in color.plane_views(picture):
        value = zlib.crc32(np.ascontiguousarray(plane).data, value)
    return value
