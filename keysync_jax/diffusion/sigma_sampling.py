"""Noise levels that training draws: log-normal (Karras et al. 2022, Table 1)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Stable Video Diffusion's image-to-video values, which KeySync keeps for both stages.
P_MEAN = 1.0
P_STD = 1.2


def sigmas_from_normals(normals: jax.Array, p_mean: float = P_MEAN, p_std: float = P_STD) -> jax.Array:
    """`exp(p_mean + p_std * normals)`, same shape."""
    return jnp.exp(p_mean + p_std * normals)


def sample_sigmas(key: jax.Array, shape: Sequence[int], p_mean: float = P_MEAN, p_std: float = P_STD) -> jax.Array:
    """float32 noise levels with `ln(sigma) ~ N(p_mean, p_std^2)`; one per video, so `shape` is usually `[B]`."""
    return sigmas_from_normals(jax.random.normal(key, shape), p_mean, p_std)
