"""Work in a process of its own, which ends in time and never outlives the one that started it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from keysync_jax.core import cpu
from keysync_jax.core.errors import in_one_line


class OutOfTimeError(Exception):
    """The work was not done at its deadline. The message says what became of it."""


class FailedError(Exception):
    """The work failed as a whole. The message is the reason."""


def run_apart(function: Callable[..., Iterator[Any]], *args: Any, deadline: float | None) -> Iterator[Any]:
    """Yields what a function yields in a process of its own, killed at a deadline.

    Work that hangs or takes its process down then costs the present process nothing, and the memory of a device is free afterwards.
    Where the function uses a device, the present process must not touch it meanwhile.

    Args:
      function: importable, as its arguments and what it yields must be picklable.
      args: of the function.
      deadline: `time.monotonic`; None runs it in the present process, whatever it raises.

    Raises:
      OutOfTimeError: the deadline has come.
      FailedError: the function raised, or its process ended.
    """
    if deadline is None:
        yield from function(*args)
        return
    if time.monotonic() >= deadline:
        raise OutOfTimeError("not begun, the time is used up")
    with started(_answer, function, args, daemon=True) as (process, reader):
        try:
            while reader.poll(max(0.0, deadline - time.monotonic())):
                found = reader.recv()
                if found is None:
                    return
                if isinstance(found, FailedError):
                    raise found
                yield found
            raise OutOfTimeError("stopped, the time is used up")
        except EOFError:
            process.join(max(0.0, deadline - time.monotonic()))
            code = process.exitcode or 0
            raise FailedError(f"its process ended: {f'exit status {code}' if code >= 0 else signal.strsignal(-code)}") from None


@contextlib.contextmanager
def started(target: Callable[..., object], *args: Any, daemon: bool = False) -> Iterator[tuple[SpawnProcess, Connection]]:
    """A process that runs `target(writer, *args)`, and what reads what it writes; it is killed when the block ends.

    Args:
      target: importable, as its arguments must be picklable.
      args: of the target, after the writing end.
      daemon: it starts no processes of its own.
    """
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(writer, *args), daemon=daemon)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for this process, which ends the other
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    writer.close()
    try:
        yield process, reader
    finally:
        process.kill()
        process.join()
        reader.close()


def is_there(pid: int) -> bool:
    """Whether this machine has a process of that number; one that has ended counts until it is collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours to signal, so it is there
        return True
    return True


def _answer(writer: Connection, function: Callable[..., Iterator[Any]], args: tuple) -> None:
    """The other process: sends what the function yields, then None, or the reason why there is no more."""
    cpu.prepare()
    end_with_parent()
    try:
        for found in function(*args):
            writer.send(found)
    except Exception as error:  # the parent reports it, whatever it is
        writer.send(FailedError(in_one_line(error)))
    else:
        writer.send(None)


def end_with_parent() -> None:
    """To be called in a process that `multiprocessing` started: it ends when the one that started it is killed, which would else leave it
    waiting for work, or at work for nobody."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
