"""A checksum for every array of a tree, computed where the arrays lie: equal on any mesh and host count, other after any change of a bit.

The files of a checkpoint carry none of their data: a bit that flips on a disk would come back as another weight and no one would know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from keysync_jax.core.trees import leaf_name

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: Any) -> dict[str, int]:
    """Checksum of every leaf by name; to be called by every process that holds a part of the arrays.

    It is the sum over elements of (bits × (2 i + 1)) modulo 2^32, i being the element's place in row-major order: sums of integers do not
    depend on how an array is cut, an odd factor loses no change of a single element, and unequal factors tell places apart.
    """
    found = {leaf_name(path): _checksum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: int(value) for name, value in jax.device_get(found).items()}


def changed(tree: Any, stored: Mapping[str, int]) -> list[str]:
    """Names of the leaves that are not what `stored` was computed of."""
    return [name for name, value in checksums(tree).items() if name in stored and stored[name] != value]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    factor, stride = jnp.uint32(1), 2
    for axis in reversed(range(x.ndim)):
        factor = factor + jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        stride = stride * x.shape[axis] % 2**32
    return jnp.sum(bits * factor, dtype=jnp.uint32)
