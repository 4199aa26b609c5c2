"""The clip index: one line of JSON per clip, in the order in which the clips' frames lie in the shards.

It answers which frames belong together, who speaks, where the clip came from, under which terms, and how good it is, so that filters
and splits never have to open a shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keysync_jax.core.errors import KeySyncError

log = logging.getLogger(__name__)

INDEX_FILE = "clips.jsonl"
DEFAULT_SPLITS = {"train": 0.9, "validation": 0.05, "test": 0.05}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A run of consecutive frames at 25 fps with one speaker.

    Attributes:
      id: unique in the dataset; clips are stored in the order of their ids.
      num_frames: frames, hence records.
      split: "train", "validation", ...; empty until `assign_splits` decides.
      speaker: who speaks, as named by `source`; empty when unknown, then every video counts as a speaker of its own.
      source: the collection it comes from ("hdtf", "synthetic", ...).
      video: path or name of the original file.
      start_time: seconds into `video`.
      licence, consent: terms as the manifest states them.
      scores: named measures of the clip ("quality", "active_speaker", "sync_offset", ...).
      extra: anything else worth keeping (crop box, annotation fields); JSON values only.
      fingerprint: hash of everything that the clip's stored values depend on; when it changes, its shards are written again.
      batch: which run added the clip (0 for the first); later clips go into shards of their own, behind the earlier ones.
      first_record: position of frame 0 among the records of the clip's split; -1 until `order_clips` sets it.
    """

    id: str
    num_frames: int
    split: str = ""
    speaker: str = ""
    source: str = ""
    video: str = ""
    start_time: float = 0.0
    licence: str = ""
    consent: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    batch: int = 0
    first_record: int = -1

    def __post_init__(self):
        if not self.id or not self.id.isprintable():
            raise KeySyncError(f"clip id {self.id!r} must be printable text")
        if self.num_frames < 1:
            raise KeySyncError(f"clip {self.id!r} has {self.num_frames} frames; leave empty clips out")
        if self.split:
            check_split(self.split, f"clip {self.id!r}")

    @property
    def speaker_key(self) -> tuple[str, str]:
        """What stands for one person: the speaker within the source, else the video, else the clip itself."""
        return self.source, self.speaker or f"video:{self.video or self.id}"


def check_split(name: str, where: str) -> None:
    """Raises KeySyncError, which begins with `where`, for a split that cannot be part of a file name as tfds reads it."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise KeySyncError(f"{where}: split {name!r} must be letters, digits, '_' and '-', such as train")


def assign_splits(
    clips: Sequence[Clip], fractions: Mapping[str, float] | None = None, seed: int = 0, existing: Sequence[Clip] = ()
) -> list[Clip]:
    """Give every clip a split so that no speaker is in two.

    A split that a clip already has is respected and holds for all clips of its speaker; so is the split that a clip or its speaker has
    in `existing`. Otherwise the hash of (seed, speaker) decides, so that adding videos never moves a speaker.

    Args:
      clips: clips to decide about.
      fractions: expected share of speakers per split, summing to 1; default 90 % train, 5 % validation, 5 % test.
      seed: another seed gives another division.
      existing: clips already in the dataset. What `clips` says about a clip of the same id (its speaker may be known by now) replaces it.

    Returns:
      The clips in the same order, all with a split.

    Raises:
      KeySyncError: the fractions do not sum to 1, or a speaker was given two splits.
    """
    fractions = dict(DEFAULT_SPLITS if fractions is None else fractions)
    if not fractions or any(f < 0 for f in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise KeySyncError(f"split fractions {fractions} must be non-negative and sum to 1")
    held = {c.id: c.split for c in existing}
    clips = [c if c.split else dataclasses.replace(c, split=held.get(c.id, "")) for c in clips]
    named = {c.id for c in clips}
    given = _splits_by_speaker([*(c for c in existing if c.id not in named), *clips])
    decided = [dataclasses.replace(c, split=given.get(c.speaker_key) or _hashed_split(c.speaker_key, fractions, seed)) for c in clips]
    used = {c.split for c in [*decided, *existing]}
    for split in sorted(s for s, f in fractions.items() if f > 0 and s not in used):
        log.warning("no speaker fell into split %r (%d clips); use more speakers, another seed or explicit splits", split, len(clips))
    return decided


def order_clips(clips: Iterable[Clip]) -> list[Clip]:
    """Clips in storage order (split, batch, id) with `first_record` set.

    Raises:
      KeySyncError: an id occurs twice, a clip has no split, or a speaker is in two splits.
    """
    ordered = sorted(clips, key=lambda c: (c.split, c.batch, c.id))
    seen: set[str] = set()
    position: dict[str, int] = {}
    out = []
    for clip in ordered:
        if clip.id in seen:
            raise KeySyncError(f"clip id {clip.id!r} occurs twice; ids must be unique")
        if not clip.split:
            raise KeySyncError(f"clip {clip.id!r} has no split; assign splits first")
        seen.add(clip.id)
        first = position.get(clip.split, 0)
        out.append(dataclasses.replace(clip, first_record=first))
        position[clip.split] = first + clip.num_frames
    _splits_by_speaker(out)
    return out


def dumps(clips: Sequence[Clip]) -> str:
    """The index file's text: one JSON object per line, keys sorted, so that equal clips give equal bytes."""
    lines = []
    for clip in clips:
        try:
            line = json.dumps(dataclasses.asdict(clip), sort_keys=True, allow_nan=False, ensure_ascii=False)
            lines.append(line.encode(errors="backslashreplace").decode())  # bytes of a file name that are not UTF-8, as JSON escapes
        except (TypeError, ValueError) as error:
            raise KeySyncError(f"clip {clip.id!r} cannot be written to the index: {error}") from None
    return "".join(line + "\n" for line in lines)


def loads(text: str, where: str) -> list[Clip]:
    """Clips from the index file's text.

    Raises:
      KeySyncError: a line is not a clip, or the positions do not follow from the clips' lengths. Names `where` and the line.
    """
    known = {f.name for f in dataclasses.fields(Clip)}
    clips = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise KeySyncError(f"{where} line {number} is not JSON ({error.msg}); restore the file or prepare the data anew") from None
        if not isinstance(values, dict) or not {"id", "num_frames"} <= set(values) <= known:
            raise KeySyncError(f"{where} line {number} is not a clip; its keys must be among {', '.join(sorted(known))}")
        try:
            clips.append(Clip(**values))
        except TypeError as error:
            raise KeySyncError(f"{where} line {number} is not a clip ({error}); restore the file or prepare the data anew") from None
    if clips != order_clips(clips):
        raise KeySyncError(f"{where}: clips are out of order or their record positions are wrong; restore it or prepare the data anew")
    return clips


def _splits_by_speaker(clips: Iterable[Clip]) -> dict[tuple[str, str], str]:
    chosen: dict[tuple[str, str], Clip] = {}
    for clip in clips:
        if not clip.split:
            continue
        other = chosen.setdefault(clip.speaker_key, clip)
        if other.split != clip.split:
            raise KeySyncError(
                f"speaker {clip.speaker_key[1]!r} of source {clip.source!r} is in two splits: {other.split!r} (clip {other.id!r}) and "
                f"{clip.split!r} (clip {clip.id!r}); a speaker must stay in one"
            )
    return {key: clip.split for key, clip in chosen.items()}


def _hashed_split(speaker: tuple[str, str], fractions: Mapping[str, float], seed: int) -> str:
    digest = hashlib.sha256(json.dumps([seed, *speaker]).encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    for split, fraction in fractions.items():
        if point < fraction:
            return split
        point -= fraction
    return max(fractions, key=lambda split: fractions[split])  # rounding of the last boundary
