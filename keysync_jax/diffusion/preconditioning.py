"""Preconditioning of the denoiser and loss weight as functions of the noise level.

A denoiser is `D(x; sigma) = c_out * F(c_in * x; c_noise) + c_skip * x` with network F (Karras et al. 2022, Eq. 7). KeySync keeps
what Stable Video Diffusion was trained with: velocity prediction with EDM's noise label, and the loss weight under which the
network output is weighted uniformly over noise levels (weight * c_out^2 = 1).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Preconditioning(NamedTuple):
    """The four coefficients, each of the shape of sigma."""

    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array
    c_noise: jax.Array  # the noise label that the network reads


def v_scaling_edm_noise(sigma: jax.Array) -> Preconditioning:
    """Velocity prediction (Salimans and Ho 2022) for unit data variance, with EDM's noise label `ln(sigma) / 4`: SVD and KeySync."""
    norm = jnp.sqrt(sigma**2 + 1.0)
    return Preconditioning(c_skip=1.0 / (sigma**2 + 1.0), c_out=-sigma / norm, c_in=1.0 / norm, c_noise=0.25 * jnp.log(sigma))


def v_weighting(sigma: jax.Array) -> jax.Array:
    """`(sigma^2 + 1) / sigma^2`, the inverse of c_out^2."""
    return (sigma**2 + 1.0) / sigma**2
