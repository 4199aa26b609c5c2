"""Window plan of a clip: pure integers, no arrays.

Keyframes stand at every (T - 1)-th frame. They are generated in keyframe windows of T slots, of which slot 0 repeats the identity
frame (frame 0; the network was trained to reproduce the identity there) and is discarded; an image network makes them one by one.
Between every two keyframes a segment of T frames, both keyframes included, is interpolated; neighbouring segments share their
keyframe.

The last segment may reach past the clip: its frames then take the conditions of the last frame and are cropped, so that every
clip of one frame or more comes out at its own length. `reference=True` reproduces the plan of the KeySync reference at commit
cfff7cf instead, which drops the frames after the last full segment and leaves late windows of long clips without identity slot.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from keysync_jax.config import StageConfig
from keysync_jax.core.errors import KeySyncError

# Frames of a window of the released models.
_RELEASED_FRAMES = 14


class Slot(NamedTuple):
    """One of the places of a keyframe window."""

    frame: int  # frame whose audio, mask and known latent condition this place
    keyframe: int | None  # number of the keyframe generated here (it stands at keyframe * (T - 1)); None: discarded

    @property
    def keep(self) -> bool:
        return self.keyframe is not None


class KeyframeWindow(NamedTuple):
    """Keyframes generated together. A window that keeps nothing (reference plan only) need not be computed."""

    slots: tuple[Slot, ...]

    @property
    def frames(self) -> tuple[int, ...]:
        return tuple(slot.frame for slot in self.slots)

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """(position in the window, number of the keyframe) of the slots that are kept."""
        return tuple((position, slot.keyframe) for position, slot in enumerate(self.slots) if slot.keyframe is not None)


class Segment(NamedTuple):
    """T consecutive frames between two keyframes."""

    start: int  # first frame, where the start keyframe stands
    frames: tuple[int, ...]  # frames whose conditions the T places take (the last frame of the clip, repeated, past its end)
    start_slot: tuple[int, int]  # (keyframe window, position) of the start keyframe
    end_slot: tuple[int, int]
    num_outputs: int  # the first so many of the T frames are output, as frames start, start + 1, …

    @property
    def outputs(self) -> range:
        return range(self.start, self.start + self.num_outputs)


class WindowPlan(NamedTuple):
    """How a clip of `num_frames_out` output frames is generated. Segment k lies between keyframes k and k + 1."""

    num_frames_out: int
    keyframe_windows: tuple[KeyframeWindow, ...]
    segments: tuple[Segment, ...]

    @property
    def num_keyframes(self) -> int:
        return len(self.segments) + 1


class WindowSizes(NamedTuple):
    """Frames that each network generates at once. They are equal but for an image network, which makes every keyframe on its own."""

    keyframes: int
    segment: int

    @classmethod
    def of(cls, keyframe: StageConfig, interpolation: StageConfig | None = None) -> WindowSizes:
        """Those of a model. Without interpolation, keyframes stand as far apart as the stage's own window or the reference's says."""
        own = keyframe.num_frames if keyframe.num_frames > 1 else _RELEASED_FRAMES
        return cls(keyframe.num_frames, own if interpolation is None else interpolation.num_frames)


def make_plan(
    num_frames_in: int,
    window: int = _RELEASED_FRAMES,
    *,
    keyframe_window: int | None = None,
    reference: bool = False,
    identity_slot: bool | None = None,
) -> WindowPlan:
    """Plan of a clip.

    Args:
      num_frames_in: frames for which there are both video and audio, N.
      window: T, frames of a segment; keyframes stand at every (T - 1)-th frame.
      keyframe_window: keyframes generated at once; None is T. 1 is a network without temporal layers (the paper's ablation).
      reference: reproduce the reference's plan, dropped tail and irregular windows included.
      identity_slot: begin every keyframe window with the discarded identity slot (as the released models need); None does so unless
        a window holds one keyframe, whose network has seen no such place.

    Raises:
      KeySyncError: no frame, fewer than T frames for the reference plan, or a window too short for what it must hold.
    """
    keyframe_window = window if keyframe_window is None else keyframe_window
    identity_slot = keyframe_window > 1 if identity_slot is None else identity_slot
    if window < 2:
        raise KeySyncError(f"a window of {window} frames cannot hold two keyframes; use 2 or more")
    if keyframe_window < 1 + identity_slot:
        raise KeySyncError(f"a keyframe window of {keyframe_window} has no place for a keyframe")
    if num_frames_in < 1:
        raise KeySyncError("the clip has no frames; nothing can be generated")
    if reference and num_frames_in < window:
        raise KeySyncError(f"the clip has {num_frames_in} frames, the reference plan needs at least {window}; leave it off for short clips")
    step = window - 1
    if reference:
        num_segments = (num_frames_in - 1) // step
        num_frames_out = num_segments * step + 1
    else:
        num_segments = max(1, math.ceil((num_frames_in - 1) / step))
        num_frames_out = num_frames_in
    last = num_frames_in - 1
    # Frame that lends its conditions to each place of the timeline; past the clip it is the last one.
    timeline = tuple(min(i, last) for i in range(num_segments * step + 1))
    keyframes = [Slot(timeline[k * step], k) for k in range(num_segments + 1)]
    slots = _place(keyframes, keyframe_window, reference, identity_slot)
    windows = tuple(KeyframeWindow(tuple(slots[i : i + keyframe_window])) for i in range(0, len(slots), keyframe_window))
    where = {k: (w, position) for w, window_ in enumerate(windows) for position, k in window_.kept}
    segments = tuple(
        Segment(
            start=k * step,
            frames=timeline[k * step : k * step + window],
            start_slot=where[k],
            end_slot=where[k + 1],
            # The end keyframe is the next segment's first frame; only the last segment outputs its own.
            num_outputs=step if k < num_segments - 1 else num_frames_out - k * step,
        )
        for k in range(num_segments)
    )
    return WindowPlan(num_frames_out, windows, segments)


def _place(keyframes: list[Slot], window: int, reference: bool, identity_slot: bool) -> list[Slot]:
    """Keyframes in a row of slots whose length is a multiple of `window`, identity slots and padding included."""
    identity = Slot(0, None)
    slots = list(keyframes)
    if identity_slot:
        per_window = window - 1
        if reference:
            # The reference underestimates how far insertion moves the keyframes, so that a long row has too few identity slots.
            room = len(keyframes) + (len(keyframes) + 1) % window
            num_windows = math.ceil(room / window)
        else:
            num_windows = math.ceil(len(keyframes) / per_window)
        for w in range(num_windows):
            slots.insert(w * window, identity)
    padding = -len(slots) % window
    return slots + [slots[-1]._replace(keyframe=None)] * padding
