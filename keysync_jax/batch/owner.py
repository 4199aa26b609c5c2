"""Who holds a claim: a process of a host, and whether it is still there."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple


class Owner(NamedTuple):
    """A process.

    Attributes:
      host: the machine, in this run of it, as far as process numbers mean something.
      pid: its number there.
      started: when it began, in the kernel's ticks; a number that is given to another process does not pass for it. 0 where unknown.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def of_this_process(cls) -> Owner:
        return cls(_host(), os.getpid(), _started(os.getpid()))

    @classmethod
    def from_json(cls, values: Any) -> Owner:
        return cls(*values)

    @property
    def gone(self) -> bool:
        """Whether it has certainly ended; a process of another host never is."""
        if self.host != _host():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # not ours to signal, so it is there
            return False
        return _started(self.pid) != self.started or _is_zombie(self.pid)


@functools.cache
def _host() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
    with contextlib.suppress(OSError):  # containers on one machine count their processes each for itself
        parts.append(os.readlink("/proc/self/ns/pid").strip("pid:[]"))
    return " ".join(parts)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; [] where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def _is_zombie(pid: int) -> bool:
    return _stat(pid)[:1] == ["Z"]
