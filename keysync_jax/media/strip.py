"""A picture strip: the same moments of several videos under one another, with the voice's waveform below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _WAVE = (250, 250, 248), (40, 40, 40), (60, 110, 170)


def tint_changes(before: np.ndarray, after: np.ndarray, threshold: int = 12) -> np.ndarray:
    """`before` `[H, W, 3]` uint8 with every pixel that differs from `after` by more than `threshold` of 255 tinted red."""
    changed = np.abs(before.astype(np.int16) - after).max(-1) > threshold
    tinted = before.copy()
    tinted[changed] = (0.45 * tinted[changed] + 0.55 * np.array([230, 50, 50])).astype(np.uint8)
    return tinted


def draw_strip(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    times: Sequence[float],
    samples: np.ndarray | None = None,
    seconds: float | None = None,
    cell: int = 160,
    sound_label: str = "new voice",
) -> Image.Image:
    """Rows of frames with labels.

    Args:
      rows: (label, frames `[H, W, 3]` uint8), the same number of frames in each.
      times: seconds of each column, printed above it.
      samples: voice `[S]` in [-1, 1], drawn below as a waveform that spans `seconds`.
      seconds: length of the waveform; default the last time.
      cell: width of a frame in the picture, pixels.
      sound_label: printed beside the waveform.
    """
    font = ImageFont.load_default(13)
    height = round(cell * rows[0][1][0].shape[0] / rows[0][1][0].shape[1])
    left, top, gap = 92, 22, 4
    wave = 70 if samples is not None else 0
    size = (left + len(times) * (cell + gap), top + len(rows) * (height + gap) + wave)
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    for column, t in enumerate(times):
        draw.text((left + column * (cell + gap) + 2, 3), f"{t:.2f} s", _INK, font)
    for number, (label, frames) in enumerate(rows):
        y = top + number * (height + gap)
        draw.text((6, y + height // 2 - 8), label, _INK, font)
        for column, frame in enumerate(frames):
            picture.paste(Image.fromarray(frame).resize((cell, height), Image.Resampling.LANCZOS), (left + column * (cell + gap), y))
    if samples is not None and samples.size:
        y = size[1] - wave // 2
        draw.text((6, y - 8), sound_label, _INK, font)
        width = size[0] - left - gap
        peak = max(float(np.abs(samples).max()), 1e-6)
        for x, part in enumerate(np.array_split(samples, width)):
            reach = 0.9 * (wave / 2) * float(np.abs(part).max(initial=0)) / peak
            draw.line((left + x, y - reach, left + x, y + reach), _WAVE)
        end = seconds if seconds is not None else times[-1]
        for t in times:
            x = left + width * t / end
            draw.line((x, size[1] - wave, x, size[1]), _INK)
    return picture
