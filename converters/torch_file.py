"""Reads `torch.save` files without torch.

A file written by torch 1.6 or later is a zip archive of stored (not compressed) entries: `<name>/data.pkl`, a pickle of the saved
object in which every storage is a persistent id, and `<name>/data/<key>`, the bytes of each storage. The pickle goes through
`torch_pickle`, which cannot run code from the file; every size, offset and stride is checked against the archive before a tensor is
mapped.

Older files (a bare pickle, or a tar archive) are read by torch itself where it is installed.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.converters.lazy import BFLOAT16, LazyTensor, constant
from keysync_jax.converters.torch_pickle import Storage, unpickle
from keysync_jax.core.errors import KeySyncError, first_line

_MAX_PICKLE = 512 * 2**20  # bytes of data.pkl; a full-size checkpoint with optimizer state has a few MB
_MAX_DIMENSIONS = 32
_MAX_NAME = 4096  # characters; only a dict that contains itself makes a longer one
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # pickle of torch's pre-1.6 magic number


def is_torch_zip(path: str | os.PathLike) -> bool:
    return zipfile.is_zipfile(path)


def is_legacy(path: str | os.PathLike) -> bool:
    """Whether this is a torch file from before 1.6: a pickle that starts with torch's magic number, or a tar of storages."""
    with open(path, "rb") as f:
        if f.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            return True
    try:
        with tarfile.open(path, "r:") as archive:
            return {"pickle", "storages", "tensors"} <= {name.strip("./") for name in archive.getnames()}
    except tarfile.TarError:  # no tar, a compressed one, or one cut short
        return False


def load(path: str | os.PathLike, skipped: Counter[str] | None = None) -> Any:
    """The saved object: dicts, lists, tuples, numbers and strings, with a `LazyTensor` in place of every tensor.

    Args:
      path: a local file.
      skipped: names of foreign classes whose objects were skipped are counted here; none of them was run.

    Raises:
      KeySyncError: not a torch file, truncated or damaged, big-endian, naming a function of Python's own, holding tensors inside a foreign
        object, or older than torch 1.6 where torch is not installed.
    """
    path = Path(path)
    try:
        if is_torch_zip(path):
            return _load_zip(path, skipped)
        if is_legacy(path):
            return _load_legacy(path)
        with open(path, "rb") as f:
            if f.read(4) == b"PK\x03\x04":
                raise KeySyncError(f"{path} is a truncated zip archive: its directory at the end is missing; copy or download it again")
    except OSError as error:
        raise KeySyncError(f"cannot read {path}: {error.strerror or error}") from None
    raise KeySyncError(f"{path} is not a torch file (neither a zip archive nor a pre-1.6 torch pickle)")


def _load_zip(path: Path, skipped: Counter[str] | None) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {}
            for entry in archive.infolist():
                if entry.filename in entries:
                    raise KeySyncError(f"{path} is damaged: it holds {entry.filename} twice")
                entries[entry.filename] = entry
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise KeySyncError(f"{path} is a truncated or damaged zip archive ({error}); copy or download it again") from None
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise KeySyncError(f"{path} is a zip archive but not one written by torch.save (it has {len(pickles)} data.pkl)")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise KeySyncError(f"{path} is a TorchScript program, not a checkpoint; save its state_dict() with torch.save")
    storages = _Storages(path, root, entries)
    if f"{root}byteorder" in entries and storages.bytes("byteorder", 16).strip() != b"little":
        raise KeySyncError(f"{path} was written on a big-endian machine, which is not supported")
    return unpickle(storages.bytes("data.pkl", _MAX_PICKLE), storages, skipped)


class _Storages:
    """The entries of the archive, located but not read."""

    def __init__(self, path: Path, root: str, entries: dict[str, zipfile.ZipInfo]):
        self.path = path
        self.file_size = path.stat().st_size
        self._root = root
        self._entries = entries
        self._offsets: dict[str, int] = {}

    def locate(self, name: str) -> tuple[int, int]:
        """(offset of the first byte in the file, length) of a stored entry."""
        entry = self._entries.get(self._root + name)
        if entry is None:
            raise KeySyncError(f"{self.path} is damaged: its entry {self._root}{name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise KeySyncError(f"{self.path}: its entry {entry.filename} is compressed or encrypted; torch.save stores entries as they are")
        if entry.header_offset < 0:  # what zipfile computes where bytes were cut out
            raise KeySyncError(f"{self.path} is truncated: {entry.filename} would start before the file")
        if entry.filename not in self._offsets:
            with open(self.path, "rb") as f:
                f.seek(entry.header_offset)
                header = f.read(30)
            if len(header) != 30 or header[:4] != b"PK\x03\x04":
                raise KeySyncError(f"{self.path} is damaged: no entry header for {entry.filename}")
            names, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
            self._offsets[entry.filename] = entry.header_offset + 30 + names + extra
        offset = self._offsets[entry.filename]
        if offset + entry.file_size > self.file_size:
            raise KeySyncError(f"{self.path} is truncated: {entry.filename} ends at byte {offset + entry.file_size} of {self.file_size}")
        return offset, entry.file_size

    def bytes(self, name: str, limit: int) -> bytes:
        offset, length = self.locate(name)
        if length > limit:
            raise KeySyncError(f"{self.path}: its entry {self._root}{name} is {length} bytes long; at most {limit} make sense")
        with open(self.path, "rb") as f:
            f.seek(offset)
            return f.read(length)

    def storage(self, dtype: np.dtype, key: str, numel: int) -> Storage:
        if "/" in key or not isinstance(numel, int) or numel < 0:
            raise KeySyncError(f"{self.path} is damaged: storage {key!r} with {numel!r} elements")
        if numel == 0:
            return Storage(dtype, 0, 0)  # torch may leave the entry of an empty storage out
        offset, length = self.locate(f"data/{key}")
        if length < numel * dtype.itemsize:
            raise KeySyncError(f"{self.path} is damaged: storage {key} has {length} bytes for {numel} x {dtype}")
        return Storage(dtype, numel, offset)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None) -> LazyTensor:
        """The view of a storage that a tensor is, checked to lie inside it."""
        if not isinstance(storage, Storage):
            raise KeySyncError(f"{self.path} is damaged: a tensor is built on {type(storage).__name__}, not on a storage")
        if dtype is not None and dtype != storage.dtype:  # an untyped storage, or one viewed as another type
            storage = Storage(dtype, storage.numel * storage.dtype.itemsize // dtype.itemsize, storage.offset)
        shape, strides = tuple(shape), tuple(strides)
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in numbers):
            raise KeySyncError(f"{self.path} is damaged: a tensor has shape {shape}, strides {strides} and offset {offset}")
        size = 1
        for n in shape:
            size *= n
        if size == 0:
            return constant(np.zeros(shape, storage.dtype))
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if last >= storage.numel:
            raise KeySyncError(f"{self.path} is damaged: a tensor of shape {shape} reaches element {last} of a storage of {storage.numel}")
        # Zero strides (an expanded tensor) are legal, but must not make a small file ask for a large amount of memory.
        if size * storage.dtype.itemsize > max(self.file_size, 2**20):
            raise KeySyncError(f"{self.path}: a tensor of shape {shape} is larger than the whole file; refused")
        first = storage.offset + offset * storage.dtype.itemsize
        span = last - offset + 1
        return LazyTensor(shape, storage.dtype, _mapped(self.path, first, span, shape, strides, storage.dtype))


def _mapped(path: Path, first: int, span: int, shape: tuple, strides: tuple, dtype: np.dtype) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        # One small mapping per tensor, gone with the array: a mapping of the whole file would count every page ever touched.
        if first + span * dtype.itemsize > os.path.getsize(path):
            raise KeySyncError(f"{path} became shorter while it was read")
        flat = np.memmap(path, dtype=dtype, mode="r", offset=first, shape=(span,))
        return np.lib.stride_tricks.as_strided(flat, shape, tuple(s * dtype.itemsize for s in strides), writeable=False)

    return read


def _load_legacy(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise KeySyncError(
            f"{path} is a torch file from before torch 1.6; install the torch extra to read it (pip install 'keysync-jax[torch]')"
        ) from None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a bad file; its reason is passed on
        raise KeySyncError(f"{path}: torch cannot read this pre-1.6 file ({first_line(error)})") from None

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous()
            if value.dtype == torch.bfloat16:
                return constant(value.view(torch.uint16).numpy().view(BFLOAT16))
            return constant(value.numpy())
        if isinstance(value, dict):
            return {k: convert(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [convert(v) for v in value] if isinstance(value, list) else tuple(convert(v) for v in value)
        return value

    return convert(saved)


def flatten(saved: Any, source: str, limit: int = 1_000_000) -> dict[str, LazyTensor]:
    """Every tensor in nested dicts, in order, under its keys joined by ".". Lists and tuples (optimizer state) are not entered.

    Raises:
      KeySyncError: two tensors with the same name, or a structure of more than `limit` items.
    """
    out: dict[str, LazyTensor] = {}
    stack = [("", saved)]
    for _ in range(limit):
        if not stack:
            return out
        name, value = stack.pop()
        if isinstance(value, LazyTensor):
            if name in out:
                raise KeySyncError(f"{source}: {name} appears twice")
            out[name] = value
        elif isinstance(value, dict) and len(name) < _MAX_NAME:
            stack.extend((f"{name}.{key}" if name else str(key), item) for key, item in reversed(value.items()))
    raise KeySyncError(f"{source}: its structure is too large for a checkpoint; refused")
