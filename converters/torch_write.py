"""Writes `torch.save`'s zip format without torch, one tensor at a time.

The result is what torch 1.6 and later write: `torch.load(path, weights_only=True)` reads it, and so does our own `torch_file`. The
pickle is written before any value is read, because it holds shapes and types only; each tensor's bytes follow as a stored entry,
aligned to 64 bytes so that `torch.load(mmap=True)` works.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from keysync_jax.converters.lazy import LazyTensor, Tensors
from keysync_jax.converters.safetensors_file import contiguous
from keysync_jax.converters.torch_pickle import STORAGE_TYPES
from keysync_jax.core.errors import KeySyncError

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_TYPES.items() if name != "UntypedStorage"}
_ALIGNMENT = 64
_MARK, _STOP = b"(", b"."


def write(
    path: str | os.PathLike,
    tensors: Tensors,
    wrapper: str | None = "module",
    extra: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Saves `{wrapper: {key: tensor}, **extra}`, or the bare state dict if `wrapper` is None.

    Args:
      path: local file to create.
      tensors: torch key -> array in torch layout; read one at a time.
      wrapper: key of the state dict: "module" as DeepSpeed (what KeySync reads from a `.pt`), "state_dict" as Lightning, or None.
      extra: further plain values (numbers, strings, dicts, lists) beside the state dict.
      progress: called with the bytes written after each tensor.

    Raises:
      KeySyncError: a type torch lacks, or values that are not finite.
    """
    path = Path(path)
    for name, tensor in tensors.lazy_items():
        if tensor.dtype not in _STORAGE_NAMES:
            raise KeySyncError(f"{tensors.source}: {name} has type {tensor.dtype}, which a torch file cannot hold")
    # Readers take the archive's inner name from its first entry; torch uses the file's stem.
    root = path.name.split(".")[0] or "archive"
    with open(path, "wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _entry(archive, raw, f"{root}/data.pkl", _pickle(tensors, wrapper, extra or {}))
        _entry(archive, raw, f"{root}/byteorder", b"little")
        for index, (name, tensor) in enumerate(tensors.lazy_items()):
            _entry(archive, raw, f"{root}/data/{index}", contiguous(name, tensor, tensors.source))
            if progress:
                progress(tensor.nbytes)
        _entry(archive, raw, f"{root}/version", b"3\n")


def _entry(archive: zipfile.ZipFile, raw: Any, name: str, data: bytes | memoryview) -> None:
    """A stored entry whose data starts at a multiple of 64 bytes, padded by an extra field as torch pads it."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_STORED
    # A zip64 extra of 20 bytes precedes ours for entries that need it; writestr decides by the announced size.
    zip64 = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0
    start = raw.tell() + 30 + len(name.encode()) + zip64 + 4
    info.extra = struct.pack("<2sH", b"FB", -start % _ALIGNMENT) + b"\0" * (-start % _ALIGNMENT)
    info.file_size = len(data)
    with archive.open(info, "w", force_zip64=bool(zip64)) as f:
        f.write(data)


def _pickle(tensors: Tensors, wrapper: str | None, extra: Mapping[str, Any]) -> bytes:
    """Protocol 2 with torch's persistent ids, in the opcodes that `torch.save` itself produces."""
    out = BytesIO()
    out.write(b"\x80\x02")
    if wrapper is None and extra:
        raise ValueError("extra values need a wrapper")
    if wrapper is not None:
        out.write(b"}" + _MARK)
        out.write(_plain(wrapper))
    out.write(b"ccollections\nOrderedDict\n)R" + _MARK)
    for index, (name, tensor) in enumerate(tensors.lazy_items()):
        out.write(_plain(name))
        out.write(_tensor(tensor, index))
    out.write(b"u")
    if wrapper is not None:
        for key, value in extra.items():
            out.write(_plain(key) + _plain(value))
        out.write(b"u")
    out.write(_STOP)
    return out.getvalue()


def _tensor(tensor: LazyTensor, index: int) -> bytes:
    strides, step = [], 1
    for n in reversed(tensor.shape):
        strides.insert(0, step)
        step *= max(n, 1)
    storage = (
        _MARK
        + _plain("storage")
        + b"ctorch\n"
        + _STORAGE_NAMES[tensor.dtype].encode()
        + b"\n"
        + _plain(str(index))
        + _plain("cpu")
        + _plain(tensor.size)
        + b"tQ"
    )
    arguments = storage + _plain(0) + _plain(tensor.shape) + _plain(tuple(strides)) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _MARK + arguments + b"tR"


def _plain(value: Any) -> bytes:
    """The opcodes that push a plain value, without the protocol header and the final STOP.

    Pieces are joined into one pickle, so none may number memo slots of its own: `fast` leaves the memo out.
    """
    out = BytesIO()
    pickler = pickle.Pickler(out, protocol=2)
    pickler.fast = True
    pickler.dump(value)
    return out.getvalue()[2:-1]
