"""Where the model's square lies in every frame of a shot: one fixed square where that does, else one that follows the head.

A fixed, upright square is what the model was trained on, and it adds no motion of its own, so a shot keeps one as long as the face is
of the right size in it in every frame and stands upright. Otherwise each run of frames is placed for itself: fixed, but turned, where
the head lies to one side throughout; else a square that follows place, size and tilt. It moves as slowly as the face allows: the path
of the face is smoothed over seconds where that keeps the face well inside, and over less only around the frames where it does not. It
lies between pixels, so nothing jumps from frame to frame, and there is no frame at which one square is exchanged for another.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d, median_filter, minimum_filter1d, uniform_filter1d

from keysync_jax.media.crop import MARGIN, MIN_BORDER, RAISE, Crop, View, fixed_crop
from keysync_jax.media.landmarks import check_landmarks

UPRIGHT = math.radians(30)  # a head tilted by less stands upright; the model has seen such
# A square fits a face that takes this part of its side: the larger of width and height at least, and width and height at most. Mouths
# that open wide make faces higher.
LEAST_SHARE = 0.45
MOST_WIDTH = 0.65
MOST_HEIGHT = 0.75
# Smoothing of a following square's path: standard deviations in seconds, from none to as much as a still head allows.
SMOOTHING_S = (0.0, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_MEDIAN_S = 0.4  # sizes are taken from the median over this, so that an opened mouth moves nothing
_TILT_ROOM = math.radians(20)  # how far a head may tilt in a following square


class Placement(NamedTuple):
    """The square of the frames start <= frame < stop, counted from the shot's first."""

    start: int
    stop: int
    view: Crop | View


class Placements(NamedTuple):
    """The squares of a shot's frames with a face, in order; without overlap."""

    parts: tuple[Placement, ...]

    def at(self, frame: int) -> Crop | View:
        """The square of a frame, or of the nearest one that has one."""
        index = bisect.bisect_right(self.parts, frame, key=lambda part: part.start) - 1
        return self.parts[max(0, index)].view


def place(
    landmarks: np.ndarray,
    runs: Sequence[tuple[int, int]],
    frame_size: tuple[int, int],
    *,
    aspect: float = 1.0,
    rate: float = 25.0,
) -> Placements:
    """Squares for the frames of a shot.

    Args:
      landmarks: `[N, 68, 2]` in frame pixels, NaN outside the runs.
      runs: (start, stop) of the stretches with a face.
      frame_size: (width, height) of the frame in pixels.
      aspect: width over height of a pixel as it is shown.
      rate: frames per second.

    Returns:
      None of them where there are no runs. Upright crops of square pixels are `Crop`s.
    """
    if not runs:
        return Placements(())
    shown = check_landmarks(np.asarray(landmarks, np.float64)) * [aspect, 1.0]
    known = np.concatenate([shown[start:stop] for start, stop in runs])
    shown_size = (round(frame_size[0] * aspect), frame_size[1])
    if (np.abs(tilt(known)) <= UPRIGHT).all():
        crop = fixed_crop(known, shown_size)
        if _fits(known, crop.side):
            view = crop if aspect == 1.0 else _unturned(crop, 0.0, (0.0, 0.0), aspect)
            return Placements((Placement(runs[0][0], runs[-1][1], view),))
    parts: list[Placement] = []
    for start, stop in runs:
        parts += (
            part._replace(start=part.start + start, stop=part.stop + start) for part in _run(shown[start:stop], shown_size, aspect, rate)
        )
    return Placements(tuple(parts))


def tilt(landmarks: np.ndarray) -> np.ndarray:
    """Clockwise turn of heads in radians, `[...]` in (-pi, pi] for `[..., 68, 2]`.

    From the line through the eyes' outer corners and that from the bridge of the nose to the chin, each as far as it is seen: on a
    turned head the eyes lie close together and say little.
    """
    points = np.asarray(landmarks, np.float64)
    x, y = points[..., 0], points[..., 1]
    across = (x[..., 45] - x[..., 36]) + 1j * (y[..., 45] - y[..., 36])
    down = (x[..., 8] - x[..., 27]) + 1j * (y[..., 8] - y[..., 27])
    return np.angle(across - 1j * down)


def _run(shown: np.ndarray, size: tuple[int, int], aspect: float, rate: float) -> list[Placement]:
    """Squares of the `[N, 68, 2]` landmarks of one run, shown pixels; frames counted from its first."""
    tilts = tilt(shown)
    mean = float(np.angle(np.exp(1j * tilts).mean()))
    # Quarter turns first: they blur nothing, and an upright crop stays as it is.
    for angle in (0.0, *sorted((math.pi / 2, math.pi, -math.pi / 2), key=lambda a: abs(_between(mean, a))), mean):
        if (np.abs(_between(tilts, angle)) <= UPRIGHT).all():
            crop, origin = _turned_crop(shown, angle, size)
            if _fits(_turned(shown, angle), crop.side):
                view = crop if angle == 0.0 and aspect == 1.0 else _unturned(crop, angle, origin, aspect)
                return [Placement(0, len(shown), view)]
            break
    return [Placement(frame, frame + 1, view) for frame, view in enumerate(_following(shown, tilts, size, aspect, rate))]


def _turned(points: np.ndarray, angle: float | np.ndarray) -> np.ndarray:
    """Points `[..., 2]` in axes that are turned clockwise by `angle` (one, or one for each `[N]` of the first axis)."""
    cos, sin = np.cos(angle), np.sin(angle)
    if np.ndim(angle):
        cos, sin = (value.reshape(-1, *[1] * (points.ndim - 2)) for value in (cos, sin))
    x, y = points[..., 0], points[..., 1]
    return np.stack([cos * x + sin * y, cos * y - sin * x], axis=-1)


def _turned_crop(shown: np.ndarray, angle: float, size: tuple[int, int]) -> tuple[Crop, tuple[float, float]]:
    """`fixed_crop` in axes turned by `angle`, and where these axes' origin lies in their own coordinates."""
    turned = _turned(shown, angle)
    if angle % (math.pi / 2):
        return fixed_crop(turned, None), (0.0, 0.0)  # the frame's edges are slanted there
    corners = _turned(np.array([[0, 0], [size[0], 0], [0, size[1]], size], np.float64), angle).round()
    origin = corners.min(axis=0)
    width, height = np.ptp(corners, axis=0)
    return fixed_crop(turned - origin, (int(width), int(height))), (float(origin[0]), float(origin[1]))


def _unturned(crop: Crop, angle: float, origin: tuple[float, float], aspect: float) -> View:
    """The view of a crop that lies in axes turned by `angle` and moved by `origin`."""
    middle = np.array([crop.x0 + crop.side / 2 + origin[0], crop.y0 + crop.side / 2 + origin[1]])
    x, y = _turned(middle, -angle).tolist()
    return View.around((x, y), crop.side, angle, aspect)


def _fits(landmarks: np.ndarray, side: float) -> bool:
    """Whether every face is of the right size in a square of that side."""
    width, height = (np.ptp(landmarks, axis=-2) / side).T
    return bool(((np.maximum(width, height) >= LEAST_SHARE) & (width <= MOST_WIDTH) & (height <= MOST_HEIGHT)).all())


def _following(shown: np.ndarray, tilts: np.ndarray, size: tuple[int, int], aspect: float, rate: float) -> list[View]:
    """A view for each frame of a run whose face moves, grows or tilts too far for one square."""
    upright = bool((np.abs(tilts) <= UPRIGHT).all())
    angles = np.zeros(len(shown)) if upright else np.unwrap(tilts)
    window = 2 * round(_MEDIAN_S * rate / 2) + 1
    face = median_filter(np.ptp(_turned(shown, angles), axis=1).max(axis=1), size=window, mode="nearest")
    sides = MARGIN * face
    boxes = _turned(shown, angles)
    middles = (boxes.min(axis=1) + boxes.max(axis=1)) / 2 - np.stack([np.zeros(len(shown)), RAISE * sides], axis=-1)
    target = np.concatenate([_turned(middles, -angles), np.log(sides)[:, None], angles[:, None]], axis=1)  # x, y, log side, angle
    paths = np.stack([_smooth(target, seconds * rate) for seconds in SMOOTHING_S])
    good = np.stack([_holds(shown, tilts, path) for path in paths])
    # The smoothest path up to which all hold. Least of its neighbourhood, then averaged over as much: nowhere above what holds there.
    level = np.argmin(good, axis=0).astype(np.float64) - 1
    level[good.all(axis=0)] = len(SMOOTHING_S) - 1
    reach = 2 * max(1, round(rate / 4)) + 1
    level = uniform_filter1d(minimum_filter1d(np.maximum(level, 0), reach, mode="nearest"), reach, mode="nearest")
    below = np.minimum(np.floor(level).astype(int), len(SMOOTHING_S) - 2)
    share = (level - below)[:, None]
    frames = np.arange(len(shown))
    path = (1 - share) * paths[below, frames] + share * paths[below + 1, frames]
    if upright:
        path[:, :2] = _moved_inside(path[:, :2], np.exp(path[:, 2]), shown, size)
    return [View.around((x, y), math.exp(log_side), angle, aspect) for x, y, log_side, angle in path.tolist()]


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian over the first axis. Beyond the ends the motion goes on (a point reflection), so that a steady walk is not displaced."""
    if sigma <= 0 or len(values) < 2:
        return values.copy()
    reach = math.ceil(4 * sigma)
    padded = np.pad(values, ((reach, reach), (0, 0)), mode="reflect", reflect_type="odd")
    return gaussian_filter1d(padded, sigma, axis=0, mode="nearest")[reach : reach + len(values)]


def _holds(shown: np.ndarray, tilts: np.ndarray, path: np.ndarray) -> np.ndarray:
    """bool `[N]`: whether the face lies well inside the square of the path `[N, 4]` (x, y, log side, angle), large enough and upright."""
    middle, side, angle = path[:, :2], np.exp(path[:, 2]), path[:, 3]
    offset = _turned(shown - middle[:, None], angle) / side[:, None, None]
    low, high = offset.min(axis=1), offset.max(axis=1)
    extent = high - low
    inside = ((low >= MIN_BORDER - 0.5) & (high <= 0.5 - MIN_BORDER)).all(axis=1)
    sized = (extent.max(axis=1) >= LEAST_SHARE) & (extent[:, 0] <= MOST_WIDTH) & (extent[:, 1] <= MOST_HEIGHT)
    # An upright path (angle 0) may hold heads that tilt as far as a fixed crop's may.
    tilted = np.abs(_between(tilts, angle)) <= np.where(angle == 0, UPRIGHT, _TILT_ROOM)
    return inside & sized & tilted


def _moved_inside(middles: np.ndarray, sides: np.ndarray, shown: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Middles of upright squares moved into the frame as far as they fit and the face keeps its border: real pixels are better."""
    low, high = shown.min(axis=1), shown.max(axis=1)
    half, border = sides[:, None] / 2, MIN_BORDER * sides[:, None]
    inside = np.clip(middles, half, np.maximum(half, np.array(size) - half))
    wanted = np.where(2 * half <= np.array(size), inside, middles)
    # Where the face itself reaches out, the square goes as far as it must.
    least, most = high + border - half, low - border + half
    return np.where(least <= most, np.clip(wanted, least, np.maximum(least, most)), middles)


def _between(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """a - b as an angle in (-pi, pi]."""
    return np.angle(np.exp(1j * (np.asarray(a) - np.asarray(b))))
