"""Weights and images of the stored LPIPS case, shared by the script that made it and the test: NumPy only."""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "data" / "lpips.npz"
WIDTHS = (6, 8, 10, 12, 12)
# Positions in torchvision's vgg16().features of the convolutions of each group; pools stand at 4, 9, 16 and 23.
POSITIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def weights(seed: int = 3) -> dict[str, np.ndarray]:
    """By the names of torchvision's and LPIPS's files."""
    rng, out, channels = np.random.default_rng(seed), {}, 3
    for group, (width, positions) in enumerate(zip(WIDTHS, POSITIONS, strict=True)):
        for position in positions:
            kernel = rng.standard_normal((width, channels, 3, 3), np.float32)
            out[f"features.{position}.weight"] = kernel / np.float32(np.sqrt(4.5 * channels))
            out[f"features.{position}.bias"] = rng.standard_normal(width, np.float32) / 10
            channels = width
        out[f"lin{group}.model.1.weight"] = rng.random((1, width, 1, 1), np.float32)
    return out


def images(seed: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Two batches `[2, 37, 32, 3]` in [-1, 1]; one side is odd, which pooling cuts."""
    rng = np.random.default_rng(seed)
    first = np.tanh(rng.standard_normal((2, 37, 32, 3), np.float32))
    return first, np.clip(first + 0.3 * rng.standard_normal(first.shape, np.float32), -1, 1)
