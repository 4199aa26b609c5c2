"""Distances between two sets of feature vectors: CMMD and the Fréchet distance behind FVD and FID, in float64."""

from __future__ import annotations

import numpy as np

from keysync_jax.core.errors import KeySyncError

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
_ROWS = 1024  # rows of the kernel matrix at once


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """1000 (mean k(x, x) + mean k(y, y) - 2 mean k(x, y)), k = exp(-|a - b|^2 / 200): the biased estimate (google-research `cmmd`).

    float64 throughout: unit vectors lie in the nearly linear part of the kernel, where float32 loses the third digit.

    Args:
      x: `[n, d]`, y: `[m, d]` embeddings.

    Raises:
      KeySyncError: a set is empty, or the widths differ.
    """
    x, y = _pair(x, y, least=1)
    return CMMD_SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    squares, total = (y * y).sum(1), 0.0
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS]
        distance = (rows * rows).sum(1)[:, None] + squares[None] - 2 * rows @ y.T
        total += float(np.exp(-distance / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """|mean difference|^2 + tr Sx + tr Sy - 2 tr (Sx Sy)^1/2 of two sets, covariances divided by n - 1.

    The last trace is the sum of the singular values of X Y^T / sqrt((n - 1)(m - 1)) of the centred sets: exact for sets of any rank,
    without a square root of a matrix.

    Args:
      x: `[n, d]`, y: `[m, d]` features.

    Raises:
      KeySyncError: a set has fewer than two vectors, or the widths differ.
    """
    x, y = _pair(x, y, least=2)
    difference = x.mean(0) - y.mean(0)
    # Any orthogonal factor drops out of the singular values, so each side is reduced to at most d rows first.
    a, b = (np.linalg.qr(z - z.mean(0), mode="r") / np.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(difference @ difference + (a * a).sum() + (b * b).sum() - 2 * cross)


def _pair(x: np.ndarray, y: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise KeySyncError(f"two sets of vectors of one width are needed, got shapes {x.shape} and {y.shape}")
    if min(len(x), len(y)) < least:
        raise KeySyncError(f"sets of {len(x)} and {len(y)} vectors: at least {least} a side are needed")
    return x, y
