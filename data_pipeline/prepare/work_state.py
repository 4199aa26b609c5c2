"""The folders of a run and what is read from them: analyses, features, and which clips go into the dataset."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.data_pipeline import dataset_layout as layout
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.dataset_layout import BASE, Group
from keysync_jax.data_pipeline.prepare.features import entry_name
from keysync_jax.data_pipeline.prepare.frame_table import unpack_keyframes
from keysync_jax.data_pipeline.prepare.groups import FeaturePlan
from keysync_jax.data_pipeline.prepare.item import Candidate, ClipWork, Drop, Item
from keysync_jax.data_pipeline.prepare.work import Entry, WorkFolder
from keysync_jax.data_pipeline.shards import check_settings


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where a run keeps things. Strings, so that workers on other machines get them unchanged."""

    output: str
    work: str

    @property
    def analyses(self) -> WorkFolder:
        return WorkFolder(epath.Path(self.work) / "analyses")

    @property
    def frame_tables(self) -> WorkFolder:
        """Where the frames of long videos lie, by content hash; see `frame_table`."""
        return WorkFolder(epath.Path(self.work) / "frame_tables")

    @property
    def features(self) -> WorkFolder:
        return WorkFolder(epath.Path(self.work) / "features")

    @property
    def encoded(self) -> WorkFolder:
        """One entry per item whose clips went through the networks: seconds of work and failures."""
        return WorkFolder(epath.Path(self.work) / "encoded")

    @property
    def shard_errors(self) -> WorkFolder:
        return WorkFolder(epath.Path(self.work) / "shard_errors")

    @property
    def shard_times(self) -> WorkFolder:
        return WorkFolder(epath.Path(self.work) / "shard_times")

    def remove_leftovers(self) -> None:
        """Temporary files of runs that were killed, in every folder. Call it only while no worker writes."""
        for folder in (self.analyses, self.frame_tables, self.features, self.encoded, self.shard_errors, self.shard_times):
            folder.remove_leftovers()


def default_work(output: str | os.PathLike) -> str:
    return os.fspath(epath.Path(output) / ".work")


def candidates(analysis: Entry) -> list[Candidate]:
    return [Candidate.from_json(c) for c in analysis.values["candidates"]]


def drops(entry: Entry | None) -> list[Drop]:
    return [] if entry is None else [Drop(**d) for d in entry.values["drops"]]


def feature_key(plan: FeaturePlan, group: Group, clip: Candidate, sidecars: Mapping[str, str]) -> str:
    """Key of a clip's values in a group; `sidecars` are the content hashes of the files that only some columns read."""
    own = {name: digest for name, digest in sidecars.items() if name == group.name}
    return plan.key(group, hashlib.sha256(repr((clip.fingerprint, sorted(own.items()))).encode()).hexdigest())


def clip_work(analysis: Entry, clip: Candidate, groups: Sequence[Group]) -> ClipWork:
    sources, landmarks = (analysis.arrays[f"{name}.{clip.id}"] for name in ("sources", "landmarks"))
    return ClipWork(clip, sources, landmarks, tuple(groups), unpack_keyframes(analysis.arrays.get("keyframes", np.zeros((0, 3)))))


def missing_groups(
    folders: Folders, plan: FeaturePlan, clip: Candidate, sidecars: Mapping[str, str], written: Mapping[str, Mapping[str, str]]
) -> list[Group]:
    """Groups whose values for a clip are neither in the finished dataset nor in the work folder.

    Args:
      written: per group name the fingerprints, by clip, of what is finished (see `written_clips`).
    """
    out = []
    for group in plan.groups:
        if written.get(group.name, {}).get(clip.id) == clip.fingerprint:
            continue
        if not folders.features.has(entry_name(group, clip.id), feature_key(plan, group, clip, sidecars)):
            out.append(group)
    return out


def written_clips(output: str | os.PathLike, groups: Iterable[Group]) -> dict[str, dict[str, str]]:
    """Per group name, clip id -> fingerprint of what the finished dataset holds; groups of other settings are left out."""
    root = epath.Path(output)
    if not (root / layout.SUCCESS_FILE).exists():
        return {}
    clips = layout.read_clips(root)
    out = {}
    for group in groups:
        directory = group.directory(root)
        if not (directory / layout.SUCCESS_FILE).exists():
            continue
        held = layout.read_group(directory)
        same = held.group.columns == group.columns and dict(held.group.info) == dict(group.info)
        splits = {c.split for c in clips}
        complete = all(held.num_records(s) == sum(c.num_frames for c in clips if c.split == s) for s in splits)
        if same and (complete or group.name == BASE):
            out[group.name] = {c.id: c.fingerprint for c in clips}
    return out


def check_dataset(output: str | os.PathLike, groups: Iterable[Group]) -> None:
    """Refuse, before any work is done, to add to a dataset that was made with other settings.

    Raises:
      KeySyncError: see `shards.check_settings`.
    """
    for group in groups:
        directory = group.directory(output)
        if (directory / layout.GROUP_FILE).exists():
            check_settings(layout.read_group(directory, finished=False).group, group, directory)


def index_clip(item: Item, candidate: Candidate, facts: Mapping[str, Any], faces: str) -> Clip:
    """The clip index's entry, without a split unless the manifest gives one; `extra["faces"]` says whose its landmarks are."""
    made = {"faces": "sidecar" if item.landmarks else faces, "crop": list(candidate.crop), "first_frame": candidate.first, "item": item.id}
    extra = made | item.extra
    return Clip(
        id=candidate.id, num_frames=candidate.num_frames, split=item.split, speaker=item.speaker, source=item.source, video=item.name,
        start_time=candidate.first / FRAME_RATE, licence=item.licence, consent=item.consent, scores=candidate.scores, extra=extra,
        fingerprint=candidate.fingerprint,
    )  # fmt: skip


def thumbnail(analysis: Entry, clip: str) -> bytes | None:
    """JPEG of a clip, kept or dropped."""
    array: np.ndarray | None = analysis.arrays.get(f"thumbnail.{clip}")
    return None if array is None else array.tobytes()
