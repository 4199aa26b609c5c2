"""The driver: starts workers, notices at once when one dies or takes too long, counts that against the item in hand, and starts another."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from keysync_jax.batch.faults import MachineFault
from keysync_jax.batch.ledger import CLAIMED, FAILED, OPEN, Claim, Ledger
from keysync_jax.batch.worker import Ended, Holds, WorkerSpec, work

_LOOK_S = 0.5  # how often the driver looks at clocks and counts
_PATIENCE_S = 20.0  # for a worker that was told to stop
MAX_STARTS = 3  # workers in a row that die before they take an item


class _Slot:
    """A place for a worker: the process in it, and what it has in hand."""

    def __init__(self, spec: WorkerSpec, name: str, environment: Mapping[str, str]):
        self._spec, self._name, self._environment = spec, name, environment
        self.claims: Sequence[Claim] = ()
        self.deadline, self.limit_s = float("inf"), 0.0
        self.ended = False
        self.idle_deaths = 0
        self._starts = 0
        self.process: SpawnProcess
        self.pipe: Connection
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        self._starts += 1
        self.scratch = f"{self._name}.{self._starts}"
        self.process = context.Process(target=work, args=(self._spec, self.scratch, self._environment, theirs), daemon=True)
        self.claims, self.deadline = (), float("inf")
        # Inherited: Ctrl-C, which a terminal sends to all its processes, is for this one, which stops the others.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def read(self) -> str:
        """Takes what the worker says; returns a fault of the machine, or ""."""
        while self.pipe.poll():
            try:
                said = self.pipe.recv()
            except (EOFError, OSError):
                return ""
            if isinstance(said, Holds):
                self.claims, self.limit_s = said.claims, said.limit_s
                self.deadline = time.monotonic() + said.limit_s
                if said.claims:
                    self.idle_deaths = 0
            elif isinstance(said, Ended):
                self.ended = True
                return said.fault
        return ""

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.clean()

    def clean(self) -> None:
        self.pipe.close()
        folder = self._spec.folder
        shutil.rmtree(folder.scratch / f"{self._spec.owner.pid}-{self.scratch}", ignore_errors=True)

    @property
    def last_words(self) -> str:
        code = self.process.exitcode or 0
        return f"exit status {code}" if code >= 0 else f"{signal.Signals(-code).name} ({signal.strsignal(-code)})"


class Progress(NamedTuple):
    """What the driver says now and then: items by state."""

    counts: dict[str, int]


def drive(
    spec: WorkerSpec, ledger: Ledger, workers: int, environments: Sequence[Mapping[str, str]], tell: Callable[[Progress], Any]
) -> None:
    """Has the items of the spec worked on until none is open.

    Args:
      spec: what the workers do.
      ledger: of the batch, for this process.
      workers: how many processes.
      environments: variables of each worker.
      tell: told of the counts, about twice a second.

    Raises:
      MachineFault: the machine cannot go on. The items in hand are open again.
      KeyboardInterrupt: the same, by Ctrl-C.
    """
    slots: list[_Slot] = []
    try:
        for number in range(workers):
            slots.append(_Slot(spec, f"w{number}", environments[number]))
        _watch(slots, spec, ledger, tell)
    finally:
        _stop(slots, ledger)


def _watch(slots: list[_Slot], spec: WorkerSpec, ledger: Ledger, tell: Callable[[Progress], Any]) -> None:
    told = 0.0
    while slots:
        connection.wait([each for slot in slots for each in (slot.pipe, slot.process.sentinel)], _LOOK_S)
        for slot in list(slots):
            if fault := slot.read():
                raise MachineFault(fault)
            if slot.process.exitcode is not None:
                slot.process.join()
                if fault := slot.read():  # said in its last moment
                    raise MachineFault(fault)
                slot.clean()
                slots.remove(slot)
                if not slot.ended:
                    _count(slot, ledger)
                    left = ledger.counts(spec.names)
                    if left[OPEN] or (left[CLAIMED] and not slots):
                        slot.start()
                        slots.append(slot)
            elif time.monotonic() > slot.deadline:
                _too_long(slot, ledger)
                slot.start()
        if time.monotonic() - told >= _LOOK_S:
            told = time.monotonic()
            tell(Progress(ledger.counts(spec.names)))
    tell(Progress(ledger.counts(spec.names)))


def _count(slot: _Slot, ledger: Ledger) -> None:
    """Counts a death against what the worker had in hand."""
    reason = slot.last_words
    for claim in slot.claims:
        ledger.died(claim, reason)
    if not slot.claims:
        slot.idle_deaths += 1
        if slot.idle_deaths >= MAX_STARTS:
            raise MachineFault(f"workers end before they take an item: {reason}")


def _too_long(slot: _Slot, ledger: Ledger) -> None:
    claims, limit = slot.claims, slot.limit_s
    slot.kill()
    if not claims:
        raise MachineFault(f"a worker took no item within {limit:g} s; is the model's place or the device stuck?")
    for claim in claims:
        if len(claims) == 1:
            ledger.finish(claim, FAILED, {"reason": f"it exceeded its time of {limit:g} s (--item-timeout)", "ended": time.time()})
        else:
            ledger.died(claim, "it exceeded its time together with others")


def _stop(slots: Sequence[_Slot], ledger: Ledger) -> None:
    """Ends workers that are left; what they have in hand is open again."""
    alive = [slot for slot in slots if slot.process.exitcode is None]
    for slot in alive:
        slot.process.terminate()
    end = time.monotonic() + _PATIENCE_S
    try:
        for slot in alive:
            slot.process.join(max(0.0, end - time.monotonic()))
    finally:  # a second Ctrl-C ends the waiting
        for slot in slots:
            with contextlib.suppress(MachineFault, OSError):
                slot.read()
            claims = slot.claims
            slot.kill()
            for claim in claims:
                with contextlib.suppress(MachineFault):  # a full disk: the claim lapses with this process
                    ledger.release(claim)


def worker_environments(workers: int) -> list[dict[str, str]]:
    """Which of the host's GPUs each worker sees: shared out where there are at least as many as workers, else all of them.

    Raises:
      MachineFault: more workers than GPUs, which one process each would fill.
    """
    gpus = _gpus()
    if workers == 1 or not gpus:
        return [{} for _ in range(workers)]
    if workers > len(gpus):
        raise MachineFault(f"{workers} workers are more than the {len(gpus)} GPUs of this host; give --workers {len(gpus)}")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[number::workers])} for number in range(workers)]


def _gpus() -> list[str]:
    """The GPUs that this process may use; asked without JAX, which would take them."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each.strip() for each in visible.split(",") if each.strip() and each.strip() != "-1"]
    try:
        return [str(number) for number, _ in enumerate(sorted(os.listdir("/proc/driver/nvidia/gpus")))]
    except OSError:
        return []
