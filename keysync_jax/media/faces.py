"""Faces in a frame: what a landmark backend returns, and the door to the backends.

A backend finds every face of an RGB frame and gives each 68 landmarks in iBUG order. "mediapipe" is the default (its networks,
run by LiteRT); "fan" is the FAN network of the face-alignment package, which made the landmarks that the
released KeySync weights were trained on. `docs/faces.md` compares the two.
"""

from __future__ import annotations

import abc
import importlib
from typing import NamedTuple

import numpy as np

from keysync_jax.core.errors import KeySyncError, UsageError

BACKENDS = {
    "mediapipe": ("keysync_jax.media.mediapipe_backend", "MediaPipeBackend"),
    "fan": ("keysync_jax.media.fan_backend", "FanBackend"),
}


class Face(NamedTuple):
    """One face of one frame.

    Attributes:
      landmarks: float32 `[68, 2]`, (x, y) in pixels of the frame, iBUG order; points may lie outside the frame.
      box: (x0, y0, x1, y1) around the landmarks, pixels.
      score: how sure the backend is that this is a face, 0 to 1.
      look: what it looks like (`appearance.appearance_of`), where somebody has taken it down.
    """

    landmarks: np.ndarray
    box: tuple[float, float, float, float]
    score: float
    look: np.ndarray | None = None

    @classmethod
    def from_landmarks(cls, landmarks: np.ndarray, score: float) -> Face:
        """Face whose box is the bounding box of its landmarks `[68, 2]`."""
        landmarks = np.asarray(landmarks, np.float32)
        low, high = landmarks.min(axis=0), landmarks.max(axis=0)
        return cls(landmarks, (float(low[0]), float(low[1]), float(high[0]), float(high[1])), float(score))

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class FaceBackend(abc.ABC):
    """A landmark detector held open over a video. Use it as a context manager, or call `close`.

    The same frames given in the same order after `reset` (or after opening) give the same landmarks.
    """

    name: str

    @abc.abstractmethod
    def detect(self, rgb: np.ndarray) -> list[Face]:
        """Every face of one frame, largest box first, [] where there is none.

        Args:
          rgb: uint8 `[H, W, 3]`.

        Raises:
          KeySyncError: the array is not an RGB frame, or the detector failed.
        """

    def reset(self) -> None:  # noqa: B027 - stateless backends have nothing to forget
        """Forget what was tracked, so that the next frame is searched afresh. Call it at every cut."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the models. Closing twice is allowed; using a closed backend raises `KeySyncError`."""

    def __enter__(self) -> FaceBackend:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def open_backend(name: str = "mediapipe", **options) -> FaceBackend:
    """Open the landmark backend called `name`.

    Args:
      name: "mediapipe" or "fan".
      **options: arguments of the backend's constructor (see `MediaPipeBackend`, `FanBackend`).

    Raises:
      UsageError: no backend of that name, or an option it does not have.
      KeySyncError: its package or its weights are missing.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown face backend {name!r}; choose one of {', '.join(BACKENDS)}")
    module, attribute = BACKENDS[name]
    backend = getattr(importlib.import_module(module), attribute)
    unknown = sorted(set(options) - set(backend.OPTIONS))
    if unknown:
        raise UsageError(f"face backend {name!r} has no option {', '.join(unknown)}; it has {', '.join(backend.OPTIONS)}")
    return backend(**options)


def check_frame(rgb: np.ndarray) -> np.ndarray:
    """The frame itself, C-contiguous, if it is uint8 `[H, W, 3]`.

    Raises:
      KeySyncError: another type or shape.
    """
    if not isinstance(rgb, np.ndarray) or rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        found = f"{rgb.dtype} {rgb.shape}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
        raise KeySyncError(f"face detection needs a uint8 RGB frame of shape (H, W, 3), not {found}")
    return np.ascontiguousarray(rgb)


def box_iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two (x0, y0, x1, y1) boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)
