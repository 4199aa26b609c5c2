"""Awkward files, as dubbing people have them, made from one talking clip at run time: each case a video, a voice, and what is right.

What is right stands beside how the file is made. Figures are those of a player: lengths and times of the container, after edit lists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE = 48000
BURSTS = ((0.2, 0.4), (0.72, 0.92), (1.2, 1.36), (1.6, 1.8), (2.0, 2.2))  # seconds in which the voice is loud
MS = Fraction(1, 1000)
MASTER = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1)"


@dataclasses.dataclass(frozen=True)
class Case:
    """A dub and what must hold of it.

    Attributes:
      make: gives (video, voice) in a folder.
      out: the output's extension.
      expect: wanted figures by name, see `awkward_files.problems`.
      options: further words of the command.
      done: True where the thing is done, False where saying so is all that is asked.
    """

    make: Callable[[Studio], tuple[Path, Path]]
    expect: dict[str, Any]
    out: str = ".mp4"
    options: tuple[str, ...] = ()
    done: bool = True


class Studio:
    """Pictures and sound of a clip, and files made of them.

    Args:
      clip: a video with a face and sound.
      folder: where files go.
      side: of the square pictures, pixels.
    """

    def __init__(self, clip: Path, folder: Path, side: int = 480):
        self.clip, self.folder, self.side = clip, folder, side

    @functools.cached_property
    def head(self) -> list[np.ndarray]:
        """Forty pictures uint8 `[side, side, 3]` of the clip's middle, around the upper part where a head is."""
        pictures = []
        with av.open(str(self.clip)) as container:
            for frame in container.decode(video=0):
                rgb = frame.to_ndarray(format="rgb24")
                height, width = rgb.shape[:2]
                size = min(round(0.6 * width), height)
                x, y = (width - size) // 2 + round(0.06 * width), min(round(0.26 * height), height - size)
                part = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb[y : y + size, x : x + size]), format="rgb24")
                pictures.append(part.reformat(self.side, self.side, interpolation="AREA").to_ndarray())
                if len(pictures) == 40:
                    break
        return pictures

    @functools.cached_property
    def speech(self) -> np.ndarray:
        """1.6 s of the clip's own sound, float32 mono."""
        resampler, parts = av.AudioResampler(format="flt", layout="mono", rate=RATE), []
        with av.open(str(self.clip)) as container:
            for frame in container.decode(audio=0):
                parts += [block.to_ndarray()[0] for block in resampler.resample(frame)]
                if sum(map(len, parts)) > 1.6 * RATE:
                    break
        return np.concatenate(parts)[: int(1.6 * RATE)]

    def film(
        self, name: str, pictures: Sequence[np.ndarray], *, rate: Any = 25, times: Sequence[float] | None = None, codec: str = "libx264",
        pix_fmt: str = "yuv420p", options: dict[str, str] | None = None, sound: np.ndarray | None = None, sound_codec: str = "aac",
        start: float = 0, shape: Fraction | None = None, muxer: dict[str, str] | None = None, tags: dict[str, str] | None = None,
        colour: tuple[int, int, int] | None = None,
    ) -> Path:  # fmt: skip
        """Write pictures (uint8 RGB or RGBA) and mono sound."""
        path = self.folder / name
        tick = {".ts": Fraction(1, 90000), ".mkv": MS, ".webm": MS, ".gif": Fraction(1, 100)}.get(path.suffix, 1 / Fraction(rate))
        with av.open(str(path), "w", options=muxer or {}) as out:
            usual = {"crf": "10", "preset": "veryfast"} if codec.startswith("libx26") else {}
            stream = out.add_stream(codec, rate=Fraction(rate), options=usual | (options or {}))
            stream.width, stream.height, stream.pix_fmt = pictures[0].shape[1], pictures[0].shape[0], pix_fmt
            stream.time_base = stream.codec_context.time_base = tick
            stream.metadata.update(tags or {})
            if shape:
                stream.codec_context.sample_aspect_ratio = shape
            if colour:
                context = stream.codec_context
                context.color_primaries, context.color_trc, context.colorspace = colour
                context.color_range = 1
            track = out.add_stream(sound_codec, rate=RATE, layout="mono") if sound is not None else None
            for index, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24").reformat(format=pix_fmt)
                time = times[index] if times is not None else index / Fraction(rate)
                frame.pts, frame.time_base = round((Fraction(time).limit_denominator(90000) + Fraction(start)) / tick), tick
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
            if track is not None and sound is not None:
                _encode_sound(out, track, sound[None], RATE, start)
        return path

    def voice(
        self,
        name: str,
        channels: np.ndarray,
        *,
        rate: int = RATE,
        codec: str = "pcm_s16le",
        layout: str = "",
        tags: dict[str, str] | None = None,
    ) -> Path:
        """Write sound, float32 `[C, S]`."""
        path = self.folder / name
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=rate, layout=layout or {1: "mono", 2: "stereo", 6: "5.1"}[len(channels)])
            stream.metadata.update(tags or {})
            _encode_sound(out, stream, channels, rate, 0)
        return path

    def bursts(self, repeat: int = 1) -> Path:
        """The voice of most cases: noise in `BURSTS`."""
        return self.voice(f"bursts{repeat}.wav", np.tile(bursts(), repeat)[None])

    def talk(self) -> Path:
        return self.film("talk.mp4", self.head)


def bursts(seconds: float = 2.4, rate: int = RATE) -> np.ndarray:
    """Noise that is loud in `BURSTS` and silent elsewhere, float32."""
    at = np.arange(int(seconds * rate)) / rate
    loud = sum((at >= a) & (at < b) for a, b in BURSTS)
    return (0.2 * np.random.default_rng(0).standard_normal(len(at)) * loud).astype(np.float32)


def _encode_sound(out, stream, channels: np.ndarray, rate: int, start: float) -> None:
    layout = stream.codec_context.layout
    resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
    for at in range(0, channels.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels[:, at : at + 1024], np.float32), format="fltp", layout=layout.name)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), at + round(start * rate)
        for ready in resampler.resample(frame):
            out.mux(stream.encode(ready))
    out.mux(stream.encode(None))


# The cases ---------------------------------------------------------------------------------------------------------------------------


def _late_clock(start: float):
    def make(s: Studio):
        return s.film(f"clock_{start:g}.ts", s.head, sound=s.speech, start=start, muxer={"mpegts_copyts": "1"}), s.bursts()

    return make


def _holds(s: Studio):
    times = [0, 0.04, 0.08, 0.12, 0.16, 0.2, 1.2, 1.24, 1.28, 3.2, 3.24, 4.0]
    return s.film("holds.mkv", s.head[: len(times)], times=times), s.bursts(2)


def _cut_off(suffix: str, share: float = 0.5):
    def make(s: Studio):
        muxer = {"movflags": "+faststart"} if suffix == ".mp4" else {}
        whole = s.film(f"whole{suffix}", s.head, sound=s.speech, sound_codec="aac" if suffix != ".avi" else "mp2", muxer=muxer)
        part = s.folder / f"cut_off{suffix}"
        data = whole.read_bytes()
        part.write_bytes(data[: int(share * len(data))])
        return part, s.bursts()

    return make


def _sound_outlasts(s: Studio):
    return s.film("sound_outlasts.ts", s.head[:15], sound=s.speech), s.bursts()


def _second_default(s: Studio):
    d = av.stream.Disposition
    path = s.folder / "second_default.mkv"
    with av.open(str(path), "w") as out:
        made = []
        for side, disposition in ((160, d(0)), (s.side, d.default)):
            stream = out.add_stream("libx264", rate=25)
            stream.width = stream.height = side
            stream.pix_fmt, stream.disposition = "yuv420p", disposition
            made.append(stream)
        for stream in made:
            for index, picture in enumerate(s.head):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(stream.width, stream.width, "yuv420p")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return path, s.bursts()


def _joined_voice(second: tuple[int, str]):
    def make(s: Studio):
        rate, layout = second
        count = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
        first = s.voice("first.ts", bursts(0.8)[None], codec="aac")
        then = s.voice("then.ts", np.repeat(bursts(0.8, rate)[None], count, 0), rate=rate, codec="aac", layout=layout)
        path = s.folder / f"joined_{rate}_{count}.ts"
        path.write_bytes(first.read_bytes() + then.read_bytes())
        return s.talk(), path

    return make


def _voice_of(name: str, mix: Callable[[np.ndarray], list[np.ndarray]]):
    def make(s: Studio):
        return s.talk(), s.voice(name, np.stack(mix(s.speech)))

    return make


def _coded(name: str, codec: str, pix_fmt: str, *, count: int = 20, **options: Any):
    def make(s: Studio):
        return s.film(name, s.head[:count], codec=codec, pix_fmt=pix_fmt, **options), s.bursts()

    return make


def _transparent(name: str, codec: str, pix_fmt: str, **options: Any):
    def make(s: Studio):
        y, x = np.mgrid[: s.side, : s.side]
        inside = (255 * (np.hypot(x - s.side / 2, y - s.side / 2) < 0.46 * s.side)).astype(np.uint8)
        return s.film(name, [np.dstack([f, inside]) for f in s.head[:20]], codec=codec, pix_fmt=pix_fmt, **options), s.bursts()

    return make


def _language(s: Studio):
    return s.talk(), s.voice("deutsch.m4a", bursts()[None], codec="aac", tags={"language": "deu"})


def _hdr(s: Studio):
    params = f"log-level=none:crf=8:hdr10=1:repeat-headers=1:max-cll=1000,400:master-display={MASTER}"
    options = {"x265-params": f"{params}:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"}
    return s.film("hdr.mp4", s.head[:20], codec="libx265", pix_fmt="yuv420p10le", options=options, colour=(9, 16, 9)), s.bursts()


def _interlaced(s: Studio):
    return s.film("bottom_first.mp4", s.head[:20], options={"flags": "+ildct+ilme", "x264-params": "bff=1"}), s.bursts()


def _late_picture(s: Studio):
    times = [0.5 + i / 25 for i in range(40)]
    return s.film("late_picture.mkv", s.head, times=times, sound=np.tile(s.speech, 2)[: 2 * RATE]), s.bursts()


def _odd(s: Studio):
    return s.film("odd.mkv", [f[:477, :479] for f in s.head[:20]], codec="ffv1"), s.bursts()


def _voice_codec(name: str, codec: str, rate: int = RATE):
    def make(s: Studio):
        return s.talk(), s.voice(name, bursts()[None, :: RATE // rate], rate=rate, codec=codec)

    return make


_WHOLE = {"exit": 0, "length": (1.6, 0.1), "first": (0.0, 0.06), "pictures": 40, "voice_ms": 25}
_REFUSED = {"exit": 1, "says": r"breaks off: \d+ of \d+ pictures", "output": False}
_PLAYS = {"exit": 0, "codec": ("h264",), "pix_fmt": ("yuv420p", "yuvj420p"), "says": "is written as", "pictures": 20}
_WEBM_ALPHA = _transparent(
    "alpha.webm", "libvpx-vp9", "yuva420p", options={"crf": "20", "b": "0", "deadline": "realtime"}, tags={"alpha_mode": "1"}
)
_MOV_ALPHA = _transparent("alpha.mov", "prores_ks", "yuva444p10le", options={"profile": "4"})
_MASTER_MOV = _coded("master.mov", "prores_ks", "yuv422p10le", options={"profile": "3"})
_DNXHR_MOV = _coded("dnxhr.mov", "dnxhd", "yuv422p", options={"profile": "dnxhr_sq"})
CASES = {
    "clock at 10 h": Case(_late_clock(36000), _WHOLE),
    "clock at 1.4 s": Case(_late_clock(1.4), _WHOLE),
    "clock at 0.67 s": Case(_late_clock(2 / 3), _WHOLE, ".mkv"),
    "long holds": Case(_holds, {"exit": 0, "length": (4.04, 0.05), "pictures": 12}),
    "B pictures in AVI": Case(lambda s: (s.film("b.avi", s.head), s.bursts()), _WHOLE | {"even": 0.04}),
    "cut off, mp4": Case(_cut_off(".mp4"), _REFUSED),
    "cut off, mkv": Case(_cut_off(".mkv"), _REFUSED),
    "cut off, avi": Case(_cut_off(".avi"), _REFUSED),
    "cut off, allowed": Case(_cut_off(".mp4"), {"exit": 0, "says": "breaks off: 1[0-9] of 40"}, options=("--allow-damaged",)),
    "sound outlasts pictures, ts": Case(_sound_outlasts, _REFUSED),
    "second stream default": Case(_second_default, {"exit": 0, "size": (480, 480), "says": "video stream 1"}),
    "first stream asked for": Case(_second_default, {"exit": 0, "size": (160, 160)}, options=("--video-stream", "0")),
    "voice: mono, then stereo": Case(_joined_voice((RATE, "stereo")), _WHOLE),
    "voice: 48, then 44.1 kHz": Case(_joined_voice((44100, "mono")), _WHOLE),
    "voice: mono, then 5.1": Case(_joined_voice((RATE, "5.1")), _WHOLE),
    "voice: mono": Case(_voice_of("mono.wav", lambda x: [x]), {"exit": 0, "pictures": 40}, ".mkv", ("--lossless",)),
    "voice: right upside down": Case(
        _voice_of("inverted.wav", lambda x: [x, -x]), {"exit": 0, "same_as": "voice: mono", "says": "out of phase"}, ".mkv", ("--lossless",)
    ),
    "voice: centre of 5.1": Case(
        _voice_of("centre.wav", lambda x: [0.3 * bursts(1.6), 0.3 * bursts(1.6), x, 0 * x, 0 * x, 0 * x]),
        {"exit": 0, "same_as": "voice: mono", "says": "the centre of 6 channels"},
        ".mkv",
        ("--lossless",),
    ),  # fmt: skip
    "voice: a mix that cancels": Case(
        _voice_of("inverted.wav", lambda x: [x, -x]), {"exit": 1, "says": "silent", "output": False}, options=("--voice-channel", "mix")
    ),
    "GIF": Case(_coded("a.gif", "gif", "rgb8", rate=Fraction(25, 2)), _PLAYS),
    "RGB": Case(_coded("rgb.mkv", "ffv1", "bgr0"), _PLAYS),
    "gray": Case(_coded("gray.mkv", "ffv1", "gray"), _PLAYS),
    "4:4:4": Case(_coded("444.mkv", "libx264", "yuv444p"), _PLAYS),
    "transparent, webm": Case(
        _WEBM_ALPHA,
        {"exit": 0, "alpha": True, "codec": ("vp9",)},
        ".webm",
    ),  # fmt: skip
    "transparent, webm to mov": Case(
        _WEBM_ALPHA,
        {"exit": 0, "alpha": True, "codec": ("prores",)},
        ".mov",
    ),  # fmt: skip
    "transparent, ProRes 4444": Case(
        _MOV_ALPHA,
        {"exit": 0, "alpha": True, "codec": ("prores",)},
        ".mov",
    ),
    "transparent, to mp4": Case(
        _MOV_ALPHA,
        {"exit": 0, "says": "transparency is not written"},
        done=False,
    ),  # fmt: skip
    "ProRes": Case(
        _MASTER_MOV,
        {"exit": 0, "codec": ("prores",), "pix_fmt": ("yuv422p10le",)},
        ".mov",
    ),  # fmt: skip
    "ProRes, lossless": Case(
        _MASTER_MOV,
        {"exit": 0, "pix_fmt": ("yuv422p10le",), "pictures": 20},
        ".mov",
        ("--lossless",),
    ),  # fmt: skip
    "DNxHR": Case(
        _DNXHR_MOV,
        {"exit": 0, "codec": ("dnxhd",), "pix_fmt": ("yuv422p",)},
        ".mov",
    ),
    "voice in German": Case(_language, {"exit": 0, "language": "deu"}),
    "HDR10": Case(_hdr, {"exit": 0, "pix_fmt": ("yuv420p10le",), "codec": ("hevc",), "mastering": MASTER}),
    "bottom field first": Case(_interlaced, {"exit": 0, "bottom_first": True}),
    "late picture": Case(_late_picture, {"exit": 0, "pictures": 40, "first": (0.5, 0.03), "voice_ms": 25}),
    "odd size": Case(_odd, {"exit": 0, "size": (479, 477), "pictures": 20}, ".mkv", ("--lossless",)),
    "full range AVI": Case(
        lambda s: (s.film("camera.avi", s.head, codec="mjpeg", pix_fmt="yuvj420p", options={"q": "2"}), s.bursts()),
        {"exit": 0, "pictures": 40},
        ".mkv",
        ("--lossless",),
    ),  # fmt: skip
    "m4v": Case(lambda s: (s.talk(), s.bursts()), _WHOLE, ".m4v"),
    "webm": Case(lambda s: (s.talk(), s.bursts()), _WHOLE | {"codec": ("vp9",)}, ".webm"),
    "voice: 8 kHz mu-law": Case(_voice_codec("phone.wav", "pcm_mulaw", 8000), _WHOLE),
    "voice: 8 bits": Case(_voice_codec("eight.wav", "pcm_u8"), _WHOLE),
    "voice: AAC with delay": Case(_voice_codec("primed.m4a", "aac"), _WHOLE),
    "voice: Opus": Case(_voice_codec("opus.webm", "libopus"), _WHOLE),
}
