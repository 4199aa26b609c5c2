"""A progress bar in bytes, shown only when there is something to wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LONG = 256 * 2**20  # bytes; less takes about a second


@contextlib.contextmanager
def byte_progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes that were just done."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=total < _LONG)
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
