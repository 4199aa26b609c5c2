"""Figures of pairs of pictures: PSNR, SSIM with Wang's settings, and sharpness as the variance of the Laplacian."""

from __future__ import annotations

import cv2
import numpy as np
import scipy.ndimage

from keysync_jax.core.errors import KeySyncError


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise of two 8-bit pictures in dB, over all channels; infinite where they are identical."""
    a, b = _pair(a, b)
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two 8-bit pictures `[H, W, C]`: 11x11 Gaussian of 1.5, population covariance, mean of the channels.

    Other conventions differ by up to .05 on one pair.

    Raises:
      KeySyncError: the shapes differ, or a side is under 11 pixels.
    """
    a, b = _pair(a, b)
    if min(a.shape[:2]) < 11:
        raise KeySyncError(f"SSIM needs pictures of 11 pixels or more a side, got {a.shape[1]}x{a.shape[0]}")

    def blur(x: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(value[5:-5, 5:-5].mean())


def sharpness(picture: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian of the 8-bit grey picture (VL); `[H, W, 3]` RGB."""
    return float(cv2.Laplacian(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if a.shape != b.shape:
        raise KeySyncError(f"two pictures of one size are needed, got {a.shape} and {b.shape}")
    return np.asarray(a, np.float64), np.asarray(b, np.float64)
