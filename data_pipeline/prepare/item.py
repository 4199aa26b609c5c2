"""What goes in (`Item`), what comes out of curation (`Candidate`, `Drop`), as plain JSON values, and what is then computed (`ClipWork`)."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any, NamedTuple

import numpy as np

from keysync_jax.config import from_dict
from keysync_jax.data_pipeline.dataset_layout import Group
from keysync_jax.media import video


@dataclasses.dataclass(frozen=True)
class Item:
    """One input: a video file, or a stretch of one that an annotation names.

    Attributes:
      path: the video, local.
      name: how the manifest calls it (relative path); with `start` and `box` it makes the id, so that ids do not depend on where the
        data lie or in which order they are listed.
      speaker, split, source, consent, licence: as the manifest states them; empty when it does not.
      start, stop: seconds of the video that are used; `stop` None for its end.
      box: (x0, y0, x1, y1) as fractions of the upright picture in which the annotated face lies; None for any face.
      landmarks, emotion, occluder: sidecar files; empty for none.
      extra: further fields worth keeping in the clip index.
      audio: file with the sound, where it is not that of the video.
      problem, reason: why it cannot be used, in words and for counting, where that is known before the video is opened: a row that cannot
        be understood, a copy of another file.
    """

    path: str
    name: str
    speaker: str = ""
    split: str = ""
    source: str = ""
    consent: str = ""
    licence: str = ""
    start: float = 0.0
    stop: float | None = None
    box: tuple[float, float, float, float] | None = None
    landmarks: str = ""
    emotion: str = ""
    occluder: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    audio: str = ""
    problem: str = ""
    reason: str = ""

    @property
    def id(self) -> str:
        """Readable and unique: the file's stem and a hash of source, name, times and box."""
        key = repr((self.source, self.name, self.start, self.stop, self.box, *([self.problem] if self.problem else [])))
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", self.name.rsplit("/", 1)[-1].rsplit(".", 1)[0])[:48]
        return f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"

    @property
    def is_part(self) -> bool:
        """Whether it names a stretch of its video, of which there may be more."""
        return self.start > 0 or self.stop is not None

    def seed(self, seed: int, purpose: str) -> int:
        """32-bit seed that depends on this item, the run's seed and the purpose only."""
        return derived_seed(seed, purpose, self.id)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Item:
        return from_dict(cls, values, "item")


def derived_seed(seed: int, *key: str) -> int:
    """32-bit integer from a seed and names."""
    return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:4], "big")


class Drop(NamedTuple):
    """Something that was left out.

    Attributes:
      path, item: of the input.
      clip: id of the dropped stretch, empty when the whole input went.
      stage: where it was decided ("input", "probe", "quality", "shots", "faces", "checks", "active_speaker", "sync", "features").
      reason: short word for counting.
      detail: one sentence.
      seconds: how much material it was, 0 when unknown.
    """

    path: str
    item: str
    clip: str
    stage: str
    reason: str
    detail: str
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A clip that passed curation.

    Attributes:
      id: clip id.
      first: model frame (25 fps) of the video's clock at which it begins; its sound begins at sample 640 * first.
      num_frames: model frames.
      crop: (x0, y0, side) in pixels of the upright picture.
      scores: named measures.
      fingerprint: hash of what its stored values depend on.
    """

    id: str
    first: int
    num_frames: int
    crop: tuple[int, int, int]
    scores: dict[str, float]
    fingerprint: str

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Candidate:
        return from_dict(cls, values, "candidate")


class DropError(Exception):
    """Raised by a stage to leave an item out for a known reason."""

    def __init__(self, stage: str, reason: str, detail: str, seconds: float = 0.0):
        super().__init__(detail)
        self.stage, self.reason, self.detail, self.seconds = stage, reason, detail, seconds

    def __reduce__(self):
        return DropError, (self.stage, self.reason, self.detail, self.seconds)


class ClipWork(NamedTuple):
    """A clip whose values are wanted: the curated clip, its source frames and landmarks, the groups to compute, the video's keyframes."""

    clip: Candidate
    sources: np.ndarray
    landmarks: np.ndarray
    groups: tuple[Group, ...]
    keyframes: tuple[video.Keyframe, ...] = ()
