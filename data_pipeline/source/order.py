"""The global order of training samples as a pure function of (seed, index).

Sample number `index = step * batch + row` is the same on every machine and for every number of machines; nothing is stored but the
step. All draws come from the 64-bit SplitMix finalizer, written out here so that no library version can change the order of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keysync_jax.core.errors import KeySyncError

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
# Samples per block of a mixture: within each block every dataset has its exact share.
BLOCK = 1024


class Pick(NamedTuple):
    """Item `item` of dataset `dataset`, which is in its `epoch`-th pass."""

    dataset: int
    item: int
    epoch: int


class Order:
    """Endless order over one or several collections of items, each shuffled anew in every pass, without replacement within it."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        """Args:
          sizes: number of items of each dataset.
          weights: relative share of each dataset among the samples.
          seed: of the shuffles.

        Raises:
          KeySyncError: a dataset is empty or a weight is not positive (or below 1/1024 of the whole).
        """
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1:
            raise KeySyncError(f"every dataset needs items and a weight, not sizes {list(sizes)} and weights {list(weights)}")
        self._sizes = tuple(int(n) for n in sizes)
        self._counts = _shares(weights)
        self._seed = int(seed)

    def __call__(self, index: int) -> Pick:
        """The pick of sample `index` >= 0."""
        dataset, k = 0, index
        if len(self._sizes) > 1:
            block, place = divmod(index, BLOCK)
            datasets, ranks = _block(self._seed, self._counts, block)
            dataset = int(datasets[place])
            k = block * self._counts[dataset] + int(ranks[place])
        epoch, place = divmod(k, self._sizes[dataset])
        return Pick(dataset, int(_permutation(self._seed, dataset, epoch, self._sizes[dataset])[place]), epoch)


def bits(seed: int, purpose: str, *numbers: int) -> int:
    """64 pseudo-random bits that depend on all arguments."""
    state = _finalize(seed & _MASK)
    for number in (int.from_bytes(purpose.encode(), "little"), *numbers):
        while True:  # long purposes take several words
            state = _finalize((state + _GAMMA) ^ (number & _MASK))
            number >>= 64
            if number in (0, -1):
                break
    return state


def integer(bound: int, seed: int, purpose: str, *numbers: int) -> int:
    """Uniform integer in [0, bound)."""
    return bits(seed, purpose, *numbers) * bound >> 64


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """Uniform float in [0, 1)."""
    return (bits(seed, purpose, *numbers) >> 11) / 2**53


def subset(size: int, count: int, seed: int, purpose: str, *numbers: int) -> np.ndarray:
    """`count` distinct integers below `size`, ascending, int32."""
    if not count:
        return np.empty(0, np.int32)
    keys = [bits(seed, purpose, *numbers, i) for i in range(size)]
    return np.sort(np.argsort(keys, kind="stable")[:count]).astype(np.int32)


def _finalize(z: int) -> int:
    z = ((z & _MASK) ^ (z & _MASK) >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each dataset per block: largest remainders of the exact shares."""
    if not all(w > 0 and np.isfinite(w) for w in weights):
        raise KeySyncError(f"dataset weights must be positive, not {list(weights)}; leave a dataset out instead of weighting it 0")
    exact = np.array(weights, np.float64) / np.sum(weights) * BLOCK
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
    if counts.min() < 1:
        raise KeySyncError(f"dataset weights {list(weights)} differ too much; the smallest share must be at least 1/{BLOCK}")
    return tuple(int(c) for c in counts)


@functools.lru_cache(maxsize=32)
def _permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    """Order of `size` items in one pass: ascending hash."""
    key = np.uint64(bits(seed, "permutation", stream, epoch))
    z = (np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GAMMA)) + key
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ z >> np.uint64(31), kind="stable")


@functools.lru_cache(maxsize=32)
def _block(seed: int, counts: tuple[int, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """For each place of a block of a mixture: the dataset, and how many samples of it came before in the block."""
    place = _permutation(seed, -1, block, BLOCK)
    datasets = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(c) for c in counts])
    # Sorting by (dataset, place) would give the ranks in order of place; scatter, then number each dataset's places in order.
    out = np.empty(BLOCK, np.int64)
    out[place] = datasets
    rank = np.empty(BLOCK, np.int64)
    rank[np.argsort(out, kind="stable")] = ranks
    return out, rank
