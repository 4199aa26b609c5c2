"""Audio of any file as mono samples on the file's own clock.

Decoding is FFmpeg's (inside PyAV's wheel), so any container and codec that it knows will do, the sound track of a video included.
Which channels are heard says `voice_channels`; the rate is converted by soxr. A file is decoded in small blocks: memory is the result
(64 kB a second at 16 kHz), not the source; sound of several channels is decoded twice.

Time zero is the start of the file's clock, as for the pictures in `keysync_jax.media.video`: the first picture or the first sample,
whichever comes first. Encoder delay is not sound: where the container or codec states it (MP4's edit list, LAME's header, Opus'
pre-skip), FFmpeg drops it, and what is left starts at its stated time.
"""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import av.audio.stream
import av.container
import av.error
import av.stream
import numpy as np
import soundfile
import soxr

from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import replacing
from keysync_jax.media import voice_channels
from keysync_jax.media.streams import refuse_address
from keysync_jax.media.voice_channels import Levels

log = logging.getLogger(__name__)

# Formats that fetch other files instead of holding sound themselves.
_PLAYLISTS = {"hls", "concat", "sdp", "rtsp", "dash", "ffconcat"}
# Formats that state their length exactly rather than as an estimate from the bit rate.
_STATES_LENGTH = {"mov", "mp4", "matroska", "webm", "wav", "w64", "aiff", "flac", "ogg", "mp3", "avi", "asf"}
# Formats without a start time of their own; what FFmpeg reports for them is the first packet that it could read.
_STARTS_AT_ZERO = {"flac", "wav", "w64", "aiff"}
# Timestamps are often rounded to a millisecond and may jitter; a smaller step is not a gap. A lost MP3 or AAC frame is 21 ms or more.
GAP_TOLERANCE_S = Fraction(1, 50)
# Steps beyond these are a restart of the clock (joined streams), not silence or overlap.
LONGEST_GAP_S, _LONGEST_OVERLAP_S = 60, 1
_LONGEST_REPEAT_S = Fraction(1, 4)  # a longer overlap that leads back to the file's beginning is a restart, too
# Opus states up to 80 ms of encoder delay, AAC about 50.
_LONGEST_ENCODER_DELAY_S = Fraction(1, 10)
_MOST_NOTES = 5


class AudioClip(NamedTuple):
    """Decoded audio.

    Attributes:
      samples: float32 `[S]`, mono, full scale 1; sample 0 is time 0 of the file.
      source_rate: sampling rate in the file, Hz.
      source_channels: channel count in the file.
      duration_s: length of `samples` in seconds.
      notes: what was found and mended, one sentence each (damage, gaps); empty for a clean file.
      heard: which channels these are, in words.
    """

    samples: np.ndarray
    source_rate: int
    source_channels: int
    duration_s: float
    notes: tuple[str, ...] = ()
    heard: str = "the only channel"


class AudioInfo(NamedTuple):
    """What a file says about its audio stream; None where it does not say."""

    codec: str
    sample_rate: int
    channels: int
    layout: str
    duration_s: float | None
    bit_rate: int | None


def probe_audio(path: str | os.PathLike) -> AudioInfo:
    """Describes the audio stream that `load_audio` would read, without decoding it.

    Raises:
      KeySyncError: no such file, not a media file, or no audio stream in it.
    """
    container, stream = open_audio(path)
    with container:
        context = stream.codec_context
        duration = None
        if stream.duration is not None:
            duration = float(stream.duration * _time_base(stream))
        elif container.duration is not None:
            duration = container.duration / av.time_base
        return AudioInfo(context.name, context.sample_rate, context.channels, context.layout.name, duration, context.bit_rate or None)


def load_audio(path: str | os.PathLike, sample_rate: int = SAMPLE_RATE, number: int | None = None, channel: str = "auto") -> AudioClip:
    """Decodes a file's audio to mono at `sample_rate`.

    A file that breaks off or is damaged inside gives what can be decoded, with a note; missing stretches inside become silence, so
    that what follows stays in its place. Channels and rate may change on the way.

    Args:
      path: any audio or video file.
      sample_rate: rate of the result, Hz.
      number: position among the file's audio streams, from 0; default the one that players choose.
      channel: which channels are heard, of `voice_channels.CHOICES` or a number from 0.

    Raises:
      UsageError: no such stream or channel.
      KeySyncError: no such file, not a media file, no audio stream, nothing that can be decoded, non-finite samples, or silence in the
        channels that are heard of a file that is not silent.
    """
    voice_channels.check_choice(channel)
    notes: list[str] = []
    container, stream = open_audio(path, number)
    with container:
        sink = _Sink(path, sample_rate)
        channels = 0
        clock = Clock(container, stream)
        mixer = _Mixer(path, number, channel)
        for frame in decoded_frames(container, stream, notes):
            mono = mixer.mono(frame)
            rate = frame.sample_rate
            channels = channels or frame.layout.nb_channels
            silence, skip = clock.place(frame, len(mono))
            sink.write(np.zeros(silence, np.float32), rate)
            sink.write(mono[skip:], rate)
        samples = sink.finish()
        notes += clock.notes()
        if not len(samples):
            reason = f"could not be decoded ({notes[0]})" if notes else "has no samples"
            raise KeySyncError(f"{path}: the audio stream {reason}; give a file with sound in it")
        mixer.check()
        if number is None and len(container.streams.audio) > 1:
            of = len(container.streams.audio)
            notes.append(f"audio stream {list(container.streams.audio).index(stream)} of {of} is the voice; --audio-stream chooses another")
        if len(mixer.heard) > 1:
            notes.append("channels change on the way: " + "; then ".join(f"{name}, heard: {words}" for name, words in mixer.heard.items()))
        samples = _to_stated_length(samples, container, stream, clock.start, sample_rate, notes)
        if container.format.name == "wav" and _is_cut_off_wav(path):
            notes.append("the file is shorter than its header says; it breaks off at the end of the sound")
    for note in notes:
        log.warning("%s: %s", path, note)
    return AudioClip(samples, sink.source_rate, channels, len(samples) / sample_rate, tuple(notes), next(iter(mixer.heard.values())))


class _Mixer:
    """The channels that are heard, as one.

    Attributes:
      heard: by layout, in words, in the order of the file.
    """

    def __init__(self, path: str | os.PathLike, number: int | None, choice: str):
        self._path, self._number, self._choice = path, number, choice
        self._levels: dict[str, Levels] | None = None
        self._groups: dict[str, tuple[int, ...]] = {}
        self._energy, self._loudest = 0.0, 0.0
        self.heard: dict[str, str] = {}

    def mono(self, frame: av.AudioFrame) -> np.ndarray:
        """float32 `[samples]`, full scale 1."""
        layout = frame.layout.name
        channels = voice_channels.samples_of(frame)
        if layout not in self._groups:
            self._groups[layout], self.heard[layout] = voice_channels.choose(self._levels_of(frame), self._choice, self._path)
        group = self._groups[layout]
        mean = (channels if len(group) == len(channels) else channels[list(group)]).mean(axis=0)
        if len(channels) > 1:
            self._energy += float((mean**2).sum())
            self._loudest += float((channels**2).sum(axis=1).max())
        return mean.astype(np.float32)

    def check(self) -> None:
        """Raises KeySyncError where silence was heard of a file that is not silent."""
        voice_channels.refuse_silence(self._energy, self._loudest, " and ".join(dict.fromkeys(self.heard.values())), self._path)

    def _levels_of(self, frame: av.AudioFrame) -> Levels:
        if frame.layout.nb_channels == 1:
            return Levels.of(frame)
        if self._levels is None:  # the whole file is gone through before its first samples of several channels are taken
            self._levels = {}
            container, stream = open_audio(self._path, self._number)
            with container:
                for each in decoded_frames(container, stream, []):
                    if each.layout.nb_channels > 1:
                        self._levels.setdefault(each.layout.name, Levels.of(each)).add(voice_channels.samples_of(each))
        return self._levels.get(frame.layout.name) or Levels.of(frame)


def from_samples(samples: np.ndarray, rate: int, sample_rate: int = SAMPLE_RATE) -> AudioClip:
    """Sound in memory as `load_audio` would give it.

    Args:
      samples: floats `[S]` mono, full scale 1.
      rate: their rate, Hz.
      sample_rate: rate of the result, Hz.

    Raises:
      UsageError: another shape or type, no sample, or no rate.
      KeySyncError: non-finite samples.
    """
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating) or not samples.size:
        raise UsageError(f"samples are {samples.dtype} {list(samples.shape)}; give mono floats [S] with full scale 1")
    if rate < 1:
        raise UsageError(f"rate is {rate}; give the samples per second")
    sink = _Sink("the samples", sample_rate)
    sink.write(samples.astype(np.float32), int(rate))
    found = sink.finish()
    return AudioClip(found, sink.source_rate, 1, len(found) / sample_rate)


def save_wav(path: str | os.PathLike, samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> None:
    """Writes a WAV file, which appears only when it is complete.

    Args:
      path: file to write; its folder must exist.
      samples: float `[S]` or `[S, channels]`, full scale 1; what exceeds it is clipped by integer subtypes.
      rate: sampling rate, Hz.
      subtype: soundfile's name of the sample format ("PCM_16", "PCM_24", "FLOAT").

    Raises:
      KeySyncError: non-finite samples, or the file cannot be written.
    """
    path = pathlib.Path(path)
    samples = np.asarray(samples)
    if not np.isfinite(samples).all():
        raise KeySyncError(f"{path}: the samples to write are not all finite")
    if not path.parent.is_dir():
        raise KeySyncError(f"{path}: the folder {path.parent} does not exist; create it first")
    try:
        with replacing(path) as partial:
            soundfile.write(partial, samples, rate, format="WAV", subtype=subtype)
    except (OSError, soundfile.LibsndfileError) as error:
        raise KeySyncError(f"{path}: cannot be written: {error}") from error


def open_audio(path: str | os.PathLike, number: int | None = None) -> tuple[av.container.InputContainer, av.audio.stream.AudioStream]:
    """The opened file, which the caller closes, and its main audio stream: the one that players choose, which need not be the first.

    Args:
      path: the file.
      number: position among its audio streams, from 0, of another one.

    Raises:
      UsageError: no stream of that number.
      KeySyncError: no such file, not a media file, or no audio stream in it that can be decoded.
    """
    refuse_address(path)
    if not os.path.exists(path):
        raise KeySyncError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise KeySyncError(f"{path}: not a file; give an audio or video file")
    try:
        # Absolute, because FFmpeg takes what stands before a colon in a relative name for a protocol.
        container = av.open(os.path.abspath(path), options={"protocol_whitelist": "file"})
    except PermissionError as error:
        raise KeySyncError(f"{path}: cannot be read: {error.strerror}") from error
    except (av.error.FFmpegError, OSError) as error:
        raise KeySyncError(f"{path}: not a media file, or one whose header is missing; give an audio or video file") from error
    try:
        if _PLAYLISTS & set(container.format.name.split(",")):
            raise KeySyncError(f"{path}: a playlist ({container.format.name}), not a media file; give the file that it names")
        streams = container.streams.audio
        if number is not None and not 0 <= number < len(streams):
            raise UsageError(f"{path}: --audio-stream {number}: the file has {len(streams)} audio stream(s), counted from 0")
        stream = container.streams.best("audio") if number is None else streams[number]
        if not isinstance(stream, av.AudioStream):
            raise KeySyncError(f"{path}: no audio stream; give a file with sound in it")
        if stream.codec_context is None:
            raise KeySyncError(f"{path}: the audio stream's codec is not known; give .wav, .mp3, .m4a, .flac or the like")
    except BaseException:
        container.close()
        raise
    return container, stream


def stated_start(container: av.container.InputContainer, stream: av.audio.stream.AudioStream) -> Fraction:
    """When an audio stream begins, in seconds on its file's own clock, as far as the file states it; else 0."""
    if stream.start_time is None or container.format.name in _STARTS_AT_ZERO:
        return Fraction(0)
    return stream.start_time * _time_base(stream)


def _time_base(stream: av.stream.Stream) -> Fraction:
    """Seconds that a timestamp of the stream counts; a demuxer always states them."""
    assert stream.time_base is not None
    return Fraction(stream.time_base)


def clock_zero(container: av.container.InputContainer, first: Fraction) -> Fraction:
    """Time zero of a file: the first picture or the first sample (at `first`), in seconds on the file's own clock.

    Beside pictures, a sample before the clock's own zero does not count.
    """
    pictures = [
        stream.start_time * _time_base(stream)
        for stream in container.streams.video
        if stream.start_time is not None and not stream.disposition & av.stream.Disposition.attached_pic
    ]
    return min([*pictures, max(first, Fraction(0))]) if pictures else first


def decoded_frames(container, stream, notes: list[str]) -> Iterator[av.AudioFrame]:
    """Decoded frames of a stream; what cannot be decoded is skipped and noted."""
    damaged = 0
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                damaged += 1
                reason = error.strerror
                continue
            yield from frames
    except av.error.FFmpegError as error:
        notes.append(f"reading broke off: {error.strerror}")
    if damaged:
        notes.append(f"{damaged} damaged packet{'s' if damaged > 1 else ''} left out: {reason}")


class Clock:
    """Keeps decoded frames at their stated times.

    Args:
      container: what `open_audio` returned, before anything is read from it.
      stream: the same.
    """

    def __init__(self, container, stream):
        self._container = container
        self._stream = stream
        self._started = False
        self._shift = Fraction(0)  # added to stated times after a restart of the clock
        self._next = Fraction(0)  # where the next sample belongs if the stream is continuous
        self._first = Fraction(0)  # what the first frame states
        self._mended: list[str] = []
        self.start = Fraction(0)  # of the file

    def place(self, frame: av.AudioFrame, samples: int) -> tuple[int, int]:
        """(samples of silence to put before a frame, samples to drop from its head); `samples` is how many it has."""
        stated = self._next if frame.pts is None or frame.time_base is None else frame.pts * Fraction(frame.time_base) + self._shift
        if not self._started:
            self._started = True
            self._first = stated
            self.start, gap = self._file_start(stated)
            self._next = self.start
        else:
            gap = self._mend(stated - self._next, begins_anew=abs(stated - self._shift - self._first) < _LONGEST_REPEAT_S)
        silence, skip = max(round(gap * frame.sample_rate), 0), min(max(round(-gap * frame.sample_rate), 0), samples)
        self._next += Fraction(silence + samples - skip, frame.sample_rate)
        return silence, skip

    def notes(self) -> list[str]:
        """What was mended; of many places the first ones and their number."""
        more = len(self._mended) - _MOST_NOTES
        return self._mended[:_MOST_NOTES] + ([f"and {more} more such places"] if more > 0 else [])

    def _mend(self, gap: Fraction, begins_anew: bool) -> Fraction:
        """The gap (or, negative, overlap) in seconds that is to be acted on, which is noted.

        Args:
          gap: by how much a frame comes after the end of the one before.
          begins_anew: the frame states about the time at which the file began, as the first one of a joined file does.
        """
        if abs(gap) <= GAP_TOLERANCE_S:
            return Fraction(0)
        at = f"at {float(self._next - self.start):.3f} s"
        if not -_LONGEST_OVERLAP_S <= gap <= LONGEST_GAP_S or begins_anew and gap < -_LONGEST_REPEAT_S:
            self._mended.append(f"{at} the clock restarts; continued without a gap")
            self._shift -= gap
            return Fraction(0)
        fate = "is missing; filled with silence" if gap > 0 else "comes twice; used once"
        self._mended.append(f"{at} {abs(float(gap)):.3f} s of sound {fate}")
        return gap

    def _file_start(self, first: Fraction) -> tuple[Fraction, Fraction]:
        """(zero of the file's clock, how long after it the sound starts), given the time of the first decoded sample."""
        stated = stated_start(self._container, self._stream)
        # Encoder delay that was dropped makes a small difference; a large one means that the first packets could not be decoded.
        if first - stated > _LONGEST_ENCODER_DELAY_S:
            self._mended.append(f"the first {float(first - stated):.3f} s of sound are missing; filled with silence")
        else:
            stated = first
        start = clock_zero(self._container, stated)
        return start, first - start


class _Sink:
    """Collects mono samples at the target rate."""

    def __init__(self, path: str | os.PathLike, rate: int):
        self._path = path
        self._rate = rate
        self._bytes = bytearray()  # grows in place: no second copy at the end
        self._resampler: soxr.ResampleStream | None = None
        self._current = 0
        self._written_s = 0.0
        self.source_rate = 0

    def write(self, mono: np.ndarray, rate: int) -> None:
        if not len(mono):
            return
        if not np.isfinite(mono).all():
            at = self._written_s + np.argmin(np.isfinite(mono)) / rate
            raise KeySyncError(f"{self._path}: non-finite samples (NaN or infinity) from {at:.3f} s on; export the audio again")
        self._written_s += len(mono) / rate
        if rate != self._current:
            self._flush()
            self._current = rate
            self.source_rate = self.source_rate or rate
            self._resampler = None if rate == self._rate else soxr.ResampleStream(rate, self._rate, 1, dtype="float32")
        self._bytes += (mono if self._resampler is None else self._resampler.resample_chunk(mono)).tobytes()

    def finish(self) -> np.ndarray:
        self._flush()
        return np.frombuffer(self._bytes, np.float32)

    def _flush(self) -> None:
        if self._resampler is not None:
            self._bytes += self._resampler.resample_chunk(np.zeros(0, np.float32), last=True).tobytes()


def _to_stated_length(samples: np.ndarray, container, stream, start: Fraction, rate: int, notes: list[str]) -> np.ndarray:
    """Cuts what the last codec frame has beyond the stated end (MP4 states it exactly), and notes a file that stops short of it."""
    formats = set(container.format.name.split(","))
    if stream.duration is not None:
        end = (stream.start_time or 0) + stream.duration
        length = end * Fraction(stream.time_base) - start
    elif container.duration is not None and len(container.streams) == 1:
        begin = 0 if "matroska" in formats else container.start_time or 0  # Matroska's duration counts from zero
        length = Fraction(begin + container.duration, av.time_base) - start
    else:
        return samples
    count = round(length * rate)
    surplus = len(samples) - count
    if "mp4" in formats and 0 < surplus <= rate * stream.codec_context.frame_size / stream.codec_context.sample_rate:
        return samples[:count]
    if formats & _STATES_LENGTH and surplus < -rate / 10:
        notes.append(f"the file states {float(length):.2f} s of sound, {len(samples) / rate:.2f} s could be decoded")
    return samples


def _is_cut_off_wav(path: str | os.PathLike) -> bool:
    """Whether the RIFF header promises more bytes than there are (FFmpeg silently takes what is there)."""
    with open(path, "rb") as file:
        header = file.read(8)
    promised = int.from_bytes(header[4:8], "little")
    return header[:4] == b"RIFF" and promised != 0xFFFFFFFF and promised + 8 > os.path.getsize(path)  # all ones: written as a stream
