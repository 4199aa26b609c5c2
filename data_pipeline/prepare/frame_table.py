"""Where the frames of a long video lie, found in one pass, so that each of its clips need not be reached by decoding what comes before.

A table is kept in the work folder under the file's content hash, and shared by all items that name parts of the same file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from keysync_jax.data_pipeline.prepare.work import WorkFolder, file_digest
from keysync_jax.media import video

_VERSION = "1"
_DAMAGE = ("damaged", "unreadable", "broke off", "breaks off", "could be decoded")


class FrameTable(NamedTuple):
    """The frames of a video file.

    Attributes:
      pts: int64 `[N]`, presentation times in ticks.
      keyframes: where reading may begin.
      damage: (index of the first frame behind it, what it is), or None.
    """

    pts: np.ndarray
    keyframes: tuple[video.Keyframe, ...]
    damage: tuple[int, str] | None


class FrameTables:
    """Frame tables by file, made when first asked for.

    Args:
      folder: where they are kept; None keeps the last one only.
    """

    def __init__(self, folder: WorkFolder | None = None):
        self._folder = folder
        self._last: tuple[str, FrameTable] | None = None

    def __call__(self, info: video.VideoInfo) -> FrameTable:
        """The table of a file.

        Raises:
          KeySyncError: no picture in it can be decoded.
        """
        name = file_digest(info.path)
        if self._last is None or self._last[0] != name:
            self._last = name, self._load(name) or self._scan(name, info)
        return self._last[1]

    def _load(self, name: str) -> FrameTable | None:
        held = self._folder.load(name, _VERSION) if self._folder is not None else None
        if held is None:
            return None
        damage = held.values["damage"]
        return FrameTable(held.arrays["pts"], unpack_keyframes(held.arrays["keyframes"]), tuple(damage) if damage else None)

    def _scan(self, name: str, info: video.VideoInfo) -> FrameTable:
        pts: list[int] = []
        damage: tuple[int, str] | None = None
        with video.read(info.path, info, note_keyframes=True) as reader:
            for frame in reader:
                pts.append(frame.pts)
                if damage is None and (words := damage_in(reader.notes)):
                    damage = frame.index, words
        if damage is None and (words := damage_in(reader.notes)):
            damage = len(pts), words
        table = FrameTable(np.asarray(pts, np.int64), tuple(reader.keyframes), damage)
        if self._folder is not None:
            self._folder.save(name, _VERSION, {"damage": damage}, {"pts": table.pts, "keyframes": pack_keyframes(table.keyframes)})
        return table


def damage_in(notes: Iterable[str]) -> str:
    """The first of a reader's notes that speaks of damage, "" without one."""
    return next((note for note in notes if any(word in note for word in _DAMAGE)), "")


def pack_keyframes(keyframes: tuple[video.Keyframe, ...] | list[video.Keyframe]) -> np.ndarray:
    """int64 `[K, 3]`."""
    return np.asarray(keyframes, np.int64).reshape(-1, 3)


def unpack_keyframes(array: np.ndarray) -> tuple[video.Keyframe, ...]:
    """What `pack_keyframes` packed."""
    return tuple(video.Keyframe(*row) for row in array.tolist())
