"""Weights of a training run, read back by one process whatever mesh wrote them, without the optimizer's state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from keysync_jax.core.errors import KeySyncError
from keysync_jax.training.config import TrainConfig, train_config
from keysync_jax.training.start.weights_layout import FIRST_STAGE, checked
from keysync_jax.training.state import Tree, merge
from keysync_jax.training.store import checkpoints
from keysync_jax.training.store.workdir import absolute
from keysync_jax.training.trainable import Trainable


class RunWeights(NamedTuple):
    """A run at one of its checkpoints.

    Attributes:
      workdir: where it lies.
      trainable: what was trained, with the resolved recipe.
      step: of the checkpoint.
      ema: whether the averaged weights were taken.
      params: the whole model, trained and frozen leaves together, as NumPy arrays.
      decoder: the VAE decoder that the pixel loss used, under `first_stage_model`; None for runs without one.
    """

    workdir: str
    trainable: Trainable
    step: int
    ema: bool
    params: Tree
    decoder: Tree | None = None

    @property
    def config(self) -> TrainConfig:
        """The resolved recipe."""
        return self.trainable.config

    @property
    def part(self) -> str:
        """Which part of a model directory this is."""
        return self.trainable.part

    @property
    def said(self) -> str:
        """What to call them."""
        return f"step {self.step} of {self.workdir}{', averaged weights' * self.ema}"


def is_run(path: str | os.PathLike) -> bool:
    """Whether a directory is the workdir of a training run."""
    if str(path).startswith("hub:"):
        return False
    root = epath.Path(path)
    return (root / checkpoints.CONFIG).exists() and (root / checkpoints.CHECKPOINTS).exists()


def read_config(workdir: str | os.PathLike) -> TrainConfig:
    """The resolved recipe of a run.

    Raises:
      KeySyncError: there is no run, or its recipe is not one.
    """
    return train_config(checkpoints.read_config(workdir), str(epath.Path(workdir) / checkpoints.CONFIG))


def last_step(workdir: str | os.PathLike) -> int | None:
    """Step of the last checkpoint; None if there is no run or no checkpoint yet."""
    if not is_run(workdir):
        return None
    with checkpoints.Checkpoints(workdir, read_only=True) as saved:
        return saved.latest()


def read_weights(workdir: str | os.PathLike, trainable: Trainable, step: int = -1, ema: bool = False) -> RunWeights:
    """The weights of a run on this host.

    Args:
      workdir: local or `gs://`.
      trainable: what the run trains, with its recipe (`trainables.of_run`).
      step: of the checkpoint; -1 for the last one.
      ema: take the averaged weights in place of the last ones.

    Raises:
      KeySyncError: no run, no such checkpoint, no averages in it, or leaves that do not fit the run's recipe (named).
    """
    abstract, frozen = trainable.split(trainable.abstract_model())
    wanted, tried = step, None
    while True:
        with checkpoints.Checkpoints(workdir, read_only=True) as saved:
            latest = saved.latest() if wanted == -1 else wanted
            if latest is None:
                raise KeySyncError(f"{workdir} has no checkpoint yet; the first comes after {trainable.config.checkpoint.every} steps")
            try:
                params, sums = saved.weights(latest, _here(abstract), ema=ema), saved.checksums(latest)
                break
            except KeySyncError:
                # A training at work may have removed the checkpoint for a newer one while it was read.
                if wanted != -1 or latest == tried:
                    raise
                tried = latest
    held = _frozen(workdir, sums.get(checkpoints.FROZEN)) if jax.tree.leaves(frozen) or trainable.uses_pixels else {}
    vae = held.pop(FIRST_STAGE, None)
    checked(held, frozen, f"the frozen weights of {workdir}")
    params, decoder = jax.tree.map(np.asarray, (merge(params, held), vae))
    return RunWeights(str(workdir), trainable, latest, ema, params, decoder and {FIRST_STAGE: decoder})


def _frozen(workdir: str | os.PathLike, stored: Mapping[str, int] | None) -> Tree:
    """Everything that a run keeps frozen, whatever it is."""
    path = absolute(workdir) / checkpoints.FROZEN
    if not path.exists():
        raise KeySyncError(f"{path} is missing: it holds the weights that the run does not train")
    with ocp.StandardCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
    return checkpoints.restore_frozen(workdir, _here(tree), stored)


def _here(metadata: Tree) -> Tree:
    """Shapes as they are stored, to be laid out on one CPU device."""
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu), metadata)
