"""Random parameters in NumPy, from shapes alone: seconds for a full-size network, where a jitted `init` compiles for minutes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Path = tuple[str, ...]

# Layers of the U-Net that the reference starts at zero, so that every block begins as the identity: the head's convolution, the
# second convolution of residual blocks, the transformers' output projection.
_ZERO_LAYERS = ("out_2", "out_layers_3", "proj_out")


def starts_at_zero(path: Path) -> bool:
    """Whether the reference initialises the layer that this parameter belongs to with zeros."""
    return "diffusion_model" in path and path[-2] in _ZERO_LAYERS


def random_params(
    shapes: Mapping[str, Any],
    seed: int,
    *,
    zero: Callable[[Path], bool] = starts_at_zero,
    gain: float = 1.0,
    constants: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Fills a tree of shapes with torch's default initialisation, float32.

    Kernels and their biases are uniform in +-1/sqrt(fan_in); norms are 1 and 0.

    Args:
      shapes: nested dict of arrays or `jax.ShapeDtypeStruct` (from `jax.eval_shape`); paths end in Flax's leaf names.
      seed: each parameter draws from its own stream, keyed by this and its path.
      zero: which parameters start at zero instead.
      gain: factor on the kernels' range; sqrt(3) keeps the variance of activations, which the default shrinks layer by layer.
      constants: value by leaf name for parameters that are neither kernel, bias nor scale (`mix_factor`, ...).

    Raises:
      ValueError: a leaf of unknown name.
    """
    flat = {_names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]}
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        tree = out
        for name in path[:-1]:
            tree = tree.setdefault(name, {})
        tree[path[-1]] = _draw(path, leaf.shape, flat, seed, zero, gain, constants or {})
    return out


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(str(key.key) for key in path)


def _draw(
    path: Path, shape: tuple[int, ...], flat: Mapping[Path, Any], seed: int, zero: Callable, gain: float, constants: Mapping
) -> np.ndarray:
    name = path[-1]
    if name in constants:
        return np.full(shape, constants[name], np.float32)
    if name == "scale":
        return np.ones(shape, np.float32)
    kernel = flat.get((*path[:-1], "kernel"))
    if name not in ("kernel", "bias"):
        raise ValueError(f"no initial value for {'/'.join(path)}")
    if zero(path) or kernel is None:  # a bias without a kernel belongs to a norm
        return np.zeros(shape, np.float32)
    bound = (gain if name == "kernel" else 1.0) / math.sqrt(math.prod(kernel.shape[:-1]))
    generator = np.random.default_rng([seed, zlib.crc32("/".join(path).encode())])
    values = generator.random(shape, np.float32)
    values *= 2 * bound
    values -= bound
    return values
