"""Progress with time left for each stage of a job, and the seconds each one took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from keysync_jax.core.progress import Bars


class StageProgress:
    """`with progress.stage("encode", total=250) as advance: advance()`; silent when `show` is False."""

    def __init__(self, show: bool = True):
        self.seconds: dict[str, float] = {}
        self._bars = Bars(quiet=not show)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        start = time.perf_counter()
        with self._bars:
            task = self._bars.add_task(name, total=total)
            yield lambda: self._bars.advance(task)
            self._bars.update(task, total=self._bars.tasks[-1].completed if total is None else total)
            self._bars.stop_task(task)
        self._bars.remove_task(task)
        self.seconds[name] = round(time.perf_counter() - start, 3)
