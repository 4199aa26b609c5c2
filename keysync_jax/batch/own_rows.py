"""Clips side by side, each in the rows of the microbatch that it has alone.

XLA gives a row the same bits whatever stands in the others, but not always the same in another row. So a clip begins in the first row, and
the rows that are left before it are filled as they are at the end of a clip that is alone: by its last window again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keysync_jax.config import StageConfig
from keysync_jax.inference.engine import Window


class OwnRows:
    """A stage's sampler for the windows of several clips.

    Args:
      sampler: called with windows, gives the latents of each; row `i % microbatch` of its program is the `i`-th window's.
      config: of the stage.
      microbatch: windows that a device computes at once.
    """

    def __init__(self, sampler: Callable[[Iterable[Window]], Iterator[np.ndarray]], config: StageConfig, microbatch: int):
        self.config = config
        self._sampler, self.microbatch = sampler, microbatch

    def __call__(self, windows: Iterable[Window], settings: Any = ()) -> Iterator[np.ndarray]:
        """The latents `[T, h, w, 4]` of each window, in order; a window of index 0 begins a clip."""
        wanted: deque[bool] = deque()

        def filled() -> Iterator[Window]:
            count, last = 0, None
            for window in windows:
                while last is not None and int(window.index) == 0 and count % self.microbatch:
                    wanted.append(False)
                    count += 1
                    yield last
                wanted.append(True)
                count, last = count + 1, window
                yield window

        for latents in self._sampler(filled()):
            if wanted.popleft():
                yield latents
