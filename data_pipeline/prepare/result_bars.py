"""Progress of a job as seen from outside: how many of its results are there. The same for every runner."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from rich.progress import TaskID

from keysync_jax.core import progress

log = logging.getLogger(__name__)

_SECONDS = 1.0  # between two looks; a look may list a folder


class ResultBars:
    """`with ResultBars() as bars: bars.follow("features", 36, count)`: bars with time left, or a line now and then in a log file."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._bars = progress.Bars(quiet)
        self._followed: list[tuple[str, int, Callable[[], int], TaskID]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def follow(self, name: str, total: int, count: Callable[[], int]) -> None:
        """Show `count()` of `total`."""
        self._followed.append((name, total, count, self._bars.add_task(name, total=total)))

    def __enter__(self) -> ResultBars:
        self._bars.start()
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        self._thread.join()
        if exc[0] is None:
            self._show(time.monotonic(), last=True)
        self._bars.stop()

    def _look(self) -> None:
        self._began = time.monotonic()
        self._first: dict[str, int] = {}
        self._line = self._began
        while not self._stop.wait(_SECONDS):
            self._show(time.monotonic())

    def _show(self, now: float, last: bool = False) -> None:
        lines = []
        for name, total, count, task in self._followed:
            try:
                done = count()
            except OSError as error:  # a folder that another process is replacing; the next look will see it
                log.debug("progress of %s: %s", name, error)
                continue
            self._bars.update(task, completed=done)
            new = done - self._first.setdefault(name, done)
            left = f", {(total - done) * (now - self._began) / new:.0f} s left" if 0 < new and done < total else ""
            lines.append(f"{name} {done}/{total}{left}")
        if not self._quiet and not sys.stderr.isatty() and (last or now - self._line >= progress.LINE_SECONDS):
            self._line = now
            print(f"keysync prepare: {now - self._began:.0f} s: {'; '.join(lines)}", file=sys.stderr, flush=True)
