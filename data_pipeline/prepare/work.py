"""Finished work on disk: one entry per item or clip, complete or absent.

An entry is `NAME.npz` (arrays, only where there are some) and `NAME.json`, written last, which holds the entry's key and the arrays'
checksum. Both appear by atomic rename. An entry whose key differs or whose checksum does not match counts as absent. Folders may lie
on gs://, where a file shows only when complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from keysync_jax.core.files import is_local, replacing, sha256


class Entry(NamedTuple):
    """A stored entry; `arrays` is {} where none were asked for or stored."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


class WorkFolder:
    """Entries of one kind.

    Args:
      path: folder, local or gs://; made when first written to.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)

    def save(self, name: str, key: str, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Store an entry.

        Args:
          name: file name without suffix.
          key: hash of everything that the entry was made from.
          values: JSON values.
          arrays: NumPy arrays (numbers or bytes).
        """
        self.path.mkdir(parents=True, exist_ok=True)
        checksum = None
        if arrays is not None:
            data = _pack(arrays)
            checksum = hashlib.sha256(data).hexdigest()
            _replace(self.path / f"{name}.npz", data)
        text = json.dumps({"key": key, "arrays": checksum, "values": dict(values)}, sort_keys=True, allow_nan=False)
        _replace(self.path / f"{name}.json", text.encode())

    def load(self, name: str, key: str | None = None, arrays: bool = True) -> Entry | None:
        """The entry, or None when it is absent, damaged or (with `key`) of another key."""
        path = self.path / f"{name}.json"
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            checksum, values = record["arrays"], record["values"]
            if key is not None and record["key"] != key:
                return None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            return None
        if not arrays or checksum is None:
            return Entry(values, {})
        path = self.path / f"{name}.npz"
        if not path.exists():
            return None
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != checksum:
            return None
        return Entry(values, _unpack(data))

    def has(self, name: str, key: str) -> bool:
        """Whether the entry is there (the arrays' checksum is looked at when they are read)."""
        entry = self.load(name, key, arrays=False)
        return entry is not None

    def names(self) -> list[str]:
        """Names of all entries, sorted."""
        if not self.path.exists():
            return []
        return sorted(p.name.removesuffix(".json") for p in self.path.iterdir() if p.name.endswith(".json"))

    def count(self) -> int:
        return len(self.names())

    def remove(self, name: str) -> None:
        for suffix in (".json", ".npz"):
            (self.path / f"{name}{suffix}").unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Temporary files of runs that were killed. Call it only while no worker writes here."""
        if self.path.exists():
            for path in self.path.iterdir():
                if path.name.endswith(".tmp"):
                    path.unlink(missing_ok=True)


def digest(*values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


_digests: dict[tuple[str, int, int], str] = {}
# A file written to this recently may be written to again without its time changing, so coarse are some clocks.
_SETTLED_NS = 2_000_000_000


def identity(path: str | os.PathLike) -> tuple[str, int, int] | None:
    """Path, size and time of change of a local file, by which to know it again; None while that tells nothing."""
    if not is_local(path):
        return None
    stat = os.stat(path)
    settled = time.time_ns() - stat.st_mtime_ns >= _SETTLED_NS
    return (os.path.abspath(path), stat.st_size, stat.st_mtime_ns) if settled else None


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content. A process reads a file once, as long as its size and time of change stay."""
    key = identity(path)
    if key is None:
        return sha256(path)
    if key not in _digests:
        _digests[key] = sha256(path)
    return _digests[key]


def _pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of an .npz file without time stamps: equal arrays give equal bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())
    return out.getvalue()


def _unpack(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _replace(path: epath.Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: epath.PathLike, text: str) -> None:
    """Replace a small text file in one step. Bytes of a file name that are not UTF-8 become escapes, as JSON has them."""
    _replace(epath.Path(path), text.encode(errors="backslashreplace"))
