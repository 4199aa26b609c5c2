"""What the metrics' networks share: frozen batch norm, pooling as torch does it, and the table that a network's own shapes give."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from keysync_jax.models.table import Entry, Table

Array = jax.Array

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}
_KERNELS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


class FrozenBatchNorm(nn.Module):
    """Batch norm of a trained network over the last axis, with stored statistics: four leaves `[C]`."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1:]
        scale, var = (self.param(name, nn.initializers.ones, features) for name in ("scale", "var"))
        bias, mean = (self.param(name, nn.initializers.zeros, features) for name in ("bias", "mean"))
        return (x - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias


def max_pool(x: Array, window: Sequence[int], strides: Sequence[int], pad: Sequence[int] | str = "VALID") -> Array:
    """Largest of each window over the axes between the first and the last; `pad` on both sides, as torch counts it."""
    padding: Any = pad if isinstance(pad, str) else [(p, p) for p in pad]
    return nn.max_pool(x, tuple(window), tuple(strides), padding)


def network_table(network: nn.Module, *shapes: tuple[int, ...], method: str | None = None, numbered: bool = False) -> Table:
    """One entry per parameter of `network`, walked over inputs of the given shapes without computing anything.

    Args:
      network: the module, whose names are those of the published file.
      shapes: of its float32 arguments.
      method: which method touches every parameter.
      numbered: a trailing `_3` of a name stands for torch's `.3`.
    """
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    tree = jax.eval_shape(lambda *args: network.init(jax.random.key(0), *args, method=method), *inputs)["params"]
    entries = []
    leaves: dict[Any, Any] = flax.traverse_util.flatten_dict(tree)
    for path, leaf in leaves.items():
        *modules, name = path
        if numbered:
            modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
        layout = _KERNELS[len(leaf.shape)] if name == "kernel" else "same"
        torch_shape = _TORCH_SHAPES[layout](leaf.shape)
        entries.append(Entry(".".join([*modules, _LEAVES.get(name, name)]), path, torch_shape, layout))
    return entries


_TORCH_SHAPES = {
    "same": lambda shape: tuple(shape),
    "linear": lambda shape: tuple(shape[::-1]),
    "conv1d": lambda shape: (shape[2], shape[1], shape[0]),
    "conv2d": lambda shape: (shape[3], shape[2], *shape[:2]),
    "conv3d": lambda shape: (shape[4], shape[3], *shape[:3]),
}
