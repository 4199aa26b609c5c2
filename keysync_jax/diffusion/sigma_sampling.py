"""Noise levels that training draws: log-normal (Karras et al. 2022, Table 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Stable Video Diffusion's image-to-video values, which KeySync keeps for both stages.
P_MEAN = 1.0
P_STD = 1.2


def sigmas_from_normals(normals: jax.Array, p_mean: float = P_MEAN, p_std: float = P_STD) -> jax.Array:
    """Noise levels with `ln(sigma) ~ N(p_mean, p_std^2)` from standard normal draws, one per video: `[B]` to `[B]`."""
    return jnp.exp(p_mean + p_std * normals)
