"""Weights that a case names by recipe instead of storing: uniform numbers from a counter, the same bits everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def recipe_weights(recipe: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Torch key -> float32 array of `{"seed", "tensors": [[key, shape, mean, std], ...]}`."""
    tensors = enumerate(recipe["tensors"])
    return {key: _tensor(recipe["seed"], i, tuple(shape), mean, std) for i, (key, shape, mean, std) in tensors}


def _tensor(seed: int, i: int, shape: tuple[int, ...], mean: float, std: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        start = _mix(np.array([(seed << 32) + i], np.uint64))[0]
        z = _mix(start + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    uniform = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (mean + std * math.sqrt(3.0) * (2.0 * uniform - 1.0)).astype(np.float32).reshape(shape)


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
