"""Region masks from 68-point landmarks: 1 = the pixel or latent cell is regenerated, 0 = it is kept.

The default "box" is the mask of the KeySync paper: everything below landmark 28 (just under the eye line) between the leftmost and
the rightmost landmark. The rasterisation rules (truncation toward zero, both border columns inside, floor-nearest sampling to the
latent grid) are those of the KeySync reference at commit cfff7cf, because the released weights were trained on masks drawn so; they
are written here as closed forms over row and column indices, which a polygon rasteriser reproduces pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from keysync_jax.config import MASK_KINDS, MaskConfig
from keysync_jax.core.errors import KeySyncError

# Constants of the reference's mask kinds (KeySync reference at commit cfff7cf).
MOUTH_MARGIN = 0.01  # "mouth": the box grows up and down by this fraction of the image width
FACE_MARGIN = 0.05  # "face": the jaw polygon grows by this fraction of the image height
HEART_TOP = 29  # "heart": landmark at the top edge
NOSE_MARGIN = 0.10  # "heart": sideways growth of the nose rectangle, as a fraction of the distance from jaw to nose bridge

# (top, bottom, left, right) of one rectangle per frame, all inclusive, int64 [F].
Rect = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
# Draws a kind of mask: landmarks [F, 68, 2], the sampled rows [h] and columns [w] of an image of size (H, W) -> bool [F, h, w].
Draw = Callable[[np.ndarray, np.ndarray, np.ndarray, tuple[int, int], MaskConfig], np.ndarray]


def nearest_indices(length: int, target: int) -> np.ndarray:
    """Source index of each of `target` samples under floor-nearest resizing of an axis of `length`, int64 `[target]`.

    Computed in float32 as torch's `interpolate(mode="nearest")` does, so that the grids agree for every pair of sizes and not only
    for those that divide.
    """
    scale = np.float32(length) / np.float32(target)
    index = np.floor(np.arange(target, dtype=np.float32) * scale).astype(np.int64)
    return np.minimum(index, length - 1)


def downsample(mask: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    """`[F, H, W]` sampled floor-nearest to `[F, h, w]` (no averaging, no threshold), same dtype."""
    rows = nearest_indices(mask.shape[1], target[0])
    cols = nearest_indices(mask.shape[2], target[1])
    return mask[:, rows[:, None], cols[None, :]]


def remove_occluder(mask: np.ndarray, occluder: np.ndarray) -> np.ndarray:
    """Mask without the cells an occluding object covers: `M and not M_object` (paper Eq. 7).

    Args:
      mask: `[F, h, w]` with 1 = regenerate.
      occluder: `[F, h, w]`, non-zero where the object (hand, microphone) is.

    Returns:
      Array of `mask`'s dtype with values 0 and 1.

    Raises:
      KeySyncError: masks of different shapes.
    """
    if mask.shape != occluder.shape:
        raise KeySyncError(f"occluder mask has shape {occluder.shape} but the face mask has {mask.shape}; they must be the same")
    return np.logical_and(mask, np.logical_not(occluder)).astype(mask.dtype)


def register(kind: str, draw: Draw) -> None:
    """Adds a kind of mask: from now on stages can be trained with it and dubs can name it, in this process.

    Whoever uses a model that was trained with it registers it again, and so do the workers that read its data.

    Args:
      kind: a name that `MaskConfig.kind` takes from now on.
      draw: how it is drawn, see `Draw`.

    Raises:
      KeySyncError: there is a kind of that name.
    """
    if kind in KINDS:
        raise KeySyncError(f"there is a mask {kind!r} already; choose another name")
    KINDS[kind] = draw
    MASK_KINDS.append(kind)


def make_mask(landmarks: np.ndarray, height: int, width: int, config: MaskConfig, target: tuple[int, int] | None = None) -> np.ndarray:
    """Masks of `config.kind`, one of `KINDS`, for a run of frames. Parts outside the image are clipped.

    Args:
      landmarks: `[F, 68, 2]` (x, y) in image pixels, float or int. Float and int inputs follow the same truncation rules.
      height, width: image size in pixels.
      config: kind, nose landmark and expansion.
      target: (h, w) of the grid to sample to; None keeps the image's own grid.

    Returns:
      float32 `[F, h, w]`, values 0 and 1.

    Raises:
      KeySyncError: landmarks of another shape, or not finite; a kind that was registered in another process.
    """
    landmarks = np.asarray(landmarks)
    if landmarks.ndim != 3 or landmarks.shape[1:] != (68, 2):
        raise KeySyncError(f"mask needs landmarks of shape (F, 68, 2), not {landmarks.shape}")
    if not np.isfinite(landmarks).all():
        frames = np.flatnonzero(~np.isfinite(landmarks).all(axis=(1, 2)))
        raise KeySyncError(f"landmarks of frame {frames[0]} are not finite ({frames.size} such frames); leave out frames without a face")
    if not 0 <= config.nose_index < 68:
        raise KeySyncError(f"mask nose_index is {config.nose_index}; it must name one of the 68 landmarks (0-67)")
    if config.kind not in KINDS:
        raise KeySyncError(f"no mask {config.kind!r} is registered in this process; import the module that registers it")
    # Only the sampled rows and columns are ever evaluated.
    rows = np.arange(height) if target is None else nearest_indices(height, target[0])
    cols = np.arange(width) if target is None else nearest_indices(width, target[1])
    return KINDS[config.kind](landmarks, rows, cols, (height, width), config).astype(np.float32)


def _box(landmarks: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: tuple[int, int], config: MaskConfig) -> np.ndarray:
    """Rows from landmark `nose_index` (raised by `box_expand`, of the width) to the bottom, between the extreme landmarks."""
    expand = _pixels(config.box_expand, size[1])
    return inside(below(landmarks, landmarks[:, config.nose_index, 1] - expand, size[0]), rows, cols)


def _full(landmarks: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: tuple[int, int], config: MaskConfig) -> np.ndarray:
    """The box's rows over the whole width. `box_expand`, of the height, is added to the edge as the reference does: it lowers it."""
    offset = config.box_expand
    if 0 < abs(offset) < 1:
        offset = int(offset * size[0])
    # Clipped to the last row: the reference never gives an empty "full" mask.
    edge = np.clip(landmarks[:, config.nose_index, 1] + offset, 0, size[0] - 1)
    return np.repeat((rows >= edge[:, None])[:, :, None], len(cols), axis=2)


def _mouth(landmarks: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: tuple[int, int], config: MaskConfig) -> np.ndarray:
    """Rows from landmark `nose_index` to the lowest landmark, one percent of the width more at both ends, between the extremes."""
    margin = _pixels(MOUTH_MARGIN, size[1])
    lowest = np.minimum(size[0], landmarks[:, :, 1].max(axis=1) + margin)
    return inside(below(landmarks, landmarks[:, config.nose_index, 1] - margin, lowest), rows, cols)


def _heart(landmarks: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: tuple[int, int], config: MaskConfig) -> np.ndarray:
    """The box from landmark 29 down, without a rectangle over the nose."""
    box = below(landmarks, landmarks[:, HEART_TOP, 1], size[0])
    return inside(box, rows, cols) & ~inside(nose_rect(landmarks), rows, cols)


def _face(landmarks: np.ndarray, rows: np.ndarray, cols: np.ndarray, size: tuple[int, int], config: MaskConfig) -> np.ndarray:
    """Polygon of jaw points 2-14, grown from its centre by five percent of the height."""
    out = np.zeros((len(landmarks), len(rows), len(cols)), bool)
    for mask, points in zip(out, landmarks, strict=True):
        mask[:] = _jaw_polygon(points, *size)[rows[:, None], cols[None, :]]
    return out


# A `box_expand` in [0, 1) is a fraction, else pixels; mouth, heart and face have fixed margins and ignore it, as in the reference.
KINDS: dict[str, Draw] = {"box": _box, "full": _full, "mouth": _mouth, "heart": _heart, "face": _face}


def _pixels(value: float, length: int) -> float:
    return int(value * length) if 0 <= value < 1 else value


def _truncate(values: np.ndarray) -> np.ndarray:
    return np.trunc(values).astype(np.int64)


def below(landmarks: np.ndarray, top: np.ndarray, bottom: int | np.ndarray) -> Rect:
    """Rectangle between the extreme landmarks from `top` to `bottom`."""
    x = landmarks[:, :, 0]
    return _truncate(top), _truncate(np.broadcast_to(bottom, len(landmarks))), _truncate(x.min(axis=1)), _truncate(x.max(axis=1))


def nose_rect(landmarks: np.ndarray) -> Rect:
    """Rectangle over the nose that "heart" leaves out."""
    # The arithmetic stays in the landmarks' own precision (float32 or, from integers, float64) before it is truncated.
    side = np.abs(landmarks[:, 2, 0] - landmarks[:, HEART_TOP, 0]) * NOSE_MARGIN
    return (
        _truncate(landmarks[:, HEART_TOP, 1]),
        _truncate(landmarks[:, 33, 1]),
        _truncate(landmarks[:, 31, 0] - side),
        _truncate(landmarks[:, 35, 0] + side),
    )


def inside(rect: Rect, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """bool `[F, h, w]`: which of the given rows and columns lie in each frame's rectangle. Corners may come in either order."""
    top, bottom, left, right = (edge[:, None] for edge in rect)
    in_rows = (rows >= np.minimum(top, bottom)) & (rows <= np.maximum(top, bottom))
    in_cols = (cols >= np.minimum(left, right)) & (cols <= np.maximum(left, right))
    return in_rows[:, :, None] & in_cols[:, None, :]


def _jaw_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 `[H, W]`: filled polygon of jaw points 2-14 of one frame `[68, 2]`, each moved outward from their centroid."""
    jaw = np.trunc(points[2:15]).astype(np.int64).astype(np.float64)
    margin = int(FACE_MARGIN * height)
    if margin:
        arm = jaw - jaw.mean(axis=0)
        length = np.sqrt((arm**2).sum(axis=1, keepdims=True))
        moved = np.trunc(jaw + margin * (arm / np.where(length == 0, 1, length)))
        jaw = np.where(length == 0, jaw, moved)
    canvas = Image.new("L", (width, height), 0)
    ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in jaw], outline=1, fill=1)
    return np.asarray(canvas)
