"""One face per shot: tracks, the choice among them, short gaps filled, jitter taken out.

A shot is a run of frames without a cut. `FaceTable` takes the faces of its frames as they are decoded and gives one `ShotFaces` at the
end. Faces are followed by place and size; the tracks that come out are put together to persons by what they look like, so that somebody
who leaves and comes back elsewhere is taken up again. A second person never replaces the chosen one: where the chosen face is missing,
nothing is usable but gaps of a few frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.signal import savgol_filter

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.media import appearance
from keysync_jax.media.faces import Face, box_iou
from keysync_jax.media.landmarks import NUM_LANDMARKS, check_landmarks

MAX_GAP = 5  # frames without the face, between two with it, that are filled for conditioning
# A face is the one of an earlier frame if its centre moved by less than this many face sizes, and so much more per missed frame.
REACH = 0.5
REACH_PER_FRAME = 0.05
MAX_REACH = 1.5
# Between two pictures of a slow camera a face goes further: so many sizes per second beyond the time that REACH is meant for.
REACH_PER_SECOND = 4.0
REACH_TIME_S = 0.04
MAX_SLOW_REACH = 2.5
MAX_SIZE_RATIO = 1.8  # and if its size changed by less than this factor
# "left", "right", "center" and points choose among faces seen at least this fraction as often as the most frequent one.
PERSISTENCE = 0.2
# Tracks of one person, which are never seen in one frame, may differ in size by this factor: somebody who comes back stands elsewhere.
MAX_RETURN_RATIO = 2.5
# A portrait on a wall, a poster: seen in so many frames, its landmarks, less place and size, move by less than this part of its size.
STILL = 0.004
STILL_FRAMES = 15
# Savitzky-Golay filter: a parabola through 7 frames (three on either side). It is symmetric, so nothing lags, and a face that moves
# steadily or accelerates steadily is not displaced at all.
SMOOTHING_WINDOW = 7
SMOOTHING_S = 0.28  # and no longer than this: with few pictures a second, a head turns back within seven
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


class OtherFace(NamedTuple):
    """A face of a shot that is not dubbed."""

    center: tuple[float, float]  # (x, y) of its middle on average, pixels
    frames: int  # in which it was found
    still: bool  # a picture of a face


@dataclasses.dataclass(frozen=True)
class ShotFaces:
    """The chosen face of a shot of N frames.

    Attributes:
      landmarks: float32 `[N, 68, 2]` in frame pixels, smoothed and with short gaps filled; NaN where not `usable`.
      detected: bool `[N]`, the face was found in the frame itself. Only these frames may be composited.
      usable: bool `[N]`, landmarks exist (found or filled). These frames may condition the model.
      runs: (start, stop) of each stretch of usable frames.
      tracks: how many different faces the shot has.
      center: (x, y) of the chosen face's middle on average, pixels; None where there is none.
      others: the faces that were not chosen, those seen longest first.
      seen: bool `[N]`, any face was found in the frame.
    """

    landmarks: np.ndarray
    detected: np.ndarray
    usable: np.ndarray
    runs: list[tuple[int, int]]
    tracks: int
    center: tuple[float, float] | None = None
    others: tuple[OtherFace, ...] = ()
    seen: np.ndarray | None = None


@dataclasses.dataclass
class _Track:
    """One face through a shot: frame numbers and the face in each."""

    frames: list[int]
    faces: list[Face]

    def gate(self, frame: int, face: Face, seconds: float) -> float:
        """Cost of continuing with `face` after so many seconds: distance in face sizes, or infinity when it cannot be the same face."""
        last, missed = self.faces[-1], frame - self.frames[-1] - 1
        sizes = _size(last), _size(face)
        if max(sizes) > MAX_SIZE_RATIO * min(sizes):
            return np.inf
        moved = float(np.hypot(face.center[0] - last.center[0], face.center[1] - last.center[1])) / float(np.mean(sizes))
        reach = min(MAX_REACH, REACH + REACH_PER_FRAME * missed)
        if missed == 0:
            reach = min(MAX_SLOW_REACH, reach + REACH_PER_SECOND * max(0.0, seconds - REACH_TIME_S))
        if moved > reach:
            return np.inf
        return moved - box_iou(last.box, face.box)


class _Person:
    """The tracks of one face, none of which share a frame."""

    def __init__(self, track: _Track):
        self.tracks = [track]
        self.frames, self.faces = track.frames, track.faces

    def likeness(self, track: _Track) -> float:
        """Of the nearest of its tracks in time to another one; -1 where it cannot be the same person."""
        if not set(self.frames).isdisjoint(track.frames):
            return -1.0
        sizes = [float(np.median([_size(face) for face in faces])) for faces in (self.faces, track.faces)]
        if max(sizes) > MAX_RETURN_RATIO * min(sizes):
            return -1.0
        return max((_alike(own, track) for own in self.tracks), default=-1.0)

    def add(self, track: _Track) -> None:
        self.tracks.append(track)
        order = sorted(zip(self.frames + track.frames, self.faces + track.faces, strict=True), key=lambda pair: pair[0])
        self.frames, self.faces = [frame for frame, _ in order], [face for _, face in order]

    @property
    def area(self) -> float:
        """Summed over frames."""
        return sum(face.area for face in self.faces)

    @property
    def center(self) -> tuple[float, float]:
        """Average of the face's middles."""
        x, y = np.mean([face.center for face in self.faces], axis=0).tolist()
        return x, y

    @property
    def still(self) -> bool:
        """Whether this is a picture of a face: nothing in it ever moves."""
        if len(self.faces) < STILL_FRAMES:
            return False
        shapes = np.stack([face.landmarks for face in self.faces]).astype(np.float64)
        shapes = (shapes - shapes.mean(axis=1, keepdims=True)) / np.array([_size(face) for face in self.faces])[:, None, None]
        return bool(shapes.std(axis=0).mean() < STILL)


class FaceTable:
    """Collects the faces of a shot frame by frame.

    Args:
      frame_size: (width, height) of the frames, for the choice "center".
    """

    def __init__(self, frame_size: tuple[int, int]):
        self._size = frame_size
        self._tracks: list[_Track] = []
        self._times: list[float] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, faces: Sequence[Face], time: float | None = None) -> None:
        """Append the next frame's faces (in any order, [] where none was found).

        Args:
          faces: of the frame.
          time: when it is shown, seconds; without it, frames are 40 ms apart.
        """
        frame, self._count = self._count, self._count + 1
        self._times.append(frame / 25 if time is None else time)
        seconds = self._times[-1] - self._times[-2] if frame else 0.0
        left = list(range(len(faces)))
        if self._tracks and left:
            cost = np.array([[track.gate(frame, face, seconds) for face in faces] for track in self._tracks])
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
        people = _people(self._tracks)
        person = _choose(people, selection, self._size)
        if person is not None:
            landmarks[person.frames] = np.stack([face.landmarks for face in person.faces])
            detected[person.frames] = True
        landmarks, runs = fill_gaps(landmarks, detected, max_gap)
        if smooth:
            for start, stop in runs:
                landmarks[start:stop] = smooth_run(landmarks[start:stop], self._window(start, stop))
        usable = np.zeros(self._count, bool)
        for start, stop in runs:
            usable[start:stop] = True
        others = [OtherFace(other.center, len(other.frames), other.still) for other in people if other is not person]
        others.sort(key=lambda other: -other.frames)
        seen = np.zeros(self._count, bool)
        for track in self._tracks:
            seen[track.frames] = True
        center = None if person is None else person.center
        return ShotFaces(landmarks, detected, usable, runs, len(people), center, tuple(others), seen)

    def _window(self, start: int, stop: int) -> int:
        """Frames over which a run is smoothed."""
        if stop - start < 2:
            return 1
        step = float(np.median(np.diff(self._times[start:stop])))
        fitting = 2 * round((SMOOTHING_S / max(step, 1e-3) - 1) / 2) + 1
        return max(1, min(SMOOTHING_WINDOW, fitting))


def _people(tracks: Sequence[_Track]) -> list[_Person]:
    """Tracks in the order in which they begin, those that show one person put together."""
    people: list[_Person] = []
    for track in sorted(tracks, key=lambda track: track.frames[0]):
        fits = [(person.likeness(track), person) for person in people]
        best, person = max(fits, key=lambda fit: fit[0], default=(-1.0, None))
        if person is not None and best >= appearance.ALIKE:
            person.add(track)
        else:
            people.append(_Person(track))
    return people


def _alike(a: _Track, b: _Track) -> float:
    """Likeness of two tracks: on the whole, or where they are nearest in time; -1 where nobody took down what they look like."""
    looks = [[face.look for face in track.faces if face.look is not None] for track in (a, b)]
    if not all(looks):
        return -1.0
    first, second = looks if a.frames[0] <= b.frames[0] else looks[::-1]
    return max(appearance.likeness(np.mean(first, axis=0), np.mean(second, axis=0)), appearance.likeness(first[-1], second[0]))


def _size(face: Face) -> float:
    return max(1.0, float(np.sqrt(max(0.0, face.area))))


def _choose(people: list[_Person], selection: Selection, frame_size: tuple[int, int]) -> _Person | None:
    if not people:
        return None
    longest = max(len(person.frames) for person in people)
    steady = [person for person in people if len(person.frames) >= PERSISTENCE * longest]
    if selection.kind == "largest":
        # Summed over frames: the face that is both large and there for long.
        largest = max(people, key=lambda person: person.area)
        if not largest.still:
            return largest
        # A portrait is not the talker, unless nobody else is there for some time.
        alive = [person for person in steady if len(person.frames) >= STILL_FRAMES and not person.still]
        return max(alive, key=lambda person: person.area, default=largest)
    if selection.kind in ("left", "right"):
        sign = 1 if selection.kind == "left" else -1
        return min(steady, key=lambda person: sign * float(np.mean([face.center[0] for face in person.faces])))
    point = selection.point or (frame_size[0] / 2, frame_size[1] / 2)  # "center" has no point of its own
    return min(steady, key=lambda person: float(np.mean([_distance(face, point) for face in person.faces])))


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
