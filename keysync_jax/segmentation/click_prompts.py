"""What a person or a detector says about an object: clicks and boxes on some frames, and the file that holds them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from keysync_jax.core.errors import KeySyncError

# Labels of points, as SAM 2 has them.
OUTSIDE, INSIDE, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Prompt:
    """All clicks for one object on one frame.

    Attributes:
      frame: index of the frame.
      points: (x, y) of each click, in pixels of the frame.
      inside: whether each click lies on the object.
      box: x0, y0, x1, y1 around the object; None: only clicks.
      object: which object, if there are several.
    """

    frame: int
    points: tuple[tuple[float, float], ...] = ()
    inside: tuple[bool, ...] = ()
    box: tuple[float, float, float, float] | None = None
    object: int = 1

    def __post_init__(self):
        if len(self.points) != len(self.inside):
            raise KeySyncError(f"frame {self.frame}: {len(self.points)} clicks, but {len(self.inside)} times inside or outside")
        if not self.points and self.box is None:
            raise KeySyncError(f"frame {self.frame}: a prompt needs a click or a box")

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Points `[P, 2]` and labels `[P]`, a box's corners first."""
        corners = [] if self.box is None else [self.box[:2], self.box[2:]]
        labels = [TOP_LEFT, BOTTOM_RIGHT][: len(corners)] + [INSIDE if inside else OUTSIDE for inside in self.inside]
        return np.array([*corners, *self.points], np.float32), np.array(labels, np.int32)

    def moved(self, frame: int, place: Any = None) -> Prompt:
        """The same on another frame's index, its points sent through `place`, `[P, 2]` -> `[P, 2]`."""
        if place is None:
            return dataclasses.replace(self, frame=frame)
        points = tuple((float(x), float(y)) for x, y in place(np.array(self.points, np.float64).reshape(-1, 2)))
        box = self.box
        if box is not None:
            corners = place(np.array([(x, y) for x in (box[0], box[2]) for y in (box[1], box[3])], np.float64))
            box = (*map(float, corners.min(axis=0)), *map(float, corners.max(axis=0)))  # a turned box is boxed again
        return dataclasses.replace(self, frame=frame, points=points, box=box)


def read_prompts(path: str | os.PathLike, width: int | None = None, height: int | None = None, frames: int | None = None) -> list[Prompt]:
    """Clicks and boxes of a file, ordered by object and frame.

    The file is JSON; frames count from 0, pixels are those of the upright picture, and "inside" and "object" (1) may be left out:

        {"points": [{"frame": 0, "x": 310, "y": 402, "inside": true}, {"frame": 9, "box": [280, 350, 400, 480], "object": 2}]}

    Args:
      path: the file.
      width, height, frames: size of the picture and length of the video, to check against; None checks nothing.

    Raises:
      KeySyncError: it cannot be read or understood, or a click lies outside the picture or the video.
    """
    name = os.path.basename(os.fspath(path))
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)["points"]
        if not isinstance(entries, list):
            raise TypeError('"points" is no list')
        clicks = [_click(entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KeySyncError(f"{name} holds no click points ({error!r})") from error
    for click in clicks:
        _check(click, name, width, height, frames)
    return merge(clicks)


def _click(entry: Mapping[str, Any]) -> Prompt:
    frame, number = int(entry["frame"]), int(entry.get("object", 1))
    box = entry.get("box")
    if box is not None:
        x0, y0, x1, y1 = map(float, box)
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"box {box} is not left, top, right, bottom")
        box = (x0, y0, x1, y1)
    if box is not None and "x" not in entry and "y" not in entry:
        return Prompt(frame, box=box, object=number)
    return Prompt(frame, ((float(entry["x"]), float(entry["y"])),), (bool(entry.get("inside", True)),), box, number)


def _check(prompt: Prompt, name: str, width: int | None, height: int | None, frames: int | None) -> None:
    if prompt.frame < 0 or (frames is not None and prompt.frame >= frames):
        raise KeySyncError(
            f"{name}: a click on frame {prompt.frame}, but the video has {frames if frames is not None else 'no such'} frames"
        )
    points, _ = prompt.coordinates()
    for x, y in points.tolist():
        if not (math.isfinite(x) and math.isfinite(y)):
            raise KeySyncError(f"{name}: frame {prompt.frame}: ({x}, {y}) is no place in a picture")
        if x < 0 or y < 0 or (width is not None and x > width) or (height is not None and y > height):
            size = f"{width} x {height}" if width is not None else "given"
            raise KeySyncError(f"{name}: frame {prompt.frame}: ({x:g}, {y:g}) lies outside the {size} picture")


def merge(prompts: Iterable[Prompt]) -> list[Prompt]:
    """One prompt per object and frame; the last box counts. Objects with a positive click or a box only.

    Raises:
      KeySyncError: an object whose clicks all say where it is not.
    """
    grouped: dict[tuple[int, int], list[Prompt]] = {}
    for prompt in prompts:
        grouped.setdefault((prompt.object, prompt.frame), []).append(prompt)
    merged = [
        Prompt(
            frame,
            tuple(point for prompt in own for point in prompt.points),
            tuple(inside for prompt in own for inside in prompt.inside),
            next((prompt.box for prompt in reversed(own) if prompt.box is not None), None),
            number,
        )
        for (number, frame), own in sorted(grouped.items(), key=lambda item: item[0])
    ]
    for prompt in merged:
        if prompt.box is None and not any(prompt.inside):
            raise KeySyncError(f"object {prompt.object}, frame {prompt.frame}: no click lies on the object; give one, or a box")
    return merged


def by_start(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Prompts whose objects start on the same frame, together: such objects are followed side by side."""
    starts: dict[int, int] = {}
    for prompt in prompts:
        starts[prompt.object] = min(prompt.frame, starts.get(prompt.object, prompt.frame))
    return [[p for p in prompts if starts[p.object] == start] for start in sorted(set(starts.values()))]
