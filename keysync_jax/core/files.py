"""Files that appear whole or not at all, here and in object stores (`gs://`); checksums; the folders that files go to."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keysync_jax.core.errors import KeySyncError, UsageError

if TYPE_CHECKING:  # half of the time that the commands' own import takes: at run time only where a file is opened
    from etils import epath

_BLOCK = 1 << 22  # bytes


def is_local(path: str | os.PathLike) -> bool:
    """Whether a path lies on a disk, not in an object store."""
    return "://" not in os.fspath(path)


def sha256(path: str | os.PathLike, advance: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file's content; `advance` is told the bytes of every block read."""
    from etils import epath

    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def read_object(path: str | os.PathLike, advice: str) -> dict[str, Any]:
    """The object in one of our JSON files, on a disk or in an object store.

    Args:
      path: of the file, which must exist.
      advice: what to do where it is damaged.

    Raises:
      KeySyncError: it cannot be read, is not valid JSON (NaN is no number there), or holds something else.
    """
    from etils import epath

    try:
        values = json.loads(epath.Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise KeySyncError(f"{path} cannot be read ({error}); {advice}") from None
    except ValueError as error:
        raise KeySyncError(f"{path} cannot be read: it is not valid JSON ({error}); {advice}") from None
    if not isinstance(values, dict):
        raise KeySyncError(f"{path} must hold a JSON object; {advice}")
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def local_folder(path: str | os.PathLike) -> Path:
    """The folder to write to, which need not exist.

    Raises:
      UsageError: nothing, or an object store.
      KeySyncError: there is a file where a folder must be.
    """
    text = os.fspath(path)
    if not text or not is_local(text):
        raise UsageError(f"output {text!r} is no local folder; name one")
    folder = Path(text)
    there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if there.exists() and not there.is_dir():
        raise KeySyncError(f"{there} is a file; name a folder")
    return folder


def check_target(path: str | os.PathLike, name: str = "") -> Path:
    """Refuses, before the work, a file that could not be written after it.

    Args:
      path: of the file.
      name: of the option that asks for it, for the message.

    Returns:
      The path, resolved.

    Raises:
      UsageError: a folder, or something else that a file must not replace.
      KeySyncError: in a folder that does not exist, or without permission.
    """
    target, said = Path(path).resolve(), f"{name} {path}".lstrip()
    if not target.parent.is_dir():
        raise KeySyncError(f"{said}: the folder {target.parent} does not exist; create it first")
    if target.is_dir():
        raise UsageError(f"{said} is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise UsageError(f"{said} is no ordinary file, and is not replaced; name another")
    if not all(os.access(each, os.W_OK) for each in (target.parent, target) if each.exists()):
        raise KeySyncError(f"{said} cannot be written: permission denied")
    return target


def temporary_beside(path: Path, suffix: str = "") -> Path:
    """Where the file that shall become `path` is written: a name of its own at every call, and none that is too long.

    Args:
      path: the target.
      suffix: that the temporary file shall have.
    """
    # A name may be as long as a file's name can be, so the temporary one has a part of it and a checksum.
    return path.with_name(f".{path.name[:40]}.{zlib.crc32(os.fsencode(path.name)):08x}.{uuid.uuid4().hex[:12]}.part{suffix}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike, suffix: str = ".tmp") -> Iterator[epath.Path]:
    """Where to write a file that becomes `path` when the block ends well, and vanishes when it does not.

    On a disk it is a file beside `path`, renamed at the end. In an object store it is `path` itself, which shows only when complete.

    Args:
      path: the file to make or replace; its folder must exist.
      suffix: of the temporary name; a process that is killed leaves that file behind.

    Raises:
      OSError: whatever writing and renaming raise.
    """
    from etils import epath

    if not is_local(path):
        yield epath.Path(path)
        return
    temporary = temporary_beside(Path(path), suffix)
    try:
        yield epath.Path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to a local `path`, then rename it; nothing half-written ever bears the final name.

    Raises:
      KeySyncError: the disk is full or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, path.suffix) as temporary:
            write(Path(temporary))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):  # None: NumPy, which says how much it could write
            raise KeySyncError(f"cannot write {path}: the disk is full; free space or choose another folder") from error
        raise KeySyncError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` of UTF-8 text."""
    write_atomically(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))
