"""Where a run lies."""

from __future__ import annotations

import os

from etils import epath


def absolute(workdir: epath.PathLike) -> epath.Path:
    """The workdir as Orbax wants it, whatever the current folder. `epath.Path.resolve` would make a local folder `gs:` of `gs://`."""
    path = epath.Path(workdir)
    return path if "://" in os.fspath(path) else path.resolve()
