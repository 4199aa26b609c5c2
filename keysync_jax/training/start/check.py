"""What a run would begin with or go on from, found out before anything is trained."""

from __future__ import annotations

import os

import jax
from etils import epath

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.parallel.mesh import check_batch, train_mesh
from keysync_jax.training import lpips, resume
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.start import runs
from keysync_jax.training.start.stage_vae import is_gone, located
from keysync_jax.training.store import checkpoints
from keysync_jax.training.trainable import Trainable
from keysync_jax.training.trainables import trainable_of
from keysync_jax.training.watch import metrics, validation

_SOURCES = {
    "svd": "name Stable Video Diffusion there, a .safetensors file or a diffusers folder, or choose another config.init.kind",
    "model": "name a model directory there (keysync convert, export or init makes one)",
    "run": "name the workdir of a run there",
}


def resolve(config: TrainConfig, workdir: str | os.PathLike | None = None) -> tuple[Trainable, list[str]]:
    """What a recipe trains, with what its sources decide in its config: of a stage the latent scale, and the sizes of its VAE.

    A run that is continued keeps what its workdir says, so that it needs its sources no more.

    Args:
      config: as the recipe says.
      workdir: of the run; its `config.json` is read if it is there.

    Returns:
      The trainable, and lines that say what was taken from where.

    Raises:
      UsageError: the workdir is empty.
      KeySyncError: the workdir is a file, a path of `config.init` does not exist, or the sources do not fit the recipe.
    """
    trainable = trainable_of(config)
    if workdir is not None and not os.fspath(workdir):
        raise UsageError("--workdir is empty; name a folder")
    if workdir is not None and "://" not in os.fspath(workdir) and os.path.exists(workdir) and not os.path.isdir(workdir):
        raise KeySyncError(f"--workdir {workdir} is a file; name a folder")
    stored = stored_config(workdir)
    if stored is None:
        _require_sources(config)
    return trainable.resolved(stored, str(workdir))


def stored_config(workdir: str | os.PathLike | None) -> TrainConfig | None:
    """The recipe of the run that goes on in a workdir; None where one begins."""
    if workdir is None or not (epath.Path(workdir) / checkpoints.CONFIG).exists():
        return None
    # Without a finished checkpoint the run begins again, from whatever the recipe names now.
    saved = epath.Path(workdir) / checkpoints.CHECKPOINTS
    if not saved.is_dir() or not any(path.name.isdigit() and _is_whole(path) for path in saved.iterdir()):
        return None
    return runs.read_config(workdir)


def _is_whole(checkpoint: epath.Path) -> bool:
    """An object store renames no folders: there Orbax writes in place, and this file last."""
    return "://" not in os.fspath(checkpoint) or (checkpoint / "commit_success.txt").exists()


def _require_sources(config: TrainConfig) -> None:
    init = located(config.init)
    needed = {"path": (init.path, _SOURCES.get(init.kind, "")), "vae": (init.vae, "name a model directory with a VAE there")}
    if init.kind == "scratch":
        del needed["path"]
    for key, (path, advice) in needed.items():
        if path and is_gone(path):
            raise KeySyncError(f"config.init.{key}: {path} does not exist; {advice}")


def describe(config: TrainConfig, workdir: str | os.PathLike) -> list[str]:
    """Opens data and weights and says what a run would begin with, or go on from.

    Raises:
      KeySyncError: whatever would stop the run at its start.
    """
    trainable, lines = resolve(config, workdir)
    config = trainable.config
    check_batch(train_mesh(config.mesh), config.data.batch_size, config.optimizer.accumulate)
    trainable.check_data(trainable.reader())
    validation.open_reader(trainable, lines.append)
    if trainable.uses_lpips:
        lpips.load(config.lpips)
    if config.log.wandb:
        metrics.require_wandb()
    latest = runs.last_step(workdir)
    if latest is not None:
        with checkpoints.Checkpoints(workdir, read_only=True) as saved:
            changes = resume.changes(saved.meta(latest), trainable, f"checkpoint {latest} of {workdir}")
        changed = [f"the recipe changed: {change}" for change in changes]
        if latest >= config.num_steps:
            return [*lines, *changed, f"nothing to do: step {latest} of {workdir} is reached, the recipe asks for {config.num_steps}"]
        return [*lines, *changed, f"goes on from step {latest} of {workdir}"]
    weights = trainable.initial_weights()
    count, held = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (weights.params, weights.frozen))
    todo = f"{count:,} parameters are trained, {held:,} are frozen; {config.num_steps} steps of {config.data.batch_size} samples"
    return [*lines, *weights.notes, todo]
