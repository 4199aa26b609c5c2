"""What a face looks like, for telling whether two stretches of one shot show the same person.

There is no face recognition here. Within one shot, light and camera are the same, and a small picture of the face in its own axes,
from hair to upper lip, is enough to take somebody up again who left for a while, and to see that another person is another.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

_SIDE = 16  # pixels of the stored picture
_FINE = 64  # it is averaged from
_WIDTH = 2.6  # of what it shows, in distances between the outer eye corners
_ABOVE = 1.4  # of that, in the same unit, above the eye line: brow, forehead and hair
_MOUTH = 13  # rows from here on move with speech and say nothing
ALIKE = 0.6  # likeness from which two faces of one shot are one person


def appearance_of(rgb: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """uint8 `[16, 16, 3]`: the face in its own axes.

    Args:
      rgb: uint8 `[H, W, 3]`.
      landmarks: `[68, 2]` in its pixels.
    """
    left, right = np.asarray(landmarks[36], np.float64), np.asarray(landmarks[45], np.float64)
    eyes = right - left
    distance = max(1.0, float(np.hypot(*eyes)))
    across = eyes / distance if np.any(eyes) else np.array([1.0, 0.0])
    down = np.array([-across[1], across[0]])
    step = _WIDTH * distance / _FINE
    corner = (left + right) / 2 - across * (_WIDTH * distance / 2) - down * (_ABOVE * distance)
    back = np.stack([across * step, down * step, corner + (across + down) * (step / 2) - 0.5], axis=1)
    source = rgb
    if step > 2:  # a large face would alias
        shrink = 1 / math.floor(step)
        source = cv2.resize(rgb, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        back = back * shrink
        back[:, 2] += (shrink - 1) / 2
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fine = cv2.warpAffine(source, back, (_FINE, _FINE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(fine, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Of two faces `[16, 16, 3]`, -1 to 1: correlation of what their luma shows, less what their colours differ by."""
    a, b = (np.asarray(look, np.float64)[:_MOUTH] for look in (a, b))
    luma = [look @ [0.299, 0.587, 0.114] for look in (a, b)]
    flat = [(values - values.mean()).ravel() for values in luma]
    norm = math.sqrt(float(flat[0] @ flat[0]) * float(flat[1] @ flat[1]))
    correlation = float(flat[0] @ flat[1]) / norm if norm > 0 else float(norm == 0)
    tints = [(look - values[..., None]).mean(axis=(0, 1)) for look, values in zip((a, b), luma, strict=True)]
    return correlation - float(np.abs(tints[0] - tints[1]).mean()) / 40
