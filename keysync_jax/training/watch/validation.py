"""Loss on held-out items that never change: the same windows, the same noise, no dropout, at fixed noise levels.

The training loss mixes all noise levels, and most of its scatter is which levels were drawn. Here the distribution of ln(sigma) is cut
into buckets of equal probability and every item is measured at the middle (the median) of each, so that the mean over the levels is
the training loss to within that quadrature, and a change at one level shows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.source.frames import FrameReader
from keysync_jax.data_pipeline.source.loader import Batches, Reader
from keysync_jax.parallel.mesh import DATA_AXIS, FSDP_AXIS
from keysync_jax.parallel.sharding import data_share, global_batch
from keysync_jax.training import data
from keysync_jax.training.objective import Batch, Objective
from keysync_jax.training.state import TrainState, Tree
from keysync_jax.training.trainable import Say, Trainable

BUCKETS = 5
SEED = 20_240_611  # fixed, so that runs with different seeds can be compared


def bucket_normals(count: int = BUCKETS) -> np.ndarray:
    """float32 `[count]`: medians of the standard normal distribution cut into `count` equally probable parts."""
    return np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)], np.float32)


def open_reader(trainable: Trainable, say: Say) -> Reader | None:
    """The validation data, or None (said once, with the reason) where there are none.

    Raises:
      KeySyncError: `config.data.validation` names data that cannot be used.
    """
    config = trainable.config
    log, source = config.log, config.data
    if not (log.validate_every and log.validation_batches) and not (log.samples_every and log.samples):
        return None
    if not source.validation_split:
        say("no validation and no sample pictures: data.validation_split is empty")
        return None
    try:
        # The run's seed orders its data; here it must not decide which items are held out.
        held = dataclasses.replace(trainable, config=dataclasses.replace(config, seed=SEED))
        reader = _with_split(held, say).reader(source.validation_split)
    except KeySyncError as error:
        if source.validation:
            raise  # asked for by name
        say(f"no validation and no sample pictures: {error}")
        return None
    if isinstance(reader, FrameReader) and not source.validation:
        trained = trainable.reader()
        if isinstance(trained, FrameReader) and set(reader.paths) & set(trained.paths):
            say("[yellow]validation uses videos that are trained on: a folder has no splits; give a manifest with a column split[/yellow]")
    return reader


def _with_split(trainable: Trainable, say: Say) -> Trainable:
    """With those datasets only that can be validated on; as it is where that is all, none, or another directory is named."""
    source = trainable.config.data
    if source.validation or len(source.datasets) < 2:
        return trainable
    good, problems = [], []
    for dataset in source.datasets:
        try:
            _only(trainable, (dataset,)).reader(source.validation_split)
            good.append(dataset)
        except KeySyncError as error:
            problems.append(str(error))
    if not good or not problems:
        return trainable
    say(f"validation leaves out {len(problems)} of {len(source.datasets)} datasets: {problems[0]}")
    return _only(trainable, tuple(good))


def _only(trainable: Trainable, datasets: tuple[str, ...]) -> Trainable:
    config = trainable.config
    only = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=datasets, weights=()))
    return dataclasses.replace(trainable, config=only)


def shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return mesh.shape[DATA_AXIS] * mesh.shape[FSDP_AXIS]


def make_evaluation(objective: Objective, normals: np.ndarray | None) -> Callable[[Tree, Tree, Batch, Any], dict[str, jax.Array]]:
    """`evaluate(params, frozen, batch, number) -> {part: [levels]}`, a pure function; `number` keys the noise.

    Args:
      objective: of the run.
      normals: levels ln(sigma) in standard deviations from the mean; None for an objective without noise levels.
    """

    def evaluate(params: Tree, frozen: Tree, batch: Batch, number: jax.Array) -> dict[str, jax.Array]:
        drawn = objective.draw(jax.random.fold_in(jax.random.key(SEED), number), batch)
        drawn |= {name: jnp.ones_like(value) for name, value in drawn.items() if name.startswith("keep_")}

        def at(level: jax.Array | None) -> dict[str, jax.Array]:
            own = {} if level is None else {"normals": jnp.full_like(drawn["normals"], level)}
            loss, parts = objective.loss(params, frozen, batch, drawn | own)
            return {"loss": loss} | parts

        if normals is None:
            return jax.tree.map(lambda x: x[None], at(None))
        return jax.lax.map(at, jnp.asarray(normals))

    return evaluate


class Validation:
    """Computes the validation losses; every process takes part."""

    def __init__(self, trainable: Trainable, reader: Reader, objective: Objective, mesh: Mesh, say: Say):
        self._config, self._reader, self._mesh, self._say, self._items = trainable.config, reader, mesh, say, trainable.item
        config, normals = trainable.config, bucket_normals() if trainable.noise_levels else None
        noise = config.noise
        self.sigmas = () if normals is None else tuple(np.exp(noise.p_mean + noise.p_std * normals.astype(np.float64)).tolist())
        # As large as what a training step holds at once.
        parts = shards(mesh)
        self.batch_size = -(-config.microbatch // parts) * parts
        self._evaluate = jax.jit(make_evaluation(objective, normals), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._compiled = False

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Losses of `state.params` (`val/...`) and of the average if there is one (`val_ema/...`).

        Names: `val/loss` and `val/PART` are means over all levels, `val/loss_sigma_0.58` is one level.

        Raises:
          KeySyncError: a validation record cannot be read or is not finite.
        """
        config, begin = self._config, time.perf_counter()
        count = config.log.validation_batches
        first = "" if self._compiled else ", compiling first"
        self._say(f"{step:>7}  validating on {count * self.batch_size} {self._items}{first} …")
        weights = {"val": state.params} | ({} if state.ema is None else {"val_ema": state.ema})
        found: dict[str, list[dict[str, jax.Array]]] = {name: [] for name in weights}
        read = config.data
        share = data_share(self._mesh)
        with Batches(self._reader, self.batch_size, 0, *share, read.threads, 0, read.prefetch, count) as batches:
            for number, host in enumerate(batches):
                batch = global_batch(self._mesh, data.step_arrays(host))
                for name, params in weights.items():
                    found[name].append(self._evaluate(params, state.frozen, batch, jax.device_put(np.int32(number))))
        self._compiled = True
        values: dict[str, float] = {}
        for name, parts in jax.device_get(found).items():
            values |= self._named(name, jax.tree.map(lambda *x: np.mean(x, axis=0), *parts))
        self._say(self._line(step, values, time.perf_counter() - begin))
        return values

    def _named(self, prefix: str, parts: Mapping[str, np.ndarray]) -> dict[str, float]:
        out = {f"{prefix}/{name}": float(np.mean(levels)) for name, levels in parts.items()}
        for name, levels in parts.items():
            out |= {f"{prefix}/{name}_sigma_{s:.3g}": float(x) for s, x in zip(self.sigmas, levels, strict=False)}
        return out

    def _line(self, step: int, values: Mapping[str, float], seconds: float) -> str:
        averaged = "val_ema/loss" in values
        prefix = "val_ema" if averaged else "val"
        text = f"{step:>7}  validation loss {values['val/loss']:.4g}"
        text += f"  averaged weights {values['val_ema/loss']:.4g}" if averaged else ""
        if self.sigmas:
            text += "  at σ " + "  ".join(f"{s:.3g}: {values[f'{prefix}/loss_sigma_{s:.3g}']:.3g}" for s in self.sigmas)
        else:
            parts = [name for name in values if name.startswith(f"{prefix}/") and not name.endswith("/loss")]
            text += "".join(f"  {name.partition('/')[2]} {values[name]:.3g}" for name in parts)
        return f"{text}  ({seconds:.0f} s)"
