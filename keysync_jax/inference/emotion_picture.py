"""The emotion of an animation as a picture: both curves over time, with the keyframes, which are all that the network sees of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keysync_jax.core.clock import FRAME_RATE

_PAPER, _INK, _GRID = (250, 250, 248), (40, 40, 40), (215, 215, 210)
_COLOURS = {"valence": (205, 60, 45), "arousal": (60, 110, 170)}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 200, 40, 26, 22


def draw(emotion: Mapping[str, np.ndarray], keyframes: Sequence[int], title: str) -> Image.Image:
    """Curves from -1 to 1 over the clip.

    Args:
      emotion: `valence` and `arousal` of each frame.
      keyframes: frame numbers, each a dot.
      title: what was asked for.
    """
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen = ImageDraw.Draw(picture)
    frames = len(emotion["valence"])

    def place(frame: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 8) * frame / max(frames - 1, 1)
        return x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value) / 2

    for level in (-1, 0, 1):
        pen.line([place(0, level), place(max(frames - 1, 1), level)], fill=_GRID)
        pen.text((8, place(0, level)[1] - 8), f"{level:+d}" if level else "0", fill=_INK, font=font)
    for number, (name, colour) in enumerate(_COLOURS.items()):
        values = np.asarray(emotion[name], np.float64)
        points = [place(frame, float(values[frame])) for frame in range(frames)]
        if len(points) > 1:
            pen.line(points, fill=colour, width=2)
        for frame in keyframes:
            x, y = place(frame, float(values[frame]))
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        pen.text((_WIDTH - 170 + 80 * number, 6), name, fill=colour, font=font)
    pen.text((_LEFT, 6), title[:90], fill=_INK, font=font)
    pen.text((_LEFT, _HEIGHT - 18), "0 s", fill=_INK, font=font)
    pen.text((_WIDTH - 60, _HEIGHT - 18), f"{frames / FRAME_RATE:.2f} s", fill=_INK, font=font)
    return picture
