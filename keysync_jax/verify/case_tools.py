"""What the runners of network cases share: torch's layouts and ours, weights to parameters, compiled calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from numpy.typing import ArrayLike

from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import Table, to_flax


def to_video(x: np.ndarray, frames: int) -> np.ndarray:
    """(B*T, C, H, W), frames fastest, to `[B, T, H, W, C]`."""
    return np.moveaxis(x, 1, -1).reshape(-1, frames, *x.shape[2:], x.shape[1])


def from_video(x: ArrayLike) -> np.ndarray:
    """`[B, T, H, W, C]` to (B*T, C, H, W)."""
    x = np.asarray(x)
    return from_images(x.reshape(-1, *x.shape[2:]))


def to_images(x: np.ndarray) -> np.ndarray:
    """(N, C, ..., W) to `[N, ..., W, C]`; also (B, C, T, H, W) to `[B, T, H, W, C]`."""
    return np.moveaxis(x, 1, -1)


def from_images(x: ArrayLike) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def params_of(table: Table, weights: Mapping[str, np.ndarray], where: str, prefix: str = "") -> dict[str, Any]:
    """Flax parameters of a case.

    Raises:
      KeySyncError: a tensor under `prefix` that the table does not know (missing ones are refused by `to_flax`).
    """
    known = {entry.torch_key for entry in table}
    unexpected = sorted(key for key in weights if key.startswith(prefix) and key not in known)
    if unexpected:
        raise KeySyncError(f"{where}: {len(unexpected)} unexpected weights: {', '.join(unexpected[:5])}")
    return to_flax(table, weights, where)


@functools.lru_cache(maxsize=16)
def _jitted(module: nn.Module, method: str | None, blocks: bool) -> Callable[..., Any]:
    """Compiled once for all calls that differ in values only."""

    def function(params, args, kwargs):
        if not blocks:
            return module.apply({"params": params}, *args, method=method, **kwargs)
        options = {"capture_intermediates": lambda m, _: len(m.path) == 1, "mutable": ["intermediates"]}
        out, state = module.apply({"params": params}, *args, **kwargs, **options)
        return out, {name: calls["__call__"][0] for name, calls in state["intermediates"].items() if name != "__call__"}

    return jax.jit(function)


def apply(module: nn.Module, params: Mapping[str, Any], *args: Any, method: str | None = None, **kwargs: Any) -> Any:
    """Jitted `module.apply`."""
    return _jitted(module, method, False)(params, args, kwargs)


def apply_with_blocks(module: nn.Module, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Jitted `module.apply` that also returns the output of every direct submodule, by name."""
    return _jitted(module, None, True)(params, args, kwargs)
