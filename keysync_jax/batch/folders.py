"""What lies in a batch's output folder beside the outputs: the ledger, thumbnails, reports of single items, and scratch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from keysync_jax.batch import ledger as base
from keysync_jax.batch.faults import MachineFault
from keysync_jax.batch.job_list import STATE_FOLDER
from keysync_jax.batch.ledger import Ledger
from keysync_jax.batch.ledger_files import FileLedger
from keysync_jax.batch.ledger_sqlite import SqliteLedger
from keysync_jax.batch.owner import Owner
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import write_text

LEDGERS: dict[str, Callable[[Path, float], Ledger]] = {"sqlite": SqliteLedger, "files": FileLedger}
# File systems on which SQLite's locks cannot be trusted, as /proc/mounts calls them.
_SHARED = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse", "9p", "afs", "pvfs", "orangefs", "wekafs")
_STALE_S = 20 * base.LEASE_S  # scratch of another host that nobody touched for so long


@dataclasses.dataclass(frozen=True)
class BatchFolder:
    """The folder of a batch.

    Attributes:
      root: the output folder.
      lease_s: how long a claim lasts without a beat, seconds.
    """

    root: Path
    lease_s: float = base.LEASE_S

    @property
    def state(self) -> Path:
        return self.root / STATE_FOLDER

    @property
    def scratch(self) -> Path:
        return self.state / "scratch"

    def strip(self, name: str) -> Path:
        """The thumbnails of an item, a JPEG."""
        return self.state / "strips" / f"{name}.jpg"

    def report(self, name: str) -> Path:
        """The whole report of an item's dub."""
        return self.state / "reports" / f"{name}.json"

    def create(self, ledger: str | None = None) -> None:
        """Makes the folder, or finds it made.

        Args:
          ledger: "sqlite" or "files"; None keeps what is there, else chooses by the file system.

        Raises:
          UsageError: the folder has a ledger of the other kind.
          MachineFault: it cannot be made.
        """
        try:
            for folder in (self.scratch, self.state / "strips", self.state / "reports"):
                folder.mkdir(parents=True, exist_ok=True)
            kind = self._kind()
            if kind is None:
                write_text(self.state / "ledger.json", json.dumps({"ledger": ledger or _fitting(self.root)}) + "\n")
        except (OSError, KeySyncError) as error:
            raise MachineFault(f"{self.root} cannot be used: {getattr(error, 'strerror', None) or error}") from error
        if ledger is not None and self._kind() != ledger:
            raise UsageError(f"{self.root} has a ledger of the kind {self._kind()!r}; leave --ledger out, or give another folder")

    def open_ledger(self) -> Ledger:
        """The ledger of a folder that was created.

        Raises:
          KeySyncError: there is none.
        """
        kind = self._kind()
        if kind is None:
            raise KeySyncError(f"{self.root} holds no batch; name the folder that keysync batch -o was given")
        return LEDGERS[kind](self.state, self.lease_s)

    def new_scratch(self, owner: Owner, name: str) -> Path:
        """A folder for what a worker of this driver has half made."""
        folder = self.scratch / f"{owner.pid}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "owner.json").write_text(json.dumps(list(owner)))
        return folder

    def sweep(self) -> None:
        """Removes what killed processes have left: scratch whose owner is gone."""
        for folder in self.scratch.iterdir():
            with contextlib.suppress(OSError):  # somebody else sweeps, too
                try:
                    gone = Owner.from_json(json.loads((folder / "owner.json").read_text())).gone
                except (OSError, ValueError, TypeError):
                    gone = False
                if gone or folder.stat().st_mtime < time.time() - _STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)
        for path in self._leftovers():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - _STALE_S:
                    path.unlink()

    def _leftovers(self) -> Iterator[Path]:
        yield from self.state.glob(".*")
        yield from (self.state / "new").glob("*")

    def _kind(self) -> str | None:
        try:
            kind = json.loads((self.state / "ledger.json").read_text(encoding="utf-8"))["ledger"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MachineFault(f"{self.state / 'ledger.json'} cannot be read: {error}") from error
        return kind


def _fitting(folder: Path) -> str:
    """The kind of ledger for the file system of a folder."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:  # not Linux
        return "sqlite"
    real = os.path.realpath(folder)
    over = [(point, kind) for _, point, kind, *_ in mounts if real == point or real.startswith(point.rstrip("/") + "/")]
    kind = max(over, key=lambda mount: len(mount[0]), default=("/", ""))[1]
    return "files" if kind.startswith(_SHARED) else "sqlite"
