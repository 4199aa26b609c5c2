"""Stage 1: look at a whole video once. Timestamps, cuts, a few pictures for the quality scorer, and its sound at 16 kHz.

Nothing is resampled on disk. The model's time axis (25 frames a second from the start of the file's clock) is laid over the source's
own timestamps, so a variable frame rate or a late first picture cannot make sound and mouth drift apart.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np

from data_pipeline.prepare.item import DropError, Item
from keysync_jax.errors import KeySyncError
from keysync_jax.inference.audio_features import SAMPLES_PER_FRAME
from keysync_jax.media import audio, video
from keysync_jax.media.shots import ShotDetector

STAGE = "probe"
# A file may state a few frames more than it has (edit lists, priming); more than this share missing means that it breaks off.
_MISSING_SHARE = 0.05
_MISSING_FRAMES = 3
_DAMAGE = ("damaged", "unreadable", "broke off", "breaks off", "could be decoded")
# A cut changes the whole picture; a mouth that pops open in a close-up changes less than this share of it.
_CUT_SHARE = 0.15
_CUT_LEVELS = 8  # 8-bit levels by which a pixel counts as changed
_COMPARED_SIDE = 64  # pixels of the compared pictures
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
    """

    info: video.VideoInfo
    times: list[Fraction]
    shots: list[tuple[int, int]]
    pictures: list[np.ndarray]
    samples: np.ndarray
    audio_frames: int

    @property
    def seconds(self) -> float:
        """Length of the used range."""
        return float(sum(self.times[b - 1] - self.times[a] for a, b in self.shots)) + len(self.shots) / 25


def probe(item: Item, min_rate: float) -> Probed:
    """Decode a video once, holding no more than a few pictures.

    Raises:
      DropError: not a video, damaged, without sound, too slow, or nothing in the item's time range.
    """
    try:
        info = video.probe(item.path)
    except KeySyncError as error:
        raise DropError(STAGE, "unreadable", _without_path(error, item)) from error
    if not info.has_audio:
        raise DropError(STAGE, "no_audio", "the file has no sound", info.duration_s or 0.0)
    if info.average_rate < min_rate:
        rate = f"{float(info.average_rate):.2f} frames a second, fewer than {min_rate:g}"
        raise DropError(STAGE, "frame_rate", rate, info.duration_s or 0.0)
    samples = _sound(item, info)
    times, shots, pictures = _pictures(item, info)
    # A last frame of which half is there counts and is filled up with silence, as resampled tracks end a few samples early.
    audio_frames = (len(samples) + SAMPLES_PER_FRAME // 2) // SAMPLES_PER_FRAME
    samples = np.pad(samples, (0, max(0, audio_frames * SAMPLES_PER_FRAME - len(samples))))
    return Probed(info, times, shots, pictures, samples, audio_frames)


def _sound(item: Item, info: video.VideoInfo) -> np.ndarray:
    try:
        clip = audio.load_audio(item.path)
    except KeySyncError as error:
        raise DropError(STAGE, "bad_audio", _without_path(error, item), info.duration_s or 0.0) from error
    if damage := [note for note in clip.notes if any(word in note for word in _DAMAGE)]:
        raise DropError(STAGE, "damaged", f"sound: {damage[0]}", info.duration_s or 0.0)
    return clip.samples


def _pictures(item: Item, info: video.VideoInfo) -> tuple[list[Fraction], list[tuple[int, int]], list[np.ndarray]]:
    """Times of the frames up to the end of the item's range; shots and pictures of those within it."""
    cuts = ShotDetector()
    shares: list[float] = []
    before: np.ndarray | None = None
    times: list[Fraction] = []
    middle = _Middle()
    first = last = None
    used = 0
    start = -1
    whole = True
    try:
        with video.read(item.path, info) as reader:
            for frame in reader:
                time = frame.time - info.start_time
                if item.stop is not None and float(time) >= item.stop:
                    whole = False
                    break
                times.append(time)
                if float(time) < item.start:
                    continue
                if start < 0:
                    start = frame.index
                small = frame.thumbnail()
                cuts.update(small, used)
                picture = _compared(small)
                shares.append(0.0 if before is None else float((np.abs(picture - before).max(axis=-1) > _CUT_LEVELS).mean()))
                before = picture
                middle.offer(used, frame)
                first = frame if first is None else first
                last = frame
                used += 1
            notes = reader.notes
    except KeySyncError as error:
        raise DropError(STAGE, "damaged", _without_path(error, item), info.duration_s or 0.0) from error
    if damage := [note for note in notes if any(word in note for word in _DAMAGE)]:
        raise DropError(STAGE, "damaged", f"pictures: {damage[0]}", info.duration_s or 0.0)
    missing = (info.frames or 0) - len(times)
    if whole and missing > max(_MISSING_FRAMES, _MISSING_SHARE * (info.frames or 0)):
        raise DropError(STAGE, "damaged", f"the file states {info.frames} frames, {len(times)} are there", info.duration_s or 0.0)
    if first is None or last is None:
        raise DropError(STAGE, "no_frames", f"no frame between {item.start:g} s and {item.stop if item.stop is not None else 'the end'}")
    edges = [0, *(cut for cut in cuts.cuts if shares[cut] >= _CUT_SHARE), used]
    shots = [(start + a, start + b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return times, shots, [first.rgb(), middle.pick(used).rgb(), last.rgb()]


def _compared(picture: np.ndarray) -> np.ndarray:
    """A thumbnail `[h, w, 3]` small and blurred, int16, so that grain and small motion average out."""
    height, width = picture.shape[:2]
    scale = _COMPARED_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.GaussianBlur(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), (0, 0), 1.5).astype(np.int16)


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
