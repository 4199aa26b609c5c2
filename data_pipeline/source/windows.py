"""Which frames of a clip form a training window, for both stages."""

from __future__ import annotations

import dataclasses

import numpy as np

from keysync_jax.core.errors import KeySyncError

IDENTITY_FRAMES = ("first", "clip_first", "random")


@dataclasses.dataclass(frozen=True)
class Windows:
    """Frames s, s + k, ..., s + (T - 1) k of one clip.

    As in the reference, the very last frame of a clip is never used, so that a window needs (T - 1) k + 2 frames.

    Attributes:
      num_frames: T; 1 trains a keyframe stage on images.
      spacing: k, in frames.
      min_spacing: clips too short for `spacing` are used at the largest spacing that fits, down to this one.
      identity: what conditions the keyframe stage: "first" (frame 0 of the window, as released), "clip_first" (frame 0 of the clip) or
        "random" (any frame of the clip). Unused by the interpolation stage, whose condition are the endpoints.
    """

    num_frames: int = 14
    spacing: int = 1
    min_spacing: int = 1
    identity: str = "first"

    def __post_init__(self):
        least = 1 if self.stage == "keyframe" else 2
        if self.num_frames < least or not 1 <= self.min_spacing <= self.spacing:
            raise KeySyncError(f"{self.stage} windows need at least {least} frames and 1 <= min_spacing <= spacing, not {self}")
        if self.identity not in IDENTITY_FRAMES:
            raise KeySyncError(f"identity frame {self.identity!r} is not known; choose one of {', '.join(IDENTITY_FRAMES)}")

    @property
    def stage(self) -> str:
        raise TypeError("use KeyframeWindows or InterpolationWindows")

    @property
    def min_length(self) -> int:
        """Frames that a clip must have to be used."""
        return (self.num_frames - 1) * self.min_spacing + 2

    def fit(self, length: int) -> tuple[int, int]:
        """(spacing, number of possible starts) in a clip of `length` frames; (0, 0) when it is too short."""
        if length < self.min_length:
            return 0, 0
        spacing = min(self.spacing, max(1, (length - 2) // max(1, self.num_frames - 1)))
        return spacing, length - 1 - spacing * (self.num_frames - 1)

    def frames(self, start: int, spacing: int) -> np.ndarray:
        """Frame numbers within the clip, int32 `[T]`."""
        return start + spacing * np.arange(self.num_frames, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class KeyframeWindows(Windows):
    """Keyframe stage: 14 frames 13 apart, which needs clips of 171 frames (6.84 s)."""

    spacing: int = 13
    min_spacing: int = 13

    @property
    def stage(self) -> str:
        return "keyframe"


@dataclasses.dataclass(frozen=True)
class InterpolationWindows(Windows):
    """Interpolation stage: 14 consecutive frames."""

    @property
    def stage(self) -> str:
        return "interpolation"


def windows_for(stage: str, **options) -> Windows:
    """The windows of stage "keyframe" or "interpolation"."""
    kinds = {"keyframe": KeyframeWindows, "interpolation": InterpolationWindows}
    if stage not in kinds:
        raise KeySyncError(f"stage {stage!r} is not known; choose one of {', '.join(kinds)}")
    return kinds[stage](**options)
