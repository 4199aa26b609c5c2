"""Masks with the slips of the KeySync reference (commit cfff7cf), which production code leaves out."""

from __future__ import annotations

import cv2
import numpy as np

from keysync_jax.config import MaskConfig
from keysync_jax.media import masks


def scale_landmarks(landmarks: np.ndarray, size: tuple[int, int], target: tuple[int, int], times: int = 1) -> np.ndarray:
    """Landmarks of an image of one size in the pixels of the same image resized, truncated toward zero.

    Args:
      landmarks: `[..., 2]` (x, y) in pixels of an image of `size`.
      size: (height, width) of the image the landmarks were found on.
      target: (height, width) after resizing.
      times: how often the factor is applied: the reference's raw-video path applies it twice, as it detects on frames that are already
        resized and scales the result again.

    Returns:
      int64 array of the same shape.
    """
    factor = np.array([target[1] / size[1], target[0] / size[0]])
    scaled = landmarks
    for _ in range(times):
        scaled = scaled * factor
    return scaled.astype(np.int64)


def make_mask(landmarks: np.ndarray, height: int, width: int, config: MaskConfig, target: tuple[int, int] | None = None) -> np.ndarray:
    """`media.masks.make_mask`, but "heart" has the reference's two slips.

    Its box is a self-crossing contour (a few pixels are lost when it leaves the image above and at the side), and uint8 wraps to 255
    where the nose rectangle leaves the box.

    Returns:
      float32 `[F, h, w]`, values 0 and 1, and 255 in "heart".
    """
    if config.kind != "heart":
        return masks.make_mask(landmarks, height, width, config, target)
    rows, cols = np.arange(height), np.arange(width)
    box = _crossed_boxes(masks.below(landmarks, landmarks[:, masks.HEART_TOP, 1], height), height, width)
    mask = (box - masks.inside(masks.nose_rect(landmarks), rows, cols).astype(np.uint8)).astype(np.float32)
    return mask if target is None else masks.downsample(mask, target)


def _crossed_boxes(rect: masks.Rect, height: int, width: int) -> np.ndarray:
    """uint8 `[F, H, W]`: each rectangle filled through the eight-point contour, with both diagonals, of the reference's "heart"."""
    boxes = np.zeros((len(rect[0]), height, width), np.uint8)
    for box, top, bottom, left, right in zip(boxes, *rect, strict=True):
        corners = [(left, top), (left, bottom), (right, top), (right, bottom)]
        contour = np.array([corners[i] for i in (0, 1, 2, 3, 0, 2, 1, 3)], np.int32)
        cv2.drawContours(box, [contour], -1, 1, cv2.FILLED)
    return boxes
