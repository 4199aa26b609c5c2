"""Files of one JSON object per line that grow while a run goes on, on a disk or in an object store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from keysync_jax.core.files import is_local
from keysync_jax.training.store.workdir import as_os_error


class JsonLines:
    """Adds lines to a file, which need not exist.

    An object store cannot append: gcsfs warns and overwrites. There what the file held and all lines since are kept in memory, and each
    line writes the whole object anew, which is half a megabyte at the end of 60,000 steps that are logged every 50. A line that could
    not be written comes with the next one.

    Raises:
      OSError: it is there and cannot be read, so that adding to it would lose what it holds.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._remote = not is_local(self._path)
        with as_os_error(self._path):
            self._held = self._path.read_bytes() if self._path.exists() else b""
        if self._held and not self._held.endswith(b"\n"):  # a killed process left half a line, which the next one must not continue
            self._held += b"\n"
            if not self._remote:
                self._append(b"\n")
        if not self._remote:
            self._held = b""

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one more line.

        Raises:
          OSError: the disk is full, or the store does not answer.
        """
        line = json.dumps(row).encode() + b"\n"
        if not self._remote:
            self._append(line)
            return
        self._held += line
        with as_os_error(self._path):
            self._path.write_bytes(self._held)

    def _append(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data)


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of such a file; none where it does not exist. A line that was cut when the process was killed is left out.

    Raises:
      OSError: it cannot be read.
    """
    path, out = epath.Path(path), []
    with as_os_error(path):
        text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            out.append(row)
    return out
