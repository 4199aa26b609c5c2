"""AdamW with the reference's warm-up, as an optax chain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from keysync_jax.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Rate of update n: `warmup_start + (1 - warmup_start) n / warmup_steps` of the full rate while n < warmup_steps, then all of it."""
    if not config.warmup_steps:
        return optax.constant_schedule(config.learning_rate)
    start = config.warmup_start * config.learning_rate
    return optax.linear_schedule(start, config.learning_rate, config.warmup_steps)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """`torch.optim.AdamW` (decoupled decay times the learning rate), after optional clipping of the global norm."""
    adamw = optax.adamw(
        learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mu_dtype=jnp.float32
    )
    # Always two links, so that clipping can be switched on and off without changing the state's tree.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw)


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """`d ema + (1 - d) params` with d = min(decay, (1 + step) / (10 + step)), so that the first steps are soon forgotten."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old * d + new * (1.0 - d), ema, params)
