"""LPIPS, the perceptual distance of Zhang et al. 2018 (version 0.1, VGG-16), as a differentiable loss term.

Two files are read, without PyTorch, from one folder: the VGG-16 of torchvision (`vgg16-397923af.pth`, keys `features.N.weight`) and the
linear weights of LPIPS (`vgg.pth`, keys `linN.model.1.weight`). Any names will do; the keys decide. Neither is shipped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.core.errors import KeySyncError

# Positions of VGG-16's convolutions in torchvision's `features`; a distance is taken after the last of each group, before pooling.
GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# Mean and deviation of ImageNet in the range [-1, 1], as LPIPS has them.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_EPS = 1e-10


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: JAX looks up compiled functions by their hash
class Lpips:
    """Weights of the distance, float32; constants of a loss, never trained.

    Attributes:
      convolutions: for each of the five groups, (kernel `[3, 3, I, O]`, bias `[O]`) of its convolutions.
      linear: for each group, the weight of every channel `[O]`.
    """

    convolutions: tuple[tuple[tuple[np.ndarray, np.ndarray], ...], ...]
    linear: tuple[np.ndarray, ...]

    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Distance of images `[N, H, W, 3]` in [-1, 1], `[N]` float32. At least 16 pixels a side."""
        with jax.named_scope("LPIPS"):  # by which `flops` tells it from the network
            features = self._features(jnp.concatenate([first, second]).astype(jnp.float32))
            total = jnp.zeros(first.shape[0], jnp.float32)
            for feature, weight in zip(features, self.linear, strict=True):
                a, b = jnp.split(_normalized(feature), 2)
                total += jnp.mean(jnp.square(a - b) @ weight, axis=(1, 2))
        return total

    def _features(self, images: jax.Array) -> list[jax.Array]:
        h, out = (images - _SHIFT) / _SCALE, []
        for i, group in enumerate(self.convolutions):
            if i:
                h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            for kernel, bias in group:
                h = jax.lax.conv_general_dilated(h, cast(jax.Array, kernel), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
                h = jax.nn.relu(h + bias)
            out.append(h)
        return out


def _normalized(x: jax.Array) -> jax.Array:
    """Unit length along the channels; where all are zero, zero with a zero gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + _EPS)


def from_tensors(tensors: Mapping[str, np.ndarray], where: str) -> Lpips:
    """Weights from torch's names and layouts.

    Raises:
      KeySyncError: a tensor is missing, or one does not fit the next; names it.
    """

    def take(name: str, ndim: int) -> np.ndarray:
        if name not in tensors:
            raise KeySyncError(f"{where} has no tensor {name}; LPIPS needs torchvision's VGG-16 and the linear weights of LPIPS (vgg.pth)")
        value = np.asarray(tensors[name], np.float32)
        if value.ndim != ndim:
            raise KeySyncError(f"{where}: {name} is {value.shape}; LPIPS expects {ndim} dimensions")
        return value

    convolutions, linear, channels = [], [], 3
    for i, group in enumerate(GROUPS):
        layers = []
        for position in group:
            name = f"features.{position}.weight"
            kernel = take(name, 4)
            if kernel.shape[1:] != (channels, 3, 3):
                raise KeySyncError(f"{where}: {name} is {kernel.shape}, not (O, {channels}, 3, 3)")
            channels = kernel.shape[0]
            layers.append((np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), take(f"features.{position}.bias", 1)))
        name = f"lin{i}.model.1.weight"
        weight = take(name, 4)
        if weight.shape != (1, channels, 1, 1):
            raise KeySyncError(f"{where}: {name} is {weight.shape}, not (1, {channels}, 1, 1)")
        convolutions.append(tuple(layers))
        linear.append(weight[0, :, 0, 0].copy())
    return Lpips(tuple(convolutions), tuple(linear))


def load(folder: str | os.PathLike) -> Lpips:
    """Weights from a folder with the two files (or one file that holds both).

    Raises:
      KeySyncError: no such folder or file, not PyTorch files, or tensors that are missing.
    """
    from keysync_jax.converters import torch_file

    path = Path(folder)
    if not str(folder):
        raise KeySyncError("the LPIPS term needs weights: name a folder with vgg16-397923af.pth and vgg.pth in config.lpips")
    files = sorted(p for p in path.iterdir() if p.suffix in (".pth", ".pt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise KeySyncError(f"{folder} holds no weights of LPIPS; put vgg16-397923af.pth and vgg.pth there")
    tensors: dict[str, Any] = {}
    for file in files:
        found = torch_file.flatten(torch_file.load(file), str(file))
        tensors |= {name: tensor.read() for name, tensor in found.items() if name.startswith(("features.", "lin"))}
    return from_tensors(tensors, str(folder))
