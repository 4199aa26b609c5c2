"""Stage 3: hard cuts, found by PySceneDetect in our own stream of pictures.

Its adaptive detector with its own settings, but for the shortest scene: that is one frame here, because a cut which is left out for
coming soon after another would end up in the middle of a clip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import video
from keysync_jax.media.faces import Face
from keysync_jax.media.shots import picture_change, same_view

_INSTALL = "install it with: pip install 'keysync-jax[data]'"
_FRAME_RATE = 25.0  # PySceneDetect wants one to count frames with; nothing depends on it


def check_package() -> None:
    """Raises KeySyncError when PySceneDetect is not installed."""
    _adaptive_detector()


def _adaptive_detector():
    try:
        from scenedetect.detectors import AdaptiveDetector
    except ImportError as error:
        raise KeySyncError(f"shot boundaries need PySceneDetect ({error}); {_INSTALL}") from error
    return AdaptiveDetector(min_scene_len=1)


class _Seen(NamedTuple):
    frame: video.Frame
    picture: np.ndarray


class CutFinder:
    """Finds the cuts of a stream of frames. Holds a few frames.

    Args:
      faces_in: the faces of one frame; asked only about the two frames at a supposed cut.
    """

    def __init__(self, faces_in: Callable[[video.Frame], list[Face]]):
        self._faces_in = faces_in
        self._detector = _adaptive_detector()
        self._margin = self._detector.window_width  # frames that the detector looks ahead and back
        self._recent: deque[_Seen] = deque(maxlen=self._margin + 2)
        self._count = self._given = 0
        self._cuts: list[int] = []

    def update(self, frame: video.Frame) -> None:
        """Take the next frame."""
        seen = _Seen(frame, frame.thumbnail())
        if not self._count:
            self._stand_still(seen)
        self._recent.append(seen)
        self._count += 1
        self._detect(seen)

    def finish(self) -> list[int]:
        """Numbers, counted from the first frame given, of the frames that begin a new shot; ascending, without 0."""
        if self._count:
            self._stand_still(self._recent[-1])
        return self._cuts

    def _stand_still(self, seen: _Seen) -> None:
        """The detector is blind for its margin at both ends; a standing picture there lets it see cuts next to them."""
        for _ in range(self._margin):
            self._detect(seen)

    def _detect(self, seen: _Seen) -> None:
        from scenedetect.common import FrameTimecode

        bgr = np.ascontiguousarray(seen.picture[..., ::-1])
        found = self._detector.process_frame(FrameTimecode(self._given, _FRAME_RATE), bgr)
        self._given += 1
        for timecode in found:
            number = timecode.frame_num - self._margin
            before, after = (self._recent[number - self._count - back] for back in (1, 0))
            change = picture_change(before.picture, after.picture)
            if not same_view(change, self._faces_in(before.frame), self._faces_in(after.frame)):
                self._cuts.append(number)
