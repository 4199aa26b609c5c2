"""Which clips are read, from which datasets, and how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.source.windows import Windows

SAMPLING = ("clip", "duration")


@dataclasses.dataclass(frozen=True)
class ClipFilter:
    """Conditions on the clip index; an empty one keeps every clip.

    Attributes:
      min_scores, max_scores: bounds by score name, inclusive; a clip without the score is left out.
      sources, licences, consents, speakers: allowed values; empty allows all.
      exclude_sources, exclude_speakers, exclude_clips: values that are left out.
    """

    min_scores: dict = dataclasses.field(default_factory=dict)
    max_scores: dict = dataclasses.field(default_factory=dict)
    sources: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    consents: tuple[str, ...] = ()
    speakers: tuple[str, ...] = ()
    exclude_sources: tuple[str, ...] = ()
    exclude_speakers: tuple[str, ...] = ()
    exclude_clips: tuple[str, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), str):  # "own" would hold for every value that is part of it
                raise KeySyncError(f"filter {field.name} is {getattr(self, field.name)!r}; give a tuple of values")

    def reason(self, clip: Clip) -> str | None:
        """Why the clip is left out, or None when it is kept."""
        for field, value in (("sources", clip.source), ("licences", clip.licence), ("consents", clip.consent), ("speakers", clip.speaker)):
            if getattr(self, field) and value not in getattr(self, field):
                return field
        for field, value in (("exclude_sources", clip.source), ("exclude_speakers", clip.speaker), ("exclude_clips", clip.id)):
            if value in getattr(self, field):
                return field
        for name, bound in self.min_scores.items():
            if not clip.scores.get(name, -np.inf) >= bound:
                return f"min_scores.{name}"
        for name, bound in self.max_scores.items():
            if not clip.scores.get(name, np.inf) <= bound:
                return f"max_scores.{name}"
        return None


@dataclasses.dataclass(frozen=True)
class DatasetChoice:
    """One dataset of a mixture.

    Attributes:
      path: dataset directory, local or gs://.
      split: which split.
      weight: share of the samples relative to the other datasets' weights.
      filter: which of its clips.
    """

    path: str
    split: str = "train"
    weight: float = 1.0
    filter: ClipFilter = ClipFilter()


@dataclasses.dataclass(frozen=True)
class Selection:
    """The clips of one dataset that can be sampled.

    Attributes:
      clips: kept clips in storage order.
      items: int64 `[N]`, index into `clips` for each item of one pass.
      dropped: number of clips left out, by reason.
    """

    clips: tuple[Clip, ...]
    items: np.ndarray
    dropped: dict[str, int]


def select(choice: DatasetChoice, clips: Sequence[Clip], windows: Windows, sampling: str = "clip") -> Selection:
    """Apply split, filter and length.

    Args:
      choice: dataset with its filter.
      clips: its whole clip index.
      windows: what has to fit into a clip.
      sampling: "clip" gives every clip one window per pass (as the reference); "duration" gives as many as fit side by side.

    Raises:
      KeySyncError: no such split, or no clip is left; says how many were lost to what.
    """
    if sampling not in SAMPLING:
        raise KeySyncError(f"sampling {sampling!r} is not known; choose one of {', '.join(SAMPLING)}")
    splits = sorted({c.split for c in clips})
    if choice.split not in splits:
        raise KeySyncError(f"{choice.path} has no split {choice.split!r}; it has {', '.join(splits)}")
    for name in (*choice.filter.min_scores, *choice.filter.max_scores):
        known = sorted({s for c in clips for s in c.scores})
        if name not in known:
            raise KeySyncError(f"{choice.path} has no score {name!r} to filter by; it has {', '.join(known) or 'none'}")
    kept: list[Clip] = []
    dropped: dict[str, int] = {}
    for clip in clips:
        if clip.split != choice.split:
            continue
        reason = choice.filter.reason(clip)
        if reason is None and clip.num_frames < windows.min_length:
            reason = "too short"
        if reason is None:
            kept.append(clip)
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    if not kept:
        longest = max(c.num_frames for c in clips if c.split == choice.split)
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise KeySyncError(
            f"{choice.path}: no clip of split {choice.split!r} can be used ({reasons}; {windows.stage} windows need {windows.min_length} "
            f"frames, the longest clip has {longest}); relax the filter or lower min_spacing"
        )
    repeats = np.ones(len(kept), np.int64)
    if sampling == "duration":
        span = [(windows.num_frames - 1) * windows.fit(c.num_frames)[0] + 1 for c in kept]
        repeats = np.array([c.num_frames // n for c, n in zip(kept, span, strict=True)])
    return Selection(tuple(kept), np.repeat(np.arange(len(kept)), repeats), dropped)
