"""Measure mouth opening and width in the pixels of drawn talkers, true or generated.

Only landmarks that the mouth cannot move are used (eye corners), so the truth cannot enter through them: they place a window, and
what is in it is measured by colour. Lips and cavity are redder than skin (log R/G), the cavity is dark, and whatever is enclosed
by dark from above and below (teeth, tongue) belongs to the gap.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter

from keysync_jax.core.errors import KeySyncError

SAMPLES_PER_UNIT = 96  # window samples per distance between the outer eye corners
_EYE_CORNERS = (36, 39, 42, 45)
_LEFT, _RIGHT, _TOP, _BOTTOM = -0.46, 0.46, 0.635, 1.40
_SEARCH = (0.70, 1.02)  # rows that hold part of the lips in every mouth, open or shut
_BAND = 0.07  # half width of the column band in which the opening is measured
_SEAM, _DARK = 0.25, 0.55  # share of lip luminance lost: a closed lip line reaches the first, a gap the second
_PALE, _TEETH = 0.30, 0.65  # share of lip redness lost where teeth begin and where they are
_CHIN, _LIT = 0.2, 0.6  # height of skin that is more than teeth can be, and the share of lip luminance that it keeps


class MouthMeasure(NamedTuple):
    """opening, width: float32 [T] in distances between the outer eye corners; found: bool [T], a mouth was seen in the frame."""

    opening: np.ndarray
    width: np.ndarray
    found: np.ndarray


def mouth_windows(frames: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Upright, scaled windows of the mouth region, float32 [T, h, w, 3], placed by the four eye corners alone.

    Args:
        frames: uint8 [T, H, W, 3].
        landmarks: [T, 68, 2] continuous pixels.
    """
    corners = landmarks[:, list(_EYE_CORNERS)].astype(np.float64)
    across = corners[:, 3] - corners[:, 0]
    origin = corners.mean(axis=1)
    columns = _LEFT + (np.arange(int((_RIGHT - _LEFT) * SAMPLES_PER_UNIT)) + 0.5) / SAMPLES_PER_UNIT
    rows = _TOP + (np.arange(int((_BOTTOM - _TOP) * SAMPLES_PER_UNIT)) + 0.5) / SAMPLES_PER_UNIT
    out = np.empty((len(frames), len(rows), len(columns), 3), np.float32)
    for i, frame in enumerate(frames):
        unit, (ox, oy) = across[i], origin[i]
        map_x = ox + columns[None] * unit[0] - rows[:, None] * unit[1] - 0.5
        map_y = oy + columns[None] * unit[1] + rows[:, None] * unit[0] - 0.5
        out[i] = cv2.remap(frame, map_x.astype(np.float32), map_y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return out


def _redness(window: np.ndarray) -> np.ndarray:
    """log R/G with a floor against noise in the dark; illumination cancels."""
    return np.log((window[..., 0] + 25) / (window[..., 1] + 25))


def _extent(profile: np.ndarray, threshold: float, inside: slice) -> tuple[float, float] | None:
    """Sub-sample ends of the run above `threshold` that holds the maximum of profile[inside]; None if it stays below."""
    peak = inside.start + int(np.argmax(profile[inside]))
    if profile[peak] <= threshold:
        return None
    above = profile > threshold
    first, last = peak, peak
    while first > 0 and above[first - 1]:
        first -= 1
    while last < len(profile) - 1 and above[last + 1]:
        last += 1
    low, high = float(first), float(last)
    if first > 0:
        low -= float((profile[first] - threshold) / (profile[first] - profile[first - 1]))
    if last < len(profile) - 1:
        high += float((profile[last] - threshold) / (profile[last] - profile[last + 1]))
    return low, high


def _above_chin(profile: np.ndarray, strip: np.ndarray, threshold: float, tone: float, inside: slice) -> np.ndarray:
    """The red profile up to the chin's skin: the shade below the chin may be as red as lips, and would enclose the chin with them.

    Between the lips it is dark, or pale for the height of the teeth; skin is neither red nor dark for longer than that.
    """
    skin = (profile <= threshold) & (strip > _LIT * tone)
    run = 0
    for row in range(inside.start + int(np.argmax(profile[inside])), len(profile)):
        run = run + 1 if skin[row] else 0
        if run >= _CHIN * SAMPLES_PER_UNIT:
            return profile[: row + 1]
    return profile


def _enclosed(profile: np.ndarray) -> np.ndarray:
    """Soft filling: every sample becomes the lesser of the maximum above it and the maximum below it, itself included."""
    return np.minimum(np.maximum.accumulate(profile), np.maximum.accumulate(profile[::-1])[::-1])


def measure_mouth(frames: np.ndarray, landmarks: np.ndarray) -> MouthMeasure:
    """Opening and width of the mouth in every frame.

    Args:
        frames: uint8 [T, H, W, 3], a drawn talker of any size from about 96 px, also blurred or generated.
        landmarks: [T, 68, 2]; only the eye corners 36, 39, 42, 45 are read.

    Raises:
        KeySyncError: no frame, shapes that do not fit together, frames of another type, or eye corners that are not finite.
    """
    if len(frames) < 1 or frames.ndim != 4 or frames.shape[-1] != 3 or landmarks.shape != (len(frames), 68, 2):
        raise KeySyncError(f"measure_mouth needs frames [T, H, W, 3] and landmarks [T, 68, 2], not {frames.shape} and {landmarks.shape}")
    if frames.dtype != np.uint8:  # colours are read in steps of 8 bits
        raise KeySyncError(f"measure_mouth needs uint8 frames, 0 to 255, not {frames.dtype}")
    if not np.isfinite(landmarks[:, list(_EYE_CORNERS)]).all():
        raise KeySyncError("measure_mouth needs finite eye corners (landmarks 36, 39, 42, 45)")
    windows = mouth_windows(frames, landmarks)
    red = _redness(windows)
    luminance = windows @ np.array([0.299, 0.587, 0.114], np.float32)
    rows = _TOP + (np.arange(red.shape[1]) + 0.5) / SAMPLES_PER_UNIT
    columns = _LEFT + (np.arange(red.shape[2]) + 0.5) / SAMPLES_PER_UNIT
    search = slice(*(int(v) for v in np.searchsorted(rows, _SEARCH)))
    band = np.flatnonzero(np.abs(columns) <= _BAND)
    middle = slice(*(int(v) for v in np.searchsorted(columns, (-0.12, 0.12))))
    # The redder share of the cheeks: skin in shadow is redder than skin in light.
    skin = float(np.percentile(red[:, rows < 0.78][:, :, np.abs(columns) > 0.38], 85))
    lip = float(np.percentile(red[:, search][:, :, band], 75))
    threshold = skin + 0.29 * (lip - skin)
    red_pixels = red[:, search][:, :, middle] > threshold
    tone = max(float(np.percentile(luminance[:, search][:, :, middle][red_pixels], 80)), 1.0) if red_pixels.any() else 1.0
    count = len(frames)
    opening, width, found = np.zeros(count, np.float32), np.zeros(count, np.float32), np.zeros(count, bool)
    if lip - skin < 0.06:  # nothing redder than skin anywhere: no mouth in this clip
        return MouthMeasure(opening, width, found)
    for i in range(count):
        smooth = gaussian_filter(red[i], (1.2, 2.5))
        across = smooth[:, band].mean(axis=1), luminance[i][:, band].mean(axis=1)
        lips = _extent(_enclosed(_above_chin(*across, threshold, tone, search)), threshold, search)
        if lips is None:
            continue
        top, bottom = int(np.floor(lips[0])), int(np.ceil(lips[1])) + 1
        sides = _extent(smooth[max(top, 0) : bottom].max(axis=0), threshold, middle)
        if sides is None:
            continue
        found[i] = True
        width[i] = (sides[1] - sides[0]) / SAMPLES_PER_UNIT
        strip = luminance[i, top:bottom, band[0] : band[-1] + 1].mean(axis=1)
        dark = np.clip((1 - strip / tone - _SEAM) / (_DARK - _SEAM), 0, 1)
        line = smooth[top:bottom, band[0] : band[-1] + 1].mean(axis=1)
        pale = np.clip(((_enclosed(line) - line) / (lip - skin) - _PALE) / (_TEETH - _PALE), 0, 1)
        opening[i] = _enclosed(np.maximum(dark, pale)).sum() / SAMPLES_PER_UNIT
    return MouthMeasure(opening, width, found)
