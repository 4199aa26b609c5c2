"""Beam with several local worker processes, watched: a worker that is killed is noticed at once, and the item it had in hand is named.

Beam's local runner waits for ever for the answer of a worker that has died, as one does that runs out of memory. So the pipeline runs in a
process of its own. When one of its workers ends early, that process says which items the worker had in hand and ends; the pipeline is
started again and passes over what is finished. What kills its worker a second time is put aside.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from keysync_jax.core import cpu
from keysync_jax.core.errors import KeySyncError, UsageError, in_one_line
from keysync_jax.core.processes import end_with_parent, is_there, started

MAX_DEATHS = 2
_IDLE_DEATHS = 3  # in a row, of workers that have nothing in hand
_LOOK_S = 1.0
_WATCH = "end_with_pipeline"
_WORKER_THREAD = "run_worker"  # Beam's thread that waits for a worker's process, and raises when that ends early


class Died(NamedTuple):
    """A worker's end: in Beam's words, and what it had in hand."""

    words: str
    in_hand: tuple[str, ...]


class _Failed(NamedTuple):
    words: str
    usage: bool
    ours: bool


class Marks:
    """Which worker has what in hand: a file each, in a folder of this machine that all workers see.

    Made in the pipeline's process and sent to its workers.

    Args:
      folder: where; "" keeps no marks.
    """

    def __init__(self, folder: str):
        self._folder, self._pipeline = folder, os.getpid()

    def end_with_pipeline(self) -> None:
        """To be called in a worker: it ends when the process of its pipeline does, which it would wait for for ever."""
        if self._folder and os.getpid() != self._pipeline and not any(thread.name == _WATCH for thread in threading.enumerate()):
            threading.Thread(target=self._watch, name=_WATCH, daemon=True).start()

    def _watch(self) -> None:
        while is_there(self._pipeline):
            time.sleep(_LOOK_S)
        os._exit(1)

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """The element is in this process's hand until the block ends."""
        if not self._folder:
            yield
            return
        path = Path(self._folder) / f"{name}.{os.getpid()}"
        path.touch()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def of_the_dead(self) -> tuple[str, ...]:
        """What processes had in hand that are gone."""
        names = []
        for path in Path(self._folder).iterdir():
            name, _, pid = path.name.rpartition(".")
            if not is_there(int(pid)):
                names.append(name)
        return tuple(sorted(names))


def run_supervised(run: Callable[[Collection[str], str], object], put_aside: Callable[[str, str], object]) -> None:
    """Runs a pipeline until it ends well.

    Args:
      run: takes the names of elements to leave out and the folder for `Marks`; importable, or a partial of something importable. It runs in
        a process of its own, more than once if workers die, and must pass over what is finished.
      put_aside: told of an element that killed its worker twice, and why.

    Raises:
      KeySyncError: the pipeline failed, or workers die with nothing in hand.
    """
    deaths: Counter[str] = Counter()
    idle = 0
    while True:
        folder = tempfile.mkdtemp(prefix="keysync-prepare-")
        aside = [name for name, count in deaths.items() if count >= MAX_DEATHS]
        try:
            end = _run_once(run, aside, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if end is None:
            return
        deaths.update(end.in_hand)
        idle = 0 if end.in_hand else idle + 1
        what = " and ".join(end.in_hand) or "nothing yet"
        print(f"keysync: a worker died ({end.words}); it had in hand: {what}; going on", file=sys.stderr, flush=True)
        if idle >= _IDLE_DEATHS:
            raise KeySyncError(f"workers die before they take an item ({end.words}); is there too little memory for so many --workers?")
        for name in end.in_hand:
            if deaths[name] == MAX_DEATHS:
                put_aside(name, f"its worker died {MAX_DEATHS} times while it was in hand ({end.words})")


def _run_once(run: Callable[[Collection[str], str], object], aside: Collection[str], folder: str) -> Died | None:
    """None if the pipeline ended well."""
    with started(_pipeline, run, aside, folder) as (process, reader):
        try:
            said = reader.recv()
        except EOFError:
            process.join()
            return Died(f"the pipeline's process ended with {process.exitcode}", Marks(folder).of_the_dead())
    if isinstance(said, _Failed):
        raise (UsageError if said.usage else KeySyncError if said.ours else RuntimeError)(said.words)
    return said


def _pipeline(writer: Connection, run: Callable[[Collection[str], str], object], aside: Collection[str], folder: str) -> None:
    cpu.prepare()
    end_with_parent()
    usual, lock = threading.excepthook, threading.Lock()

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.thread is None or args.thread.name != _WORKER_THREAD:
            usual(args)
            return
        with lock:  # the first to come ends the process
            writer.send(Died(str(args.exc_value), Marks(folder).of_the_dead()))
            os._exit(1)

    threading.excepthook = hook
    try:
        run(aside, folder)
    except Exception as error:  # the parent reports it, whatever it is
        said = _Failed(in_one_line(error), isinstance(error, UsageError), isinstance(error, KeySyncError))
    else:
        said = None
    threading.excepthook = usual
    writer.send(said)
    writer.close()
    os._exit(0)  # Beam's threads need not be waited for; its workers end with this process
