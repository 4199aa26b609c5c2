"""A picture in the pixel format of an encoder: samples kept wherever the two formats have them in common."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation

from keysync_jax.media import color
from keysync_jax.media.color import SWSCALE_THREADS, PlaneFormat

# FFmpeg's numbers of the matrices in libswscale: 1 is BT.709, 5 BT.601.
_SWSCALE = {1: 1, 6: 5}


def convert(picture: av.VideoFrame, fmt: PlaneFormat, pix_fmt: str, matrix: int = 2, alpha: np.ndarray | None = None) -> av.VideoFrame:
    """A picture in another pixel format, with its stamp.

    Args:
      picture: in an editable format.
      fmt: what its planes mean.
      pix_fmt: format wanted; one with a transparency takes `alpha`.
      matrix: H.273 matrix of the result, where RGB becomes Y'CbCr; else the source's stays.
      alpha: opacity uint16 `[h, w]` up to `color.OPAQUE`.
    """
    stamp, duration, tick = picture.pts, picture.duration, picture.time_base
    given = picture.format.name
    if given.replace("yuvj", "yuv") == pix_fmt.replace("yuvj", "yuv"):
        out = picture if given == pix_fmt else color.relabel(picture, pix_fmt)
    elif fmt.family == "gray" and color.is_editable(pix_fmt) and pix_fmt.startswith("yuv"):
        out = _gray_with_chroma(picture, fmt, pix_fmt)
    elif fmt.family == "rgb" and pix_fmt.startswith("yuv"):
        out = picture.reformat(
            format=pix_fmt,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=_SWSCALE.get(matrix, 5),
            interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
            threads=SWSCALE_THREADS,
        )
    else:
        out = picture.reformat(format=pix_fmt, threads=SWSCALE_THREADS)
    if alpha is not None and color.has_alpha(pix_fmt):
        out = color.with_alpha(out, alpha)
    out.pts, out.duration = stamp, duration
    if tick is not None:
        out.time_base = tick
    return out


def _gray_with_chroma(picture: av.VideoFrame, fmt: PlaneFormat, pix_fmt: str) -> av.VideoFrame:
    """Gray as Y'CbCr without colour; libswscale would take every gray picture for full range."""
    out = av.VideoFrame(picture.width, picture.height, pix_fmt)
    bits = out.format.components[0].bits
    luma, *chroma = color.plane_views(out)
    source = color.plane_views(picture)[0]
    shift = fmt.bits - bits
    luma[...] = np.minimum((source.astype(np.uint32) + (1 << shift >> 1)) >> shift, 2**bits - 1) if shift > 0 else source << -shift
    for plane in chroma:
        plane[...] = 1 << (bits - 1)
    out.color_range, out.color_primaries, out.color_trc = picture.color_range, picture.color_primaries, picture.color_trc
    return out
