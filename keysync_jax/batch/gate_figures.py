"""What the quality gate measures, from series and pictures alone; nothing here has weights.

Series hold one number for each frame of 40 ms, NaN where nothing was seen; `gate.THRESHOLDS` says what is too much.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter1d

from keysync_jax.evaluation.lip_metrics import correlation
from keysync_jax.evaluation.video_metrics import laplacian_variance, mouth_box, to_gray

MAX_LAG = 8  # frames
_NEAR = 2  # frames by which lips may lead or follow the sound without anybody seeing it
_FEWEST = 25  # frames with a mouth and a voice below which nothing is said about the two
_RANGE_DB = 40.0  # below the loudest
_SILENT_DB = 35.0  # below the loudest: a pause
_MARGIN = 2  # frames at the ends of a pause, in which lips still close or open already
_BAND_PX = 3  # around the border of the painted region
_BORDER_ALPHA = 0.5
_SEAM_SIGMA = 4.0  # pixels; what is smoother than this is light, not an edge


def follow_curve(opening: np.ndarray, loudness: np.ndarray) -> np.ndarray:
    """Correlation of the opening `[T]` at t + lag with the loudness `[T]` in dB at t, for lag = -MAX_LAG … MAX_LAG; NaN where too few."""
    loud = uniform_filter1d(np.maximum(loudness, loudness.max() - _RANGE_DB), 3) if len(loudness) else loudness
    curve = []
    for lag in range(-MAX_LAG, MAX_LAG + 1):
        a = opening[max(0, lag) : len(opening) + min(0, lag)]
        b = loud[max(0, -lag) : len(loud) - max(0, lag)]
        known = np.isfinite(a)
        curve.append(correlation(a[known], b[known]) if known.sum() >= _FEWEST else math.nan)
    return np.array(curve)


def follow_figures(opening: np.ndarray, loudness: np.ndarray) -> dict[str, float]:
    """How the mouth goes with the voice.

    Returns:
      "voice_r": best correlation of opening and loudness within two frames; "voice_lag": lag in frames of the best one of all, positive
      where the mouth is late; "voice_lag_gain": how much better that is than the best within two frames. {} where too little is seen.
    """
    curve = follow_curve(opening, loudness)
    if np.isnan(curve).any():
        return {}
    near = float(curve[MAX_LAG - _NEAR : MAX_LAG + _NEAR + 1].max())
    best = int(np.argmax(curve))
    return {"voice_r": near, "voice_lag": float(best - MAX_LAG), "voice_lag_gain": float(curve[best]) - near}


def movement(opening: np.ndarray, loudness: np.ndarray) -> float:
    """Standard deviation of the opening in frames with a voice; NaN where too few."""
    voiced = np.isfinite(opening) & (loudness > loudness.max(initial=-math.inf) - _SILENT_DB)
    return float(opening[voiced].std()) if voiced.sum() >= _FEWEST else math.nan


def open_in_silence(opening: np.ndarray, loudness: np.ndarray, threshold: float) -> float:
    """Share of the frames inside pauses in which the opening is above `threshold`; NaN where there is no pause."""
    if not len(loudness):
        return math.nan
    silent = loudness < loudness.max() - _SILENT_DB
    if loudness.max() < -55:  # nothing but room noise
        silent = np.ones(len(loudness), bool)
    else:
        kernel = np.ones(2 * _MARGIN + 1, np.uint8)
        silent = cv2.erode(silent.astype(np.uint8)[None], kernel[None], borderValue=0)[0].astype(bool)
    known = silent & np.isfinite(opening)
    return float((opening[known] > threshold).mean()) if known.sum() >= 3 else math.nan


class PictureFigures:
    """Gathers what pairs of pictures say: source and result of one frame."""

    def __init__(self) -> None:
        self.seam: list[float] = []
        self.level: list[float] = []
        self.frames: list[int] = []
        self.sharpness: list[float] = []

    def add(self, frame: int, source: np.ndarray, result: np.ndarray, alpha: np.ndarray, landmarks: np.ndarray) -> None:
        """A painted frame.

        Args:
          frame: its number.
          source, result: uint8 `[H, W, 3]` RGB.
          alpha: opacity of what was painted, `[H, W]`, 0 to 1.
          landmarks: of the source's face `[68, 2]`, pixels.
        """
        before, after = to_gray(source), to_gray(result)
        difference = after.astype(np.float32) - before
        near = cv2.dilate((alpha > 0).astype(np.uint8), np.ones((2 * _BAND_PX + 1,) * 2, np.uint8)) > 0
        band = near & (alpha <= _BORDER_ALPHA)
        if band.any():
            edges = difference - gaussian_filter(difference, _SEAM_SIGMA)
            self.seam.append(float(np.abs(edges[band]).mean()))
        inside = alpha > _BORDER_ALPHA
        if inside.any():
            self.level.append(float(difference[inside].mean()))
            self.frames.append(frame)
        rows, columns = mouth_box(landmarks, *before.shape)
        if min(rows.stop - rows.start, columns.stop - columns.start) >= 3:
            had = laplacian_variance(before[rows, columns])
            if had > 1:
                self.sharpness.append(laplacian_variance(after[rows, columns]) / had)

    def figures(self) -> dict[str, float]:
        """ "seam": edges along the border of the painted region that the source has not, code values; "flicker": how the region's
        brightness jumps from frame to frame, code values; "sharpness": of the mouth, relative to the source's."""
        out = {}
        if self.seam:
            out["seam"] = float(np.percentile(self.seam, 90))
        level, frames = np.array(self.level), np.array(self.frames)
        if len(level) >= 3:
            in_a_row = (np.diff(frames)[1:] == 1) & (np.diff(frames)[:-1] == 1)
            bends = np.diff(level, n=2)[in_a_row]
            if bends.size:
                out["flicker"] = float(np.sqrt(np.square(bends).mean()))
        if self.sharpness:
            out["sharpness"] = float(np.median(self.sharpness))
        return out
