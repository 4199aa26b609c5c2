"""Which encoder, pixel format and options a written video gets.

What is written plays in a browser and on a phone, unless the source or the person asks for more:

- 8-bit pictures, RGB, palettes and gray become H.264 with 4:2:0 chroma; 10-bit 4:2:0 (HDR) stays so, as HEVC; 10-bit 4:2:2 stays H.264.
- ProRes and DNxHR stay what they are in .mov. A transparency is kept as VP9 in .webm and .mkv and as ProRes 4444 in .mov.
- Neither H.264 nor HEVC has odd sizes with subsampled chroma: 8-bit pictures of that kind are VP9, and where that does not go (.mov,
  more bits) they get full chroma.
- Without a quality asked for, the picture gets what looks like the source's own at about the source's own bit rate.
- `lossless` keeps the source's format: H.264, HEVC, VP9, and FFV1 in .mkv.

Every change of format is said in a note.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import av

from keysync_jax.config import CODECS
from keysync_jax.core.errors import UsageError
from keysync_jax.media import color
from keysync_jax.media.video_info import VideoInfo

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
DEFAULT_CRF = 16.0  # visually transparent; the whole picture is encoded once more, so it must not show
DEFAULT_PRESET = "fast"  # quality at a given CRF hardly depends on it; "medium" costs half as much again
# The rate may be this many times the source's. The source's artefacts have to be coded, too, so the same rate would show.
_RATE_CAP = 1.15
# Seconds over which the rate may vary. What the buffer holds at the beginning comes on top, so short clips have a shorter one.
_CAP_SECONDS, _CAP_SHARE, _LEAST_CAP_SECONDS = 2.0, 0.2, 0.4
# Sources whose rate says nothing about what the pictures need: every picture stands alone, or nothing is lost.
_NO_RATE = {
    "mjpeg",
    "prores",
    "dnxhd",
    "ffv1",
    "rawvideo",
    "png",
    "gif",
    "huffyuv",
    "utvideo",
    "qtrle",
    "webp",
    "bmp",
    "tiff",
    "dvvideo",
    "v210",
}
_ENCODERS = {
    "h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1", "prores": "prores_ks", "dnxhr": "dnxhd", "ffv1": "ffv1",
}  # fmt: skip
_HELD = {
    "mp4": ("h264", "hevc", "vp9", "av1"),
    "mov": ("h264", "hevc", "prores", "dnxhr"),
    "matroska": CODECS,
    "webm": ("vp9", "av1"),
}
_PRORES = {"proxy": 0, "lt": 1, "standard": 2, "hq": 3, "4444": 4, "xq": 5}
_DNXHR_LEAST = (256, 120)  # pixels
_X265_BLOCK = 64  # pixels
_BT601, _BT709 = 6, 1
_LIMITED = 1


@dataclass(frozen=True)
class Encoding:
    """How pictures are encoded.

    Attributes:
      codec: FFmpeg's encoder.
      pix_fmt: its pixel format.
      options: its options.
      tag: sample entry in .mp4 and .mov; "" for the muxer's own choice.
      notes: what changes, one line each.
      color_space: H.273 matrix of what is written.
      color_range: 1 limited, 2 full, 0 where the source does not say.
      one_thread: pictures are encoded one after the other: with a limited rate x264 gives other bytes from run to run on several threads.
    """

    codec: str
    pix_fmt: str
    options: dict[str, str]
    tag: str = ""
    notes: tuple[str, ...] = ()
    color_space: int = 2
    color_range: int = 0
    one_thread: bool = False

    @property
    def keeps_alpha(self) -> bool:
        """Whether the transparency is written."""
        return color.has_alpha(self.pix_fmt)


def choose_encoding(
    info: VideoInfo,
    extension: str,
    crf: float | None = None,
    lossless: bool = False,
    preset: str = DEFAULT_PRESET,
    codec: str | None = None,
    pix_fmt: str | None = None,
) -> Encoding:
    """Encoder, pixel format and options for a source in a container.

    Args:
      info: the source.
      extension: of the output, one of `CONTAINERS`.
      crf: constant rate factor; None for 16 within about the source's bit rate.
      lossless: nothing is lost.
      preset: speed of x264 and x265.
      codec: one of `CODECS`, None for the one that fits.
      pix_fmt: FFmpeg's name of a pixel format, None for the one that fits.

    Raises:
      UsageError: a codec that the container does not hold, a pixel format that the codec has not, or either together with `lossless`.
    """
    container = CONTAINERS[extension]
    if lossless and (codec or pix_fmt):
        raise UsageError("--lossless keeps the source's format and chooses the codec; leave --codec and --pix-fmt out, or give --crf 0")
    if codec is not None and codec not in _HELD[container]:
        raise UsageError(f"--codec {codec}: {extension} does not hold it; choose {', '.join(_HELD[container])}, or another container")
    if codec is None and pix_fmt is not None:
        codec = next((name for name in _HELD[container] if pix_fmt in _formats(name)), None)
        if codec is None:
            raise UsageError(f"--pix-fmt {pix_fmt}: no codec that {extension} holds has it; yuv420p is what every player takes")
    if lossless:
        chosen = _lossless(info, container)
    elif codec is not None:
        chosen = _asked(info, codec, pix_fmt)
    else:
        chosen = _fitting(info, container)
    if info.interlaced and (chosen.codec not in ("libx264", "prores_ks", "ffv1") or chosen.codec == "libx264" and info.height % 4):
        chosen = replace(chosen, notes=(*chosen.notes, "the source is interlaced; this codec is written without its field order"))
    return _tagged(_rated(chosen, info, crf, lossless, preset), info)


def _fitting(info: VideoInfo, container: str) -> Encoding:
    """The default: what players play, or what the source's kind asks for."""
    fmt, given = info.planes, info.source_pix_fmt
    if info.has_alpha and container in ("webm", "matroska"):
        said = () if given.startswith("yuva420p") else (f"{given} is written as yuva420p, VP9 with its transparency",)
        return Encoding("libvpx-vp9", "yuva420p", {}, notes=said)
    if info.has_alpha and container == "mov":
        return _prores(info, "yuva444p10le")
    notes = (
        [f"the transparency is not written: {container} has no codec for it; .webm (VP9) and .mov (ProRes 4444) keep it"]
        if info.has_alpha
        else []
    )
    if info.codec in ("prores", "dnxhd"):
        name = "ProRes" if info.codec == "prores" else "DNxHR"
        small = info.codec == "dnxhd" and (info.width < _DNXHR_LEAST[0] or info.height < _DNXHR_LEAST[1])
        if container == "mov" and not small:
            return _prores(info) if info.codec == "prores" else _dnxhr(info)
        where = (
            f"pictures of {info.width}x{info.height} are too small for it"
            if small
            else f".mov keeps it, {container} gets what players play"
        )
        notes.append(f"{name} is not written: {where}")
    if container == "webm":
        return _changed(info, "libvpx-vp9", "yuv420p", notes)
    if _is_odd(info, info.pix_fmt):
        return _odd(info, container, notes)
    if fmt.bits == 8 or fmt.family != "yuv":
        target = "yuvj420p" if info.pix_fmt.startswith("yuvj") else "yuv420p"
        if _is_odd(info, target):
            return _changed(info, "libvpx-vp9", "yuv420p", notes) if container != "mov" else _odd(info, container, notes)
        return _changed(info, "libx264", target, notes)
    if (fmt.log2_w, fmt.log2_h) == (1, 0):
        notes.append("4:2:2 with 10 bits is kept, which browsers and phones do not play; --pix-fmt yuv420p makes a file that they do")
        return _changed(info, "libx264" if fmt.bits == 10 else "libx265", info.pix_fmt, notes)
    return _changed(info, "libx265", "yuv444p10le" if _is_odd(info, "yuv420p10le") else "yuv420p10le", notes)


def _changed(info: VideoInfo, encoder: str, pix_fmt: str, notes: list[str] | tuple[str, ...]) -> Encoding:
    """An encoding, with a note where the pixel format is another than the source's."""
    same = pix_fmt in (info.source_pix_fmt, info.pix_fmt) or info.source_pix_fmt in _same_samples(pix_fmt)
    if not same and not (info.has_alpha and info.pix_fmt == pix_fmt):
        notes = [*notes, f"{info.source_pix_fmt} is written as {pix_fmt}, which players play; --pix-fmt or --lossless keep more"]
    if encoder == "libvpx-vp9" and _is_odd(info, pix_fmt):
        notes = [*notes, f"{info.width}x{info.height} with 4:2:0 chroma is encoded as VP9: H.264 has even sizes only"]
    return Encoding(encoder, pix_fmt, {}, notes=tuple(notes))


def _same_samples(pix_fmt: str) -> tuple[str, ...]:
    """Formats that hold the very samples of another one, in another order."""
    return {"yuv420p": ("nv12", "nv21"), "yuv420p10le": ("p010le",), "yuv422p": ("yuyv422", "uyvy422", "nv16")}.get(pix_fmt, ())


def _odd(info: VideoInfo, container: str, notes: list[str]) -> Encoding:
    """Odd sizes with subsampled chroma: VP9, or full chroma where that does not go."""
    fmt = info.planes
    if fmt.bits == 8 and container != "mov":
        return _changed(info, "libvpx-vp9", "yuv420p", notes)
    full_chroma = _full_chroma(info)
    said = f"{info.width}x{info.height} {info.pix_fmt} does not fit H.264 or HEVC; written as {full_chroma}"
    return Encoding("libx265" if fmt.bits == 12 else "libx264", full_chroma, {}, notes=(*notes, said))


def _full_chroma(info: VideoInfo) -> str:
    bits = info.planes.bits
    return f"{'yuvj' if info.pix_fmt.startswith('yuvj') else 'yuv'}444p{'' if bits == 8 else f'{bits}le'}"


def _lossless(info: VideoInfo, container: str) -> Encoding:
    """The source's own samples."""
    fmt, pix_fmt = info.planes, info.pix_fmt
    plain = pix_fmt.replace("yuvj", "yuv")
    if container == "matroska" and info.has_alpha and fmt.family == "yuv":
        return Encoding("ffv1", plain.replace("yuv", "yuva"), {})
    notes = ["the transparency is not written without loss here; yuva sources keep it in .mkv"] if info.has_alpha else []
    if container == "matroska" and pix_fmt != "gbrp":  # FFV1 packs 8-bit RGB otherwise
        return Encoding("ffv1", plain, {}, notes=tuple(notes))
    odd = _is_odd(info, pix_fmt)
    if container == "webm" or odd and fmt.bits == 8 and container != "mov":
        if plain not in _formats("vp9"):
            raise UsageError(f"{pix_fmt} cannot be written to .webm without loss; choose .mkv")
        said = f"{info.width}x{info.height} with {plain} chroma is encoded as VP9"
        return Encoding("libvpx-vp9", plain, {}, notes=(*notes, said) if odd else tuple(notes))
    if odd:
        pix_fmt = _full_chroma(info)
        notes.append(f"{info.width}x{info.height} {info.pix_fmt} does not fit H.264 or HEVC; written as {pix_fmt}")
    hevc = fmt.family != "yuv" or fmt.bits == 12 or (fmt.bits == 10 and (fmt.log2_w, fmt.log2_h) == (1, 1))
    return Encoding("libx265" if hevc else "libx264", pix_fmt, {}, notes=tuple(notes))


def _asked(info: VideoInfo, codec: str, pix_fmt: str | None) -> Encoding:
    """A codec by name, and a pixel format by name or the nearest to the source's."""
    if pix_fmt is not None and pix_fmt not in _formats(codec):
        raise UsageError(f"--pix-fmt {pix_fmt}: {codec} has {', '.join(_formats(codec))}")
    if codec == "prores":
        return _prores(info, pix_fmt)
    if codec == "dnxhr":
        if info.width < _DNXHR_LEAST[0] or info.height < _DNXHR_LEAST[1]:
            raise UsageError(f"--codec dnxhr: pictures of {info.width}x{info.height} are too small; it begins at 256x120")
        return _dnxhr(info, pix_fmt)
    deep = info.planes.bits > 8 and info.planes.family == "yuv"
    if pix_fmt is None:
        wanted = [info.pix_fmt] if codec == "ffv1" else []
        wanted += ["yuva420p"] if info.has_alpha and codec == "vp9" else []
        # 10 bits in H.264 are what only editors read.
        wanted += ["yuv420p10le"] if deep and codec in ("hevc", "av1", "ffv1") else []
        pix_fmt = next(name for name in [*wanted, "yuv420p"] if name in _formats(codec))
    if _is_odd(info, pix_fmt) and codec in ("h264", "hevc", "av1"):
        raise UsageError(f"{codec} has no {pix_fmt} of {info.width}x{info.height}, which is odd; choose vp9 or a 4:4:4 --pix-fmt")
    return _changed(info, _ENCODERS[codec], pix_fmt, ())


def _prores(info: VideoInfo, pix_fmt: str | None = None) -> Encoding:
    """ProRes of the source's profile, or of the one that its format needs."""
    if pix_fmt is None:
        full = info.planes.family != "yuv" or info.planes.log2_w == 0
        pix_fmt = "yuva444p10le" if info.has_alpha else "yuv444p10le" if full else "yuv422p10le"
    least = 4 if "444" in pix_fmt else 0
    known = _PRORES.get(info.profile.lower(), 3) if info.codec == "prores" else 3
    options = {"profile": str(max(known, least) if least else min(known, 3)), "vendor": "apl0"}
    notes = [] if info.codec == "prores" else [f"{info.source_pix_fmt} is written as ProRes {'4444' if least else '422'}"]
    if info.codec == "prores" and info.planes.bits > 10:
        notes.append(f"ProRes is written with 10 bits; the source has {info.planes.bits}")
    return Encoding("prores_ks", pix_fmt, options, notes=tuple(notes))


def _dnxhr(info: VideoInfo, pix_fmt: str | None = None) -> Encoding:
    """DNxHR of the source's profile, or of the one that its format needs."""
    words = info.profile.lower()
    if pix_fmt is None:
        full = info.planes.family != "yuv" or info.planes.log2_w == 0
        pix_fmt = "yuv444p10le" if full else "yuv422p10le" if info.planes.bits > 8 else "yuv422p"
    if pix_fmt == "yuv422p":
        profile = next((f"dnxhr_{name}" for name in ("lb", "sq") if words.endswith(name)), "dnxhr_hq")
    else:
        profile = "dnxhr_444" if "444" in pix_fmt or pix_fmt.startswith("gbrp") else "dnxhr_hqx"
    notes = [] if info.codec == "dnxhd" else [f"{info.source_pix_fmt} is written as DNxHR, {pix_fmt}"]
    if words.startswith("dnxhd"):
        notes.append("DNxHD is written as DNxHR of like quality")
    return Encoding("dnxhd", pix_fmt, {"profile": profile}, notes=tuple(notes))


def _rated(chosen: Encoding, info: VideoInfo, crf: float | None, lossless: bool, preset: str) -> Encoding:
    """With the options that set quality and speed."""
    quality = DEFAULT_CRF if crf is None else crf
    cap = None if crf is not None or lossless else rate_cap(info)
    options = dict(chosen.options)
    if chosen.codec == "libx264":
        # The macroblock tree of x264 gives other bytes from run to run on CPUs with AVX-512 (seen at 160x96 and 320x240).
        options |= {"preset": "veryfast" if lossless else preset, "mbtree": "0"}
        options |= {"qp": "0"} if lossless else {"crf": f"{quality:g}"}
        options |= {"maxrate": str(cap), "bufsize": str(_buffer(info, cap))} if cap else {}
        params = [each for each in (info.mastering.x264_params(),) if each]
        if info.interlaced and info.height % 4 == 0:
            options["flags"] = "+ildct+ilme"
            params.append("bff=1" if info.bottom_first else "tff=1")
        return replace(chosen, options=options | ({"x264-params": ":".join(params)} if params else {}), one_thread=cap is not None)
    if chosen.codec == "libx265":
        # A mean rate repeats its bytes on several threads, where a limited one would not.
        rate = "lossless=1" if lossless else f"bitrate={cap // 1000}" if cap else f"crf={quality:g}"
        # Pictures no wider than its largest block come out spoilt, and other ones each time, where x265 predicts one from another.
        alone = ":keyint=1" if info.width <= _X265_BLOCK else ""
        params = f"log-level=none:info=0:frame-threads=2:{rate}{alone}{info.mastering.x265_params()}"
        return replace(chosen, options=options | {"preset": "veryfast" if lossless else preset, "x265-params": params}, tag="hvc1")
    if chosen.codec == "libvpx-vp9":
        options |= {"deadline": "good", "cpu-used": "4", "row-mt": "1"}
        options |= {"profile": "0"} if "420" in chosen.pix_fmt else {"profile": "1"}
        options |= {"auto-alt-ref": "0"} if chosen.keeps_alpha else {}  # libvpx refuses both together
        options |= {"lossless": "1"} if lossless else {"crf": f"{quality * 63 / 51:.0f}", "b": str(cap or 0)}
        return replace(chosen, options=options)
    if chosen.codec == "libsvtav1":
        return replace(chosen, options=options | {"preset": "8", "crf": f"{max(1.0, quality * 63 / 51):.0f}"})
    if chosen.codec == "ffv1":
        return replace(chosen, options={"level": "3", "slicecrc": "1"})
    return replace(chosen, options=options | ({"flags": "+ildct"} if info.interlaced and chosen.codec == "prores_ks" else {}))


def rate_cap(info: VideoInfo) -> int | None:
    """Bits per second that the pictures may take; None where the source's rate is not known or says nothing."""
    if info.bit_rate is None or info.codec in _NO_RATE:
        return None
    return round(_RATE_CAP * info.bit_rate)


def _buffer(info: VideoInfo, cap: int) -> int:
    """Bits by which the rate may run ahead."""
    seconds = min(_CAP_SECONDS, max(_LEAST_CAP_SECONDS, _CAP_SHARE * (info.duration_s or _CAP_SECONDS / _CAP_SHARE)))
    return round(seconds * cap)


def _tagged(chosen: Encoding, info: VideoInfo) -> Encoding:
    """With matrix and range of what is written."""
    to_yuv = info.planes.family == "rgb" and chosen.pix_fmt.startswith("yuv")
    if to_yuv:
        matrix = _BT709 if max(info.width, info.height) > 1024 or min(info.width, info.height) > 576 else _BT601
        return replace(chosen, color_space=matrix, color_range=_LIMITED)
    return replace(chosen, color_space=info.color_space, color_range=info.color_range)


def _formats(codec: str) -> tuple[str, ...]:
    """Pixel formats of an encoder."""
    found = av.Codec(_ENCODERS[codec], "w").video_formats or ()
    return tuple(dict.fromkeys(each.name for each in found))


def _is_odd(info: VideoInfo, pix_fmt: str) -> bool:
    layout = av.VideoFormat(pix_fmt, 64, 64)
    return bool(layout.chroma_width(64) < 64 and info.width % 2 or layout.chroma_height(64) < 64 and info.height % 2)
