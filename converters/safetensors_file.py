"""The safetensors format, one tensor at a time.

Reading maps (local) or seeks to (remote) each tensor when it is asked for; writing streams tensors to the file in turn. The
`safetensors` package needs a whole file's tensors in memory to write and a local path to read; both would break the bound on host
memory and `gs://` model directories. The format: a little-endian u64 header length, a JSON header of `{name: {dtype, shape,
data_offsets}}`, then the data without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from keysync_jax.converters.lazy import BFLOAT16, LazyTensor, Tensors
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import is_local

_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(bool),
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the safetensors package's own limit


class Written(NamedTuple):
    """What was written, for a part's config.json."""

    sha256: str
    tensors: int
    parameters: int
    nbytes: int  # of the file


def looks_like(head: bytes, size: int) -> bool:
    """Whether a file that starts with `head` and is `size` bytes long can be a safetensors file."""
    return len(head) >= 9 and 2 <= int.from_bytes(head[:8], "little") <= min(size - 8, _MAX_HEADER) and head[8:9] == b"{"


def read(path: str | epath.Path) -> Tensors:
    """Opens a safetensors file; tensors are mapped from a local file, or read by range from a remote one.

    Raises:
      KeySyncError: the file is missing, truncated or malformed.
    """
    path = epath.Path(path)
    try:
        size = path.stat().length
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise KeySyncError(f"{path} is not a safetensors file, or is truncated (header of {length} bytes in {size})")
            header = json.loads(f.read(length))
    except OSError as error:
        raise KeySyncError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise KeySyncError(f"{path} is not a safetensors file: its header is not JSON") from None
    start, items, end = 8 + length, {}, 0
    try:
        metadata = header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = _TYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, stop = entry["data_offsets"]
            tensor = LazyTensor(shape, dtype, _reader(path, start + begin, shape, dtype))
            if min(shape, default=0) < 0 or begin != end or stop - begin != tensor.nbytes:
                raise KeySyncError(f"{path}: {name} says {entry['dtype']} {shape} at bytes {begin}..{stop}, which does not add up")
            items[name], end = tensor, stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KeySyncError(f"{path}: malformed safetensors header ({type(error).__name__}: {error})") from None
    if start + end != size:
        raise KeySyncError(f"{path} is truncated or has trailing bytes: {size} bytes, the header asks for {start + end}")
    return Tensors(items, str(path), metadata)


def _reader(path: epath.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
    def from_map() -> np.ndarray:
        if 0 in shape:  # an empty range cannot be mapped
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)

    def from_range() -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with path.open("rb") as f:
            f.seek(offset)
            data = f.read(count)
        if len(data) != count:
            raise KeySyncError(f"{path}: {len(data)} of {count} bytes at {offset}; the file changed or the read failed")
        return np.frombuffer(data, dtype).reshape(shape)

    return from_map if is_local(path) else from_range


def write(
    path: str | os.PathLike,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Writes tensors in turn; only one is in memory at a time.

    Args:
      path: file to create, local or remote.
      tensors: torch key -> array.
      metadata: free text pairs for the header; `{"format": "pt"}` is always there, for transformers.
      progress: called with the bytes written after each tensor.

    Raises:
      KeySyncError: a type that the format lacks, or a tensor with values that are not finite.
    """
    path = epath.Path(path)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    # Wider types first keeps every tensor aligned to its own size.
    order = sorted(tensors.lazy_items(), key=lambda item: -item[1].dtype.itemsize)
    for name, tensor in order:
        if tensor.dtype not in _NAMES:
            raise KeySyncError(f"{tensors.source}: {name} has type {tensor.dtype}, which safetensors cannot hold")
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for chunk in (len(text).to_bytes(8, "little"), text):
            f.write(chunk)
            digest.update(chunk)
        for name, tensor in order:
            data = contiguous(name, tensor, tensors.source)
            f.write(data)
            digest.update(data)
            if progress:
                progress(tensor.nbytes)
    return Written(digest.hexdigest(), len(order), tensors.parameters, 8 + len(text) + end)


def contiguous(name: str, tensor: LazyTensor, source: str) -> memoryview:
    """The bytes of a tensor in row-major order, after checking that it is what it said it would be.

    Raises:
      KeySyncError: other shape or type than announced, or a value that is not finite.
    """
    value = np.ascontiguousarray(tensor.read())
    if value.shape != tensor.shape and value.size == tensor.size == 1:
        value = value.reshape(tensor.shape)  # ascontiguousarray turns a scalar into a vector
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise KeySyncError(f"{source}: {name} was announced as {tensor.dtype} {tensor.shape} and is {value.dtype} {value.shape}")
    if (value.dtype.kind == "f" or value.dtype == BFLOAT16) and not np.isfinite(value).all():
        raise KeySyncError(f"{source}: {name} holds values that are not finite; the file is damaged or the training diverged")
    return value.reshape(-1).view(np.uint8).data
