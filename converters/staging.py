"""Folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator

from etils import epath

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import is_local


@contextlib.contextmanager
def staged(path: str | os.PathLike, *, force: bool, replaceable: Callable[[epath.Path], bool]) -> Iterator[epath.Path]:
    """A folder to write into, which becomes `path` when the block ends well and is removed when it does not.

    Locally it is a temporary sibling that is renamed. An object store has no renaming of folders: there files are written in place
    and removed on failure, so write the file that makes the folder valid last.

    Args:
      path: the folder to make; may exist if it is empty.
      force: replace a folder that is not empty, provided that `replaceable` says it is one of ours.
      replaceable: whether a folder that is not empty may be replaced at all.

    Raises:
      KeySyncError: `path` is a file, is in use, or its parent does not exist.
    """
    target, remote, used = _target(path, force, replaceable)
    if remote:
        if used:
            target.rmtree()
        try:
            target.mkdir(parents=True, exist_ok=True)
            yield target
        except BaseException:
            target.rmtree(missing_ok=True)
            raise
        return
    name = uuid.uuid4().hex[:8]
    folder = target.with_name(f".{target.name}.writing-{name}")
    try:
        folder.mkdir()
        yield folder
        if used:
            old = target.with_name(f".{target.name}.replaced-{name}")
            os.rename(target, old)
            try:
                os.rename(folder, target)
            except OSError:
                os.rename(old, target)
                raise
            old.rmtree()
        else:
            os.replace(folder, target)  # an empty folder may be there
    except BaseException:
        folder.rmtree(missing_ok=True)
        raise


def check_free(path: str | os.PathLike, *, force: bool, replaceable: Callable[[epath.Path], bool]) -> None:
    """Raises what `staged` would, so that a folder that cannot be written is found before the work for it."""
    _target(path, force, replaceable)


def _target(path: str | os.PathLike, force: bool, replaceable: Callable[[epath.Path], bool]) -> tuple[epath.Path, bool, bool]:
    """The folder, whether it lies in an object store, and whether there is something to replace."""
    remote = not is_local(path)
    target = epath.Path(path if remote else os.path.abspath(path))
    try:
        return target, remote, _check_target(target, remote, force, replaceable)
    except ImportError as error:  # the package that speaks gs:// is not installed
        raise KeySyncError(f"cannot write {target}: {error}") from None


def _check_target(target: epath.Path, remote: bool, force: bool, replaceable: Callable[[epath.Path], bool]) -> bool:
    """Whether there is something to replace."""
    if target.exists() and not target.is_dir():
        raise KeySyncError(f"{target} is a file; name a folder")
    if not remote and not target.parent.is_dir():
        raise KeySyncError(f"{target.parent} does not exist; make the folder first")
    if not target.exists() or not any(target.iterdir()):
        return False
    if not force:
        raise KeySyncError(f"{target} is not empty; choose another folder, or use --force to replace it")
    if not replaceable(target):
        raise KeySyncError(f"{target} holds other files than ours, and is not replaced; choose another folder or empty it")
    return True
