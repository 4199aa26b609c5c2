"""Progress with time left: bars where a person watches, a line now and then where stderr goes to a file."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0


class Bars(Progress):
    """Rich's progress on stderr, since stdout belongs to results. Where stderr is no terminal, a line every `LINE_SECONDS` instead.

    Args:
      quiet: show nothing.
    """

    def __init__(self, quiet: bool = False):
        self._lines = not quiet and not sys.stderr.isatty()
        self._spoken = time.monotonic()
        super().__init__(
            TextColumn("{task.description:<24}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=Console(stderr=True), disable=quiet or self._lines,
        )  # fmt: skip

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if self._lines and time.monotonic() - self._spoken >= LINE_SECONDS:
            self._spoken = time.monotonic()
            print(self._line(task_id), file=sys.stderr, flush=True)

    def _line(self, task_id: TaskID) -> str:
        task = next(task for task in self.tasks if task.id == task_id)
        total = "" if task.total is None else f"/{task.total:g}"
        left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
        return f"{task.description}: {task.completed:g}{total} after {task.elapsed or 0:.0f} s{left}"
