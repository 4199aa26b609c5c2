"""How far a job is: phases with bars, a callback and a way to stop, and the seconds that each one took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.progress import Bars

# (phase, done, total): total is None where it is not known beforehand.
OnProgress = Callable[[str, int, int | None], object]


class CancelledError(KeySyncError):
    """A job that was told to stop."""


class CancelHandle(Protocol):
    """What `threading.Event` is: some other thread sets it."""

    def is_set(self) -> bool: ...


class PhaseProgress:
    """`with progress.phase("encode", total=250) as advance: advance()`.

    Args:
      show: bars on stderr.
      on_progress: called when a phase begins (with 0 done) and after each piece of it; what it raises ends the job.
      cancel: looked at in the same places.

    Attributes:
      seconds: how long each phase took that is over.
    """

    def __init__(self, show: bool = False, on_progress: OnProgress | None = None, cancel: CancelHandle | None = None):
        self.seconds: dict[str, float] = {}
        self._bars = Bars(quiet=not show)
        self._on_progress = on_progress
        self._cancel = cancel

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Raises `CancelledError` at its beginning, or from what it yields, once the handle is set."""
        start, done = time.perf_counter(), 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._bars.advance(task)
            self._report(name, done, total)

        with self._bars:
            task = self._bars.add_task(name, total=total)
            self._report(name, 0, total)
            yield advance
            self._bars.update(task, total=done if total is None else total)
            self._bars.stop_task(task)
        self._bars.remove_task(task)
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def _report(self, name: str, done: int, total: int | None) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError(f"cancelled in phase {name}, after {done} of {'an unknown number' if total is None else total}")
        if self._on_progress is not None:
            self._on_progress(name, done, total)
