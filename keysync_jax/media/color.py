"""Pixel formats that are edited in place, and RGB <-> code values for their matrix, range and depth.

A decoded picture is a set of planes of integer code values. Compositing works on these planes, so that pixels outside the blend
keep the very values that the decoder gave. Formats edited in place are planar Y'CbCr with 4:2:0, 4:2:2 or 4:4:4 chroma, planar
G, B, R, and gray, each with 8, 10 or 12 bits; a picture in any other format (semi-planar, packed, palette, 9, 14 or 16 bits,
alpha) is brought to the nearest of them by libswscale when it is read, and the reader says so.

Code values follow ITU-T H.273: limited range is Y' = 219 E' + 16 and C = 224 E + 128 at 8 bits, times 2**(bits - 8) above; full range
spans 0 .. 2**bits - 1. RGB here is the gamma-coded R'G'B' of the video; transfer functions (HDR ones too) are never undone, because
what the model paints goes back through the same matrix.

Chroma siting: a chroma sample is the plain average of the luma positions of its cell (centre siting). Real files mostly site
4:2:0 chroma at the left edge; the difference, half a luma pixel of chroma inside the blend, is below what the feather hides.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Interpolation

# Luma weights (kr, kb) by H.273 matrix code: 1 BT.709, 4 FCC, 5 and 6 BT.601, 7 SMPTE 240M, 9 and 10 BT.2020.
_LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
_SWSCALE_MATRIX = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # the same matrices in libswscale's numbering
FULL_RANGE = 2  # H.273 / libavutil number of full ("JPEG") range
_BT601, _BT709 = 5, 1
_SUBSAMPLING = {"420": (1, 1), "422": (1, 0), "444": (0, 0)}
_EDITABLE = re.compile(r"(?:yuvj(420|422|444)p|yuv(420|422|444)p(?:(10|12)le)?|gray(?:(10|12)le)?|gbrp(?:(10|12)le)?)")


@dataclass(frozen=True)
class PlaneFormat:
    """What the planes of a picture mean.

    Attributes:
      family: "yuv" (Y, Cb, Cr), "gray" (Y) or "rgb" (G, B, R, the order of planar RGB).
      bits: bits per sample; planes are uint8 for 8 bits and uint16 above.
      log2_w: log2 of the horizontal chroma subsampling.
      log2_h: log2 of the vertical chroma subsampling.
      kr: luma weight of red.
      kb: luma weight of blue.
      full_range: code values span the whole range instead of the limited ("video") one.
      swscale_matrix: the same matrix in libswscale's numbering.
    """

    family: str
    bits: int
    log2_w: int
    log2_h: int
    kr: float
    kb: float
    full_range: bool
    swscale_matrix: int

    @property
    def num_planes(self) -> int:
        return 1 if self.family == "gray" else 3


def is_editable(pix_fmt: str) -> bool:
    """Whether compositing edits this pixel format in place."""
    return _EDITABLE.fullmatch(pix_fmt) is not None


def working_format(pix_fmt: str) -> str:
    """Nearest pixel format that is edited in place: `pix_fmt` itself where possible, never fewer chroma samples than it has.

    Alpha is dropped, 9 bits become 10, and 14 or 16 bits become 12, the deepest that the encoders take.
    """
    if is_editable(pix_fmt):
        return pix_fmt
    layout = av.VideoFormat(pix_fmt, 64, 64)
    bits = max(component.bits for component in layout.components)
    depth = "" if bits <= 8 else "10le" if bits <= 10 else "12le"
    if layout.is_rgb or layout.has_palette or pix_fmt.startswith(("xyz", "bayer")):
        return f"gbrp{depth}"
    if len(layout.components) <= 2:
        return f"gray{depth}"
    halved_w, halved_h = layout.chroma_width(64) < 64, layout.chroma_height(64) < 64
    chroma = "444" if not halved_w else "420" if halved_h else "422"
    return f"yuv{chroma}p{depth}"


OPAQUE = 65535  # of `alpha_of`


def has_alpha(pix_fmt: str) -> bool:
    """Whether a pixel format has a transparency."""
    return any(component.is_alpha for component in av.VideoFormat(pix_fmt, 64, 64).components) or pix_fmt == "pal8"


def alpha_of(frame: av.VideoFrame) -> np.ndarray:
    """Opacity of a picture in a format with a transparency: uint16 `[h, w]` in stored orientation, from 0 to `OPAQUE`."""
    name = frame.format.name
    if not (name.startswith("yuva") or name.startswith("gbrap")) or name.endswith("be"):
        deep = any(component.bits > 8 for component in frame.format.components)
        frame = frame.reformat(format="gbrap16le" if deep else "gbrap", threads=SWSCALE_THREADS)
    bits = frame.format.components[3].bits
    rows = _rows(frame.planes[3], bits).astype(np.uint32)
    top = 2**bits - 1
    return ((rows * OPAQUE + top // 2) // top).astype(np.uint16)


def with_alpha(frame: av.VideoFrame, alpha: np.ndarray) -> av.VideoFrame:
    """A picture in a planar format with a transparency, given its opacity as `alpha_of` gives it."""
    frame.make_writable()
    bits = frame.format.components[3].bits
    _rows(frame.planes[3], bits)[...] = (alpha.astype(np.uint32) * (2**bits - 1) + OPAQUE // 2) // OPAQUE
    return frame


def _rows(plane: Any, bits: int) -> np.ndarray:
    """View `[h, w]` of a plane's samples; `plane` has a buffer, which PyAV's stubs do not say."""
    dtype = np.dtype(np.uint8 if bits == 8 else np.uint16)
    return np.frombuffer(plane, dtype).reshape(plane.height, plane.line_size // dtype.itemsize)[:, : plane.width]


def plane_format(pix_fmt: str, color_space: int, color_range: int, width: int, height: int) -> PlaneFormat:
    """Meaning of the planes of an editable pixel format.

    Args:
      pix_fmt: one for which `is_editable` holds.
      color_space: H.273 matrix code; an unspecified one is BT.709 for pictures larger than 1024x576 and BT.601 below, as players guess.
      color_range: 2 is full range; anything else is limited, except for RGB and "yuvj" formats.
      width: picture width in pixels.
      height: picture height in pixels.
    """
    match = _EDITABLE.fullmatch(pix_fmt)
    if match is None:
        raise ValueError(f"{pix_fmt} is not edited in place; convert it to {working_format(pix_fmt)} first")
    family = "rgb" if pix_fmt.startswith("gbrp") else "gray" if pix_fmt.startswith("gray") else "yuv"
    log2_w, log2_h = _SUBSAMPLING[match[1] or match[2] or "444"]
    bits = int(match[3] or match[4] or match[5] or 8)
    guess = _BT709 if max(width, height) > 1024 or min(width, height) > 576 else _BT601
    matrix = color_space if color_space in _LUMA_WEIGHTS else guess
    kr, kb = _LUMA_WEIGHTS[matrix]
    full = family == "rgb" or pix_fmt.startswith("yuvj") or color_range == FULL_RANGE
    return PlaneFormat(family, bits, log2_w, log2_h, kr, kb, full, _SWSCALE_MATRIX[matrix])


@functools.lru_cache(maxsize=32)
def _affine(fmt: PlaneFormat) -> np.ndarray:
    """`[C, 4]` float64: code values = A[:, :3] @ (r, g, b) + A[:, 3], in plane order."""
    top = 2.0**fmt.bits - 1
    if fmt.family == "rgb":
        return np.array([[0, top, 0, 0], [0, 0, top, 0], [top, 0, 0, 0]], np.float64)
    unit = 2.0 ** (fmt.bits - 8)
    luma_scale, luma_zero = (top, 0.0) if fmt.full_range else (219 * unit, 16 * unit)
    chroma_scale, chroma_zero = (top, 2.0 ** (fmt.bits - 1)) if fmt.full_range else (224 * unit, 128 * unit)
    kr, kb = fmt.kr, fmt.kb
    kg = 1 - kr - kb
    y = np.array([kr, kg, kb])
    cb = (np.array([0, 0, 1.0]) - y) / (2 * (1 - kb))
    cr = (np.array([1.0, 0, 0]) - y) / (2 * (1 - kr))
    rows = [[*(luma_scale * y), luma_zero], [*(chroma_scale * cb), chroma_zero], [*(chroma_scale * cr), chroma_zero]]
    return np.array(rows[: fmt.num_planes], np.float64)


def to_codes(rgb: np.ndarray, fmt: PlaneFormat) -> np.ndarray:
    """R'G'B' float `[h, w, 3]` in 0..1 to unrounded code values float32 `[h, w, C]` in plane order, chroma at full resolution."""
    codes = cv2.transform(np.ascontiguousarray(rgb, np.float32), _affine(fmt))
    return codes.reshape(*rgb.shape[:2], fmt.num_planes)


def to_rgb(codes: np.ndarray, fmt: PlaneFormat) -> np.ndarray:
    """Inverse of `to_codes` (chroma at full resolution): float32 `[h, w, 3]`, not clipped; gray gives three equal channels."""
    affine = _affine(fmt)
    if fmt.family == "gray":
        luma = (np.asarray(codes, np.float32).reshape(codes.shape[:2]) - affine[0, 3]) / affine[0, :3].sum()
        return np.repeat(luma[:, :, None], 3, axis=2).astype(np.float32)
    inverse = np.linalg.inv(affine[:, :3])
    matrix = np.concatenate([inverse, -inverse @ affine[:, 3:]], axis=1)
    return cv2.transform(np.ascontiguousarray(codes, np.float32), matrix)


def nominal_limits(fmt: PlaneFormat) -> list[tuple[float, float]]:
    """Smallest and largest code value that a colour inside 0..1 can have, per plane."""
    unit, top = 2.0 ** (fmt.bits - 8), 2.0**fmt.bits - 1
    if fmt.full_range:
        return [(0.0, top)] * fmt.num_planes
    return [(16 * unit, 235 * unit), (16 * unit, 240 * unit), (16 * unit, 240 * unit)][: fmt.num_planes]


def code_scale(fmt: PlaneFormat) -> list[float]:
    """Code values per unit of R'G'B', per plane (chroma: per unit of colour difference)."""
    unit, top = 2.0 ** (fmt.bits - 8), 2.0**fmt.bits - 1
    scales = [top] * 3 if fmt.full_range else [219 * unit, 224 * unit, 224 * unit]
    return scales[: fmt.num_planes]


def code_zero(fmt: PlaneFormat) -> list[float]:
    """Code value of black, and of no colour, per plane."""
    unit, mid = 2.0 ** (fmt.bits - 8), 2.0 ** (fmt.bits - 1)
    if fmt.family == "rgb":
        return [0.0] * 3
    return [0.0 if fmt.full_range else 16 * unit, mid, mid][: fmt.num_planes]


def subsample(plane: np.ndarray, fmt: PlaneFormat) -> np.ndarray:
    """Area average of a full-resolution plane `[h, w]` float32 over the chroma cells: `[ceil(h/2), ceil(w/2)]` for 4:2:0.

    The last cell of an odd size averages the samples that exist.
    """
    if not (fmt.log2_w or fmt.log2_h):
        return plane
    step_w, step_h = 1 << fmt.log2_w, 1 << fmt.log2_h
    height, width = plane.shape
    pad_h, pad_w = -height % step_h, -width % step_w
    if pad_h or pad_w:
        plane = np.pad(plane, ((0, pad_h), (0, pad_w)), mode="edge")
    size = (plane.shape[1] // step_w, plane.shape[0] // step_h)
    return cv2.resize(plane, size, interpolation=cv2.INTER_AREA)


def plane_views(frame: av.VideoFrame) -> list[np.ndarray]:
    """Writable views `[h, w]` (uint8 or uint16) of the planes of a frame in an editable format.

    Call `frame.make_writable()` first when writing: a decoded picture shares its memory with the decoder.
    """
    dtype = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
    views = []
    for plane in frame.planes:
        rows = np.frombuffer(memoryview(plane), dtype).reshape(plane.height, plane.line_size // np.dtype(dtype).itemsize)
        views.append(rows[:, : plane.width])
    return views


def relabel(frame: av.VideoFrame, pix_fmt: str) -> av.VideoFrame:
    """Copy of the samples of `frame` under another name of the same layout ("yuvj420p" and "yuv420p"), without any conversion."""
    out = av.VideoFrame(frame.width, frame.height, pix_fmt)
    for target, source in zip(plane_views(out), plane_views(frame), strict=True):
        target[...] = source
    out.pts = frame.pts
    if frame.time_base is not None:
        out.time_base = frame.time_base
    out.color_range, out.colorspace = frame.color_range, frame.colorspace
    out.color_primaries, out.color_trc = frame.color_primaries, frame.color_trc
    return out


# libswscale's slice threads write up to eight pixels into each other's rows when the width is odd, so results differ from run to run.
SWSCALE_THREADS = 1


def frame_to_rgb(frame: av.VideoFrame, fmt: PlaneFormat, width: int | None = None, height: int | None = None) -> np.ndarray:
    """8-bit RGB `[h, w, 3]` of a frame in stored orientation, resized on request, with the frame's own matrix and range."""
    shrinks = (width or frame.width) < frame.width
    if fmt.family == "gray":  # libswscale takes every gray picture for full range
        luma = to_rgb(plane_views(frame)[0][:, :, None], fmt)
        if (width, height) != (None, None):
            luma = cv2.resize(luma, (width or frame.width, height or frame.height), interpolation=cv2.INTER_AREA)
        return np.rint(np.clip(luma, 0, 1) * 255).astype(np.uint8)
    converted = frame.reformat(
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=fmt.swscale_matrix,
        dst_colorspace=fmt.swscale_matrix,
        src_color_range=ColorRange.JPEG if fmt.full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=(Interpolation.AREA if shrinks else Interpolation.BILINEAR)
        | Interpolation.ACCURATE_RND
        | Interpolation.FULL_CHR_H_INT,
        threads=SWSCALE_THREADS,
    )
    return converted.to_ndarray()
