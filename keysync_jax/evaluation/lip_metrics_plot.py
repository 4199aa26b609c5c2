"""Curves of a mouth over time as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _GRID = (250, 250, 248), (40, 40, 40), (205, 205, 200)
COLOURS = ((25, 25, 25), (205, 60, 45), (60, 110, 170), (70, 140, 70))


def draw_curves(
    curves: Sequence[tuple[str, np.ndarray]],
    seconds: float,
    label: str,
    width: int = 960,
    height: int = 150,
    left: int = 92,
    right: int = 4,
    levels: Sequence[float] = (),
    times: Sequence[np.ndarray] | None = None,
) -> Image.Image:
    """Curves over time with a legend.

    Args:
      curves: (name, values `[T]`); NaN leaves a gap.
      seconds: length of the time axis.
      label: printed at the left.
      width, height: of the picture in pixels.
      left, right: margins, so that it can stand under a picture strip.
      levels: values at which a grey line is drawn.
      times: seconds of every value of each curve; None spreads each curve evenly over `seconds`.
    """
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    top, bottom = 24, height - 8
    known = np.concatenate([np.asarray(values, np.float64)[np.isfinite(values)] for _, values in curves] or [np.zeros(0)])
    high = max([float(known.max(initial=0)), *levels, 1e-6]) * 1.05

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / high

    draw.text((6, (top + bottom) // 2 - 8), label, _INK, font)
    for level in (0.0, *levels):
        draw.line((left, y(level), width - right, y(level)), _GRID)
        draw.text((left - 34, y(level) - 8), f"{level:.2f}", _INK, font)
    for second in range(int(seconds) + 1):
        x = left + (width - left - right) * second / seconds
        draw.line((x, bottom, x, bottom + 4), _INK)
    at = left
    for number, ((name, values), colour) in enumerate(zip(curves, COLOURS, strict=False)):
        draw.line((at, 12, at + 18, 12), colour, 2)
        draw.text((at + 23, 3), name, _INK, font)
        at += 40 + int(font.getlength(name))
        when = (np.arange(len(values)) + 0.5) / len(values) if times is None else times[number] / seconds
        x = left + (width - left - right) * when
        points: list[tuple[float, float]] = []
        for px, value in [*zip(x.tolist(), np.asarray(values, np.float64).tolist(), strict=True), (0.0, float("nan"))]:
            if np.isfinite(value):
                points.append((px, y(value)))
                continue
            if len(points) > 1:
                draw.line(points, colour, 2, joint="curve")
            points = []
    return picture


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width under one another."""
    out = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), _PAPER)
    y = 0
    for picture in pictures:
        out.paste(picture, (0, y))
        y += picture.height
    return out
