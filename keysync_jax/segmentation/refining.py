"""SAM 2 on top of a detector: the detector's masks prompt it, and its own count only where they are plausible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.segmentation.click_prompts import Prompt
from keysync_jax.segmentation.object_tracker import Frames, Segmenter

REACH = 25  # frames before and after a stretch that are followed: an object enters before a detector sees it
# A mask of SAM 2 must overlap the detector's by this much, where there is one, and leave this share of the crop free.
LEAST_OVERLAP, MOST_COVERED = 0.2, 0.6
# Parts of a mask below this share of the largest are left to it.
_SMALL_PART = 0.1
# Of the 68 landmarks: the outer and inner corners of both eyes, and the bridge of the nose between them.
_EYES, _BRIDGE = ((36, 39), (42, 45)), 27


class Refined(NamedTuple):
    """Masks, and where they come from.

    Attributes:
      masks: bool `[N, H, W]`.
      followed: bool `[N]`, frames whose mask is SAM 2's.
      refused: bool `[N]`, frames for which it had one that was not believed.
    """

    masks: np.ndarray
    followed: np.ndarray
    refused: np.ndarray


def stretches(detected: np.ndarray) -> list[tuple[int, int]]:
    """First and last frame of each run of frames with a mask; `detected` bool `[N, H, W]`."""
    seen = np.concatenate([[False], detected.any(axis=(1, 2)), [False]])
    edges = np.flatnonzero(seen[1:] != seen[:-1])
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def prompts_of(detected: np.ndarray, landmarks: np.ndarray | None, stretch: tuple[int, int]) -> list[Prompt]:
    """What asks for the objects of a stretch: on the frame where most is covered, a box and the deepest point of each part.

    Eyes and nose bridge are said to be outside where the detector agrees.

    Args:
      detected: bool `[N, H, W]`.
      landmarks: `[N, 68, 2]` in pixels of the masks; None: nothing is said to be outside.
      stretch: its first and last frame.
    """
    first, last = stretch
    frame = first + int(np.argmax(detected[first : last + 1].sum(axis=(1, 2))))
    mask = detected[frame]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    outside = [] if landmarks is None else _outside(mask, landmarks[frame])
    prompts = []
    for part in range(1, count):
        if areas[part - 1] < _SMALL_PART * areas.max():
            continue
        x, y, width, height = (int(value) for value in stats[part, : cv2.CC_STAT_AREA])
        # A part that touches the picture's edge is not deepest there.
        depth = cv2.distanceTransform(np.pad((labels == part).astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        deepest = np.unravel_index(int(np.argmax(depth)), depth.shape)
        points = ((float(deepest[1]), float(deepest[0])), *outside)
        inside = (True, *[False] * len(outside))
        prompts.append(Prompt(frame, points, inside, (float(x), float(y), float(x + width), float(y + height)), len(prompts) + 1))
    return prompts


def _outside(mask: np.ndarray, landmarks: np.ndarray) -> list[tuple[float, float]]:
    height, width = mask.shape
    points = [landmarks[list(eye)].mean(axis=0) for eye in _EYES] + [landmarks[_BRIDGE]]
    kept = []
    for x, y in np.asarray(points, np.float64):
        if 0 <= x < width and 0 <= y < height and not mask[int(y), int(x)]:
            kept.append((float(x), float(y)))
    return kept


def refine(
    segmenter: Segmenter,
    frames: Frames,
    detected: np.ndarray,
    landmarks: np.ndarray | None = None,
    prompts: Sequence[Prompt] | None = None,
    reach: int = REACH,
) -> Refined:
    """Masks of a shot, the detector's made better.

    Each stretch of the detector's is asked for on its own and followed both ways, `reach` frames further than it goes.

    Args:
      segmenter: see `segmenters.open_segmenter`.
      frames: the shot's crops.
      detected: the detector's masks, bool `[N, H, W]`.
      landmarks: `[N, 68, 2]` in pixels of the crop.
      prompts: a person's clicks. They are followed through the whole shot, believed wherever they lead, and joined with the rest.
      reach: see above.

    Raises:
      KeySyncError: masks of another number than frames.
    """
    if len(detected) != len(frames):
        raise KeySyncError(f"{len(detected)} masks for {len(frames)} frames")
    count = len(detected)
    masks, found = detected.copy(), np.zeros_like(detected)
    for stretch in stretches(detected):
        _follow(segmenter, frames, prompts_of(detected, landmarks, stretch), stretch, reach, found)
    followed, refused = np.asarray(found.any(axis=(1, 2))), np.zeros(count, bool)
    for i in np.flatnonzero(followed):
        if plausible(found[i], detected[i], None if landmarks is None else landmarks[i]):
            masks[i] = found[i]
        else:
            followed[i], refused[i] = False, True
    if prompts:
        clicked = np.zeros_like(detected)
        for number in sorted({prompt.object for prompt in prompts}):
            own = [prompt for prompt in prompts if prompt.object == number]
            _follow(segmenter, frames, own, (0, count - 1), 0, clicked)
        masks |= clicked
        followed |= clicked.any(axis=(1, 2))
    return Refined(masks, followed, refused)


def _follow(
    segmenter: Segmenter, frames: Frames, prompts: Sequence[Prompt], stretch: tuple[int, int], reach: int, found: np.ndarray
) -> None:
    """Adds what becomes of the prompted objects to `found`, as far as the stretch goes and `reach` frames further."""
    start = min(prompt.frame for prompt in prompts)
    for reverse, limit in ((False, stretch[1] + reach - start), (True, start - stretch[0] + reach)):
        for frame, logits in segmenter.follow(frames, prompts, reverse, limit):
            found[frame] |= (logits > 0).any(axis=0)


def plausible(found: np.ndarray, detected: np.ndarray, landmarks: np.ndarray | None) -> bool:
    """Whether a mask bool `[H, W]` of SAM 2 is believed: it meets the detector's, leaves much of the crop free, and an eye.

    A lost object tends to become the whole face or the whole picture, which these three tell.
    """
    if found.mean() >= MOST_COVERED:
        return False
    if landmarks is not None and all(_covers(found, landmarks[list(eye)].mean(axis=0)) for eye in _EYES):
        return False
    together = (found & detected).sum() / max((found | detected).sum(), 1)
    return not detected.any() or bool(together > LEAST_OVERLAP)


def _covers(mask: np.ndarray, point: np.ndarray) -> bool:
    x, y = (int(round(float(value))) for value in point)
    return 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and bool(mask[y, x])
