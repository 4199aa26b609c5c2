"""Latents of a whole clip on disk, so that memory does not grow with its length."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from keysync_jax.core.errors import KeySyncError


class LatentStore:
    """Rows of float32 latents `[N, h, w, C]` in an unnamed file of a scratch folder.

    Plain reads and writes rather than a memory map: mapped pages would count as this process's memory.

    Args:
      path: of the file; replaced where it exists.
      shape: of one row, `[h, w, C]`.

    Raises:
      KeySyncError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, shape: Sequence[int]):
        self._path = path
        self._shape = tuple(shape)
        self._bytes = int(np.prod(self._shape)) * 4
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed by close()

    def __setitem__(self, row: int, latent: np.ndarray) -> None:
        if latent.shape != self._shape:
            raise ValueError(f"latent is {latent.shape}, the store holds {self._shape}")
        left = memoryview(np.ascontiguousarray(latent, np.float32).tobytes())
        try:
            self._file.seek(row * self._bytes)
            while left:  # on a disk that is nearly full, a part is written and nothing said
                left = left[self._file.write(left) :]
        except OSError as error:
            raise KeySyncError(f"cannot write {self._path}: {error.strerror}; free space or choose an output on another disk") from error

    def __getitem__(self, row: int) -> np.ndarray:
        self._file.seek(row * self._bytes)
        data = self._file.read(self._bytes)
        if len(data) != self._bytes:
            raise IndexError(f"latent {row} was never written")
        return np.frombuffer(data, np.float32).reshape(self._shape)

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """`[len(rows), h, w, C]`; a row may be asked for more than once."""
        latents = {row: self[row] for row in set(rows)}
        return np.stack([latents[row] for row in rows])

    def close(self) -> None:
        self._file.close()
