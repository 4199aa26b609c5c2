"""A picture of what a dub would work on: of each shot one frame with the face's box and the region that would be regenerated."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keysync_jax.config import MaskConfig, StageConfig
from keysync_jax.inference.analysis import Analysis, Shot
from keysync_jax.inference.clip_io import VideoSource
from keysync_jax.media.compositing import Compositor
from keysync_jax.media.crop import View

_WIDTH = 480  # of a shot's frame in the picture, pixels
_LABEL = 20  # height of the line above it
_COLUMNS = 3
_PAPER, _INK, _BOX, _MASK = (250, 250, 248), (40, 40, 40), (60, 200, 90), (230, 50, 50)


def draw(source: VideoSource, analysis: Analysis, stage: StageConfig, mask: MaskConfig) -> np.ndarray:
    """The middle frame of every shot: green the crop that the model sees, red what it would regenerate.

    Args:
      source: the clip; one pass over it.
      analysis: of the same clip.
      stage: whose resolution and latent grid count.
      mask: the region.

    Returns:
      uint8 `[H, W, 3]` RGB, shots in rows of three.
    """
    wanted = {_middle(shot): shot for shot in analysis.shots}
    cells = []
    for frame in source.read():
        if (shot := wanted.get(frame.index)) is not None:
            rgb = frame.rgb()
            if shot.crop is not None:
                covered = Compositor(analysis.info).alpha(shot.view(frame.index), shot.mask(frame.index, stage, mask)) > 0
                rgb[covered] = (0.5 * rgb[covered] + 0.5 * np.array(_MASK)).astype(np.uint8)
            cells.append(_cell(rgb, shot, frame.index, float(frame.time)))
    return _grid(cells)


def _middle(shot: Shot) -> int:
    """A frame that shows the shot: with a face in it, where there is one."""
    seen = shot.start + np.flatnonzero(shot.faces.detected if shot.crop is not None else np.ones(shot.stop - shot.start))
    return int(seen[len(seen) // 2])


def _cell(rgb: np.ndarray, shot: Shot, frame: int, time: float) -> Image.Image:
    scale = _WIDTH / rgb.shape[1]
    height = max(1, round(rgb.shape[0] * scale))
    cell = Image.new("RGB", (_WIDTH, height + _LABEL), _PAPER)
    cell.paste(Image.fromarray(rgb).resize((_WIDTH, height), Image.Resampling.LANCZOS), (0, _LABEL))
    pen = ImageDraw.Draw(cell)
    if shot.crop is None:
        what = "no face"
    else:
        corners = View.of(shot.view(frame)).corners * scale + [0, _LABEL]
        corners[1:3, 0] -= 1
        corners[2:, 1] -= 1
        pen.polygon([(x, y) for x, y in corners.tolist()], outline=_BOX, width=2)
        what = f"face in {int(shot.faces.detected.sum())} frames"
    pen.rectangle((0, 0, _WIDTH, _LABEL - 1), fill=_PAPER)  # a box that reaches beyond the picture
    pen.text((4, 2), f"shot {shot.index}: frames {shot.start}–{shot.stop - 1}, {what}; {time:.2f} s", _INK, ImageFont.load_default(12))
    return cell


def _grid(cells: list[Image.Image]) -> np.ndarray:
    width, height = cells[0].size
    columns = min(_COLUMNS, len(cells))
    picture = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), _PAPER)
    for place, cell in enumerate(cells):
        picture.paste(cell, (place % columns * width, place // columns * height))
    return np.asarray(picture)
