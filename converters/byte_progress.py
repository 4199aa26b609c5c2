"""Progress in MiB, shown only when there is something to wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console

from keysync_jax.core.progress import Bars

_MIB = 2**20
_LONG = 256 * _MIB  # bytes; less takes about a second


@contextlib.contextmanager
def byte_progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes that were just done; silent for little, or where the console is quiet."""
    with Bars(quiet=console.quiet or total < _LONG) as bars:
        task = bars.add_task(f"{label}, MiB", total=round(total / _MIB))
        yield lambda count: bars.advance(task, count / _MIB)
