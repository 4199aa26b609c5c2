"""What a conversion table is: one entry per tensor, with a closed set of invertible layout changes.

A table is a list of `Entry`, walked from the same config as the model. Both directions, every container format and every check
(missing, unexpected, mis-shaped) read it; nothing else decides where a tensor goes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from keysync_jax.core.differences import some
from keysync_jax.core.errors import KeySyncError

Path = tuple[str, ...]


class Layout(NamedTuple):
    """A layout change between torch and Flax, and its inverse."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _axes(*to_flax: int) -> Layout:
    inverse = tuple(int(i) for i in np.argsort(to_flax))
    return Layout(lambda x: np.transpose(x, to_flax), lambda x: np.transpose(x, inverse))


LAYOUTS: dict[str, Layout] = {
    "same": Layout(lambda x: x, lambda x: x),  # biases, norms, scalars, embeddings
    "linear": _axes(1, 0),  # (out, in) -> [in, out]
    "conv1d": _axes(2, 1, 0),  # (out, in/groups, k) -> [k, in/groups, out]
    "conv2d": _axes(2, 3, 1, 0),  # (out, in, kh, kw) -> [kh, kw, in, out]
    "conv2d_transposed": _axes(2, 3, 0, 1),  # (in, out, kh, kw) -> [kh, kw, in, out]
    "conv3d": _axes(2, 3, 4, 1, 0),  # (out, in, kt, kh, kw) -> [kt, kh, kw, in, out]
    # (out, in, kt, 1, 1) -> [kt, 1, in, out]: temporal convolutions run as 2-D convolutions over [T, H*W]
    "conv3d_temporal": Layout(lambda x: np.transpose(x[..., 0], (2, 3, 1, 0)), lambda x: np.transpose(x, (3, 2, 0, 1))[..., None]),
    # (out, in, 1, 1) -> [in, out]: a 1x1 convolution that the model runs as a Dense layer
    "conv1x1": Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    "chw": _axes(1, 2, 0),  # (C, h, w) -> [h, w, C]
}


class Entry(NamedTuple):
    """One tensor under its torch name and under its Flax path."""

    torch_key: str
    flax_path: Path
    torch_shape: tuple[int, ...]
    layout: str

    @property
    def flax_shape(self) -> tuple[int, ...]:
        # A zero-strided view has the shape without the memory of a full-size tensor.
        return LAYOUTS[self.layout].to_flax(np.broadcast_to(np.float32(0), self.torch_shape)).shape


Table = list[Entry]


def fold(torch_key: str, leaf: str) -> Path:
    """Flax path of a torch key: integer segments join the name before them, the last segment becomes `leaf`.

    >>> fold("input_blocks.4.1.time_stack.0.attn1.to_q.weight", "kernel")
    ('input_blocks_4_1', 'time_stack_0', 'attn1', 'to_q', 'kernel')
    """
    segments = re.sub(r"\.(?=\d+(\.|$))", "_", torch_key).split(".")
    return (*segments[:-1], leaf)


def linear(key: str, in_features: int, out_features: int, bias: bool = True) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", fold(f"{key}.weight", "kernel"), (out_features, in_features), "linear")
    if bias:
        yield _bias(key, out_features)


def norm(key: str, features: int) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", fold(f"{key}.weight", "scale"), (features,), "same")
    yield _bias(key, features)


def conv(key: str, layout: str, in_features: int, out_features: int, kernel: tuple[int, ...], bias: bool = True) -> Iterator[Entry]:
    """A convolution of the given layout; `in_features` is per group, `kernel` the spatial extent in torch's order."""
    yield Entry(f"{key}.weight", fold(f"{key}.weight", "kernel"), (out_features, in_features, *kernel), layout)
    if bias:
        yield _bias(key, out_features)


def raw(key: str, shape: tuple[int, ...], layout: str = "same") -> Iterator[Entry]:
    """A bare parameter that keeps its own name."""
    yield Entry(key, fold(key, key.rsplit(".", 1)[-1]), shape, layout)


def _bias(key: str, features: int) -> Entry:
    return Entry(f"{key}.bias", fold(f"{key}.bias", "bias"), (features,), "same")


def prefixed(prefix: str, table: Iterable[Entry]) -> Table:
    """The same entries one level deeper, e.g. under `model.diffusion_model`."""
    path = tuple(prefix.split("."))
    return [Entry(f"{prefix}.{e.torch_key}", (*path, *e.flax_path), e.torch_shape, e.layout) for e in table]


def set_leaf(tree: dict, path: Path, value) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def get_leaf(tree: Mapping[str, Any], path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def to_flax(table: Table, tensors: Mapping[str, np.ndarray], source: str = "weights", dtype=np.float32) -> dict:
    """Flax parameters from torch-layout tensors, leaf by leaf.

    Args:
      table: the entries to fill; every one must be present in `tensors`.
      tensors: torch key -> array; may be lazy (each value is read once).
      source: what to call the file in errors.
      dtype: type of the parameters; None keeps each tensor's own.

    Raises:
      KeySyncError: a key is missing or has another shape than the config asks for (all of them are named).
    """
    missing = [e.torch_key for e in table if e.torch_key not in tensors]
    if missing:
        raise KeySyncError(f"{source}: {len(missing)} tensors are missing: {some(missing, 12)}")
    tree: dict = {}
    wrong = []
    for entry in table:
        value = np.asarray(tensors[entry.torch_key])
        if value.shape != entry.torch_shape:
            wrong.append(f"{entry.torch_key} is {value.shape}, expected {entry.torch_shape}")
            continue
        value = LAYOUTS[entry.layout].to_flax(value)
        set_leaf(tree, entry.flax_path, np.ascontiguousarray(value, dtype=dtype))
    if wrong:
        raise KeySyncError(f"{source}: {len(wrong)} tensors have the wrong shape: {some(wrong, 12)}")
    return tree


def to_torch(table: Table, params: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """(torch key, contiguous torch-layout array) for each entry, one at a time so that host memory stays near one copy.

    Raises:
      KeySyncError: the tree lacks an entry's path or holds another shape there.
    """
    for entry in table:
        try:
            value = np.asarray(get_leaf(params, entry.flax_path))
        except KeyError:
            raise KeySyncError(f"parameters lack {'/'.join(entry.flax_path)} (for {entry.torch_key})") from None
        if value.shape != entry.flax_shape:
            raise KeySyncError(f"{'/'.join(entry.flax_path)} is {value.shape}, expected {entry.flax_shape}")
        yield entry.torch_key, np.ascontiguousarray(LAYOUTS[entry.layout].to_torch(value))
