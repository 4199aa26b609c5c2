"""Masks from stored landmarks at reading time, and the two augmentations that touch them."""

from __future__ import annotations

import numpy as np

from keysync_jax.config import MaskConfig
from keysync_jax.core.errors import KeySyncError

# Landmark i of a mirrored face is landmark MIRROR[i] of the face (68-point scheme: jaw, brows, nose, eyes, outer and inner lip).
MIRROR = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31, 45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)


def latent_masks(
    landmarks: np.ndarray, crop_size: tuple[int, int], latent_size: tuple[int, int], config: MaskConfig, occluder: np.ndarray | None = None
) -> np.ndarray:
    """Masks on the latent grid.

    Args:
      landmarks: `[T, 68, 2]` (x, y) in crop pixels.
      crop_size: (H, W) of the crop.
      latent_size: (h, w) of the latent grid.
      config: kind and extent of the mask.
      occluder: bool `[T, h, w]` or `[T, h, w, 1]`, cells that an object covers and that are therefore kept; None for none.

    Returns:
      float32 `[T, h, w, 1]`, 1 = regenerate.
    """
    from keysync_jax.media.masks import make_mask, remove_occluder

    mask = make_mask(landmarks, *crop_size, config, target=latent_size)
    if occluder is not None:
        mask = remove_occluder(mask, occluder.reshape(occluder.shape[:3]))
    return mask[..., None].astype(np.float32)


def mirror_landmarks(landmarks: np.ndarray, width: int) -> np.ndarray:
    """Landmarks `[..., 68, 2]` of the horizontally mirrored crop of `width` pixels."""
    mirrored = landmarks[..., MIRROR, :].copy()
    # A point belongs to the pixel that it is in, and one between two pixels to the right one: in the mirrored crop to the left one.
    mirrored[..., 0] = np.nextafter(width - mirrored[..., 0], -np.inf)
    return mirrored


def jitter_landmarks(landmarks: np.ndarray, crop_size: tuple[int, int], shift: tuple[float, float], stretch: float) -> np.ndarray:
    """Landmarks moved and stretched as one, the same for all frames of a window.

    Stands for a detector with another habit: the box's top edge and sides end up elsewhere, and training sees mouths nearer to its
    border than a steady detector gives.

    Args:
      landmarks: `[T, 68, 2]`.
      crop_size: (H, W).
      shift: (dx, dy) as fractions of W and H.
      stretch: sideways growth as a fraction, about the horizontal centre of each frame's landmarks.
    """
    if abs(stretch) >= 1:
        raise KeySyncError(f"box stretch is {stretch}; it must stay within (-1, 1)")
    height, width = crop_size
    moved = landmarks.astype(np.float32)
    centre = moved[..., 0].mean(axis=-1, keepdims=True)
    moved[..., 0] = centre + (moved[..., 0] - centre) * (1 + stretch) + shift[0] * width
    moved[..., 1] += shift[1] * height
    return moved
