"""Face boxes as annotations state them: fractions of the picture, or pixels, told apart by their range and the picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare.manifest_fields import finite_number

Box = tuple[float, float, float, float]
_OUTSIDE = 1.0  # how far, in picture sizes, a face may stick out of the picture


def as_fractions(values: str | Sequence[float], video: Path) -> Box | None:
    """x0 y0 x1 y1 as fractions of the upright picture; None where they are pixels of a video that cannot be opened (it is reported later).

    Raises:
      ValueError: not four numbers in order, or neither fractions nor pixels of this picture; says which.
    """
    numbers = [finite_number(v) for v in (values.replace(",", " ").split() if isinstance(values, str) else values)]
    if len(numbers) != 4:
        raise ValueError(f"{len(numbers)} numbers, not four")
    x0, y0, x1, y1 = numbers
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{x0:g} {y0:g} {x1:g} {y1:g} has no area")
    if _inside(numbers, 1, 1):
        return x0, y0, x1, y1
    from keysync_jax.media.video import probe  # here, since boxes in fractions need no decoder

    try:
        info = probe(video)
    except KeySyncError:
        return None
    width, height = info.display_width, info.display_height
    # Pixels of this picture lie within it, give or take a face at its edge; those of another size do not.
    if not _inside(numbers, width, height, 0.25):
        raise ValueError(f"{x0:g} {y0:g} {x1:g} {y1:g} are neither fractions nor pixels of a picture of {width} x {height}")
    return x0 / width, y0 / height, x1 / width, y1 / height


def _inside(numbers: Sequence[float], width: float, height: float, outside: float = _OUTSIDE) -> bool:
    x0, y0, x1, y1 = numbers
    return -outside * width <= x0 and x1 <= (1 + outside) * width and -outside * height <= y0 and y1 <= (1 + outside) * height
