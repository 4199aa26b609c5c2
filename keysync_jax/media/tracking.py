"""One face per shot: tracks, the choice among them, short gaps filled, jitter taken out.

A shot is a run of frames without a cut. `FaceTable` takes the faces of its frames as they are decoded and gives one `ShotFaces` at the
end. A second person never replaces the chosen one: where the chosen face is missing, nothing is usable but gaps of a few frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.signal import savgol_filter

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.media.faces import Face, box_iou
from keysync_jax.media.landmarks import NUM_LANDMARKS, check_landmarks

MAX_GAP = 5  # frames without the face, between two with it, that are filled for conditioning
# A face is the one of an earlier frame if its centre moved by less than this many face sizes, and so much more per missed frame.
REACH = 0.5
REACH_PER_FRAME = 0.05
MAX_REACH = 1.5
MAX_SIZE_RATIO = 1.8  # and if its size changed by less than this factor
# "left", "right", "center" and points choose among faces seen at least this fraction as often as the most frequent one.
PERSISTENCE = 0.2
# Savitzky-Golay filter: a parabola through 7 frames (three on either side). It is symmetric, so nothing lags, and a face that moves
# steadily or accelerates steadily is not displaced at all.
SMOOTHING_WINDOW = 7
SMOOTHING_ORDER = 2

NAMED_SELECTIONS = ("largest", "center", "left", "right")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which face of a shot is dubbed: one of `NAMED_SELECTIONS`, or the one nearest to `point` (x, y) in frame pixels."""

    kind: str = "largest"
    point: tuple[float, float] | None = None

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read "largest", "center", "left", "right" or "x,y" (`UsageError` for anything else)."""
        if text in NAMED_SELECTIONS:
            return cls(text)
        try:
            x, y = (float(part) for part in text.split(","))
        except ValueError:
            raise UsageError(f"face choice {text!r} is not one of {', '.join(NAMED_SELECTIONS)} or a point such as 640,360") from None
        if not (np.isfinite(x) and np.isfinite(y)):
            raise UsageError(f"face choice {text!r} is not a point in the picture")
        return cls("point", (x, y))


@dataclasses.dataclass(frozen=True)
class ShotFaces:
    """The chosen face of a shot of N frames.

    Attributes:
      landmarks: float32 `[N, 68, 2]` in frame pixels, smoothed and with short gaps filled; NaN where not `usable`.
      detected: bool `[N]`, the face was found in the frame itself. Only these frames may be composited.
      usable: bool `[N]`, landmarks exist (found or filled). These frames may condition the model.
      runs: (start, stop) of each stretch of usable frames.
      tracks: how many different faces the shot has.
    """

    landmarks: np.ndarray
    detected: np.ndarray
    usable: np.ndarray
    runs: list[tuple[int, int]]
    tracks: int


@dataclasses.dataclass
class _Track:
    """One face through a shot: frame numbers and the face in each."""

    frames: list[int]
    faces: list[Face]

    def gate(self, frame: int, face: Face) -> float:
        """Cost of continuing with `face`: distance in face sizes, or infinity when it cannot be the same face."""
        last, missed = self.faces[-1], frame - self.frames[-1] - 1
        sizes = _size(last), _size(face)
        if max(sizes) > MAX_SIZE_RATIO * min(sizes):
            return np.inf
        moved = float(np.hypot(face.center[0] - last.center[0], face.center[1] - last.center[1])) / float(np.mean(sizes))
        if moved > min(MAX_REACH, REACH + REACH_PER_FRAME * missed):
            return np.inf
        return moved - box_iou(last.box, face.box)


class FaceTable:
    """Collects the faces of a shot frame by frame.

    Args:
      frame_size: (width, height) of the frames, for the choice "center".
    """

    def __init__(self, frame_size: tuple[int, int]):
        self._size = frame_size
        self._tracks: list[_Track] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, faces: Sequence[Face]) -> None:
        """Append the next frame's faces (in any order, [] where none was found)."""
        frame, self._count = self._count, self._count + 1
        left = list(range(len(faces)))
        if self._tracks and left:
            cost = np.array([[track.gate(frame, face) for face in faces] for track in self._tracks])
            # Infinite costs would make the assignment infeasible; a large one is never preferred to a real match.
            rows, cols = linear_sum_assignment(np.where(np.isinf(cost), 1e6, cost))
            for row, col in zip(rows, cols, strict=True):
                if np.isfinite(cost[row, col]):
                    self._tracks[row].frames.append(frame)
                    self._tracks[row].faces.append(faces[col])
                    left.remove(col)
        self._tracks += [_Track([frame], [faces[i]]) for i in left]

    def finish(self, selection: Selection | str = "largest", max_gap: int = MAX_GAP, smooth: bool = True) -> ShotFaces:
        """The chosen face of the frames added so far.

        Args:
          selection: a `Selection` or its text.
          max_gap: longest gap, in frames, that is filled by interpolation. Frames before the first and after the last detection are
            never filled, and a longer gap splits the shot into runs.
          smooth: take out jitter within each run.
        """
        selection = Selection.parse(selection) if isinstance(selection, str) else selection
        landmarks = np.full((self._count, NUM_LANDMARKS, 2), np.nan, np.float32)
        detected = np.zeros(self._count, bool)
        track = _choose(self._tracks, selection, self._size)
        if track is not None:
            landmarks[track.frames] = np.stack([face.landmarks for face in track.faces])
            detected[track.frames] = True
        landmarks, runs = fill_gaps(landmarks, detected, max_gap)
        if smooth:
            for start, stop in runs:
                landmarks[start:stop] = smooth_run(landmarks[start:stop])
        usable = np.zeros(self._count, bool)
        for start, stop in runs:
            usable[start:stop] = True
        return ShotFaces(landmarks, detected, usable, runs, len(self._tracks))


def _size(face: Face) -> float:
    return max(1.0, float(np.sqrt(max(0.0, face.area))))


def _choose(tracks: list[_Track], selection: Selection, frame_size: tuple[int, int]) -> _Track | None:
    if not tracks:
        return None
    if selection.kind == "largest":
        # Summed over frames: the face that is both large and there for long.
        return max(tracks, key=lambda track: sum(face.area for face in track.faces))
    longest = max(len(track.frames) for track in tracks)
    steady = [track for track in tracks if len(track.frames) >= PERSISTENCE * longest]
    if selection.kind in ("left", "right"):
        sign = 1 if selection.kind == "left" else -1
        return min(steady, key=lambda track: sign * float(np.mean([face.center[0] for face in track.faces])))
    point = selection.point or (frame_size[0] / 2, frame_size[1] / 2)  # "center" has none
    return min(steady, key=lambda track: float(np.mean([_distance(face, point) for face in track.faces])))


def _distance(face: Face, point: tuple[float, float]) -> float:
    """From a point to the middle of a face."""
    return float(np.hypot(face.center[0] - point[0], face.center[1] - point[1]))


def fill_gaps(landmarks: np.ndarray, detected: np.ndarray, max_gap: int = MAX_GAP) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Interpolate short gaps and list the stretches that are then complete.

    Args:
      landmarks: `[N, 68, 2]`; only frames with `detected` are read.
      detected: bool `[N]`.
      max_gap: longest gap that is filled.

    Returns:
      float32 `[N, 68, 2]` with NaN where nothing is known, and the (start, stop) runs.
    """
    filled = np.full(landmarks.shape, np.nan, np.float32)
    frames = np.flatnonzero(detected)
    filled[frames] = landmarks[frames]
    runs: list[tuple[int, int]] = []
    for frame in frames.tolist():
        if runs and frame - runs[-1][1] <= max_gap:
            first, last = runs[-1][1] - 1, frame
            for missing in range(first + 1, last):
                t = (missing - first) / (last - first)
                filled[missing] = (1 - t) * filled[first] + t * filled[last]
            runs[-1] = (runs[-1][0], frame + 1)
        else:
            runs.append((frame, frame + 1))
    return filled, runs


def smooth_run(landmarks: np.ndarray, window: int = SMOOTHING_WINDOW, order: int = SMOOTHING_ORDER) -> np.ndarray:
    """Landmarks of consecutive frames with their jitter taken out, without lag.

    A Savitzky-Golay filter over time, each coordinate alone. Runs shorter than the window use the longest odd window that fits, and
    those of one to four frames stay as they are (a parabola goes through three points).

    Args:
      landmarks: `[N, 68, 2]`, finite.

    Returns:
      float32 `[N, 68, 2]`.

    Raises:
      KeySyncError: not landmarks, or not finite.
    """
    landmarks = check_landmarks(np.asarray(landmarks))
    if not np.isfinite(landmarks).all():
        raise KeySyncError("landmarks to smooth must be finite; smooth each run of usable frames by itself")
    length = min(window, len(landmarks) - (1 - len(landmarks) % 2))
    if length <= order + 1:
        return landmarks.astype(np.float32)
    return np.asarray(savgol_filter(landmarks.astype(np.float64), length, order, axis=0, mode="interp"), np.float32)


def jitter(landmarks: np.ndarray) -> float:
    """Frame-to-frame noise of a run `[N, ...]` in pixels: standard deviation of white noise with the same third differences.

    Third differences cancel position, velocity and acceleration, so what is left is what no face does. 0 for fewer than 4 frames.
    """
    if len(landmarks) < 4:
        return 0.0
    third = np.diff(np.asarray(landmarks, np.float64), n=3, axis=0)
    return float(np.sqrt((third**2).mean() / 20))  # the weights 1, 3, 3, 1 have the squared sum 20
