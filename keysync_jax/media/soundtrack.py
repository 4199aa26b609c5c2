"""The given voice track inside the written file: copied packet by packet where the container can hold it, else AAC (Opus in .webm).

Time zero of the sound is the zero of its file's clock (the first sample of a sound file); it is laid on the output's clock at the
writer's `audio_start`. Which of several streams is heard, and when each of its samples is, follows `audio.load_audio`, as the mouth
does; packets whose timestamps do not run as those samples do are not copied, nor are those whose channels or rate change on the way:
such sound is brought to what it begins with. Copied packets keep their bytes; PCM is cut at the exact sample where the video ends,
other codecs at the packet. Encoded sound keeps its channels, and its sample rate wherever AAC holds the bit rate at it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction

import av
import av.error
import av.stream
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media.audio import GAP_TOLERANCE_S, LONGEST_GAP_S, clock_zero, open_audio, stated_start
from keysync_jax.media.sound_blocks import AAC_LAYOUTS, placed, resampled

_PCM_BYTES = {"u8": 1, "s8": 1, "mulaw": 1, "alaw": 1, "s16": 2, "s24": 3, "s32": 4, "f32": 4, "f64": 8}
_PCM_LE = {f"pcm_{kind}le" for kind in ("s16", "s24", "s32", "f32", "f64")} | {"pcm_u8"}
_PCM_QUICKTIME = _PCM_LE | {f"pcm_{kind}be" for kind in ("s16", "s24", "s32", "f32", "f64")} | {"pcm_s8", "pcm_mulaw", "pcm_alaw"}
# Codecs that each container holds and that players expect there. PCM in .mp4 is legal but hardly anything plays it.
COPIED_CODECS = {
    ".mp4": {"aac", "mp3", "ac3", "eac3", "alac", "flac", "opus"},
    ".mov": {"aac", "mp3", "ac3", "eac3", "alac"} | _PCM_QUICKTIME,
    ".mkv": {"aac", "mp3", "mp2", "ac3", "eac3", "dts", "truehd", "flac", "opus", "vorbis", "alac", "tta", "wavpack"} | _PCM_LE,
    ".webm": {"opus", "vorbis"},
}
COPIED_CODECS[".m4v"] = COPIED_CODECS[".mp4"]
AAC_BITRATE = 192_000  # bits per second at least, whatever the number of channels
_AAC_BITRATE_PER_CHANNEL = 64_000
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # higher ones exist, few players take them
_AAC_BITS_PER_SAMPLE = 6  # ISO/IEC 14496-3: at most 6144 bits per channel in a frame of 1024 samples
_AAC_FRAME = 1024
_OPUS_RATE, _OPUS_FRAME = 48000, 960
_STATELESS = ("pcm_", "flac", "alac")  # whose channels and rate stand in the header, once


class Soundtrack:
    """Audio stream of an output container, fed as the video advances.

    Args:
      output: the output container, before anything is written to it.
      extension: its file name extension.
      path: sound or video file with the voice.
      start: seconds on the output's clock where the sound begins.
      number: position among the file's audio streams, from 0; default the one that players choose.
      language: of the sound (ISO 639-2), where its stream does not say it.
      main: it is what players play.

    Raises:
      KeySyncError: no such file, no audio stream in it, or no sound in the stream.
    """

    def __init__(
        self,
        output,
        extension: str,
        path: str | os.PathLike,
        start: Fraction,
        *,
        number: int | None = None,
        language: str | None = None,
        main: bool = True,
    ):
        self._name = os.fspath(path)
        self._start = start
        self._done = False
        self._output = output
        # The stream and the clock that the model hears (`audio.load_audio`): a file may hold several.
        self._input, self._source = open_audio(path, number)
        self._opus = extension == ".webm"
        try:
            self._codec = self._source.codec_context.codec.canonical_name
            self._packets = _packets(self._input, self._source)
            self._waiting = next(self._packets, None)
            if self._waiting is None:
                raise KeySyncError(f"{self._name}: the audio stream is empty; give a file with sound in it")
            if self._codec not in COPIED_CODECS[extension]:
                self._encode_setup()
            elif why := _reason_to_encode(path, number, gaps_are_kept=not (extension == ".mov" and self._codec.startswith("pcm_"))):
                self._encode_setup()
                self._note += f", {why}"
            else:
                self._copy_setup()
            self._stream.disposition = av.stream.Disposition.default if main else av.stream.Disposition(0)
            own = self._source.metadata.get("language", "und")
            spoken = own if own not in ("", "und") else language
            self._stream.metadata.update({"language": spoken} if spoken else {})
        except BaseException:
            self._input.close()
            raise

    @property
    def note(self) -> str:
        """What was done with the sound, in words: "copied pcm_s16le", "encoded aac 192 kb/s ...", and where it was cut."""
        return self._note

    def close(self) -> None:
        """Release the source file."""
        self._input.close()

    def advance(self, until: Fraction) -> None:
        """Write the sound up to `until` seconds on the output's clock."""
        self._write_until(until - self._start)

    def finish(self, end: Fraction) -> None:
        """Write the rest of the sound up to the end of the video, `end` seconds on the output's clock."""
        self._write_until(end - self._start, last=True)
        total = self._total_seconds()
        heard = float(end - self._start)
        if total is not None and total > heard + 1e-3:
            self._note += f"; cut at the end of the video, {heard:.3f} s of {total:.3f} s"

    def _total_seconds(self) -> float | None:
        if self._source.duration:
            return float(self._source.duration * _ratio(self._source.time_base))
        return self._input.duration / av.time_base if self._input.duration else None

    # Copying -----------------------------------------------------------------------------------------------------------------------

    def _copy_setup(self) -> None:
        self._stream = self._output.add_stream_from_template(self._source)
        self._tick = _ratio(self._source.time_base)
        self._origin = clock_zero(self._input, max(stated_start(self._input, self._source), Fraction(0)))
        self._shift = round((self._start - self._origin) / self._tick)
        self._next_stamp = 0
        kind = self._codec.removeprefix("pcm_").removesuffix("le").removesuffix("be")
        self._sample_bytes = 0
        if self._codec.startswith("pcm_"):
            self._sample_bytes = _PCM_BYTES[kind] * self._source.codec_context.layout.nb_channels
        self._note = f"copied {self._codec}"
        self._write_until = self._copy_until

    def _copy_until(self, limit: Fraction, last: bool = False) -> None:
        """Mux packets that begin before `limit` seconds of sound."""
        while self._waiting is not None:
            packet = self._waiting
            stamp = packet.pts if packet.pts is not None else self._next_stamp
            begins = stamp * self._tick - self._origin
            if begins >= limit:
                return
            if self._sample_bytes:
                samples = packet.size // self._sample_bytes
                rate = self._source.codec_context.sample_rate
                heard = round((limit - begins) * rate)
                if heard < samples:
                    if not last:
                        return  # not before it is known where the video ends
                    packet = self._cut_pcm(packet, heard)
            self._next_stamp = stamp + (packet.duration or 0)
            lag = packet.dts - stamp if packet.dts is not None else 0
            packet.pts = stamp + self._shift
            packet.dts = stamp + lag + self._shift
            packet.stream = self._stream
            self._output.mux(packet)
            self._waiting = next(self._packets, None)

    def _cut_pcm(self, packet: av.Packet, samples: int) -> av.Packet:
        cut = av.Packet(bytes(packet)[: samples * self._sample_bytes])
        cut.pts, cut.dts, cut.time_base = packet.pts, packet.dts, packet.time_base
        cut.duration = round(Fraction(samples, self._source.codec_context.sample_rate) / self._tick)
        cut.is_keyframe = True
        return cut

    # Encoding ----------------------------------------------------------------------------------------------------------------------

    def _encode_setup(self) -> None:
        context = self._source.codec_context
        self._rate_in = context.sample_rate
        channels = context.layout.nb_channels
        self._layout = AAC_LAYOUTS.get(channels, "stereo")
        heard = av.AudioLayout(self._layout).nb_channels
        bitrate = max(AAC_BITRATE, _AAC_BITRATE_PER_CHANNEL * heard)
        self._rate = _OPUS_RATE if self._opus else _aac_rate(self._rate_in, -(-bitrate // (_AAC_BITS_PER_SAMPLE * heard)))
        self._frame = _OPUS_FRAME if self._opus else _AAC_FRAME
        self._stream = self._output.add_stream("libopus" if self._opus else "aac", rate=self._rate)
        encoder = self._stream.codec_context
        encoder.layout, encoder.format = self._layout, "flt" if self._opus else "fltp"
        encoder.bit_rate = bitrate
        encoder.time_base = Fraction(1, self._rate)
        self._note = f"encoded {'opus' if self._opus else 'aac'} {bitrate // 1000} kb/s, {self._rate} Hz {self._layout}, from {self._codec}"
        if self._rate != self._rate_in:
            self._note += f", resampled from {self._rate_in} Hz"
        if self._layout == "stereo" and channels > 2:
            self._note += f", mixed down from {channels} channels"
        self._offset = round(self._start * self._rate)
        self._written = 0
        self._held = np.zeros((heard, 0), np.float32)
        self._sound = self._samples()
        self._write_until = self._encode_until

    def _encode_until(self, limit: Fraction, last: bool = False) -> None:
        target = max(0, round(limit * self._rate))
        while not self._done:
            room = target - self._written
            if self._held.shape[1] < min(self._frame, room):
                more = next(self._sound, None)
                if more is not None:
                    self._held = np.concatenate([self._held, more], axis=1)
                    continue
            count = min(self._frame, self._held.shape[1], room)
            if count < self._frame and not last:
                return
            if count > 0:
                self._encode(np.ascontiguousarray(self._held[:, :count]))
                self._held = self._held[:, count:]
            if count < self._frame or self._written >= target:
                break
        if last and not self._done:
            self._output.mux(self._stream.encode(None))
            self._done = True

    def _encode(self, samples: np.ndarray) -> None:
        if self._opus:
            packed = np.ascontiguousarray(samples.T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=self._layout)
        else:
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=self._layout)
        frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
        frame.pts = self._offset + self._written
        self._written += samples.shape[1]
        self._output.mux(self._stream.encode(frame))

    def _samples(self) -> Iterator[np.ndarray]:
        """Blocks float32 `[channels, n]` from time zero of the sound, at the encoder's rate."""
        blocks = placed(self._input, self._source, self._decoded(), self._rate_in, self._layout)
        return resampled(blocks, self._rate_in, self._rate, self._held.shape[0])

    def _decoded(self) -> Iterator[av.AudioFrame]:
        """Decoded frames; what cannot be decoded becomes a gap."""
        while self._waiting is not None:
            packet, self._waiting = self._waiting, next(self._packets, None)
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue
            yield from frames
        try:
            yield from self._source.codec_context.decode(None)
        except av.error.FFmpegError:
            return  # nothing is left in the decoder


def _reason_to_encode(path: str | os.PathLike, number: int | None, gaps_are_kept: bool) -> str:
    """Why the packets cannot be copied as they are, "" where they can.

    Stamps that go back, as in joined files, or leave a gap that the output's container does not keep; channels or a rate that change.
    """
    container, stream = open_audio(path, number)
    longest = LONGEST_GAP_S if gaps_are_kept else GAP_TOLERANCE_S
    decodes = not stream.codec_context.codec.canonical_name.startswith(_STATELESS)
    with container:
        following, kinds = None, set()
        for packet in _packets(container, stream):
            if packet.pts is not None:
                if following is not None and not -GAP_TOLERANCE_S <= (packet.pts - following) * _ratio(stream.time_base) <= longest:
                    return "whose timestamps jump"
                following = packet.pts + packet.duration if packet.duration else None
            if decodes:
                kinds |= _kinds(packet)
                if len(kinds) > 1:
                    return "whose channels or rate change on the way"
    return ""


def _kinds(packet: av.Packet) -> set[tuple[str, int]]:
    """(layout, rate) of what a packet holds; nothing where it is damaged."""
    try:
        return {(frame.layout.name, frame.sample_rate) for frame in packet.decode()}
    except av.error.FFmpegError:
        return set()


def _packets(container, stream) -> Iterator[av.Packet]:
    """Packets with data; a file that breaks off gives what can be read."""
    demuxer = container.demux(stream)
    while True:
        try:
            packet = next(demuxer)
        except (StopIteration, av.error.FFmpegError):
            return
        if packet.size:
            yield packet


def _aac_rate(rate: int, least: int) -> int:
    """The rate itself where AAC has it and holds the bit rate at it (`least` Hz are needed), else one that does.

    A multiple of the rate is preferred, then the next one up; above 48 kHz, 44.1 kHz for its multiples and 48 kHz for the rest.
    """
    if rate > _AAC_RATES[-1]:
        return 44100 if rate % 44100 == 0 else 48000
    return min((allowed for allowed in _AAC_RATES if allowed >= max(rate, least)), key=lambda allowed: (allowed % rate != 0, allowed))


def _ratio(ratio) -> Fraction:
    return Fraction(ratio.numerator, ratio.denominator)
