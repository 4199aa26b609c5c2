"""One process at a time in a folder: two that write into the same one would spoil each other's work."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import is_local

_EVERY_S = 0.5


@contextlib.contextmanager
def only_process(folder: str, refusal: str, *, wait_s: float = 0.0, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold the lock of a folder. It ends with the process, however that ends.

    Object stores (`gs://`) and file systems without locks have none: there nothing is held, and a second process is not kept out.

    Args:
      folder: the lock is its file `lock`; made where it does not exist.
      refusal: what to tell who comes second.
      wait_s: how long another process may take to leave, in seconds.
      say: told once that we wait.

    Raises:
      KeySyncError: another process holds it.
    """
    if not is_local(folder):
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "lock", "a", encoding="utf-8") as file:
        end, told = time.monotonic() + wait_s, False
        while not _take(file):
            if time.monotonic() >= end:
                raise KeySyncError(refusal)
            if not told:
                say(f"another process is still at work in {folder}: waiting up to {wait_s:g} s for it to leave")
                told = True
            time.sleep(_EVERY_S)
        yield


def _take(file: IO[str]) -> bool:
    held = PermissionError if sys.platform == "win32" else BlockingIOError
    try:
        if sys.platform == "win32":  # each system has a module of its own
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except held:
        return False
    except OSError:  # a file system without locks
        return True
    return True
