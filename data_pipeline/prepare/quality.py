"""Measures that need no weights, and the nine views that the quality scorer sees."""

from __future__ import annotations

import cv2
import numpy as np

from keysync_jax.core.clock import SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError

VIEWS_PER_PICTURE = 3  # paper A.1: first, middle and last frame, three random crops each
VIEW_SIZE = 224
FACE_SIZE = 128  # faces are scaled to this before sharpness is measured, so that it does not depend on the video's size
# Root mean square of a 40 ms frame below this part of full scale is silence (-50 dB).
SILENCE = 10 ** (-50 / 20)


def quality_views(pictures: list[np.ndarray], seed: int) -> np.ndarray:
    """Random square views of pictures.

    Args:
      pictures: uint8 `[H, W, 3]` each.
      seed: equal seeds give equal views.

    Returns:
      uint8 `[3 * len(pictures), 224, 224, 3]`; pictures smaller than a view are enlarged first.
    """
    rng = np.random.default_rng(seed)
    views = []
    for picture in pictures:
        height, width = picture.shape[:2]
        scale = VIEW_SIZE / min(height, width)
        if scale > 1:
            picture = cv2.resize(picture, (max(VIEW_SIZE, round(width * scale)), max(VIEW_SIZE, round(height * scale))))
            height, width = picture.shape[:2]
        for _ in range(VIEWS_PER_PICTURE):
            y, x = rng.integers(height - VIEW_SIZE + 1), rng.integers(width - VIEW_SIZE + 1)
            views.append(picture[y : y + VIEW_SIZE, x : x + VIEW_SIZE])
    return np.stack(views)


def face_patch(rgb: np.ndarray, landmarks: np.ndarray) -> np.ndarray | None:
    """Grey levels uint8 `[128, 128]` of the box around a face's landmarks `[68, 2]`; None where no pixel of it is in the picture."""
    low, high = np.floor(landmarks.min(axis=0)).astype(int), np.ceil(landmarks.max(axis=0)).astype(int)
    height, width = rgb.shape[:2]
    part = rgb[max(low[1], 0) : min(high[1], height), max(low[0], 0) : min(high[0], width)]
    if 0 in part.shape:
        return None
    grey = cv2.cvtColor(np.ascontiguousarray(part), cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA)


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian of grey levels `[h, w]` uint8; below about 15 a face looks blurred."""
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def brightness(grey: np.ndarray) -> float:
    """Mean grey level, 0 to 255."""
    return float(grey.mean())


def silence_share(samples: np.ndarray, frames: int) -> float:
    """Share of the 40 ms frames of `samples` `[640 * frames]` that are silent.

    Raises:
      KeySyncError: fewer samples than the frames need.
    """
    if len(samples) < SAMPLES_PER_FRAME * frames or frames < 1:
        raise KeySyncError(f"{len(samples)} samples do not cover {frames} frames of {SAMPLES_PER_FRAME}")
    rms = np.sqrt(np.square(samples[: SAMPLES_PER_FRAME * frames].reshape(frames, SAMPLES_PER_FRAME), dtype=np.float64).mean(axis=1))
    return float((rms < SILENCE).mean())
