"""The two Apache Beam jobs: items (curation and features) and shards. The same code on every runner.

Elements carry no data, only which item or shard is meant; results are files in the work folder and the dataset (`work`, `shards`).
So a job that died is simply run again: what is finished is recognised and passed over.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils import shared

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError, UsageError, first_line
from keysync_jax.core.memory import peak_bytes
from keysync_jax.data_pipeline import shards as shard_writer
from keysync_jax.data_pipeline.dataset_layout import Group
from keysync_jax.data_pipeline.prepare import analyse as curation_stages
from keysync_jax.data_pipeline.prepare import features as feature_stages
from keysync_jax.data_pipeline.prepare import scorers as scorer_plugins
from keysync_jax.data_pipeline.prepare import work_state as state
from keysync_jax.data_pipeline.prepare.analyse import Analysis, Tools
from keysync_jax.data_pipeline.prepare.frame_table import FrameTables
from keysync_jax.data_pipeline.prepare.groups import FeaturePlan
from keysync_jax.data_pipeline.prepare.item import Candidate, ClipWork, Drop, Item
from keysync_jax.data_pipeline.prepare.settings import Curation
from keysync_jax.data_pipeline.prepare.shot_bounds import check_package
from keysync_jax.data_pipeline.prepare.supervise import Marks, run_supervised
from keysync_jax.data_pipeline.prepare.work import file_digest
from keysync_jax.data_pipeline.prepare.work_state import Folders
from keysync_jax.data_pipeline.shard_plan import Piece, Shard
from keysync_jax.media import faces

log = logging.getLogger(__name__)

_FAILED = "failed"  # key of an entry that must be tried again
# What ends a run, since no other item would fare better: no room, or a file system that takes no files.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class _Opened:
    """Something that is costly to open, shared by the threads of a worker."""

    def __init__(self, value: Any):
        self.value = value


class Analyse(beam.DoFn):
    """Item -> the same item, after its analysis is in the work folder."""

    def __init__(self, curation: Curation, folders: Folders, marks: Marks):
        self._curation, self._folders, self._marks = curation, folders, marks

    def setup(self) -> None:
        self._marks.end_with_pipeline()
        # One detector per DoFn instance: it follows faces from frame to frame and must not be shared by threads.
        self._open_faces = functools.cache(functools.partial(open_faces, self._curation))
        self._scorers = open_scorers(self._curation)
        self._tables = FrameTables(self._folders.frame_tables)

    def process(self, item: Item) -> Iterator[Item]:
        with self._marks.holding(item.id):
            self._analyse(item)
        yield item

    def _analyse(self, item: Item) -> None:
        if item.problem:
            self._save(item, _FAILED, Analysis([], [Drop(item.path, item.id, "", "input", item.reason, item.problem)], {}, {}))
            return
        try:
            key = curation_stages.item_key(item, self._curation)
        except (OSError, ValueError) as error:  # the latter: a name that no file can have
            words = getattr(error, "strerror", None) or str(error)
            other = getattr(error, "filename", None)
            if other and os.fspath(other) != item.path:
                words = f"{other}: {words}"
            self._save(item, _FAILED, Analysis([], [Drop(item.path, item.id, "", "probe", "unreadable", words)], {}, {}))
            return
        held = self._folders.analyses.load(item.id, key)
        if held is None:
            self._save(item, *self._analysed(item, key))
        elif Item.from_json(held.values["item"]) != item:
            # The files are the same, but lie elsewhere, or the manifest says something else about them (speaker, terms, sidecars).
            drops = [{**drop, "path": item.path} for drop in held.values["drops"]]
            self._folders.analyses.save(item.id, key, {**held.values, "item": item.to_json(), "drops": drops}, held.arrays)

    def _analysed(self, item: Item, key: str) -> tuple[str, Analysis]:
        detector = None if item.landmarks else self._open_faces()
        try:
            return key, curation_stages.analyse(item, self._curation, Tools(detector, self._scorers, self._tables))
        except Exception as error:  # one bad item never kills a run: it is reported, and tried again by the next run
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            log.error("%s: %s", item.path, traceback.format_exc())
            return _FAILED, Analysis([], [_internal(item, "", "analyse", error)], {}, {})

    def _save(self, item: Item, key: str, analysis: Analysis) -> None:
        save_analysis(self._folders, item, key, analysis)


def save_analysis(folders: Folders, item: Item, key: str, analysis: Analysis) -> None:
    """Store what was found out about an item; key `_FAILED` has the next run try again."""
    values = {
        "item": item.to_json(), "candidates": [vars(c) for c in analysis.candidates], "drops": [d._asdict() for d in analysis.drops],
        "facts": analysis.facts,
    }  # fmt: skip
    folders.analyses.save(item.id, key, values, analysis.arrays)


def put_item_aside(folders: Folders, item: Item, reason: str) -> None:
    """Drop an item that killed its worker twice: before its analysis was there, whole; else the clips that still lack features."""
    analysis = folders.analyses.load(item.id)
    if analysis is None or not state.candidates(analysis):
        save_analysis(folders, item, _FAILED, Analysis([], [Drop(item.path, item.id, "", "analyse", "killed_worker", reason)], {}, {}))
        return
    clips = state.candidates(analysis)
    drops = [Drop(item.path, item.id, clip.id, "features", "killed_worker", reason, clip.num_frames / FRAME_RATE) for clip in clips]
    folders.encoded.save(item.id, "", _encoded(drops, {}, None))


def open_scorers(curation: Curation) -> dict[str, Any]:
    """The scorers that are on, by kind."""
    return {kind: scorer_plugins.open_scorer(kind, plugin, path) for kind, plugin, path in curation.scorers}


def open_faces(curation: Curation) -> faces.FaceBackend:
    """The landmark detector."""
    return faces.open_backend(curation.faces, **({"weights": curation.face_weights} if curation.face_weights else {}))


def check_tools(items: Sequence[Item], curation: Curation) -> None:
    """Open what the workers will need, so that what is missing is said here, once, and not by a worker.

    Raises:
      KeySyncError, UsageError: see `scorers.open_scorer`, `faces.open_backend` and `shots.check_package`.
    """
    check_package()
    open_scorers(curation)
    if not all(item.landmarks or item.problem for item in items):
        open_faces(curation)


class Encode(beam.DoFn):
    """Item -> its id, after the features of its clips are in the work folder."""

    def __init__(self, plan: FeaturePlan, folders: Folders, written: Mapping[str, Mapping[str, str]], handle: shared.Shared, marks: Marks):
        self._plan, self._folders, self._written, self._handle, self._marks = plan, folders, written, handle, marks

    def setup(self) -> None:
        self._marks.end_with_pipeline()
        feature_stages.settle_jax()
        self._encoders = self._handle.acquire(lambda: _Opened(feature_stages.Encoders(self._plan))).value

    def process(self, item: Item) -> Iterator[str]:
        with self._marks.holding(item.id):
            self._encode(item)
        yield item.id

    def _encode(self, item: Item) -> None:
        analysis = self._folders.analyses.load(item.id)
        if analysis is None:
            raise KeySyncError(f"the analysis of {item.path} vanished from {self._folders.work}; is it on a disk that all workers share?")
        seconds: dict[str, float] = {}
        drops = encode_item(item, analysis, self._plan, self._encoders, self._folders, self._written, seconds)
        before = self._folders.encoded.load(item.id)
        if before is None or drops or seconds or before.values["drops"]:
            self._folders.encoded.save(item.id, "", _encoded(drops, seconds, before.values if before else None))


def _encoded(drops: list[Drop], seconds: dict[str, float], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is kept of an item's encoding; kinds of work that an earlier run did keep the time that they took then."""
    memory = round(peak_bytes() / 2**20, 1)
    if before is not None:
        seconds = {k: max(seconds.get(k, 0.0), before["seconds"].get(k, 0.0)) for k in {**before["seconds"], **seconds}}
        memory = max(memory, before["peak_memory_mb"])
    return {"drops": [d._asdict() for d in drops], "seconds": seconds, "peak_memory_mb": memory}


def sidecar_digests(item: Item, groups: Iterable[Group]) -> dict[str, str]:
    """Content hashes of the sidecars that only some of the column groups read, by group.

    Raises:
      KeySyncError: a sidecar that the manifest names is not there.
    """
    names = {group.name for group in groups}
    digests = {}
    for name, path in (("emotion", item.emotion), ("occluder", item.occluder)):
        if path and name in names:
            try:
                digests[name] = file_digest(path)
            except OSError as error:
                raise KeySyncError(f"{name} sidecar {path}: {error.strerror or error}") from error
    return digests


def encode_item(
    item: Item, analysis: Any, plan: FeaturePlan, encoders: feature_stages.Encoders, folders: Folders,
    written: Mapping[str, Mapping[str, str]], seconds: dict[str, float], only: Iterable[str] | None = None,
) -> list[Drop]:  # fmt: skip
    """Compute and store what an item's clips lack.

    Args:
      written: what the finished dataset holds, see `state.written_clips`.
      seconds: work per feature is added here.
      only: ids of the clips to look at; None for all.

    Returns:
      One drop per clip whose values could not be computed.

    Raises:
      EncoderError: a network cannot be opened. OSError: a disk is full or cannot be written to.
    """
    drops: list[Drop] = []
    work: list[ClipWork] = []
    clips = [c for c in state.candidates(analysis) if only is None or c.id in only]
    clips = [c for c in clips if any(written.get(g.name, {}).get(c.id) != c.fingerprint for g in plan.groups)]
    stored: set[str] = set()
    try:
        sidecars = sidecar_digests(item, plan.groups) if clips else {}
        for clip in clips:
            if groups := state.missing_groups(folders, plan, clip, sidecars, written):
                work.append(state.clip_work(analysis, clip, groups))
        for entry, values in feature_stages.compute(item, work, plan, encoders, seconds) if work else ():
            if isinstance(values, KeySyncError):
                drops.append(_feature_drop(item, entry.clip, str(values)))
                continue
            for group in entry.groups:
                key = state.feature_key(plan, group, entry.clip, sidecars)
                folders.features.save(feature_stages.entry_name(group, entry.clip.id), key, {"clip": entry.clip.id}, values[group.name])
            stored.add(entry.clip.id)
    except feature_stages.EncoderError:
        raise
    except KeySyncError as error:  # the file or a sidecar changed or vanished since it was analysed
        drops += [_feature_drop(item, clip, str(error)) for clip in _open(clips, work, stored, drops)]
    except Exception as error:  # as in Analyse: reported, and tried again by the next run
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        log.error("%s: %s", item.path, traceback.format_exc())
        drops += [_internal(item, clip.id, "features", error, clip.num_frames / FRAME_RATE) for clip in _open(clips, work, stored, drops)]
    return drops


def _open(clips: list[Candidate], work: list[ClipWork], stored: set[str], drops: list[Drop]) -> list[Candidate]:
    """Clips that an error leaves without their values: those at work, or all when the error came before the work was laid out."""
    settled = stored | {drop.clip for drop in drops}
    return [clip for clip in ([entry.clip for entry in work] or clips) if clip.id not in settled]


def _feature_drop(item: Item, clip: Candidate, detail: str) -> Drop:
    return Drop(item.path, item.id, clip.id, "features", "bad_features", detail, clip.num_frames / FRAME_RATE)


def _internal(item: Item, clip: str, stage: str, error: Exception, seconds: float = 0.0) -> Drop:
    return Drop(item.path, item.id, clip, stage, "internal_error", f"{type(error).__name__}: {error}", seconds)


class WriteShard(beam.DoFn):
    """(group, shard) -> the shard's file name, after it is written (or found finished)."""

    def __init__(self, plan: FeaturePlan, folders: Folders, handle: shared.Shared, marks: Marks):
        self._plan, self._folders, self._handle, self._marks = plan, folders, handle, marks

    def setup(self) -> None:
        self._marks.end_with_pipeline()
        feature_stages.settle_jax()
        self._encoders = self._handle.acquire(lambda: _Opened(feature_stages.Encoders(self._plan))).value

    def process(self, element: tuple[Group, Shard]) -> Iterator[str]:
        group, shard = element
        name = group.shard_name(shard.split, shard.index)
        start = time.perf_counter()
        try:
            with self._marks.holding(name):
                done = shard_writer.write_shard(self._folders.output, group, shard, functools.partial(self._load, group))
        except KeySyncError as error:
            self._folders.shard_errors.save(name, "", {"message": str(error)})
            return
        if not done.skipped:
            memory = round(peak_bytes() / 2**20, 1)
            figures = {"bytes": done.shard.bytes, "records": shard.num_records, "peak_memory_mb": memory}
            values = {"seconds": time.perf_counter() - start, **figures}
            self._folders.shard_times.save(name, "", values)
        yield name

    def _load(self, group: Group, piece: Piece) -> Mapping[str, Any]:
        """Values of a piece from the work folder; computed when they are not there (discarded after an earlier run, damaged)."""
        item_id = piece.clip.rpartition("-")[0]
        analysis = self._folders.analyses.load(item_id)
        clip = next((c for c in state.candidates(analysis) if c.id == piece.clip), None) if analysis else None
        if analysis is None or clip is None:
            raise KeySyncError(f"clip {piece.clip!r} must be written again, but its input is not known any more; list it in the manifest")
        item = Item.from_json(analysis.values["item"])
        sidecars = sidecar_digests(item, [group])
        name, key = feature_stages.entry_name(group, clip.id), state.feature_key(self._plan, group, clip, sidecars)
        entry = self._folders.features.load(name, key)
        if entry is None:
            self._folders.features.remove(name)
            drops = encode_item(item, analysis, self._plan, self._encoders, self._folders, {}, {}, only=[clip.id])
            entry = self._folders.features.load(name, key)
            if entry is None:
                raise KeySyncError(f"{item.path}: {drops[0].detail if drops else 'its features could not be stored'}")
        return feature_stages.rows(entry.arrays, group, piece.start, piece.stop)


def run_items(
    items: Sequence[Item], curation: Curation, plan: FeaturePlan, folders: Folders, written: Mapping[str, Mapping[str, str]],
    flags: Sequence[str],
) -> None:  # fmt: skip
    """Curate all items and compute the features of their clips. An item that kills its worker twice is put aside.

    Raises:
      KeySyncError: a disk is full or cannot be written to, or a network cannot be opened.
    """
    run = functools.partial(_run_items, items, curation, plan, folders, written, flags)
    if not _has_processes(flags):
        run((), "")
        return
    by_id = {item.id: item for item in items}
    run_supervised(run, lambda name, reason: put_item_aside(folders, by_id[name], reason))


def _run_items(
    items: Sequence[Item], curation: Curation, plan: FeaturePlan, folders: Folders, written: Mapping[str, Mapping[str, str]],
    flags: Sequence[str], aside: Collection[str], marks: str,
) -> None:  # fmt: skip
    items = [item for item in items if item.id not in aside]
    if not items:
        return
    with _running(flags, folders) as pipeline:
        (
            pipeline
            | "items" >> beam.Create(list(items))
            | "spread items" >> beam.Reshuffle()
            | "curate" >> beam.ParDo(Analyse(curation, folders, Marks(marks)))
            | "spread clips" >> beam.Reshuffle()
            | "encode" >> beam.ParDo(Encode(plan, folders, written, shared.Shared(), Marks(marks)))
        )


def run_shards(work: Sequence[tuple[Group, Shard]], plan: FeaturePlan, folders: Folders, flags: Sequence[str]) -> None:
    """Write shards.

    Raises:
      KeySyncError: the first of the errors that workers met.
    """
    for name in folders.shard_errors.names():
        folders.shard_errors.remove(name)
    run = functools.partial(_run_shards, work, plan, folders, flags)
    if _has_processes(flags):
        run_supervised(run, lambda name, reason: folders.shard_errors.save(name, "", {"message": f"{name} cannot be written: {reason}"}))
    else:
        run((), "")
    for name in folders.shard_errors.names():
        error = folders.shard_errors.load(name)
        raise KeySyncError(error.values["message"] if error else f"shard {name} could not be written")


def _run_shards(
    work: Sequence[tuple[Group, Shard]], plan: FeaturePlan, folders: Folders, flags: Sequence[str], aside: Collection[str], marks: str
) -> None:
    work = [(group, shard) for group, shard in work if group.shard_name(shard.split, shard.index) not in aside]
    if not work:
        return
    with _running(flags, folders) as pipeline:
        (
            pipeline
            | "shards" >> beam.Create(list(work))
            | "spread shards" >> beam.Reshuffle()
            | "write" >> beam.ParDo(WriteShard(plan, folders, shared.Shared(), Marks(marks)))
        )


def _has_processes(flags: Sequence[str]) -> bool:
    """Whether the pipeline has worker processes on this machine, which may die."""
    return any(flag == "--direct_running_mode=multi_processing" for flag in flags)


@contextlib.contextmanager
def _running(flags: Sequence[str], folders: Folders) -> Iterator[beam.Pipeline]:
    """A pipeline that runs when the block ends. Beam wraps what stopped a worker into its own error, many lines long: this unwraps it."""
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)  # it logs what is raised anyway
    try:
        with feature_stages.as_it_was(), _pipeline(flags) as pipeline:
            yield pipeline
    except (RuntimeError, KeySyncError) as error:
        words = (str(error).strip().splitlines() or [""])[-1]
        words = re.sub(r" \[while running .*", "", words)
        if words == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        if isinstance(error, UsageError):  # of `_pipeline`
            raise
        if isinstance(error, KeySyncError):
            raise type(error)(words) from error
        if found := re.fullmatch(r"[\w.]*(?:KeySyncError|EncoderError): (.*)", words):
            raise KeySyncError(found[1]) from error
        if found := re.search(r"\[Errno \d+\].*", words):
            where = f"{folders.work} and {folders.output}"
            raise KeySyncError(f"{found[0]} ({where}); the same command goes on from here once that is mended") from error
        raise


def _pipeline(flags: Sequence[str]) -> beam.Pipeline:
    options = PipelineOptions(list(flags))
    runner = options.get_all_options().get("runner")
    if runner not in (None, "DirectRunner"):
        try:
            return beam.Pipeline(options=options)
        except (ValueError, ImportError, AttributeError) as error:  # no such runner
            raise UsageError(f"Apache Beam takes no runner {runner!r}: {first_line(error)}") from error
    # Beam's own choice for "DirectRunner" first looks for another runner's binary on the network; this is the engine it falls back to.
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle

    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))
    return beam.Pipeline(runner=fn_runner.FnApiRunner(provision_info=info), options=options)


def beam_flags(workers: int, extra: Sequence[str] = ()) -> list[str]:
    """Flags of a run: `workers` local processes unless `extra` names another runner."""
    flags = list(extra)
    if any(flag.startswith("--runner") and "DirectRunner" not in flag for flag in flags):
        return flags
    if workers > 1:
        flags += [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
    return [*flags, "--default_sdk_harness_log_level=ERROR"]  # Beam's own workers are chatty


def worker_environment() -> None:
    """Settings that worker processes inherit from this one."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GLOG_minloglevel", "2")
