"""Tensors that are described before they are read.

Every container (torch zip, safetensors, shards, Flax trees, random draws) is seen as a `Tensors` mapping from a torch key to an
array. Shapes and types are known at once; values are produced one key at a time and never kept, so that converting a checkpoint
needs little more host memory than its largest tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import LAYOUTS, Table, get_leaf

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The types a weight file may be asked to hold.
FLOAT_TYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor: its shape, its type and how to get its values.

    `read` returns a fresh (possibly memory-mapped, read-only) array of exactly that shape and type.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def astype(self, dtype: np.dtype) -> LazyTensor:
        """The same tensor converted on reading."""
        if dtype == self.dtype:
            return self

        def read() -> np.ndarray:
            with np.errstate(over="ignore"):  # what becomes infinite is refused by name when it is written
                return np.asarray(self.read()).astype(dtype)

        return LazyTensor(self.shape, dtype, read)

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same elements under another shape.

        Raises:
          ValueError: the element counts differ.
        """
        if int(np.prod(shape, dtype=np.int64)) != self.size:
            raise ValueError(f"cannot view {self.shape} as {shape}")
        return self if shape == self.shape else LazyTensor(shape, self.dtype, lambda: np.asarray(self.read()).reshape(shape))


def constant(value: np.ndarray) -> LazyTensor:
    """A tensor that is already in memory."""
    value = np.asarray(value)
    return LazyTensor(value.shape, value.dtype, lambda: value)


class Tensors(Mapping[str, np.ndarray]):
    """Torch key -> array, read when asked for; `info` describes a tensor without reading it.

    Args:
      items: torch key -> lazy tensor.
      source: what to call this set in errors, usually a file path.
      metadata: text pairs from the file's header.
    """

    def __init__(self, items: Mapping[str, LazyTensor], source: str, metadata: Mapping[str, str] | None = None):
        self._items = dict(items)
        self.source = source
        self.metadata = dict(metadata or {})

    def __getitem__(self, key: str) -> np.ndarray:
        return self._items[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def info(self, key: str) -> LazyTensor:
        return self._items[key]

    def lazy_items(self) -> Iterable[tuple[str, LazyTensor]]:
        return self._items.items()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tensor.shape for key, tensor in self._items.items()}

    @property
    def parameters(self) -> int:
        return sum(t.size for t in self._items.values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._items.values())

    def select(self, keep: Iterable[str]) -> Tensors:
        """Only the given keys, in the given order."""
        return Tensors({k: self._items[k] for k in keep}, self.source)

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """`names` maps a key of this set to its new name; keys that it lacks keep theirs.

        Raises:
          KeySyncError: two keys would get the same name.
        """
        out: dict[str, LazyTensor] = {}
        for key, tensor in self._items.items():
            new = names.get(key, key)
            if new in out:
                raise KeySyncError(f"{self.source}: {key} and another tensor are both called {new}")
            out[new] = tensor
        return Tensors(out, self.source)

    def under(self, prefix: str) -> Tensors:
        """The tensors whose key starts with `prefix`, without it."""
        return Tensors({k[len(prefix) :]: v for k, v in self._items.items() if k.startswith(prefix)}, self.source)

    def prefixed(self, prefix: str) -> Tensors:
        return Tensors({prefix + k: v for k, v in self._items.items()}, self.source)

    def updated(self, items: Mapping[str, LazyTensor]) -> Tensors:
        """This set with `items` added or put in place of its own."""
        return Tensors({**self._items, **items}, self.source)

    def astype(self, dtype: np.dtype | None) -> Tensors:
        """Floating-point tensors converted on reading; None keeps each tensor's own type."""
        if dtype is None:
            return self
        return Tensors({k: v.astype(dtype) if is_float(v.dtype) else v for k, v in self._items.items()}, self.source)


def is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


def from_params(table: Table, params: Mapping, source: str = "parameters") -> Tensors:
    """Flax parameters seen through their table in torch layout; leaves may be NumPy or JAX arrays.

    Args:
      table: which leaf is which torch key.
      params: nested dict of arrays.

    Raises:
      KeySyncError: a leaf is missing or has another shape than the table says.
    """
    items = {}
    for entry in table:
        path = "/".join(entry.flax_path)
        try:
            leaf = get_leaf(params, entry.flax_path)
        except (KeyError, TypeError):
            raise KeySyncError(f"{source}: {path} is missing (it becomes {entry.torch_key})") from None
        if tuple(leaf.shape) != entry.flax_shape:
            raise KeySyncError(f"{source}: {path} is {tuple(leaf.shape)}, expected {entry.flax_shape}")
        to_torch = LAYOUTS[entry.layout].to_torch
        items[entry.torch_key] = LazyTensor(
            entry.torch_shape, np.dtype(leaf.dtype), lambda leaf=leaf, to_torch=to_torch: np.ascontiguousarray(to_torch(np.asarray(leaf)))
        )
    return Tensors(items, source)
