"""Tensors drawn at random, one at a time, exactly as the models' own initialisation draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import numpy as np

from keysync_jax.config import StageConfig
from keysync_jax.converters.lazy import LazyTensor, Tensors
from keysync_jax.models.initializers import random_params, starts_at_zero
from keysync_jax.models.table import LAYOUTS, Entry, Table, get_leaf, set_leaf


def fresh(
    table: Table,
    seed: int,
    *,
    keys: Iterable[str] | None = None,
    zero_init: bool = True,
    gain: float = 1.0,
    constants: dict[str, float] | None = None,
) -> Tensors:
    """Random float32 tensors for a table of a stage or a VAE, in torch layout; drawn when read, so that none is kept.

    Args:
      table: all entries of the part (a bias is drawn in the range of its kernel).
      seed: each tensor has its own stream, keyed by this and its path.
      keys: torch keys wanted; None is all.
      zero_init: as the reference: the layers that it starts at zero are zero. False draws them too.
      gain: see `models.initializers.random_params`.
      constants: value by leaf name for what is neither kernel, bias nor scale.
    """
    kernels = {e.flax_path[:-1]: e for e in table if e.flax_path[-1] == "kernel"}
    zero = starts_at_zero if zero_init else lambda path: False
    wanted = None if keys is None else set(keys)
    items = {}
    for entry in table:
        if wanted is None or entry.torch_key in wanted:
            layer = [entry, kernels[entry.flax_path[:-1]]] if entry.flax_path[:-1] in kernels else [entry]
            items[entry.torch_key] = LazyTensor(
                entry.torch_shape, np.dtype(np.float32), lambda e=entry, n=layer: _draw(e, n, seed, zero, gain, constants or {})
            )
    return Tensors(items, "random weights")


def _draw(entry: Entry, layer: list[Entry], seed: int, zero, gain: float, constants: dict[str, float]) -> np.ndarray:
    shapes: dict = {}
    for each in layer:
        set_leaf(shapes, each.flax_path, jax.ShapeDtypeStruct(each.flax_shape, np.float32))
    value = get_leaf(random_params(shapes, seed, zero=zero, gain=gain, constants=constants), entry.flax_path)
    return np.ascontiguousarray(LAYOUTS[entry.layout].to_torch(value))


def stage_constants(config: StageConfig) -> dict[str, float]:
    """Starting values of a stage's mixers and learned filler."""
    return {"mix_factor": config.unet.merge_factor, "learned_mask": 1.0 if config.filler == "ones" else 0.0}


VAE_CONSTANTS = {"mix_factor": 0.0}
NON_DEGENERATE = math.sqrt(3.0)  # keeps the variance of activations, so that a random network's output depends on its input
