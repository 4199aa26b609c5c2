"""The person of an animation: a picture, the face in it, and the square in which the model works."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.animate_options import AnimateOptions
from keysync_jax.media import crop, faces, placing, still, tracking

_SMALL = 200  # pixels of a face below which a photo is enlarged so much that it shows
_TURNED = 0.25  # the tip of the nose lies within this part of the way from one eye to the other: a profile
_NOSE, _EYES = 30, (36, 45)  # in iBUG order


class Portrait(NamedTuple):
    """A picture and the square in it.

    Attributes:
      rgb: uint8 `[H, W, 3]`, the picture.
      square: where the model's square lies.
      face: (x0, y0, x1, y1) around the face's landmarks; None where none was looked for.
      notes: what a person should know.
    """

    rgb: np.ndarray
    square: crop.Crop | crop.View
    face: tuple[float, float, float, float] | None
    notes: tuple[str, ...]

    def pixels(self, size: int) -> np.ndarray:
        """The square at the model's size, float32 `[size, size, 3]` in [-1, 1]."""
        return crop.extract(self.rgb, self.square, size).astype(np.float32) / 127.5 - 1


def sit(source: str | os.PathLike | np.ndarray, options: AnimateOptions) -> Portrait:
    """Reads the picture and finds the face.

    Args:
      source: a picture or a video, or a picture as uint8 `[H, W, 3]` RGB.
      options: `at`, `crop`, `face` and the detector count.

    Raises:
      UsageError: an array of another kind, a face chosen outside the picture, or a moment that the video does not have.
      KeySyncError: a file that cannot be read, or no face in the picture.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3 or not source.size:
            raise UsageError(f"the picture is {source.dtype} {list(source.shape)}; give RGB as uint8 [H, W, 3]")
        picture, name = still.Picture(source, ()), "the picture"
    else:
        picture, name = still.read_picture(source, options.at), os.fspath(source)
    if options.crop == "none":
        return _whole(picture, name)
    weights = {"weights": options.face_weights} if options.face_weights else {}
    with faces.open_backend(options.faces, **weights) as backend:
        found = backend.detect(picture.rgb)
    return _around(picture, name, found, options.face)


def _whole(picture: still.Picture, name: str) -> Portrait:
    """The whole picture as the square, its middle where it is no square."""
    height, width = picture.rgb.shape[:2]
    side = min(height, width)
    notes = list(picture.notes)
    if height != width:
        notes.append(f"{name} is {width}x{height}: the square in its middle is animated")
    square = crop.Crop((width - side) // 2, (height - side) // 2, side)
    return Portrait(picture.rgb, square, None, tuple(notes))


def _around(picture: still.Picture, name: str, found: list[faces.Face], choice: str) -> Portrait:
    height, width = picture.rgb.shape[:2]
    selection = tracking.Selection.parse(choice)
    if selection.point is not None and not all(0 <= at <= side for at, side in zip(selection.point, (width, height), strict=True)):
        raise UsageError(f"--face {choice} lies outside the {width}x{height} picture {name}")
    table = tracking.FaceTable((width, height))
    table.add(found)
    chosen = table.finish(selection, smooth=False)
    places = placing.place(chosen.landmarks, chosen.runs, (width, height))
    if not places.parts:
        raise KeySyncError(
            f"{name}: no face found in the {width}x{height} picture; give one in which the face is visible and at least some 60 pixels "
            "wide, or --crop none for a drawing that is a square face already"
        )
    landmarks = chosen.landmarks[0]
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    notes = list(picture.notes)
    if chosen.others and chosen.center is not None:
        where = ", ".join(f"{other.center[0]:.0f},{other.center[1]:.0f}" for other in chosen.others)
        x, y = chosen.center
        notes.append(
            f"{len(chosen.others) + 1} faces; the one around {x:.0f},{y:.0f} is animated, not the one at {where}: "
            "--face left, right, center or X,Y chooses another"
        )
    if (extent := float((high - low).max())) < _SMALL:
        notes.append(f"the face is {extent:.0f} pixels large; below {_SMALL} it will look soft")
    if not _TURNED <= _between_eyes(landmarks) <= 1 - _TURNED:
        notes.append("the face is seen from the side; the model was trained on faces that look into the camera")
    box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
    return Portrait(picture.rgb, places.parts[0].view, box, tuple(notes))


def _between_eyes(landmarks: np.ndarray) -> float:
    """Where the tip of the nose lies on the way from the outer corner of one eye (0) to that of the other (1)."""
    first, last = landmarks[_EYES[0]], landmarks[_EYES[1]]
    along = last - first
    return float((landmarks[_NOSE] - first) @ along / max(float(along @ along), 1e-6))
