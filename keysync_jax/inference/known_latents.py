"""The source's crops as scaled latents, in the order in which they were encoded; jobs on one video may share them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from keysync_jax.inference.latent_store import LatentStore
from keysync_jax.media.burned_text import TextRange, TextWatch


class KnownLatents:
    """Latents by source frame.

    A frame's place in the encoder's microbatch is part of its bits. So what is there serves frames of which it is the beginning, or
    that are its own beginning (`fits`): then every frame has the place that it has without it.

    Args:
      path: of the file that holds them.
      shape: of one, `[h, w, C]`.

    Raises:
      KeySyncError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, shape: Sequence[int]):
        self._store = LatentStore(path, shape)
        self._row: dict[int, int] = {}
        self._text = TextWatch()

    @property
    def text(self) -> TextWatch:
        """What watches the frames for text as they are read."""
        return self._text

    def fits(self, sources: Sequence[int]) -> bool:
        """Whether what is there can serve these frames."""
        have = list(self._row)
        count = min(len(have), len(sources))
        return have[:count] == list(sources[:count])

    def missing(self, sources: Sequence[int], together: int) -> Sequence[int]:
        """The frames that have to be encoded before all of `sources`, which fit, are there; the encoder takes `together` at once."""
        if len(sources) <= len(self._row):
            return ()
        return sources[len(self._row) // together * together :]  # the last group was filled up, so it is encoded again

    def fill(self, frames: Sequence[int], latents: Iterable[np.ndarray]) -> Iterator[None]:
        """Takes the latents `[h, w, C]` of `frames`, of `missing`; yields after each."""
        for frame, latent in zip(frames, latents, strict=True):
            row = self._row.get(frame, len(self._row))
            self._store[row] = latent
            self._row[frame] = row
            yield

    def holds(self, frame: int) -> bool:
        """Whether a frame is there already."""
        return frame in self._row

    def take(self, frames: Sequence[int]) -> np.ndarray:
        """`[len(frames), h, w, C]`."""
        return self._store.take([self._row[frame] for frame in frames])

    def text_until(self, frame: int) -> list[TextRange]:
        """Where text was seen, up to a frame."""
        return [TextRange(start, min(stop, frame + 1)) for start, stop in self._text.ranges if start <= frame]

    def close(self) -> None:
        self._store.close()
