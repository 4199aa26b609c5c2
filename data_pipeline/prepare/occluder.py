"""Occluder masks by following click points through a clip's crops with SAM 2."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.media import video
from keysync_jax.media.crop import Crop, extract
from keysync_jax.segmentation.click_prompts import Prompt, merge, read_prompts
from keysync_jax.segmentation.object_tracker import object_masks
from keysync_jax.segmentation.segmenters import open_segmenter


class ClickMasker:
    """Follows what is clicked in a clip.

    Args:
      weights: a SAM 2.1 checkpoint; its size is read from its shapes.
      backend: "flax", or "sam2" for the package of that name.

    Raises:
      KeySyncError: the file is missing or no such checkpoint, or the package is missing.
    """

    def __init__(self, weights: str, backend: str = "flax"):
        self._segmenter = open_segmenter(weights, backend)

    def __call__(self, item: Item, sources: np.ndarray, crop: Crop, size: int, keyframes: Sequence[video.Keyframe] = ()) -> np.ndarray:
        """Mask of the objects in each crop of a clip, bool `[n, size, size]`; `keyframes` as `video.read` takes them.

        The sidecar is a file of `click_prompts.read_prompts`: frames of the video, pixels of the upright picture. Clicks outside the clip
        or its crop are passed over; a clip without any has no occluder.

        Raises:
          KeySyncError: the sidecar cannot be understood.
        """
        first, last = int(sources[0]), int(sources[-1])
        prompts = _within(read_prompts(item.occluder), first, last, crop, size)
        if not prompts:
            return np.zeros((len(sources), size, size), bool)
        with tempfile.TemporaryDirectory() as folder:
            # Crops wait on disk: both directions need them, and a long clip's do not fit beside the network.
            crops = np.lib.format.open_memmap(Path(folder) / "crops.npy", "w+", np.uint8, (last - first + 1, size, size, 3))
            with video.read(item.path, start=first, keyframes=keyframes) as reader:
                for frame in reader:
                    if frame.index > last:
                        break
                    crops[frame.index - first] = extract(frame.rgb(), crop, size)
            masks = object_masks(self._segmenter, crops, prompts)
            del crops
        return masks[sources - first]


def _within(prompts: Sequence[Prompt], first: int, last: int, crop: Crop, size: int) -> list[Prompt]:
    """The clicks on a clip's frames and within its crop, in pixels of the crop; a box is cut to it."""

    def place(points: np.ndarray) -> np.ndarray:
        return (points - (crop.x0, crop.y0)) * size / crop.side

    kept = []
    for prompt in prompts:
        if not first <= prompt.frame <= last:
            continue
        moved = prompt.moved(prompt.frame - first, place)
        clicks = [(p, inside) for p, inside in zip(moved.points, moved.inside, strict=True) if 0 <= min(p) and max(p) <= size]
        box = moved.box
        if box is not None:
            x0, y0, x1, y1 = (min(max(value, 0.0), float(size)) for value in box)
            box = (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None
        if box is not None or any(inside for _, inside in clicks):
            points, inside = tuple(p for p, _ in clicks), tuple(i for _, i in clicks)
            kept.append(Prompt(moved.frame, points, inside, box, moved.object))
    return merge(kept)
