"""Checkpoints of a run, by Orbax: params, EMA, optimizer and counters as separate items, restored onto any mesh or host count.

    WORKDIR/config.json           the resolved recipe of the last start
    WORKDIR/frozen/               leaves that are not trained, written once before the first step
    WORKDIR/checkpoints/STEP/     params, ema, opt_state, counters (step, data), meta (recipe, what the model is trained for), checksums

A step directory appears whole or not at all: Orbax writes beside it and renames. What a killed run left half-written is removed at the
next start.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from keysync_jax.core.differences import some
from keysync_jax.core.errors import KeySyncError, first_line
from keysync_jax.core.files import read_object, replacing
from keysync_jax.core.trees import require_alike
from keysync_jax.training.config import CheckpointConfig
from keysync_jax.training.state import TrainState, Tree
from keysync_jax.training.store.checksums import changed, checksums
from keysync_jax.training.store.workdir import absolute, as_os_error

CHECKPOINTS, FROZEN, CONFIG = "checkpoints", "frozen", "config.json"
_ARRAYS, _JSON = ("params", "ema", "opt_state"), ("counters", "meta", "checksums")
_UNFINISHED = "*.orbax-checkpoint-tmp*"
# How a save fails: the file system (OSError), tensorstore's words for it (ValueError), a barrier that a dead process never reaches
# (RuntimeError), and gcsfs, google-auth and aiohttp, whose errors have nothing else in common.
_WRITE_ERRORS = Exception
_SECONDS_TO_CLOSE = 15  # after an error, on several processes: the others may be gone


class Checkpoints:
    """The checkpoints of one workdir.

    Use as a context manager: inside, SIGTERM no longer kills this process but is seen by `reached_preemption`; leaving it waits for a
    save that is under way. A write that fails does not raise: `warn` gets one line, what was half-written is removed, the last good
    checkpoint stays, and the next `save` tries again. `wait` raises if the last save is not on disk. Of several processes the one that
    could not write ends instead, and the others with it: they would wait for its part of the checkpoint.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        config: CheckpointConfig = CheckpointConfig(),
        *,
        read_only: bool = False,
        warn: Callable[[str], None] | None = None,
    ):
        """Raises:
        KeySyncError: `read_only`, and there is no run.
        """
        self.workdir = epath.Path(workdir)
        self._directory = absolute(self.workdir) / CHECKPOINTS
        if read_only and not self._directory.exists():
            raise KeySyncError(f"{workdir} is not a training run: it has no {CHECKPOINTS}/")
        self._warn = warn or _to_stderr
        self._read_only = read_only
        self._saving: int | None = None
        self._failed: str | None = None
        self._strays = False
        self._terminated = False
        self._old_handler: Any = None
        _quiet_orbax()
        self._config = config
        if not read_only and jax.process_index() == 0:
            self._strays = not remove_unfinished(self._directory)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        config, write = self._config, not self._read_only
        keep: dict[str, Any] = {"max_to_keep": config.keep_last, "keep_period": config.keep_every or None} if write else {}
        if write and config.weak_at:
            period = [preservation.EveryNSteps(config.keep_every)] if config.keep_every else []
            chosen = [preservation.LatestN(config.keep_last), preservation.CustomSteps([config.weak_at]), *period]
            keep = {"preservation_policy": preservation.AnyPreservationPolicy(chosen)}
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ARRAYS} | {name: ocp.JsonCheckpointHandler() for name in _JSON}
        return ocp.CheckpointManager(
            str(self._directory),
            options=ocp.CheckpointManagerOptions(
                **keep, enable_async_checkpointing=True, create=write, cleanup_tmp_directories=write, read_only=not write,
                save_interval_steps=1 if write else 0,
            ),
            item_names=(*_ARRAYS, *_JSON),
            item_handlers=handlers,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------------------ what is there

    def latest(self) -> int | None:
        """Step of the last complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def counters(self, step: int) -> dict[str, Any]:
        """`step`, `skipped`, `data` (fingerprint of the order of samples) and `samples` (how many were seen) of a checkpoint."""
        return self._json(step, "counters")

    def checksums(self, step: int) -> dict[str, dict[str, int]]:
        """Of every leaf of params, ema, opt_state and frozen as it was saved; {} where an older version saved none."""
        return self._json(step, "checksums") if (self._directory / str(step) / "checksums").exists() else {}

    def meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint was made with, see `resume.describe`. One that does not say so was made with the workdir's recipe."""
        if step in self.steps() and not (self._directory / str(step) / "meta").exists():
            return {"format": 0, "config": read_config(self.workdir)}
        return self._json(step, "meta")

    # ------------------------------------------------------------------------------------------------------------------------ saving

    def save(self, state: TrainState, counters: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Save the state under its step; returns once the arrays are copied, writing goes on beside the training.

        Call it on all processes. A save that is still being written is waited for first.
        """
        items: dict[str, Any] = {"params": ocp.args.StandardSave(state.params), "opt_state": ocp.args.StandardSave(state.opt_state)}
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        sums = {name: checksums(getattr(state, name)) for name in (*_ARRAYS, FROZEN)}
        items |= {name: ocp.args.JsonSave(dict(value)) for name, value in zip(_JSON, (counters, meta, sums), strict=True)}
        self._settle()
        step = int(counters["step"])
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except _WRITE_ERRORS as error:
            self._fail(error)

    def check(self) -> None:
        """Report a save that failed meanwhile; costs nothing, call it every step."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._settle()

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
          KeySyncError: it could not be written.
        """
        self._settle()
        if self._failed:
            raise KeySyncError(f"{self._failed}; make room and run the same command again")

    def _settle(self) -> None:
        """Wait for the save under way; a failure becomes a warning."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except _WRITE_ERRORS as error:
            self._fail(error)
        else:
            self._saving = self._failed = None
            self._remove_strays()

    def _remove_strays(self) -> None:
        """Once more, when no save is under way: threads of a failed one may have gone on writing for a while."""
        if self._strays and jax.process_index() == 0:
            remove_unfinished(self._directory)  # what does not go now, the next start removes
        self._strays = False

    def _fail(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        self._strays = True
        if jax.process_index() == 0:
            remove_unfinished(self._directory)
        # Also takes back the old checkpoints that would have made way.
        if jax.process_count() > 1:
            self._manager.reload()
        else:  # another manager: should Orbax's cleaning up of an earlier run have failed, this one's every save would
            with contextlib.suppress(_WRITE_ERRORS):
                self._manager.close()
            self._manager = self._open()
        last = self.latest()
        self._failed = f"the checkpoint of step {step} could not be written ({_reason(error)}); " + (
            "there is none yet" if last is None else f"the last good one is step {last}"
        )
        if jax.process_count() > 1:
            raise KeySyncError(f"process {jax.process_index()}: {self._failed}; make room and start all processes again") from error
        self._warn(f"WARNING: {self._failed}; training goes on and the next save is tried")

    # ---------------------------------------------------------------------------------------------------------------------- restoring

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and counters saved at `step`; `abstract` holds shapes and the shardings wanted, and its `frozen` is kept.

        Averaged weights that the checkpoint lacks start from its weights.

        Raises:
          KeySyncError: the checkpoint holds other leaves (named) or cannot be read.
        """
        trees = {"params": abstract.params, "opt_state": abstract.opt_state}
        found = self._metadata(step)
        if abstract.ema is not None and "ema" in found:
            trees["ema"] = abstract.ema
        restored = self._restore(step, trees, found)
        params, ema = restored["params"], restored.get("ema")
        if abstract.ema is not None and ema is None:
            self._warn(f"checkpoint {step} has no averaged weights: the average starts from its weights")
            ema = jax.tree.map(jnp.copy, params)
        counters = self.counters(step)
        scalars = {
            name: jax.make_array_from_callback((), getattr(abstract, name).sharding, lambda _, name=name: np.int32(counters[name]))
            for name in ("step", "skipped")
        }
        return abstract.replace(params=params, opt_state=restored["opt_state"], ema=ema, **scalars), counters

    def weights(self, step: int, abstract: Tree, *, ema: bool = False) -> Tree:
        """The trained weights of a checkpoint alone, or their average; `abstract` holds shapes and, where arrays are to lie on a mesh,
        shardings.

        Raises:
          KeySyncError: there is no such step or no average, or the leaves differ (named).
        """
        item, found = "ema" if ema else "params", self._metadata(step)
        if item not in found:
            raise KeySyncError(f"checkpoint {step} of {self.workdir} has no averaged weights; it was trained without optimizer.ema_decay")
        return self._restore(step, {item: abstract}, found)[item]

    def _restore(self, step: int, trees: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        for item, tree in trees.items():
            require_alike(found.get(item, {}), tree, f"checkpoint {step} of {self.workdir}, {item}, is of another model")
        try:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(tree) for item, tree in trees.items()})
            restored = dict(self._manager.restore(step, args=args).items())
        except Exception as error:  # Orbax and tensorstore raise whatever the damage made them stumble over
            raise self._damaged(step, error) from error
        stored = self.checksums(step)
        for item, tree in restored.items():
            if wrong := changed(tree, stored.get(item, {})):
                raise self._damaged(step, f"{item} is not what was saved: {some(wrong, 4)}")
        return restored

    def _metadata(self, step: int) -> dict[str, Any]:
        """Stored shapes by item."""
        if step not in self.steps():
            raise KeySyncError(f"{self.workdir} has no checkpoint of step {step}; there are {', '.join(map(str, self.steps())) or 'none'}")
        try:
            metadata = self._manager.item_metadata(step)
            found = {item: metadata[item].tree for item in _ARRAYS if item in metadata and metadata[item] is not None}
        except Exception as error:  # as in `_restore`
            raise self._damaged(step, error) from error
        if lost := [item for item in ("params", "opt_state") if item not in found]:
            raise self._damaged(step, f"{' and '.join(lost)} missing")
        return found

    def _json(self, step: int, item: str) -> dict[str, Any]:
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item])
        except Exception as error:  # as in `_restore`
            raise self._damaged(step, error, f"{item} of ") from error

    def _damaged(self, step: int, problem: Exception | str, part: str = "") -> KeySyncError:
        reason = problem if isinstance(problem, str) else _reason(problem)
        return KeySyncError(f"{part}checkpoint {step} of {self.workdir} cannot be read: {reason}; {self._others(step)}")

    def _others(self, step: int) -> str:
        others = [str(s) for s in self.steps() if s != step]
        if not others:
            return "there is no other one"
        return f"there are {', '.join(others)} (remove a damaged one to continue from the one before)"

    # --------------------------------------------------------------------------------------------------------- end and termination

    def reached_preemption(self, step: int) -> bool:
        """Whether to save now and leave: SIGTERM came. With several processes JAX agrees on a step that all of them will reach."""
        return self._terminated or self._manager.reached_preemption(step)

    def close(self) -> None:
        self._settle()
        self._manager.close()
        self._remove_strays()

    def _close_after_error(self) -> None:
        try:
            self.close()
        except KeySyncError as error:  # the first error is the one to report
            logging.getLogger(__name__).info("%s", error)

    def __enter__(self) -> Checkpoints:
        # Several processes: JAX's preemption service has the signal.
        if not self._read_only and not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)
        if kind is None or jax.process_count() == 1:
            self.close()
            return
        # Another process may be dead: its barrier would hold us up for minutes, and what it did not write cannot be completed.
        thread = threading.Thread(target=self._close_after_error, daemon=True)
        thread.start()
        thread.join(_SECONDS_TO_CLOSE)


def save_frozen(workdir: epath.PathLike, frozen: Tree) -> None:
    """Write the frozen leaves, whole or not at all; replaces what a start that never reached a checkpoint left behind.

    Raises:
      KeySyncError: they cannot be written; nothing is left of them.
    """
    _quiet_orbax()
    root = absolute(workdir)
    if jax.process_index() == 0:
        remove_unfinished(root)
    if not jax.tree.leaves(frozen):
        return
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(str(root / FROZEN), frozen, force=True)
            checkpointer.wait_until_finished()
    except _WRITE_ERRORS as error:
        raise KeySyncError(f"the frozen weights could not be written to {root / FROZEN} ({_reason(error)}); start again") from error


def restore_frozen(workdir: epath.PathLike, abstract: Tree, stored: Mapping[str, int] | None = None) -> Tree:
    """The frozen leaves, laid out as `abstract` says.

    Args:
      workdir: of the run.
      abstract: shapes and shardings.
      stored: their checksums, from a checkpoint of the run; leaves without one are taken as they are.

    Raises:
      KeySyncError: they are missing, not those of this model or not those that were saved (named), or cannot be read.
    """
    if not jax.tree.leaves(abstract):
        return {}
    _quiet_orbax()
    path = absolute(workdir) / FROZEN
    if not path.exists():
        raise KeySyncError(f"{path} is missing: it holds the weights that this run does not train; restore it or start a new run")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            require_alike(checkpointer.metadata(str(path)).item_metadata.tree, abstract, f"{path} is of another model")
            frozen = checkpointer.restore(str(path), abstract)
        except KeySyncError:
            raise
        except Exception as error:  # Orbax raises whatever the damage made it stumble over
            raise KeySyncError(f"{path} cannot be read: {_reason(error)}; restore it or start a new run") from error
    if wrong := changed(frozen, stored or {}):
        raise KeySyncError(f"{path} is not what was saved: {some(wrong, 4)}; restore it or start a new run")
    return frozen


def remove_unfinished(directory: epath.PathLike) -> bool:
    """Delete what a save that did not end left in a folder; False where something is still being written there, or where an object store
    does not answer."""
    gone, left = 0, [epath.Path(directory) / _UNFINISHED]
    for _ in range(50):
        # Other threads of the failed save may still be writing into it: once more, until it stays away.
        with contextlib.suppress(OSError), as_os_error(directory):
            left = list(epath.Path(directory).glob(_UNFINISHED))
            gone = 0 if left else gone + 1
            if gone == 2:
                return True
            for path in left:
                with contextlib.suppress(OSError), as_os_error(path):
                    path.rmtree(missing_ok=True)
        time.sleep(0.05)
    logging.getLogger(__name__).warning("%s could not be removed; the next start will", ", ".join(map(str, left)))
    return False


def write_config(workdir: epath.PathLike, values: dict[str, Any]) -> None:
    """Store the resolved recipe beside the checkpoints (by process 0, whole or not at all).

    Raises:
      OSError: the disk is full, or the store does not answer.
    """
    if jax.process_index():
        return
    path = epath.Path(workdir) / CONFIG
    with as_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(values, indent=1) + "\n")


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The recipe of a run.

    Raises:
      KeySyncError: there is no run, or the file holds no recipe.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise KeySyncError(f"{workdir} is not a training run: it has no {CONFIG}")
    advice = "restore it from a copy, or give the recipe anew"
    values = read_object(path, advice)
    if not values:
        raise KeySyncError(f"{path} holds no recipe; {advice}")
    return values


def _reason(error: BaseException) -> str:
    """What the system says, of tensorstore's and Orbax's many words; else their first line."""
    if code := re.search(r"(?:os_error_code='|OS error )(\d+)", str(error)):
        return os.strerror(int(code[1]))
    return first_line(error).split(" [source locations")[0][:300]


def _to_stderr(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} process {jax.process_index()}: {text}", file=sys.stderr, flush=True)


class _OrbaxSilence(logging.Filter):
    """Drops Orbax's log, tracebacks included, unless one asked to see (`-v`): we say in a line what became of a save."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or logging.getLogger().isEnabledFor(logging.INFO) or record.levelno >= logging.CRITICAL


def _quiet_orbax() -> None:
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _OrbaxSilence) for f in logger.filters):
        logger.addFilter(_OrbaxSilence())
        sys.unraisablehook = functools.partial(_without_late_reads, sys.unraisablehook)


def _without_late_reads(hook: Callable[[Any], None], found: Any) -> None:
    """Where one file of many is damaged, the reads of the others end after Orbax has given up and would print a traceback each."""
    if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
        hook(found)
