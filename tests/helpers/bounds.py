"""How far two numbers may lie apart: as far as their precision rounds them, and no further.

A bound read off one machine fails on the next, where a sum is taken in another order. So a test states what its numbers went through
and the bound follows:

    bound = ulps x sqrt(terms) x eps(dtype) x scale

* eps(dtype): one unit in the last place of 1, 2^-23 for float32.
* scale: size of what was rounded. As a rule the largest value of the result, since a small one among large ones is a difference of
  large ones; `"each"` where every value is a product or a quotient of its own; numbers where the result is small by cancelling.
* terms: length of the longest sum. Its roundings add up like a random walk, whatever the order and the width of the vectors.
* ulps: rounded operations in a row (a network of ten layers has tens), with room of four at least above what one machine shows.

Some 8 to 100 units are 1e-6 to 1e-5 of the scale. What is wrong is wrong by far more: a product in bfloat16 by 2^-9 (16,000 units of
float32), in TF32 or float16 by 2^-11 (4,000); and a term, a row, a shift that is forgotten by whole per cent. Where the smallest mistake
can be computed, hand it over as `wrong`: the test then fails if the bound would let it pass.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

# A mistake must miss a bound by this much to count as seen.
_SEEN = 4.0
# Where to note, line by line, which share of each bound was used (tests/scenarios/processors.py reads it).
_RECORD = os.environ.get("KEYSYNC_BOUNDS")


def eps(dtype=np.float32) -> float:
    """One unit in the last place of 1: 2^-52, 2^-23, 2^-10 and 2^-7 for float64, float32, float16 and bfloat16."""
    return 2.0**-7 if str(dtype) == "bfloat16" else float(np.finfo(dtype).eps)


def close(actual, expected, ulps: float, *, scale=None, dtype=np.float32, terms: int = 1, wrong=None, err_msg: str = "") -> None:
    """Asserts that arrays agree to `ulps` x sqrt(`terms`) units in the last place of `scale`. See the module.

    Args:
      actual: what the tested code gave.
      expected: what it should be, of the same shape or one that broadcasts to it.
      ulps: units in the last place that are allowed.
      scale: None (largest magnitude of `expected`), "each" (every value's own), or numbers that broadcast to it.
      dtype: the coarsest precision that the values went through.
      terms: length of the longest sum on the way.
      wrong: an array, or a list of them, that mistakes would give: each must miss the bound at least four times over.
      err_msg: what is compared.

    Raises:
      AssertionError: some value is further off, not finite where the other is, or of another shape; or `wrong` would pass.
    """
    expected = np.asarray(expected, np.float64)
    allowed = ulps * np.sqrt(terms) * eps(dtype) * _size(expected, scale)
    for mistake in wrong if isinstance(wrong, list) else [] if wrong is None else [wrong]:
        missed = _share(mistake, expected, allowed)
        assert missed >= _SEEN, f"{err_msg}: a mistake misses the bound {missed:.3g} times over, which cannot be told from rounding"
    share = _share(actual, expected, allowed)
    if _RECORD:
        with open(_RECORD, "a") as file:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
            file.write(json.dumps({"test": test, "what": err_msg, "share": share}) + "\n")
    if not share <= 1:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=allowed if np.ndim(allowed) == 0 else np.max(allowed), err_msg=err_msg)
        raise AssertionError(f"{err_msg}: off by {share:.3g} times the bound of {ulps:g} units in the last place")


def trees_close(actual, expected, ulps: float, **how) -> None:
    """`close` leaf by leaf, each by its own size; the message names the leaf."""
    import jax

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    given = jax.tree.leaves(actual)
    for (path, leaf), ours in zip(jax.tree_util.tree_leaves_with_path(expected), given, strict=True):
        close(ours, leaf, ulps, err_msg=jax.tree_util.keystr(path), **how)


def approx(expected, ulps: float = 8, *, dtype=np.float64, scale: float | None = None):
    """`pytest.approx` for a number, a list or a dict of them, with `close`'s bound: each value's own size, or `scale`."""
    allowed = ulps * eps(dtype)
    if scale is None:
        # 0 is reached exactly, or by cancelling: then the caller states what cancelled.
        return pytest.approx(expected, rel=allowed, abs=0)
    return pytest.approx(expected, rel=0, abs=allowed * scale)


def spread(deviation: float, count: int, sigmas: float = 4) -> float:
    """How far the mean of `count` independent draws strays from the true one: four sigma, one drawing in 16,000."""
    return sigmas * deviation / np.sqrt(count)


def _size(expected: np.ndarray, scale):
    if isinstance(scale, str):
        return np.abs(expected)
    if scale is not None:
        return np.asarray(scale, np.float64)
    finite = np.abs(expected[np.isfinite(expected)])
    return float(finite.max()) if finite.size else 0.0


def _share(actual, expected: np.ndarray, allowed) -> float:
    """Largest difference in units of what is allowed; infinite where shapes or non-finite values differ."""
    actual = np.asarray(actual, np.float64)
    if actual.shape != np.broadcast_shapes(actual.shape, expected.shape):
        return float("inf")
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.where((actual == expected) | (np.isnan(actual) & np.isnan(expected)), 0.0, np.abs(actual - expected))
        shares = np.where(off == 0, 0.0, off / allowed)
    return float(np.where(np.isnan(shares), np.inf, shares).max(initial=0.0))
