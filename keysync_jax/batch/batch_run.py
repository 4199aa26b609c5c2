"""A batch from its list to its reports: what `keysync batch` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from keysync_jax.batch import batch_report
from keysync_jax.batch.batch_report import Status
from keysync_jax.batch.driver import Progress, drive, worker_environments
from keysync_jax.batch.faults import check_folder
from keysync_jax.batch.folders import BatchFolder
from keysync_jax.batch.inputs import content_digest, seen
from keysync_jax.batch.job_list import Job, check_outputs
from keysync_jax.batch.ledger import CLAIMED, DONE, FAILED, OPEN, REVIEW, Entry, Item, Ledger, item_name
from keysync_jax.batch.owner import Owner
from keysync_jax.batch.worker import Work, WorkerSpec
from keysync_jax.core.errors import KeySyncError, UsageError

# How the items are worked on, once the ledger knows them: (spec, ledger of this process, told of the counts).
Engine = Callable[[WorkerSpec, Ledger, Callable[[Progress], Any]], None]


class Shard(NamedTuple):
    """Every `of`-th item, from `number` (0 to of - 1) on."""

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`0/8` to `7/8`. Raises UsageError."""
        try:
            number, of = (int(part) for part in text.split("/"))
        except ValueError:
            raise UsageError(f"--shard {text!r} must read like 0/8") from None
        if not 0 <= number < of:
            raise UsageError(f"--shard {text}: the first number counts from 0 to {of - 1}")
        return cls(number, of)


class Done(NamedTuple):
    """What a run leaves: the whole batch's status and entries, and of this run's items how many failed."""

    status: Status
    entries: Sequence[Entry]
    failed: int


def run_batch(
    folder: BatchFolder,
    jobs: Sequence[Job],
    recipe: Mapping[str, Any],
    work: Callable[[], Work],
    *,
    shard: Shard = Shard(),
    ledger_kind: str | None = None,
    item_timeout: float | None = None,
    retry_failed: bool = False,
    engine: Engine | None = None,
    tell: Callable[[Progress], Any] = lambda _: None,
) -> Done:
    """Runs a batch, or goes on with it.

    Args:
      folder: for the outputs; made where it is not there.
      jobs: the list.
      recipe: what every result depends on beside inputs and options: model, version, microbatch.
      work: opens the work in each worker; importable, or a partial of something importable.
      shard: the part of the list that this run takes.
      ledger_kind: "sqlite", "files", or None: what is there, else what fits the file system.
      item_timeout: seconds an item may take; None: from its length.
      retry_failed: failed items are tried again.
      engine: how; default `local(1)`.
      tell: told of the counts now and then.

    Raises:
      UsageError: outputs that cannot be (see `check_outputs`), or finished items that were made with other settings or inputs.
      MachineFault: the machine cannot go on; items that were in hand are open.
      KeyboardInterrupt: Ctrl-C; the same.
    """
    check_outputs(jobs, folder.root)
    folder.create(ledger_kind)
    check_folder(folder.state)
    folder.sweep()
    ledger = folder.open_ledger()
    try:
        items = [_item(position, job, recipe) for position, job in enumerate(jobs)]
        _enter(folder, ledger, items)
        names = {item.name for item in items[shard.number :: shard.of]}
        if retry_failed:
            ledger.reopen([entry.item.name for entry in ledger.entries() if entry.state == FAILED and entry.item.name in names])
        spec = WorkerSpec(folder, work, frozenset(names), Owner.of_this_process(), item_timeout)
        try:
            counts = ledger.counts(names)
            if counts[OPEN] or counts[CLAIMED]:
                (engine or local(1))(spec, ledger, tell)
        except (KeyboardInterrupt, KeySyncError):
            with contextlib.suppress(KeySyncError):  # a full disk; `--status` writes them later
                batch_report.write_reports(folder, ledger)
            raise
        finally:
            folder.sweep()
        status, entries = batch_report.write_reports(folder, ledger)
        return Done(status, entries, ledger.counts(names)[FAILED])
    finally:
        ledger.close()


def local(workers: int) -> Engine:
    """So many processes of this host."""

    def engine(spec: WorkerSpec, ledger: Ledger, tell: Callable[[Progress], Any]) -> None:
        counts = ledger.counts(spec.names)
        number = min(workers, counts[OPEN] + counts[CLAIMED])
        drive(spec, ledger, number, worker_environments(workers), tell)

    return engine


def status(folder: BatchFolder) -> Done:
    """Where a batch stands, at any time; writes its reports anew, from the ledger alone.

    Raises:
      KeySyncError: no batch there.
    """
    ledger = folder.open_ledger()
    try:
        now, entries = batch_report.write_reports(folder, ledger)
        return Done(now, entries, now.counts[FAILED])
    finally:
        ledger.close()


def _item(position: int, job: Job, recipe: Mapping[str, Any]) -> Item:
    return Item(item_name(job.id), position, job, {**recipe, "options": dict(job.options)}, [seen(job.video), seen(job.audio)])


def _enter(folder: BatchFolder, ledger: Ledger, items: Sequence[Item]) -> None:
    """Tells the ledger of the items; refuses what would mix two batches in one folder."""
    known = {entry.item.name: entry for entry in ledger.entries()}
    outputs = {entry.item.job.output: entry.item.name for entry in known.values() if entry.state in (DONE, REVIEW)}
    again: list[str] = []
    for item in items:
        before = known.get(item.name)
        if outputs.get(item.job.output, item.name) != item.name:
            raise UsageError(f"{item.job.where}: {item.job.output} is the output of another item in {folder.root}; name another")
        if before is None:
            if (folder.root / item.job.output).exists() or (folder.root / item.job.output).is_symlink():
                raise UsageError(f"{item.job.where}: {folder.root / item.job.output} is there and is not of this batch; move it away")
            continue
        if before.state in (DONE, REVIEW):
            if difference := _difference(before, item):
                raise UsageError(
                    f"{folder.root} holds {item.job.id} made with another {difference}; give another output folder, so that they do not mix"
                )
            if not (folder.root / item.job.output).is_file():
                again.append(item.name)  # somebody has taken the output away
        elif before.state == FAILED and (dict(before.item.recipe) != dict(item.recipe) or before.item.inputs != item.inputs):
            again.append(item.name)  # it failed of something that is different now
    ledger.put(items)
    ledger.reopen(again)


def _difference(before: Entry, item: Item) -> str:
    """What is different about a finished item, in words; "" for nothing."""
    old, new = before.item.recipe, item.recipe
    for name in sorted({*old, *new} - {"options"}):
        if old.get(name) != new.get(name):
            return f"{name} ({_short(old.get(name))}, now {_short(new.get(name))})"
    options = {name for name in {*old["options"], *new["options"]} if old["options"].get(name) != new["options"].get(name)}
    for name in sorted(options):
        return f"{name} ({_short(old['options'].get(name))}, now {_short(new['options'].get(name))})"
    if before.item.job.output != item.job.output:
        return f"output name ({before.item.job.output}, now {item.job.output})"
    hashes: Mapping[str, str] = before.result.get("inputs") or {}
    for what, path, then, now in zip(("video", "audio"), (item.job.video, item.job.audio), before.item.inputs, item.inputs, strict=True):
        if list(then)[1:] != list(now)[1:] and (not now or hashes.get(what) != content_digest(path)):
            return f"{what} ({path} has changed)"
    return ""


def _short(value: Any) -> str:
    return str(value)[:24]
