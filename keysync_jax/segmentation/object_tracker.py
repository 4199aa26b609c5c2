"""SAM 2's video predictor: clicks on some frames, masks on all others, forward and in reverse, one compiled step a frame.

What a frame sees of the past is bounded: the frames with clicks, the memories of the six frames before it and the pointers of fifteen.
Older ones are dropped, so that the length of a video costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.sam2.sam2_layers import resize
from keysync_jax.models.sam2.sam2_network import Bank, Found, Sam2
from keysync_jax.segmentation.click_prompts import Prompt, by_start

Array = jax.Array

POINTERS = 16  # frames whose pointers count, the present one included
# ImageNet's mean and deviation, by which pictures are normalised.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


class Frames(Protocol):
    """A video by index; each RGB uint8 `[H, W, 3]`, all of one size. Nothing but one frame at a time is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


class Segmenter(Protocol):
    """Whatever follows objects: the network here, or the `sam2` package."""

    name: str

    def follow(
        self, frames: Frames, prompts: Sequence[Prompt], reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(frame, logits `[objects, H, W]`) from the earliest prompt on, in order of the objects' numbers; positive is on the object."""
        ...


def object_masks(segmenter: Segmenter, frames: Frames, prompts: Sequence[Prompt], limit: int | None = None) -> np.ndarray:
    """Where any of the objects is, bool `[N, H, W]`: each is followed from its first prompt forward and in reverse.

    Args:
      segmenter: what follows.
      frames: the video.
      prompts: clicks and boxes, one for each object and frame.
      limit: how far to follow from an object's first prompt, in frames; None: to the ends.

    Raises:
      KeySyncError: a prompt outside the video.
    """
    count = len(frames)
    outside = [prompt.frame for prompt in prompts if not 0 <= prompt.frame < count]
    if outside:
        raise KeySyncError(f"a click on frame {outside[0]}, but there are {count} frames")
    height, width = frames[0].shape[:2] if count else (0, 0)
    masks = np.zeros((count, height, width), bool)
    for together in by_start(prompts):
        for reverse in (False, True):
            for index, logits in segmenter.follow(frames, together, reverse, limit):
                masks[index] |= (logits > 0).any(axis=0)
    return masks


def prepare(frame: np.ndarray, size: int) -> np.ndarray:
    """RGB uint8 `[H, W, 3]` -> what the network sees, float32 `[size, size, 3]` (bicubic, as the reference resizes)."""
    square = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(square, np.float32) / 255.0 - MEAN) / DEVIATION


class ObjectTracker:
    """A loaded network.

    Args:
      config: its sizes.
      params: its parameters.
      size: side of the square picture that it sees, a multiple of 32. The published models were trained at 1024; a face crop does with 512.
    """

    name = "flax"

    def __init__(self, config: Sam2Config, params: Mapping[str, Any], size: int = 512):
        if size % 32 or size < 32:
            raise KeySyncError(f"the segmenter's picture is a multiple of 32 pixels wide, not {size}")
        self.config, self.size = config, size
        self.network = Sam2(config)
        self.params = jax.device_put(params)

    def follow(
        self, frames: Frames, prompts: Sequence[Prompt], reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `Segmenter.follow`."""
        height, width = frames[0].shape[:2]
        tracking = Tracking(self, Prepared(frames, self.size), (height, width))
        for prompt in prompts:
            tracking.add(prompt)
        yield from tracking.propagate(min(prompt.frame for prompt in prompts), reverse, limit)


class Slots(NamedTuple):
    """What one object's frame looks at, as `Bank` has it without the first axis; the two stacks are still single arrays."""

    memories: tuple[Array, ...]
    row: np.ndarray
    pointers: tuple[Array, ...]
    age: np.ndarray
    held: np.ndarray


class Prepared:
    """Frames as the network sees them, made when asked for."""

    def __init__(self, frames: Frames, size: int):
        self._frames, self._size = frames, size

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return prepare(self._frames[index], self._size)


class Tracking:
    """Some objects on their way through one video.

    Args:
      tracker: the network.
      pictures: the video, each frame as the network sees it: float32 `[size, size, 3]`.
      shape: height and width of the masks that come back; clicks are given in these pixels.
    """

    def __init__(self, tracker: ObjectTracker, pictures: Frames, shape: tuple[int, int]):
        self._tracker, self._pictures, self.shape = tracker, pictures, shape
        # Object -> frame -> what was found: frames with clicks, which are kept, and others, of which the recent ones are.
        self.prompted: dict[int, dict[int, Found]] = {}
        self.tracked: dict[int, dict[int, Found]] = {}
        self._nothing: tuple[Array, Array] | None = None

    def add(self, prompt: Prompt) -> None:
        """Segments a frame by its clicks. All of an object's prompts come before the first `propagate`."""
        size = self._tracker.size
        points, labels = prompt.coordinates()
        points = points * size / np.array(self.shape[::-1], np.float32)
        picture = self._pictures[prompt.frame]
        found = _prompted(self._tracker.network, self._tracker.params, picture, points, labels)
        self.prompted.setdefault(prompt.object, {})[prompt.frame] = found
        self.tracked.setdefault(prompt.object, {})

    def propagate(self, start: int, reverse: bool = False, limit: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Follows all objects from frame `start` to the end, or in reverse to the beginning, `limit` frames at most.

        Yields:
          (frame, logits `[objects, H, W]` in order of the objects' numbers). In reverse from frame 0 there is nothing to yield.
        """
        objects = sorted(self.prompted)
        limit = len(self._pictures) if limit is None else limit
        if reverse:
            order = range(start, max(start - limit, 0) - 1, -1) if start > 0 else range(0)
        else:
            order = range(start, min(start + limit, len(self._pictures) - 1) + 1)
        for frame in order:
            clicked = {number: self.prompted[number][frame] for number in objects if frame in self.prompted[number]}
            if len(clicked) == len(objects):
                logits = np.stack([np.asarray(_enlarged(clicked[number].logits[0], self.shape)) for number in objects])
            else:
                logits = self._step(frame, objects, clicked, reverse)
            yield frame, logits
            self._forget(frame, start)

    def _step(self, frame: int, objects: list[int], clicked: Mapping[int, Found], reverse: bool) -> np.ndarray:
        slots = [self._slots(number, frame, reverse) for number in objects]
        found, large = _tracked(self._tracker.network, self._tracker.params, self._pictures[frame], slots, self.shape)
        logits = np.array(large)
        for i, number in enumerate(objects):
            if number in clicked:
                logits[i] = _enlarged(clicked[number].logits[0], self.shape)
            else:
                self.tracked[number][frame] = found[i]
        return logits

    def _slots(self, number: int, frame: int, reverse: bool) -> Slots:
        """What an object's frame looks at, padded to what all objects need."""
        config, way = self._tracker.config, -1 if reverse else 1
        clicked, tracked = self.prompted[number], self.tracked[number]
        recent = config.num_maskmem - 1
        most = max(map(len, self.prompted.values()))
        memories: list[tuple[Array, int]] = [(found.memory, recent) for found in clicked.values()]
        for ago in range(recent, 0, -1):
            before = tracked.get(frame - way * ago)
            if before is not None:
                memories.append((before.memory, ago - 1))
        # Only prompts that the object has passed on its way give a pointer; short videos count fewer frames.
        reach = min(len(self._pictures), POINTERS)
        pointers = [(found.pointer, way * (frame - at)) for at, found in clicked.items() if way * (frame - at) >= 0]
        for ago in range(1, reach):
            before = tracked.get(frame - way * ago)
            if before is not None:
                pointers.append((before.pointer, ago))
        no_memory, no_pointer = self._empty(next(iter(clicked.values())))
        spare = most + recent - len(memories)
        spare_pointers = most + POINTERS - 1 - len(pointers)
        return Slots(
            tuple(memory for memory, _ in memories) + (no_memory,) * spare,
            np.array([row for _, row in memories] + [-1] * spare, np.int32),
            tuple(pointer for pointer, _ in pointers) + (no_pointer,) * spare_pointers,
            np.array([age / (reach - 1) for _, age in pointers] + [0.0] * spare_pointers, np.float32),
            np.array([True] * len(pointers) + [False] * spare_pointers),
        )

    def _empty(self, like: Found) -> tuple[Array, Array]:
        """What fills slots up; on the device like the rest, so that one compiled step serves every frame."""
        if self._nothing is None:
            self._nothing = jnp.zeros(like.memory.shape), jnp.zeros(like.pointer.shape)
        return self._nothing

    def _forget(self, frame: int, start: int) -> None:
        """Drops what no later frame can see; near the start it waits for the way back."""
        memories = self._tracker.config.num_maskmem - 1
        for kept in self.tracked.values():
            for at in list(kept):
                distance = min(abs(at - frame), abs(at - start))
                if distance >= POINTERS:
                    del kept[at]
                elif distance > memories and kept[at].memory.size:
                    kept[at] = kept[at]._replace(memory=np.zeros(0), logits=np.zeros(0))


@functools.partial(jax.jit, static_argnums=0)
def _prompted(network: Sam2, params: Any, picture: Array, points: Array, labels: Array) -> Found:
    variables = {"params": params}
    features: Any = network.apply(variables, picture[None], method="features")
    found: Any = network.apply(variables, features, points[None], labels[None], method="prompted")
    return found


@functools.partial(jax.jit, static_argnums=(0, 4))
def _tracked(network: Sam2, params: Any, picture: Array, slots: list[Slots], shape: tuple[int, int]) -> tuple[list[Found], Array]:
    """A frame without clicks: what was found of each object, with a batch axis of 1, and logits `[objects, H, W]`."""
    variables = {"params": params}
    features = network.apply(variables, picture[None], method="features")

    def one(own: Bank) -> Found:
        found: Any = network.apply(variables, features, jax.tree.map(lambda x: x[None], own), method="tracked")
        return found

    def bank(slot: Slots) -> Bank:
        row, age, held = (jnp.asarray(part) for part in (slot.row, slot.age, slot.held))
        return Bank(jnp.concatenate(slot.memories), row, jnp.concatenate(slot.pointers), age, held)

    banks = [bank(slot) for slot in slots]
    found = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *banks))
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(slots))], resize(found.logits[:, 0], *shape)


@functools.partial(jax.jit, static_argnums=1)
def _enlarged(logits: Array, shape: tuple[int, int]) -> Array:
    return resize(logits, *shape)
