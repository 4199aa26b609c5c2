"""What differs between two sets of shapes, in words."""

import numpy as np
import pytest

from keysync_jax.core.differences import compare, some
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.trees import require_alike, shapes


def test_differences_by_kind_and_one_by_one():
    found = compare({"a": (1,), "b": (2,), "x": ()}, {"a": (1,), "b": (3,), "c": (4,), "d": (5,)})
    assert found and not compare({"a": (1,)}, {"a": (1,)})
    assert str(found) == "2 tensors missing: c, d; 1 tensor unexpected: x; 1 tensor of the wrong shape: b is (2,), expected (3,)"
    assert found.one_by_one() == "c is missing; d is missing; x is unknown; b is (2,), not (3,)"
    assert found.one_by_one(1) == "c is missing … (4 in all)"
    assert str(found.without(missing=("b", "c"), unexpected="x")) == "1 tensor missing: d"
    assert some(["a", "b", "c"], 2) == "a, b … and 1 more"


def test_trees_are_compared_by_the_names_of_their_leaves():
    tree = {"block": {"kernel": np.zeros((2, 3))}, "bias": np.zeros(3)}
    assert shapes(tree) == {"bias": (3,), "block/kernel": (2, 3)}
    require_alike(tree, {"block": {"kernel": np.ones((2, 3))}, "bias": np.ones(3)}, "the file does not fit")
    with pytest.raises(KeySyncError, match=r"^the file does not fit: scale is missing; block/kernel is \(2, 3\), not \(3, 2\)$"):
        require_alike(tree, {"block": {"kernel": np.ones((3, 2))}, "bias": np.ones(3), "scale": np.ones(1)}, "the file does not fit")
