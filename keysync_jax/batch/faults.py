"""Faults of the machine, which stop a batch, against faults of an item, which fail that item alone."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

from keysync_jax.core.errors import KeySyncError, first_line

# No room, or a file system that takes no files: no other item would fare better.
_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE}
# What XLA and drivers say of a device that does not come back without a new process.
_DEVICE_LOST = (
    "DEVICE_LOST",
    "device is lost",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ECC",
    "uncorrectable ECC",
    "TPU is in a bad state",
)
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_PROBE_BYTES = 1 << 20


class MachineFault(KeySyncError):
    """The machine cannot go on: no item is to blame, the batch stops and its items stay unclaimed."""


def machine_fault(error: BaseException) -> str | None:
    """What is wrong with the machine, in a line, if the error or one that it came from says that something is."""
    for each in _chain(error):
        if isinstance(each, MachineFault):
            return str(each)
        number = getattr(each, "errno", None)
        if isinstance(number, int) and number in _ERRNOS:
            return first_line(error) if each is error else f"{first_line(error)} ({os.strerror(number)})"
        if isinstance(each, sqlite3.Error):
            return f"the ledger cannot be used: {first_line(each)}"
        if any(words in str(each) for words in _DEVICE_LOST):
            return f"the device is lost: {first_line(each)}"
    return None


def out_of_device_memory(error: BaseException) -> bool:
    """Whether a device had no room for what it was asked to compute; smaller pieces may fit."""
    return any(_OUT_OF_MEMORY in str(each) for each in _chain(error))


def check_folder(folder: Path) -> None:
    """Refuses a folder that takes no files now: what an item failed of may have been this.

    Raises:
      MachineFault: not there, read-only, or less than a megabyte left.
    """
    probe = folder / f".probe.{uuid.uuid4().hex}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise MachineFault(f"{folder} takes no files: {error.strerror or error}; make room, then give the same command again") from error
    finally:
        try:
            probe.unlink(missing_ok=True)
        except OSError:  # the folder is gone or read-only, which the error above says
            pass
    if free < _PROBE_BYTES:
        raise MachineFault(f"the disk of {folder} is full; make room, then give the same command again")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
