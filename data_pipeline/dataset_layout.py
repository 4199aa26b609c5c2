"""Names of the files of a dataset directory and the description each column group keeps of itself.

DIR/                                       column group "frames": latents, audio tokens, landmarks
  keysync.json                             columns, sizes, shards with their SHA-256 (`GroupFile`)
  clips.jsonl                              clip index
  keysync-train.array_record-00000 ...     shards
  dataset_info.json, features.json         what tfds needs
  checksums/                               one file per finished shard, for restarts
  MANIFEST.sha256, _SUCCESS                in the format of sha256sum; the mark that all is there
DIR/columns/NAME/                          a further column group ("jpeg", "audio_whisper", ...): the same files but clips.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from keysync_jax.config import from_dict
from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import is_local
from keysync_jax.data_pipeline.clip_index import INDEX_FILE, Clip, loads
from keysync_jax.data_pipeline.records import Column
from keysync_jax.data_pipeline.shard_plan import TARGET_BYTES, frames_per_shard

FORMAT = 1
BASE = "frames"
GROUP_FILE = "keysync.json"
MANIFEST_FILE = "MANIFEST.sha256"
SUCCESS_FILE = "_SUCCESS"
CHECKSUM_DIR = "checksums"
COLUMNS_DIR = "columns"
# Latents and audio tokens are noise to a compressor: zstd saves 7 % and doubles the time to fetch a record (docs/data_format.md).
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Group:
    """Columns that are written and read together.

    Attributes:
      columns: what a record holds beside its clip and frame.
      crop_size: (height, width) of the face crop in pixels, the frame of the landmarks.
      frames_per_shard: see `make_group`.
      name: "frames" for the dataset's own directory, else the name of a directory under columns/.
      info: how the values were made (encoder kinds and weights, VAE, seeds, latent scale); JSON, compared when data are added.
      writer_options: of ArrayRecord; must hold group_size:1, which random access needs.
    """

    columns: tuple[Column, ...]
    crop_size: tuple[int, int]
    frames_per_shard: int
    name: str = BASE
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    writer_options: str = WRITER_OPTIONS

    def __post_init__(self):
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "crop_size", tuple(self.crop_size))
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise KeySyncError(f"column group name {self.name!r} must be lower-case letters, digits and '_'")
        names = [c.name for c in self.columns]
        if not names or len(set(names)) != len(names):
            raise KeySyncError(f"column group {self.name!r} needs distinct columns, not {names}")
        if "group_size:1" not in self.writer_options.split(","):
            raise KeySyncError(f"writer options {self.writer_options!r} must contain group_size:1; anything else makes random access slow")

    @property
    def dataset_name(self) -> str:
        """What tfds calls it, and the beginning of the shards' names."""
        return "keysync" if self.name == BASE else f"keysync_{self.name}"

    def directory(self, root: epath.PathLike) -> epath.Path:
        root = epath.Path(root)
        return root if self.name == BASE else root / COLUMNS_DIR / self.name

    def shard_name(self, split: str, index: int) -> str:
        # No "-of-N": adding clips must not rename the shards that are there.
        return f"{self.dataset_name}-{split}.array_record-{index:05d}"


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A finished shard: its name, place in the split, size and checksum."""

    file: str
    split: str
    first_record: int
    num_records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class GroupFile:
    """What keysync.json says: the group and its finished shards, in storage order."""

    group: Group
    shards: tuple[ShardFile, ...]

    def dumps(self) -> str:
        g = self.group
        held = _Description(FORMAT, g.name, g.columns, g.crop_size, g.frames_per_shard, g.writer_options, dict(g.info), self.shards)
        return json.dumps(dataclasses.asdict(held), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def num_records(self, split: str) -> int:
        return sum(s.num_records for s in self.shards if s.split == split)


@dataclasses.dataclass(frozen=True)
class _Description:
    """keysync.json as it stands on disk."""

    format: int
    group: str
    columns: tuple[Column, ...]
    crop_size: tuple[int, int]
    frames_per_shard: int
    writer_options: str
    info: dict[str, Any]
    shards: tuple[ShardFile, ...]
    frame_rate: int = FRAME_RATE


def make_group(
    columns: tuple[Column, ...],
    crop_size: tuple[int, int],
    frame_bytes: int,
    target_bytes: int = TARGET_BYTES,
    name: str = BASE,
    info: Mapping[str, Any] | None = None,
) -> Group:
    """A group whose shards hold about `target_bytes` of frames of `frame_bytes` (see `records.record_bytes`)."""
    return Group(tuple(columns), crop_size, frames_per_shard(frame_bytes, target_bytes), name, info or {})


def read_group(directory: epath.PathLike, finished: bool = True) -> GroupFile:
    """The description of the column group in `directory`.

    Args:
      directory: of the group (DIR or DIR/columns/NAME), local or gs://.
      finished: refuse a group whose writing was not completed.

    Raises:
      KeySyncError: no dataset there, unfinished, or of another format.
    """
    directory = epath.Path(directory)
    path = directory / GROUP_FILE
    if finished and not (directory / SUCCESS_FILE).exists():
        state = "is not finished (no _SUCCESS); run the command that writes it again" if path.exists() else "holds no dataset"
        raise KeySyncError(f"{directory} {state}")
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise KeySyncError(f"{path} has format {values['format']}, this version reads {FORMAT}; prepare the data anew")
    except FileNotFoundError:
        raise KeySyncError(f"{path} is missing; restore it or prepare the data anew") from None
    except (ValueError, KeyError, TypeError) as error:
        raise KeySyncError(f"{path} is not a dataset description ({error!r}); restore it or prepare the data anew") from None
    try:
        held = from_dict(_Description, values, str(path))
    except KeySyncError as error:
        raise KeySyncError(f"{error}; restore it or prepare the data anew") from None
    group = Group(held.columns, held.crop_size, held.frames_per_shard, held.group, held.info, held.writer_options)
    return GroupFile(group, held.shards)


def read_clips(root: epath.PathLike) -> list[Clip]:
    """The clip index of a dataset."""
    path = epath.Path(root) / INDEX_FILE
    if not path.exists():
        raise KeySyncError(f"{path} does not exist; {root} holds no dataset")
    try:
        return loads(path.read_text(), str(path))
    except UnicodeDecodeError as error:
        raise KeySyncError(f"{path} is damaged ({error}); restore it or prepare the data anew") from None


def make_folder(path: epath.PathLike) -> None:
    """Make a folder to write to, unless it is there.

    Raises:
      KeySyncError: it cannot be made or written to.
    """
    try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
        refused = is_local(path) and not os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise KeySyncError(f"cannot write to {path}: {error.strerror or error}; choose another folder") from error
    if refused:
        raise KeySyncError(f"cannot write to {path}: no permission; choose another folder")


def column_groups(root: epath.PathLike) -> list[str]:
    """Names of the finished column groups under columns/."""
    folder = epath.Path(root) / COLUMNS_DIR
    if not folder.exists():
        return []
    return sorted(d.name for d in folder.iterdir() if (d / SUCCESS_FILE).exists())
