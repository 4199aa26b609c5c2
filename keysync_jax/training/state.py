"""The train state, and trees split into what is trained and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """Everything a step reads and writes; every leaf is an array on the mesh.

    Attributes:
      step: int32 scalar, updates done.
      params: trained leaves as nested dicts, float32. Frozen leaves are not in it, so they have neither gradient nor moments.
      frozen: the other leaves of the model, and the autoencoder that the pixel loss decodes with; {} if there are none.
      ema: average of `params`, or None.
      opt_state: optax's.
      skipped: int32 scalar, non-finite updates in a row, which were not applied.
    """

    step: jax.Array
    params: Tree
    frozen: Tree
    ema: Tree | None
    opt_state: optax.OptState
    skipped: jax.Array


def create(params: Tree, frozen: Tree, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step. Works on arrays and, under `jax.eval_shape`, on shapes."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        # A copy: a donated buffer must not appear twice in the state.
        ema=jax.tree.map(lambda x: x + 0, params) if ema else None,
        opt_state=tx.init(params),
        skipped=jnp.zeros((), jnp.int32),
    )


def partition(tree: Mapping, mask: Mapping) -> tuple[Tree, Tree]:
    """Splits nested dicts into (leaves where `mask` is false, leaves where it is true); empty dicts vanish."""
    flat, chosen = flatten_dict(tree), flatten_dict(mask)
    first = {path: leaf for path, leaf in flat.items() if not chosen[path]}
    second = {path: leaf for path, leaf in flat.items() if chosen[path]}
    return unflatten_dict(first), unflatten_dict(second)


def merge(first: Mapping, second: Mapping) -> Tree:
    """Nested dicts with the leaves of both.

    Raises:
      ValueError: a leaf is in both.
    """
    a, b = flatten_dict(first), flatten_dict(second)
    if both := a.keys() & b.keys():
        raise ValueError(f"leaves in both trees: {sorted('/'.join(path) for path in both)[:3]}")
    return unflatten_dict(a | b)
