"""Cuts of a clip of which the faces are known: what pictures alone leave open, the face decides.

A face that goes on as it went, or stays where it was, makes a jump of the picture motion; one that is suddenly another size, elsewhere
or another person's makes it a cut, also between the pictures of a slow camera or after a frozen one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keysync_jax.media import appearance
from keysync_jax.media.faces import Face
from keysync_jax.media.shots import MIN_CHANGE, NEIGHBOURS, Jump, ShotDetector, same_view

_UPPER_FACE = slice(17, 36)  # brows and nose: what speech does not move, blinks neither
# A head that goes on: what its place differs by, in face sizes, from where its own motion takes it within so many steps.
_ALONG, _ALONG_STEPS = 0.06, 5
_CHANGE_PER_STEP = 1.8  # and what the picture changes by for each of these steps, over the median around it
_SAME_SIZE = math.log(1.1)
# A face that is suddenly another: by size, place (in face sizes) or look; and so many times as much as around it.
_OTHER_SIZE, _OTHER_PLACE, _OTHER_LOOK = math.log(1.12), 0.42, 0.25
_OTHER_CHANGE = 8.0  # levels that the picture changes by, where the look alone says so
_FROZEN_PLACE = 0.8  # a head gets further while the picture is frozen
_OTHER_RATIO = 2.5
_LEAST_RATIO = 1.3  # of the picture's change to the large ones around it, where the face has changed
_CERTAIN = 25.0  # levels: whatever a head does along its way, this is no motion of it
_HISTORY = 3  # pictures before and after from which a head's own motion is taken


def find_cuts(detector: ShotDetector, detections: Sequence[Sequence[Face]]) -> list[int]:
    """First frames of new shots, ascending, without frame 0.

    Args:
      detector: has seen every frame.
      detections: the faces of each.
    """
    jumps = detector.jumps()
    steps = [_face_step(detections[jump.frame - 1], detections[jump.frame]) for jump in jumps]
    return detector.kept(jump.frame for k, jump in enumerate(jumps) if _is_cut(k, jumps, steps, detections))


class _FaceStep(NamedTuple):
    """From the largest face of a frame to that of the next: logarithm of the sizes' ratio, way in face sizes, likeness."""

    size: float
    moved: float
    likeness: float


def _face_step(before: Sequence[Face], after: Sequence[Face]) -> _FaceStep | None:
    """None where either has no face."""
    if not before or not after:
        return None
    a, b = _largest(before), _largest(after)
    size = math.sqrt(max(1.0, a.area))
    moved = float(np.linalg.norm(_place(b) - _place(a))) / size
    alike = 1.0 if a.look is None or b.look is None else appearance.likeness(a.look, b.look)
    return _FaceStep(abs(math.log(_extent(b) / _extent(a))), moved, alike)


def _is_cut(k: int, jumps: Sequence[Jump], steps: Sequence[_FaceStep | None], detections: Sequence[Sequence[Face]]) -> bool:
    jump, step = jumps[k], steps[k]
    if jump.change < MIN_CHANGE:
        return False
    before, after = detections[jump.frame - 1], detections[jump.frame]
    if step is not None and _other_face(k, jumps, steps):
        return True
    if not jump.stands_out:
        return False
    if same_view(jump.change, before, after):
        return False
    if step is not None and jump.after_freeze:
        return step.likeness < appearance.ALIKE  # the same person, somewhere else by now
    return step is None or jump.slow or not _goes_on(k, jumps, step, detections)


def _other_face(k: int, jumps: Sequence[Jump], steps: Sequence[_FaceStep | None]) -> bool:
    """Whether the face of a jump is suddenly another, while the picture changes by more than around it."""
    jump, step = jumps[k], steps[k]
    if step is None or jump.to_large < _LEAST_RATIO and not jump.after_freeze:
        return False
    around = [steps[n] for n in range(max(0, k - NEIGHBOURS), min(len(jumps), k + NEIGHBOURS + 1)) if n != k]
    sizes, ways = ([getattr(other, name) for other in around if other is not None] for name in ("size", "moved"))
    place = _FROZEN_PLACE if jump.after_freeze else _OTHER_PLACE
    if step.likeness < _OTHER_LOOK and jump.change >= _OTHER_CHANGE:
        return True
    return any(
        value >= least and value >= _OTHER_RATIO * _large(others)
        for value, least, others in ((step.size, _OTHER_SIZE, sizes), (step.moved, place, ways))
    )


def _goes_on(k: int, jumps: Sequence[Jump], step: _FaceStep, detections: Sequence[Sequence[Face]]) -> bool:
    """Whether the head went on as it moved before or after, only for longer: pictures in between are missing."""
    jump = jumps[k]
    if jump.change >= _CERTAIN or step.size > _SAME_SIZE or step.likeness < appearance.ALIKE:
        return False
    # The different pictures on either side.
    first = [jumps[n].frame for n in range(max(0, k - _HISTORY), k)]
    last = [jump.frame, *(jumps[n].frame for n in range(k + 1, min(len(jumps), k + 1 + _HISTORY)))]
    before = [detections[first[0] if first else 0], detections[jump.frame - 1]]
    after = [detections[jump.frame], detections[last[-1]]]
    if not all(before) or not all(after):
        return False
    size = math.sqrt(max(1.0, _largest(after[0]).area))
    old = (_place(_largest(before[1])) - _place(_largest(before[0]))) / max(1, len(first) - 1)
    new = (_place(_largest(after[1])) - _place(_largest(after[0]))) / max(1, len(last) - 1)
    way = _place(_largest(after[0])) - _place(_largest(before[1]))
    for steps in range(1, _ALONG_STEPS + 1):
        rest = min(float(np.linalg.norm(way - steps * (share * old + (1 - share) * new))) for share in (0, 0.5, 1))
        # So many steps at once change the picture by so much; by more, something else has changed.
        if rest < _ALONG * size and jump.to_median <= _CHANGE_PER_STEP * steps:
            return True
    return False


def _largest(faces: Sequence[Face]) -> Face:
    return max(faces, key=lambda face: face.area)


def _place(face: Face) -> np.ndarray:
    """(x, y) of the middle of brows and nose."""
    return np.asarray(face.landmarks[_UPPER_FACE], np.float64).mean(axis=0)


def _extent(face: Face) -> float:
    """Root mean square distance of brows and nose from their middle: size, whatever the mouth does."""
    points = np.asarray(face.landmarks[_UPPER_FACE], np.float64)
    return max(1e-3, float(np.sqrt(((points - points.mean(axis=0)) ** 2).sum(axis=1).mean())))


def _large(values: Sequence[float]) -> float:
    """The largest but one: one other cut may be around."""
    ordered = sorted(values)
    return ordered[-min(2, len(ordered))] if ordered else 0.0
