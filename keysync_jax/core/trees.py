"""Trees of arrays: the names of their leaves, and whether one is like another."""

from __future__ import annotations

from typing import Any

import jax

from keysync_jax.core.differences import compare
from keysync_jax.core.errors import KeySyncError


def leaf_name(path: tuple[Any, ...]) -> str:
    """`block/kernel`, of a leaf's path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by leaf name. Leaves need a `shape` only."""
    return {leaf_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def require_alike(found: Any, wanted: Any, complaint: str) -> None:
    """Refuse a tree whose leaves have other names or shapes than those wanted.

    Raises:
      KeySyncError: the complaint, and the first leaves that are missing, unknown or of another shape.
    """
    if differences := compare(shapes(found), shapes(wanted)):
        raise KeySyncError(f"{complaint}: {differences.one_by_one()}")
