"""Random access to the frames of a prepared dataset."""

from __future__ import annotations

import bisect
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from keysync_jax.core.errors import KeySyncError, first_line
from keysync_jax.data_pipeline import dataset_layout as layout
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.dataset_layout import BASE, COLUMNS_DIR, GroupFile
from keysync_jax.data_pipeline.records import Column, decode

# For random access: no read-ahead, no threads inside a reader, a small file buffer.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_FILE_BUFFER = 32768


class FrameStore:
    """The frames of all clips of a dataset, by clip and frame number.

    Shards are opened when first read, one reader each, shared by threads; a pickled store reopens them in its new process.
    """

    def __init__(self, root: epath.PathLike):
        """Args:
          root: dataset directory, local or gs://.

        Raises:
          KeySyncError: no finished dataset there.
        """
        self.root = os.fspath(root)
        base = layout.read_group(root)
        self.crop_size = base.group.crop_size
        self.clips: tuple[Clip, ...] = tuple(layout.read_clips(root))
        for split in sorted({s.split for s in base.shards} | {c.split for c in self.clips}):
            indexed, stored = sum(c.num_frames for c in self.clips if c.split == split), base.num_records(split)
            if indexed != stored:
                words = f"clips.jsonl names {indexed} frames of split {split!r} but the shards hold {stored}"
                raise KeySyncError(f"{root}: {words}; prepare it again")
        self.groups: dict[str, GroupFile] = {BASE: base}
        for name in layout.column_groups(root):
            self.groups[name] = layout.read_group(epath.Path(root) / COLUMNS_DIR / name)
        self.columns: dict[str, Column] = {}
        self._group_of: dict[str, str] = {}
        for name, group_file in self.groups.items():
            for column in group_file.group.columns:
                self.columns[column.name] = column
                self._group_of[column.name] = name
        self._readers: dict[tuple[str, str], _RecordReader] = {}
        self._lock = threading.Lock()

    def __getstate__(self):
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def info(self, column: str) -> Any:
        """What the dataset says about how a column was made (`Group.info`), {} when nothing."""
        return self.groups[self._group_of[column]].group.info.get(column, {})

    def require(self, column: str) -> Column:
        """The column of that name.

        Raises:
          KeySyncError: the dataset lacks it, or has it for a part of the clips only.
        """
        if column not in self.columns:
            raise KeySyncError(f"{self.root} has no column {column!r}; it has {', '.join(sorted(self.columns))}")
        group = self.groups[self._group_of[column]]
        for split in sorted({c.split for c in self.clips}):
            total, have = self.groups[BASE].num_records(split), group.num_records(split)
            if have != total:
                raise KeySyncError(f"{self.root}: column {column!r} covers {have} of {total} frames of split {split!r}; write it again")
        return self.columns[column]

    def read(self, clip: Clip, frames: Sequence[int], columns: Sequence[str]) -> dict[str, list[Any]]:
        """Values of some frames of a clip.

        Args:
          clip: one of `clips`.
          frames: frame numbers within the clip, in any order.
          columns: column names.

        Returns:
          Per column a list with one entry per frame: read-only arrays of the column's shape, or bytes of an encoded picture.

        Raises:
          KeySyncError: a damaged, missing or misplaced record, or a value that is not finite. Names clip, frame and file.
        """
        out: dict[str, list[Any]] = {}
        by_group: dict[str, list[Column]] = {}
        for name in dict.fromkeys(columns):
            by_group.setdefault(self._group_of[name], []).append(self.columns[name])
        for group, wanted in by_group.items():
            reader = self._reader(group, clip.split)
            records = reader.read(clip, frames)
            for column in wanted:
                out[column.name] = []
            for frame, record in zip(frames, records, strict=True):
                try:
                    got = decode(record, wanted)
                except KeySyncError as error:
                    raise KeySyncError(f"{reader.where(clip, frame)}: {error}; prepare it again") from None
                if (got.clip, got.frame) != (clip.id, frame):
                    where = reader.where(clip, frame)
                    raise KeySyncError(f"{where} holds frame {got.frame} of clip {got.clip!r}; index and shards differ, prepare it again")
                for column in wanted:
                    value = got.values[column.name]
                    if not column.is_jpeg and value.dtype.kind == "f" and not _finite(value):
                        raise KeySyncError(f"{reader.where(clip, frame)}: column {column.name!r} is not finite; prepare the clip again")
                    out[column.name].append(value)
        return out

    def _reader(self, group: str, split: str) -> _RecordReader:
        with self._lock:
            key = group, split
            if key not in self._readers:
                self._readers[key] = _RecordReader(self.groups[group], self.root, split)
            return self._readers[key]


def _finite(value: np.ndarray) -> bool:
    """Whether no float16 or float32 of the array is NaN or infinite: by the exponent bits, since `isfinite` is slow on float16."""
    unsigned, exponent = (np.uint16, 0x7C00) if value.itemsize == 2 else (np.uint32, 0x7F800000)
    return not ((value.view(unsigned) & exponent) == exponent).any()


class _RecordReader:
    """The records of one split of one column group, by position."""

    def __init__(self, group_file: GroupFile, root: str, split: str):
        self._directory = os.fspath(group_file.group.directory(root))
        self._shards = [s for s in group_file.shards if s.split == split]
        self._firsts = [s.first_record for s in self._shards]
        self._open: list[Any] = [None] * len(self._shards)
        self._lock = threading.Lock()
        _allow_open_files(len(self._shards))

    def where(self, clip: Clip, frame: int) -> str:
        """Words for an error message about one record."""
        shard = self._shards[self._shard_of(clip.first_record + frame)]
        return f"clip {clip.id!r} frame {frame} ({self._directory}/{shard.file})"

    def read(self, clip: Clip, frames: Sequence[int]) -> list[bytes]:
        positions = [clip.first_record + int(f) for f in frames]
        low, high = self._shard_of(min(positions)), self._shard_of(max(positions))
        if low == high:  # nearly always: shards are cut between clips
            return self._read_shard(low, clip, positions)
        return [self._read_shard(self._shard_of(p), clip, [p])[0] for p in positions]

    def _shard_of(self, position: int) -> int:
        return bisect.bisect_right(self._firsts, position) - 1

    def _read_shard(self, index: int, clip: Clip, positions: Sequence[int]) -> list[bytes]:
        reader = self._open[index] or self._open_shard(index)
        first = self._firsts[index]
        try:
            return reader.read([p - first for p in positions])
        except (RuntimeError, ValueError, IndexError) as error:
            for position in positions:  # which one? a reader stays usable after a damaged record
                try:
                    reader.read([position - first])
                except (RuntimeError, ValueError, IndexError) as one:
                    where = self.where(clip, position - clip.first_record)
                    raise KeySyncError(f"{where} cannot be read: {first_line(one)}; restore the shard or write it again") from None
            raise KeySyncError(f"{self.where(clip, positions[0] - clip.first_record)} cannot be read: {error}") from None

    def _open_shard(self, index: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if self._open[index] is None:
                shard = self._shards[index]
                path = f"{self._directory}/{shard.file}"
                reader = ArrayRecordReader(path, options=_READER_OPTIONS, file_reader_buffer_size=_FILE_BUFFER)
                if not reader.ok() or reader.num_records() != shard.num_records:
                    have = f"holds {reader.num_records()} of {shard.num_records} records"
                    state = have if reader.ok() else "is missing, truncated or cannot be opened (ulimit -n?)"
                    raise KeySyncError(f"{path} {state}; restore it or write it again (keysync.json has its SHA-256)")
                self._open[index] = reader
            return self._open[index]


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit of open files when many shards are to stay open (the usual 1024 is soon reached)."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 4 * count + 256
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    limit = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
