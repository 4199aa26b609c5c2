"""Stages 1 and 3: look at a video, or the part of it that an item names, once.

Timestamps, cuts, a few pictures for the quality scorer, and the sound at 16 kHz. Nothing is resampled on disk. The model's time axis
(25 frames a second from the start of the file's clock) is laid over the source's own timestamps, so a variable frame rate or a late
first picture cannot make sound and mouth drift apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from keysync_jax.core.clock import FRAME_RATE, SAMPLE_RATE, SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare.frame_table import FrameTables, damage_in
from keysync_jax.data_pipeline.prepare.item import DropError, Item
from keysync_jax.data_pipeline.prepare.shot_bounds import CutFinder
from keysync_jax.data_pipeline.prepare.sound import load_sound
from keysync_jax.media import video
from keysync_jax.media.faces import Face

log = logging.getLogger(__name__)

STAGE = "probe"
_TOLD_S = 0.2  # by how much sound in a file of its own may differ in length without being told: encoders pad by less
# A file may state a few frames more than it has (edit lists, priming); more than this share missing means that it breaks off.
_MISSING_SHARE = 0.05
_MISSING_FRAMES = 3
_HELD_PICTURES = 16  # candidates for the middle picture that are kept while the length is unknown


class Probed(NamedTuple):
    """A readable video with sound.

    Attributes:
      info: what the file is.
      times: seconds of each source frame on the file's clock, increasing, up to the end of the item's range.
      shots: (first, one past the last) source frame of each shot, within the item's time range.
      pictures: first, a middle and the last picture of that range, uint8 `[H, W, 3]`, upright.
      samples: float32 `[S]`, 16 kHz mono, from the start of the file's clock.
      audio_frames: model frames that the sound covers.
      keyframes: where later passes may begin.
    """

    info: video.VideoInfo
    times: list[Fraction]
    shots: list[tuple[int, int]]
    pictures: list[np.ndarray]
    samples: np.ndarray
    audio_frames: int
    keyframes: tuple[video.Keyframe, ...]

    @property
    def seconds(self) -> float:
        """Length of the used range."""
        return float(sum(self.times[b - 1] - self.times[a] for a, b in self.shots)) + len(self.shots) / FRAME_RATE


def probe(item: Item, min_rate: float, tables: FrameTables, faces_in: Callable[[video.Frame], list[Face]]) -> Probed:
    """Decode a video once, holding no more than a few pictures.

    Args:
      item: what to look at.
      min_rate: frames a second below which it is dropped.
      tables: where the frames lie in files of which items use parts.
      faces_in: the faces of one frame, for cuts that are in doubt.

    Raises:
      DropError: not a video, damaged, without sound, too slow, or nothing in the item's time range.
    """
    try:
        info = video.probe(item.path)
    except KeySyncError as error:
        raise DropError(STAGE, "unreadable", _without_path(error, item)) from error
    if not info.has_audio and not item.audio:
        words = "the file has no sound, and there is no file of its name with sound beside it"
        raise DropError(STAGE, "no_audio", words, info.duration_s or 0.0)
    if info.average_rate < min_rate:
        rate = f"{float(info.average_rate):.2f} frames a second, fewer than {min_rate:g}"
        raise DropError(STAGE, "frame_rate", rate, info.duration_s or 0.0)
    samples = _sound(item, info)
    times, shots, pictures, keyframes = _pictures(item, info, tables, faces_in)
    # A last frame of which half is there counts and is filled up with silence, as resampled tracks end a few samples early.
    audio_frames = (len(samples) + SAMPLES_PER_FRAME // 2) // SAMPLES_PER_FRAME
    samples = np.pad(samples, (0, max(0, audio_frames * SAMPLES_PER_FRAME - len(samples))))
    return Probed(info, times, shots, pictures, samples, audio_frames, keyframes)


def _sound(item: Item, info: video.VideoInfo) -> np.ndarray:
    try:
        clip = load_sound(item)
    except KeySyncError as error:
        raise DropError(STAGE, "bad_audio", _without_path(error, item), info.duration_s or 0.0) from error
    if damage := damage_in(clip.notes):
        raise DropError(STAGE, "damaged", f"sound: {damage}", info.duration_s or 0.0)
    if item.audio and info.duration_s is not None:
        longer = len(clip.samples) / SAMPLE_RATE - info.duration_s
        if abs(longer) > _TOLD_S:
            log.warning("%s: its sound %s is %.2f s %s", item.path, item.audio, abs(longer), "longer" if longer > 0 else "shorter")
    return clip.samples


def _pictures(
    item: Item, info: video.VideoInfo, tables: FrameTables, faces_in: Callable[[video.Frame], list[Face]]
) -> tuple[list[Fraction], list[tuple[int, int]], list[np.ndarray], tuple[video.Keyframe, ...]]:
    """Times of the frames up to the end of the item's range; shots and pictures of those within it; keyframes."""
    cuts = CutFinder(faces_in)
    middle = _Middle()
    first = last = None
    used = 0
    walk = _Part(item, info, tables) if item.is_part else _Whole(item, info)
    try:
        for frame in walk:
            cuts.update(frame)
            middle.offer(used, frame)
            first = frame if first is None else first
            last = frame
            used += 1
    except KeySyncError as error:
        raise DropError(STAGE, "damaged", _without_path(error, item), info.duration_s or 0.0) from error
    if walk.damage:
        raise DropError(STAGE, "damaged", f"pictures: {walk.damage}", info.duration_s or 0.0)
    missing = (info.frames or 0) - len(walk.times)
    if walk.to_the_end and missing > max(_MISSING_FRAMES, _MISSING_SHARE * (info.frames or 0)):
        raise DropError(STAGE, "damaged", f"the file states {info.frames} frames, {len(walk.times)} are there", info.duration_s or 0.0)
    if first is None or last is None:
        raise DropError(STAGE, "no_frames", f"no frame between {item.start:g} s and {item.stop if item.stop is not None else 'the end'}")
    edges = [0, *cuts.finish(), used]
    shots = [(first.index + a, first.index + b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return walk.times, shots, [first.rgb(), middle.pick(used).rgb(), last.rgb()], walk.keyframes


class _Whole:
    """The frames of a whole file; what it is like is known at the end."""

    to_the_end = True

    def __init__(self, item: Item, info: video.VideoInfo):
        self._path, self._info = item.path, info
        self.times: list[Fraction] = []
        self.keyframes: tuple[video.Keyframe, ...] = ()
        self.damage = ""

    def __iter__(self) -> Iterator[video.Frame]:
        with video.read(self._path, self._info, note_keyframes=True) as reader:
            for frame in reader:
                self.times.append(frame.time - self._info.start_time)
                yield frame
        self.keyframes, self.damage = tuple(reader.keyframes), damage_in(reader.notes)


class _Part:
    """The frames of an item's time range, reached by the file's table."""

    def __init__(self, item: Item, info: video.VideoInfo, tables: FrameTables):
        self._item, self._info, self._tables = item, info, tables
        self.times: list[Fraction] = []
        self.keyframes: tuple[video.Keyframe, ...] = ()
        self.damage = ""
        self.to_the_end = False

    def __iter__(self) -> Iterator[video.Frame]:
        item, info = self._item, self._info
        table = self._tables(info)
        times = [pts * info.time_base - info.start_time for pts in table.pts.tolist()]
        self.times = times if item.stop is None else [time for time in times if float(time) < item.stop]
        self.to_the_end = len(self.times) == len(times)
        stop = len(self.times)
        start = next((i for i, time in enumerate(self.times) if float(time) >= item.start), stop)
        self.keyframes = tuple(k for k in table.keyframes if k.index < stop)
        if table.damage and table.damage[0] <= stop:
            self.damage = table.damage[1]
        if self.damage or start == stop:
            return
        with video.read(item.path, info, start, self.keyframes) as reader:
            for frame in reader:
                if frame.pts != table.pts[frame.index]:
                    raise KeySyncError(f"{item.path}: frame {frame.index} is not where it was a moment ago; is the file being written?")
                yield frame
                if frame.index == stop - 1:
                    return
        raise KeySyncError(f"{item.path}: ends before frame {stop - 1}, which was there a moment ago; is the file being written?")


class _Middle:
    """Keeps a frame near the middle of a sequence of unknown length: every n-th one, n doubling when there are too many."""

    def __init__(self):
        self._step = 1
        self._kept: dict[int, video.Frame] = {}

    def offer(self, index: int, frame: video.Frame) -> None:
        if index % self._step:
            return
        self._kept[index] = frame
        if len(self._kept) > _HELD_PICTURES:
            self._step *= 2
            self._kept = {i: f for i, f in self._kept.items() if i % self._step == 0}

    def pick(self, count: int) -> video.Frame:
        return self._kept[min(self._kept, key=lambda i: abs(i - count // 2))]


def _without_path(error: KeySyncError, item: Item) -> str:
    """The message without the file's name, which reports give separately."""
    return str(error).removeprefix(f"{item.path}: ")
