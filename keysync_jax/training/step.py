"""One optimizer update as a pure function of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from keysync_jax.training.config import OptimizerConfig
from keysync_jax.training.objective import Batch, Objective
from keysync_jax.training.optimizer import learning_rate, update_ema
from keysync_jax.training.state import TrainState, Tree

Metrics = dict[str, jax.Array]


def _is_adam(path: tuple[Any, ...], value: Any) -> bool:
    """Of several counters in an optimizer's state, Adam's own: updates that were applied."""
    return getattr(path[-1], "tuple_name", "") == "ScaleByAdamState"


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """Random numbers of a step: a function of the seed and its number alone, so that a resumed run draws what it would have drawn."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_train_step(
    objective: Objective, tx: optax.GradientTransformation, config: OptimizerConfig, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `step(state, batch) -> (state, metrics)`; jit it with the state's shardings and donate the state.

    The gradient is the mean over `config.accumulate` microbatches, computed one after the other. Where loss, gradient or update are not
    finite, nothing is applied: parameters, moments and average stay, `state.skipped` counts such updates in a row.

    Metrics (float32 scalars): loss and the objective's parts, `grad_norm` before clipping, `learning_rate`, `finite` (1 or 0) and
    `skipped`.
    """
    rate = learning_rate(config)

    # Of the trained leaves; the frozen ones and what was drawn are given.
    gradient = jax.value_and_grad(objective.loss, has_aux=True)

    def gradients(state: TrainState, batch: Batch, drawn: Batch) -> tuple[tuple[jax.Array, Metrics], Tree]:
        if config.accumulate == 1:
            return gradient(state.params, state.frozen, batch, drawn)

        def split(x: jax.Array) -> jax.Array:
            # Every device keeps its own rows: microbatch i takes row i of each group of `accumulate` neighbours.
            return x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1)

        def add(total: Any, micro: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(state.params, state.frozen, *micro)), None

        micros = jax.tree.map(split, (batch, drawn))
        shapes = jax.eval_shape(gradient, state.params, state.frozen, *jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, micros)
        return jax.tree.map(lambda x: x / config.accumulate, total)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        drawn = objective.draw(step_key(seed, state.step), batch)
        (loss, metrics), grads = gradients(state, batch, drawn)
        norm = optax.global_norm(grads)
        count = optax.tree_utils.tree_get(state.opt_state, "count", filtering=_is_adam)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(updates))
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if state.ema is None else update_ema(state.ema, params, state.step, config.ema_decay)

        def applied(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        skipped = jnp.where(finite, 0, state.skipped + 1)
        state = state.replace(
            step=state.step + 1,
            params=applied(params, state.params),
            ema=ema if ema is None else applied(ema, state.ema),
            opt_state=applied(opt_state, state.opt_state),
            skipped=skipped,
        )
        extra = {"loss": loss, "grad_norm": norm, "learning_rate": rate(count), "finite": finite, "skipped": skipped}
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in (metrics | extra).items()}

    return step
