"""Writing: shards that appear whole or not at all, carry a checksum, and have the same bytes whoever writes them.

    group = make_group(columns, (512, 512), record_bytes(columns))
    write_group(DIR, group, load, clips)      # all in this process, or through any `map`

Or in pieces, for a cluster: `prepare_group` plans, `write_shard` runs anywhere in any order, `finish_group` ends it. Each may be
repeated: a shard whose checksum record matches is not written again. ArrayRecord and tfds are imported when first needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import is_local, replacing, sha256
from keysync_jax.data_pipeline import dataset_layout as layout
from keysync_jax.data_pipeline.clip_index import INDEX_FILE, Clip, dumps, order_clips
from keysync_jax.data_pipeline.dataset_layout import (
    BASE,
    CHECKSUM_DIR,
    GROUP_FILE,
    MANIFEST_FILE,
    SUCCESS_FILE,
    Group,
    GroupFile,
    ShardFile,
)
from keysync_jax.data_pipeline.records import encode_clip
from keysync_jax.data_pipeline.shard_plan import Piece, Shard, plan_shards

# Values of a piece: per column an array [stop - start, *shape], or encoded pictures.
Load = Callable[[Piece], Mapping[str, Any]]


class GroupPlan(NamedTuple):
    """The group with the shard size that holds, its clips in storage order, and the shards to write."""

    group: Group
    clips: tuple[Clip, ...]
    shards: tuple[Shard, ...]


class WrittenShard(NamedTuple):
    """A finished shard, and whether it had been there before."""

    shard: ShardFile
    skipped: bool


def write_group(
    root: epath.PathLike,
    group: Group,
    load: Load,
    clips: Sequence[Clip] | None = None,
    run: Callable[[Callable[[Shard], WrittenShard], Iterable[Shard]], Iterable[WrittenShard]] = map,
) -> GroupFile:
    """Write or extend a column group from start to finish.

    Args:
      root: dataset directory, local or gs://.
      group: what to write.
      load: gives the values of one piece; called in storage order within a shard.
      clips: for the group "frames" the clips to hold (see `prepare_group`); None for others.
      run: how to apply a function to all shards, e.g. `concurrent.futures.ThreadPoolExecutor(n).map`.
    """
    plan = prepare_group(root, group, clips)
    for _ in run(lambda shard: write_shard(root, plan.group, shard, load), plan.shards):
        pass
    return finish_group(root, plan)


def prepare_group(root: epath.PathLike, group: Group, clips: Sequence[Clip] | None = None) -> GroupPlan:
    """What has to be written so that the group holds its clips.

    Clips that the dataset already has keep their place, even when `clips` leaves them out; their metadata (scores, terms, ...) are
    taken from `clips`. New ones form a new batch behind them. A group that exists keeps its shard size.

    Args:
      root: dataset directory.
      group: "frames" or a further group.
      clips: with splits assigned, for "frames"; a further group always covers the dataset's own clips.

    Raises:
      KeySyncError: the group exists with other columns or settings, a clip changed its length or split, or there is no clip.
    """
    directory = group.directory(root)
    if (directory / GROUP_FILE).exists():
        held = layout.read_group(directory, finished=False).group
        check_settings(held, group, directory)
        group = held
    existing = layout.read_clips(root) if group.name != BASE or (epath.Path(root) / INDEX_FILE).exists() else []
    if group.name == BASE:
        existing = _merge(existing, clips or (), root)
    elif clips is not None:
        raise KeySyncError(f"column group {group.name!r} covers the clips of {root}; give no clips")
    else:
        _check_beside(root, group)
    ordered = order_clips(existing)
    if not ordered:
        raise KeySyncError(f"no clips to write to {root}; every input was dropped or none was given")
    return GroupPlan(group, tuple(ordered), tuple(plan_shards(ordered, group.frames_per_shard)))


def write_shard(root: epath.PathLike, group: Group, shard: Shard, load: Load) -> WrittenShard:
    """Write one shard, unless it is there with the right checksum record.

    A local shard is written under a temporary name and renamed; for gs:// it is written locally and copied, which that store makes
    visible only when complete. Two workers may write the same shard: both write the same bytes.

    Raises:
      KeySyncError: values that cannot be stored (see `records.encode_clip`), or the file system refuses.
    """
    directory = group.directory(root)
    target = directory / group.shard_name(shard.split, shard.index)
    digest = _plan_digest(group, shard)
    done = _finished(target, digest)
    if done is not None:
        return WrittenShard(done, skipped=True)
    (directory / CHECKSUM_DIR).mkdir(parents=True, exist_ok=True)
    with replacing(target) if is_local(target) else _copied(target) as partial:
        _write_records(partial, group.writer_options, _records(group, shard, load), target)
        result = ShardFile(target.name, shard.split, shard.first_record, shard.num_records, partial.stat().length, sha256(partial))
    checksum = json.dumps({"plan": digest, **dataclasses.asdict(result)}, sort_keys=True)
    _write_text(directory / CHECKSUM_DIR / f"{target.name}.json", checksum + "\n")
    return WrittenShard(result, skipped=False)


@contextlib.contextmanager
def _copied(target: epath.Path) -> Iterator[epath.Path]:
    """A local file, for a writer that writes to no object store, which is copied to `target` when the block ends well."""
    with tempfile.TemporaryDirectory() as folder:
        partial = epath.Path(folder) / target.name
        yield partial
        partial.copy(target, overwrite=True)


def finish_group(root: epath.PathLike, plan: GroupPlan) -> GroupFile:
    """Write the metadata around the shards of `plan`, remove what no longer belongs, and set the success marker last.

    Raises:
      KeySyncError: a shard is missing or its checksum record is of another plan.
    """
    directory = plan.group.directory(root)
    files = []
    for shard in plan.shards:
        target = directory / plan.group.shard_name(shard.split, shard.index)
        done = _finished(target, _plan_digest(plan.group, shard), rehash=False)
        if done is None:
            raise KeySyncError(f"{target} has not been written for this plan; run again to write it")
        files.append(done)
    group_file = GroupFile(plan.group, tuple(files))
    from keysync_jax.data_pipeline.tfds_metadata import tfds_files

    texts = {GROUP_FILE: group_file.dumps(), **tfds_files(group_file)}
    if plan.group.name == BASE:
        texts[INDEX_FILE] = dumps(plan.clips)
    sums = {f.file: f.sha256 for f in files} | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    texts[MANIFEST_FILE] = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    (directory / SUCCESS_FILE).unlink(missing_ok=True)
    for name, text in texts.items():
        _write_text(directory / name, text)
    _remove_strays(directory, {f.file for f in files})
    _write_text(directory / SUCCESS_FILE, hashlib.sha256(texts[MANIFEST_FILE].encode()).hexdigest() + "\n")
    return group_file


def verify_group(directory: epath.PathLike) -> list[str]:
    """Names of the files of a finished group whose SHA-256 differs from the manifest (missing ones included)."""
    directory = epath.Path(directory)
    layout.read_group(directory)
    bad = []
    for line in (directory / MANIFEST_FILE).read_text().splitlines():
        digest, _, name = line.partition("  ")
        if not (directory / name).exists() or sha256(directory / name) != digest:
            bad.append(name)
    return bad


def _check_beside(root: epath.PathLike, group: Group) -> None:
    """A further group must fit the finished dataset that it belongs to."""
    others = [epath.Path(root) / layout.COLUMNS_DIR / name for name in layout.column_groups(root) if name != group.name]
    for directory in [epath.Path(root), *others]:
        other = layout.read_group(directory).group
        taken = sorted({c.name for c in other.columns} & {c.name for c in group.columns})
        if taken:
            raise KeySyncError(f"column {taken[0]!r} is already in {directory}; give the new column another name")
        if other.crop_size != group.crop_size:
            raise KeySyncError(f"column group {group.name!r} is for crops of {group.crop_size} but {directory} has {other.crop_size}")


def check_settings(old: Group, new: Group, directory: epath.PathLike) -> None:
    """Refuse to add to a group that was made otherwise.

    Raises:
      KeySyncError: names what differs (crop size, columns, encoder weights, seed, ...), with both values.
    """
    for field in ("crop_size", "columns", "info", "writer_options"):  # the crop size first, since columns follow from it
        difference = _difference("" if field == "info" else field.replace("_", " "), _plain(old, field), _plain(new, field))
        if difference:
            raise KeySyncError(f"{directory} was made with {difference}; use the same model, seed and settings, or another directory")


def _plain(group: Group, field: str) -> Any:
    """A field as the JSON value that it becomes on disk; columns by name."""
    value = {c.name: f"{c.dtype}{list(c.shape)}" for c in group.columns} if field == "columns" else getattr(group, field)
    return json.loads(json.dumps(value, default=dict))


def _difference(name: str, before: Any, now: Any) -> str:
    """Where two JSON values differ: each leaf with both values, "" when they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = (_difference(f"{name} {key}".strip(), before.get(key), now.get(key)) for key in sorted({**before, **now}))
        return ", ".join(part for part in parts if part)
    return "" if before == now else f"{name} {before} (now {now})"


def _merge(existing: Sequence[Clip], clips: Sequence[Clip], root: epath.PathLike) -> list[Clip]:
    merged = {c.id: c for c in existing}
    batch = max((c.batch for c in existing), default=-1) + 1
    for clip in clips:
        old = merged.get(clip.id)
        if old is None:
            merged[clip.id] = dataclasses.replace(clip, batch=batch)
        elif old.batch == batch:
            raise KeySyncError(f"clip id {clip.id!r} occurs twice; ids must be unique")
        elif (old.num_frames, old.split) != (clip.num_frames, clip.split):
            raise KeySyncError(
                f"clip {clip.id!r} is in {root} with {old.num_frames} frames in split {old.split!r} and now comes with {clip.num_frames} "
                f"in {clip.split!r}; give it another id or write to another directory"
            )
        else:
            merged[clip.id] = dataclasses.replace(clip, batch=old.batch, fingerprint=clip.fingerprint or old.fingerprint)
    return list(merged.values())


def _records(group: Group, shard: Shard, load: Load) -> Iterator[bytes]:
    for piece in shard.pieces:
        count = 0
        for record in encode_clip(group.columns, piece.clip, piece.start, load(piece)):
            yield record
            count += 1
        if count != piece.stop - piece.start:
            raise KeySyncError(f"clip {piece.clip!r}: {count} frames were loaded for frames {piece.start} to {piece.stop - 1}")


def _write_records(path: epath.Path, options: str, records: Iterator[bytes], target: epath.Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    @contextlib.contextmanager
    def named():
        try:
            yield
        except RuntimeError as error:  # how ArrayRecord reports a full disk
            raise KeySyncError(f"{target} could not be written: {error}") from error

    with named():
        writer = ArrayRecordWriter(os.fspath(path), options)
    try:
        for record in records:  # errors of loading pass unchanged
            with named():
                writer.write(record)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error is the one to report
            writer.close()
        raise
    with named():
        writer.close()


def _plan_digest(group: Group, shard: Shard) -> str:
    """Changes with anything that a shard's bytes depend on."""
    settings = [layout.FORMAT, group.writer_options, list(group.crop_size), dict(group.info), [c.to_json() for c in group.columns]]
    return hashlib.sha256(json.dumps([settings, *shard], sort_keys=True).encode()).hexdigest()


def _finished(target: epath.Path, plan_digest: str, rehash: bool = True) -> ShardFile | None:
    """The shard's checksum record when it is of this plan and the file agrees with it."""
    path = target.parent / CHECKSUM_DIR / f"{target.name}.json"
    if not path.exists() or not target.exists():
        return None
    try:
        values = json.loads(path.read_text())
        matches = values.pop("plan") == plan_digest
        record = ShardFile(**values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged record: the shard is simply written again
    if not matches or target.stat().length != record.bytes or (rehash and sha256(target) != record.sha256):
        return None
    return record


def _remove_strays(directory: epath.Path, keep: set[str]) -> None:
    """Delete temporary files, and shards that this writer made and that are no longer part of the group."""
    for path in directory.iterdir():
        if path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)
    for path in (directory / CHECKSUM_DIR).iterdir():
        name = path.name.removesuffix(".json")
        if name not in keep:
            (directory / name).unlink(missing_ok=True)
            path.unlink()


def _write_text(path: epath.Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text)
