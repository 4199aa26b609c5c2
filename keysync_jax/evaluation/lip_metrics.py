"""Figures about a mouth over time: does it open when it should, as far as it should, and stay shut when it should.

Everything here works on plain series of one number per video frame (25 fps): an opening, a width, a loudness. Where the numbers come
from (pixels of drawn talkers, landmarks of real faces, the truth itself) is the caller's business. A figure of a series that does not
vary is 0, not an error: a mouth that never moves follows nothing. A figure of too few frames to tell anything is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keysync_jax.core.clock import SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError

OPEN = 0.2  # a mouth is open above this share of the speaker's maximum
MAX_LAG = 5  # frames searched on either side
FEWEST = 8  # frames a correlation needs: two points always correlate by ±1, unrelated series of three or four often nearly so
_LOUDNESS_FLOOR_DB = -80.0
_LOUDNESS_DEGREE = 3


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two series `[T]`; 0 where one of them is constant, NaN for fewer than `FEWEST` frames.

    Raises:
      KeySyncError: different lengths, or values that are not finite.
    """
    a, b = _series(a), _series(b)
    if a.shape != b.shape:
        raise KeySyncError(f"series of {len(a)} and {len(b)} frames cannot be correlated; they must be of the same clip")
    if len(a) < FEWEST:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    power = math.sqrt(float(a @ a) * float(b @ b))
    return float(np.clip(a @ b / power, -1, 1)) if power > 1e-12 else 0.0


def cross_correlation(generated: np.ndarray, true: np.ndarray, max_lag: int = MAX_LAG) -> np.ndarray:
    """Correlation of `generated[t + lag]` with `true[t]` for lag = -max_lag … max_lag, `[2 max_lag + 1]`.

    Raises:
      KeySyncError: as `correlation`; fewer than `FEWEST` frames left at the largest lag.
    """
    generated, true = _series(generated), _series(true)
    count = len(true)
    if count < FEWEST + max_lag:
        raise KeySyncError(f"{count} frames are too few to look for a lag of up to {max_lag}; it takes {FEWEST + max_lag}")
    return np.array(
        [
            correlation(generated[max(0, lag) : count + min(0, lag)], true[max(0, -lag) : count - max(0, lag)])
            for lag in range(-max_lag, max_lag + 1)
        ]
    )


def best_lag(curve: np.ndarray) -> float:
    """Lag of the highest value of a cross-correlation curve `[2 n + 1]`, frames; positive: the generated mouth is late.

    NaN where nothing correlates: a mouth that does not move is neither early nor late.
    """
    best = int(np.argmax(curve))
    return float(best - len(curve) // 2) if curve[best] > 1e-9 else math.nan


def loudness_db(samples: np.ndarray, num_frames: int) -> np.ndarray:
    """Level of the sound of each frame in dB full scale (RMS over its 40 ms), floor at -80, float64 `[num_frames]`.

    Args:
      samples: float `[S]`, 16 kHz mono, S at least 640 per frame.

    Raises:
      KeySyncError: fewer samples than the frames need.
    """
    needed = num_frames * SAMPLES_PER_FRAME
    if len(samples) < needed:
        raise KeySyncError(f"{len(samples)} samples are too few for {num_frames} frames; they need {needed} at 16 kHz")
    power = np.square(np.asarray(samples[:needed], np.float64)).reshape(num_frames, SAMPLES_PER_FRAME).mean(axis=1)
    return np.maximum(10 * np.log10(np.maximum(power, 1e-30)), _LOUDNESS_FLOOR_DB)


def partial_correlation(generated: np.ndarray, true: np.ndarray, loudness: np.ndarray, degree: int = _LOUDNESS_DEGREE) -> float:
    """Correlation of what is left of two series after a polynomial of the loudness has been taken out of both.

    With a straight line (the textbook's partial correlation) a meter that is not linear in decibels keeps a rest; a cubic follows any
    smooth loudness meter, so that what scores here must know more than how loud it is.

    Args:
      generated, true: `[T]`.
      loudness: `[T]` in dB.
      degree: of the polynomial.

    Returns:
      NaN for fewer than `FEWEST` frames beyond the powers that are taken out, which alone would explain the rest away.
    """
    z = _series(loudness)
    if len(z) < FEWEST + degree:
        return math.nan
    z = (z - z.mean()) / max(float(z.std()), 1e-9)
    directions, weights, _ = np.linalg.svd(np.stack([z**k for k in range(degree + 1)], axis=1), full_matrices=False)
    # A loudness of few levels (a gated voice, silence) has fewer independent powers; what is left of the others is rounding.
    basis = directions[:, weights > 1e-9 * weights[0]]
    rests = []
    for series in (_series(generated), _series(true)):
        rest = series - basis @ (basis.T @ series)
        # Rounding of what the polynomial explains is no signal.
        rests.append(rest if rest.std() > 1e-6 * max(float(series.std()), 1e-12) else np.zeros_like(rest))
    return correlation(*rests)


def is_open(opening: np.ndarray, maximum: float) -> np.ndarray:
    """bool `[T]`: the mouth is open by more than `OPEN` of the speaker's `maximum` (same unit as `opening`)."""
    return _series(opening) > OPEN * maximum


def open_share(opening: np.ndarray, found: np.ndarray, maximum: float) -> float:
    """Share of frames with an open mouth, 0 to 1. A frame without a visible mouth counts: a smear must not pass for silence."""
    return float((is_open(opening, maximum) | ~found).mean())


def closed_share(opening: np.ndarray, found: np.ndarray, closed: np.ndarray, maximum: float) -> float:
    """Share of the frames marked in `closed` (bool `[T]`) in which a mouth is seen and not open; NaN where none is marked."""
    if not closed.any():
        return math.nan
    return float((found & ~is_open(opening, maximum))[closed].mean())


def second_difference(series: np.ndarray, at: Sequence[int] | None = None) -> float:
    """Mean squared second difference over time of `[T, ...]`; 0 where there is none. A steady motion has none.

    Args:
      series: `[T, ...]`.
      at: only those with these frames (1 to T - 2) in the middle; None is all.
    """
    series = np.asarray(series)
    if at is not None:
        series = series[np.asarray(at, int) + np.array([[-1], [0], [1]])]  # [3, K, ...]
    bends = np.diff(series.astype(np.float64), n=2, axis=0)
    return float(np.square(bends).mean()) if bends.size else 0.0


def roughness(generated: np.ndarray, true: np.ndarray, at: Sequence[int] | None = None) -> float:
    """Mean squared second difference of the generated series relative to the true one: 1 moves as smoothly as the truth."""
    return second_difference(generated, at) / max(second_difference(true, at), 1e-12)


def input_leak(generated: np.ndarray, true: np.ndarray, source: np.ndarray) -> float:
    """How much of the input video's mouth comes through: the weight of its opening beside the true one in the generated opening.

    Least squares of `generated` on a constant, `true` and `source`. A copied input scores 1, a perfect dub 0. It tells how strongly the
    input shows where the share of open frames under silence (LipLeak) is still zero.

    Args:
      generated, true, source: `[T]` in one unit; a constant `true` (silence) is allowed.

    Returns:
      NaN where the input's mouth does not move, or for fewer than `FEWEST` frames.
    """
    basis = np.stack([np.ones(len(generated)), _series(true), _series(source)], axis=1)
    if len(generated) < FEWEST or basis[:, 2].std() < 1e-9:
        return math.nan
    return float(np.linalg.lstsq(basis, _series(generated), rcond=1e-9)[0][2])


class MouthTruth(NamedTuple):
    """What a generated mouth is held against. Lengths are in any one unit; `maximum` is the speaker's largest opening in it."""

    opening: np.ndarray  # [T]
    width: np.ndarray  # [T]
    closed: np.ndarray  # bool [T]: frames of m, b and p in which the true mouth is measured as closed
    loudness: np.ndarray  # [T] dB of the driving voice
    maximum: float
    source: np.ndarray  # [T] opening measured in the input video


def follow_figures(opening: np.ndarray, width: np.ndarray, found: np.ndarray, truth: MouthTruth, lag: bool = True) -> dict[str, float]:
    """Every figure of one clip that compares a mouth with the true one.

    Args:
      opening, width: measured `[T]`.
      found: bool `[T]`, a mouth was seen at all.
      truth: of the same frames.
      lag: whether the frames follow one another, so that lag and smoothness mean something.

    Returns:
      "opening_r", "width_r", "closed" (NaN without closed frames), "partial_r", "input_leak"; with `lag` also "lag" (frames; NaN for a
      mouth that does not move or a clip too short to search) and "roughness".
    """
    out = {
        "opening_r": correlation(opening, truth.opening),
        "width_r": correlation(width, truth.width),
        "closed": closed_share(opening, found, truth.closed, truth.maximum),
        "partial_r": partial_correlation(opening, truth.opening, truth.loudness),
        "input_leak": input_leak(opening, truth.opening, truth.source),
    }
    if lag:
        long_enough = len(opening) >= FEWEST + MAX_LAG
        out["lag"] = best_lag(cross_correlation(opening, truth.opening)) if long_enough else math.nan
        out["roughness"] = roughness(opening, truth.opening)
    return out


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over clips, those without a value (NaN) left out, and its standard error (NaN for fewer than two)."""
    known = np.array([v for v in values if not math.isnan(v)], np.float64)
    if not known.size:
        return math.nan, math.nan
    error = known.std(ddof=1) / math.sqrt(known.size) if known.size > 1 else math.nan
    return float(known.mean()), float(error)


def _series(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise KeySyncError(f"a series of one number per frame is needed, not shape {values.shape}")
    if not np.isfinite(values).all():
        raise KeySyncError(f"the series has {int((~np.isfinite(values)).sum())} values that are not finite; leave those frames out")
    return values
