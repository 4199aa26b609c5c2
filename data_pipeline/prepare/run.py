"""`keysync prepare`: the driver. It reads the inputs, runs the jobs, decides which clips go in, and writes the report."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from etils import epath

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.locking import only_process
from keysync_jax.data_pipeline import dataset_layout as layout
from keysync_jax.data_pipeline import shards
from keysync_jax.data_pipeline.clip_index import Clip, assign_splits
from keysync_jax.data_pipeline.dataset_layout import BASE, Group
from keysync_jax.data_pipeline.prepare import work_state as state
from keysync_jax.data_pipeline.prepare.groups import FeaturePlan, plan_features
from keysync_jax.data_pipeline.prepare.item import Drop, Item
from keysync_jax.data_pipeline.prepare.prepare_report import build_report
from keysync_jax.data_pipeline.prepare.result_bars import ResultBars
from keysync_jax.data_pipeline.prepare.settings import Curation, Output
from keysync_jax.data_pipeline.prepare.work import Entry, file_digest, write_text
from keysync_jax.data_pipeline.prepare.work_state import Folders

log = logging.getLogger(__name__)

DEAD_LETTER = "dead_letter.jsonl"
_SHARDS_PER_WORKER = 12  # starting a local process takes longer than writing fewer


class Summary(NamedTuple):
    """What a run did: clips and hours now in the dataset, what was dropped in this run's inputs, where the report is, and a warning."""

    clips: int
    hours: float
    dropped: int
    report: str
    seconds: float
    warning: str = ""
    copies: int = 0

    def __str__(self) -> str:
        length = f"{self.hours:.2f} h" if self.hours >= 1 else f"{60 * self.hours:.1f} min"
        copies = f" ({self.copies} of them copies of other files)" if self.copies else ""
        told = f"{self.clips} clips, {length}; {self.dropped} dropped{copies}; report: {self.report} ({self.seconds:.0f} s)"
        return f"{told}\n{self.warning}" if self.warning else told


def prepare(
    items: Sequence[Item],
    output: str | os.PathLike,
    model: str,
    curation: Curation,
    target: Output,
    *,
    work: str | os.PathLike | None = None,
    workers: int = 1,
    beam: Sequence[str] = (),
    quiet: bool = False,
) -> Summary:
    """Prepare a dataset, or go on with one.

    Args:
      items: see `manifest.read_inputs`.
      output: dataset directory, local or gs://.
      model: model directory for the features.
      curation: what a clip must be like; its `crop_size` must be the one that `groups.plan_features` chose.
      target: columns and shards.
      work: folder for finished work, which all workers must reach; default `.work` in `output`.
      workers: local processes (DirectRunner).
      beam: flags of Apache Beam, e.g. `--runner=FlinkRunner`.
      quiet: no progress.

    Raises:
      KeySyncError: no clip is left, the dataset was made with other settings, or shards cannot be written.
    """
    jobs = _jobs()
    began = time.monotonic()
    folders = Folders(os.fspath(output), os.fspath(work) if work is not None else state.default_work(output))
    plan = plan_features(model, target, curation.crop_size)
    state.check_dataset(output, plan.groups)
    jobs.check_tools(items, curation)
    layout.make_folder(folders.output)
    layout.make_folder(folders.work)
    flags = jobs.beam_flags(workers, beam)
    jobs.worker_environment()
    with only_process(folders.work, f"another keysync prepare is at work in {folders.work}; wait for it or give another --work"):
        folders.remove_leftovers()
        items = without_copies(items, set(folders.analyses.names()))
        _look_and_encode(jobs, items, curation, plan, folders, flags, quiet)
        analyses = {item.id: folders.analyses.load(item.id) for item in items}
        clips, dropped = gather(items, analyses, folders, curation.faces)
        write_dead_letter(output, dropped)

        def shard_flags(tasks: int) -> list[str]:
            return jobs.beam_flags(min(workers, 1 + tasks // _SHARDS_PER_WORKER), beam)

        try:
            clips = _with_splits(clips, output, target, len(items))
            _write(jobs, output, plan, clips, folders, shard_flags, quiet)
        finally:  # what was dropped, and why, is wanted most when nothing could be written
            report = build_report(items, analyses, dropped, folders, plan, curation, target, time.monotonic() - began)
            report.write(output)
        if target.discard_work:
            for name in folders.features.names():
                folders.features.remove(name)
    index = layout.read_clips(output)
    frames = sum(clip.num_frames for clip in index)
    where = os.fspath(epath.Path(output) / "report.html")
    return Summary(
        len(index),
        frames / FRAME_RATE / 3600,
        len(dropped),
        where,
        time.monotonic() - began,
        mixed(index),
        sum(drop.reason == "copy" for drop in dropped),
    )


def without_copies(items: Sequence[Item], known: Collection[str] = ()) -> list[Item]:
    """The items, of which those with the same bytes as another one's (pictures, sound, sidecars and stretch) carry that as their problem.

    Copies would else be speakers of their own and lie in several splits. Of equal ones the first stays that an earlier run knows (`known`).
    """
    by_size: dict[Any, list[Item]] = {}
    for item in items:
        if not item.problem and os.path.isfile(item.path):
            sidecars = (item.landmarks, item.audio, item.emotion, item.occluder)
            beside = [os.path.isfile(path) and file_digest(path) for path in sidecars]
            by_size.setdefault((os.path.getsize(item.path), item.start, item.stop, item.box, *beside), []).append(item)
    copies: dict[str, Item] = {}
    for group in by_size.values():
        first: dict[str, Item] = {}
        for item in sorted(group, key=lambda i: (i.id not in known, i.id)) if len(group) > 1 else ():
            one = first.setdefault(file_digest(item.path), item)
            if one is not item:
                copies[item.id] = dataclasses.replace(item, problem=f"a copy: the same bytes as {one.name}", reason="copy")
    return [copies.get(item.id, item) for item in items]


def mixed(index: Sequence[Clip]) -> str:
    """A warning where the landmarks, and so the masks, of a dataset come from several networks; clips of older versions don't say."""
    found = Counter(faces for clip in index if (faces := clip.extra.get("faces", "sidecar")) != "sidecar")
    if len(found) < 2:
        return ""
    counted = " and ".join(f"{count} by {faces}" for faces, count in sorted(found.items()))
    return f"WARNING: landmarks of {counted}: masks of the two differ, so prepare all clips with one --faces"


def _look_and_encode(
    jobs: Any, items: Sequence[Item], curation: Curation, plan: FeaturePlan, folders: Folders, flags: Sequence[str], quiet: bool
) -> None:
    """Curate the items and compute the features of their clips, as far as that is not done yet."""
    written = state.written_clips(folders.output, plan.groups)
    ids = {item.id for item in items}
    with ResultBars(quiet) as bars:
        bars.follow("look at videos", len(items), lambda: _count(folders.analyses, ids))
        bars.follow("features", len(items), lambda: _count(folders.encoded, ids))
        jobs.run_items(items, curation, plan, folders, written, flags)


def _with_splits(clips: Sequence[Clip], output: str | os.PathLike, target: Output, inputs: int) -> list[Clip]:
    """The clips with their splits; those of speakers who are in the dataset already stay with them."""
    existing = layout.read_clips(output) if (epath.Path(output) / layout.INDEX_FILE).exists() else []
    if not clips and not existing:
        raise KeySyncError(f"no clip is left of {inputs} inputs; {epath.Path(output) / DEAD_LETTER} says why")
    return assign_splits(clips, target.split_fractions, target.seed, existing)


def gather(items: Sequence[Item], analyses: dict[str, Entry | None], folders: Folders, faces: str) -> tuple[list[Clip], list[Drop]]:
    """Clips to write and everything that was left out, from the work folder, both in order of id; `faces` is the landmark backend."""
    clips, dropped = [], []
    for item in items:
        analysis = analyses[item.id]
        if analysis is None:
            raise KeySyncError(f"the analysis of {item.path} is missing from {folders.work}; run again")
        failed = state.drops(folders.encoded.load(item.id))
        bad = {drop.clip for drop in failed}
        # The manifest may have changed (speaker, terms) without the video: it is taken from the item, not from the stored one.
        clips += [state.index_clip(item, c, analysis.values["facts"], faces) for c in state.candidates(analysis) if c.id not in bad]
        dropped += state.drops(analysis) + failed
    return sorted(clips, key=lambda c: c.id), sorted(dropped, key=lambda d: (d.item, d.clip, d.stage))


def write_dead_letter(output: str | os.PathLike, dropped: Sequence[Drop]) -> None:
    """One JSON object per line: path, item, clip (empty when the whole input went), stage, reason, detail, seconds."""
    write_text(epath.Path(output) / DEAD_LETTER, "".join(json.dumps(d._asdict(), ensure_ascii=False) + "\n" for d in dropped))


def _jobs() -> Any:
    """The Beam jobs; Beam is an optional package, and importing it warns about Google Cloud packages that nobody asked for."""
    logging.disable(logging.WARNING)
    try:
        from keysync_jax.data_pipeline.prepare import jobs
    except ImportError as error:
        raise KeySyncError(f"keysync prepare needs Apache Beam ({error}); install the extra: pip install 'keysync-jax[data]'") from error
    finally:
        logging.disable(logging.NOTSET)
    return jobs


def _write(
    jobs: Any, output: Any, plan: FeaturePlan, clips: list[Clip], folders: Folders, flags: Callable[[int], list[str]], quiet: bool
) -> None:
    """Write the base group, then the others, whose clips are the dataset's."""
    base, others = plan.groups[0], plan.groups[1:]
    for groups in ([base], others):
        plans = [shards.prepare_group(output, group, clips if group.name == BASE else None) for group in groups]
        tasks: list[tuple[Group, Any]] = [(p.group, shard) for p in plans for shard in p.shards]
        if not tasks:
            continue
        title = "write frames" if groups[0] is base else "write further columns"
        paths = [group.directory(output) / layout.CHECKSUM_DIR / f"{group.shard_name(s.split, s.index)}.json" for group, s in tasks]
        with ResultBars(quiet) as bars:
            bars.follow(title, len(tasks), lambda paths=paths: sum(path.exists() for path in paths))
            jobs.run_shards(tasks, plan, folders, flags(len(tasks)))
        for group_plan in plans:
            shards.finish_group(output, group_plan)


def _count(folder: Any, ids: set[str]) -> int:
    return len(ids.intersection(folder.names()))
