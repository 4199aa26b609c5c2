"""A worker: one process that claims items, works on them, and enters what became of each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from keysync_jax.batch import faults
from keysync_jax.batch.folders import BatchFolder
from keysync_jax.batch.inputs import unfit
from keysync_jax.batch.job_list import Job
from keysync_jax.batch.ledger import BEAT_S, CLAIMED, DONE, FAILED, OPEN, REVIEW, Claim, Ledger
from keysync_jax.batch.owner import Owner
from keysync_jax.core import cpu
from keysync_jax.core.errors import KeySyncError, in_one_line
from keysync_jax.core.files import write_text
from keysync_jax.core.processes import end_with_parent
from keysync_jax.data_pipeline.prepare.work import digest
from keysync_jax.media import provenance

log = logging.getLogger(__name__)

_IDLE_S = 0.5  # between two looks for an item that another worker may give back


class Task(NamedTuple):
    """What the work is told of an item: its job, and a file of its own in scratch that shall become the output."""

    job: Job
    target: Path


class Outcome(NamedTuple):
    """What the work made of an item.

    Attributes:
      review: why a person should look at it; empty for nothing.
      values: for the report, JSON values.
      report: the whole report of the dub, JSON values.
      strip: thumbnails, a JPEG.
    """

    review: Sequence[str]
    values: Mapping[str, Any]
    report: Mapping[str, Any] | None = None
    strip: bytes | None = None


class Work(Protocol):
    """What a worker does with items, opened once in each worker (`WorkerSpec.open`).

    Attributes:
      together: how many items to take at once.
    """

    together: int

    def limit_s(self, job: Job) -> float:
        """How long the item may take, seconds; called before `run`, with files that are there."""
        ...

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome | Exception]:
        """The outcome of each task, in order: `target` stands complete, or why it does not."""
        ...

    def check(self) -> None:
        """Called after an item failed. Raises MachineFault if the device, the model or the like is not what it was."""
        ...


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """What all workers of a batch have in common; it is sent to their processes.

    Attributes:
      folder: of the batch.
      open: gives the work; importable, or a partial of something importable.
      names: the items to take from.
      owner: the driver.
      item_timeout: seconds an item may take; None asks the work.
    """

    folder: BatchFolder
    open: Callable[[], Work]
    names: Collection[str]
    owner: Owner
    item_timeout: float | None = None


# What a worker tells its driver.
class Holds(NamedTuple):
    """These items are in hand, and may take so long, together, from now on."""

    claims: Sequence[Claim]
    limit_s: float


class Ended(NamedTuple):
    """There is nothing more to do; or the machine is at fault, or the batch cannot be done at all: why."""

    fault: str = ""


_BEFORE_LENGTH_S = 900.0  # to find out how long an item is
_OPENING_S = 3600.0  # to load a model, perhaps over a network
_NO_LIMIT = math.inf


def work(spec: WorkerSpec, name: str, environment: Mapping[str, str], pipe: Connection) -> None:
    """The process: works until no item is left, then says so.

    SIGTERM gives back what is in hand. The driver keeps Ctrl-C from us.
    """
    os.environ.update(environment)
    cpu.prepare()
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ended = Ended()
    try:
        try:
            with _Worker(spec, name, pipe.send) as worker:
                worker.loop()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until the reason is told
    except KeyboardInterrupt:
        ended = Ended("stopped")
    except faults.MachineFault as error:
        ended = Ended(str(error))
    except Exception as error:
        log.error("%s", traceback.format_exc())
        ended = Ended(faults.machine_fault(error) or in_one_line(error))
    pipe.send(ended)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an end while libraries clean up is quiet


class _Worker:
    """Claims, works, enters; a thread says of the items in hand that they are."""

    def __init__(self, spec: WorkerSpec, name: str, tell: Callable[[Any], object]):
        self._spec, self._tell = spec, tell
        self._scratch = spec.folder.new_scratch(spec.owner, name)
        self._ledger = spec.folder.open_ledger()
        self._held: dict[str, Claim] = {}
        self._lost: set[str] = set()
        self._closing = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._lock = threading.Lock()
        # Libraries' own temporary files vanish with ours.
        tempfile.tempdir = os.fspath(self._scratch)

    def __enter__(self) -> _Worker:
        self._beats.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._beats.join()
        try:
            for claim in list(self._held.values()):
                self._ledger.release(claim)
        finally:
            self._ledger.close()
            tempfile.tempdir = None
            shutil.rmtree(self._scratch, ignore_errors=True)

    def loop(self) -> None:
        spec = self._spec
        faults.check_folder(spec.folder.state)
        self._tell(Holds((), _OPENING_S))
        try:
            opened = spec.open()
        except KeySyncError as error:
            raise faults.MachineFault(str(error)) from error
        self._tell(Holds((), _NO_LIMIT))
        while True:
            claims = self._ledger.claim(spec.owner, spec.names, opened.together)
            if claims:
                self._take(claims, opened)
                continue
            counts = self._ledger.counts(spec.names)
            if not counts[OPEN] and not counts[CLAIMED]:
                return
            time.sleep(_IDLE_S)

    def _take(self, claims: list[Claim], opened: Work) -> None:
        with self._lock:
            self._held = {claim.item.name: claim for claim in claims}
            self._lost.clear()
        limit = self._spec.item_timeout
        self._tell(Holds(claims, len(claims) * (_BEFORE_LENGTH_S if limit is None else limit)))
        ready: list[Claim] = []
        for claim in claims:
            if reason := unfit(claim.item.job):
                self._enter(claim, FAILED, {"reason": reason})
            else:
                ready.append(claim)
        if not ready:
            return
        if limit is None:
            self._tell(Holds(claims, sum(opened.limit_s(claim.item.job) for claim in ready)))
        folders = [self._scratch / claim.item.name for claim in ready]
        began = time.time()
        try:
            tasks = []
            for claim, folder in zip(ready, folders, strict=True):
                folder.mkdir()
                tasks.append(Task(claim.item.job, folder / f"output{Path(claim.item.job.output).suffix}"))
            for claim, task, outcome in zip(ready, tasks, opened.run(tasks), strict=True):
                if isinstance(outcome, Exception):
                    self._failed(claim, outcome, opened)
                else:
                    self._keep(claim, task, outcome, time.time() - began)
        except OSError as error:
            raise faults.MachineFault(f"{self._scratch} cannot be used: {error.strerror or error}") from error
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, claim: Claim, error: Exception, opened: Work) -> None:
        if fault := faults.machine_fault(error):
            raise faults.MachineFault(fault) from error
        faults.check_folder(self._spec.folder.state)
        opened.check()
        reason = in_one_line(error)
        values: dict[str, Any] = {"reason": reason if not isinstance(error, MemoryError) else "the host has not enough memory for it"}
        if not isinstance(error, KeySyncError):
            values["traceback"] = "".join(traceback.format_exception(error))[-4000:]
            log.error("%s: %s", claim.item.job.id, values["traceback"])
        self._enter(claim, FAILED, values)

    def _keep(self, claim: Claim, task: Task, outcome: Outcome, seconds: float) -> None:
        folder, job, name = self._spec.folder, claim.item.job, claim.item.name
        final = folder.root / job.output
        if outcome.strip is not None:
            strip = task.target.with_name("strip.jpg")
            strip.write_bytes(outcome.strip)
            os.replace(strip, folder.strip(name))
        values = {**outcome.values, "seconds": round(seconds, 3), "bytes": task.target.stat().st_size}
        values["key"] = digest(claim.item.recipe, values.get("inputs"))
        if outcome.review:
            values["review"] = list(outcome.review)
        final.parent.mkdir(parents=True, exist_ok=True)
        if not final.parent.resolve().is_relative_to(folder.root.resolve()):
            self._enter(claim, FAILED, {"reason": f"its output {job.output!r} leads out of {folder.root} over a link"})
            return
        if name in self._lost or not self._ledger.beat(claim):
            self._drop(claim)  # somebody else has it now
            return
        if provenance.beside(task.target).is_file():
            os.replace(provenance.beside(task.target), provenance.beside(final))
        os.replace(task.target, final)
        if outcome.report is not None:
            try:
                write_text(folder.report(name), _json(outcome.report))
            except KeySyncError as error:
                raise faults.MachineFault(str(error)) from error
        self._enter(claim, REVIEW if outcome.review else DONE, values)

    def _enter(self, claim: Claim, state: str, values: Mapping[str, Any]) -> None:
        self._ledger.finish(claim, state, {**values, "ended": time.time(), "host": self._spec.owner.host.split()[0]})
        self._drop(claim)

    def _drop(self, claim: Claim) -> None:
        with self._lock:
            self._held.pop(claim.item.name, None)
            left = list(self._held.values())
        if not left:
            self._tell(Holds((), _NO_LIMIT))

    def _beat(self) -> None:
        every = min(BEAT_S, self._spec.folder.lease_s / 4)
        ledger: Ledger | None = None
        while not self._closing.wait(every):
            with contextlib.suppress(faults.MachineFault, OSError):  # the thread at work meets it, too, and stops
                ledger = ledger or self._spec.folder.open_ledger()
                os.utime(self._scratch)
                with self._lock:
                    held = list(self._held.values())
                self._lost |= {claim.item.name for claim in held if not ledger.beat(claim)}
        if ledger is not None:
            ledger.close()


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, default=str) + "\n"
