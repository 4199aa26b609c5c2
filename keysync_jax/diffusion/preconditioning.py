"""Preconditioning of the denoiser and loss weighting as functions of the noise level.

A denoiser is `D(x; sigma) = c_out * F(c_in * x; c_noise) + c_skip * x` with network F (Karras et al. 2022, Eq. 7). KeySync keeps
what Stable Video Diffusion was trained with: velocity prediction with EDM's noise label, and the loss weight under which the
network output is weighted uniformly over noise levels (weight * c_out^2 = 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# EDM's own data scale; the velocity forms have a data scale of one.
EDM_SIGMA_DATA = 0.5


class Preconditioning(NamedTuple):
    """The four coefficients, each of the shape of sigma."""

    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array
    c_noise: jax.Array  # the noise label that the network reads


Scaling = Callable[[jax.Array], Preconditioning]
Weighting = Callable[[jax.Array], jax.Array]


def v_scaling_edm_noise(sigma: jax.Array) -> Preconditioning:
    """Velocity prediction with EDM's noise label `ln(sigma) / 4`: SVD and KeySync."""
    return v_scaling(sigma)._replace(c_noise=0.25 * jnp.log(sigma))


def v_scaling(sigma: jax.Array) -> Preconditioning:
    """Velocity prediction (Salimans and Ho 2022) for unit data variance; the noise label is sigma itself."""
    norm = jnp.sqrt(sigma**2 + 1.0)
    return Preconditioning(c_skip=1.0 / (sigma**2 + 1.0), c_out=-sigma / norm, c_in=1.0 / norm, c_noise=sigma)


def edm_scaling(sigma: jax.Array, sigma_data: float = EDM_SIGMA_DATA) -> Preconditioning:
    """EDM's own preconditioning (Karras et al. 2022, Table 1)."""
    variance = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data / jnp.sqrt(variance),
        c_in=1.0 / jnp.sqrt(variance),
        c_noise=0.25 * jnp.log(sigma),
    )


def eps_scaling(sigma: jax.Array) -> Preconditioning:
    """Noise prediction; the noise label is sigma itself."""
    return Preconditioning(c_skip=jnp.ones_like(sigma), c_out=-sigma, c_in=1.0 / jnp.sqrt(sigma**2 + 1.0), c_noise=sigma)


def v_weighting(sigma: jax.Array) -> jax.Array:
    """`(sigma^2 + 1) / sigma^2`, the inverse of c_out^2 under velocity prediction."""
    return edm_weighting(sigma, sigma_data=1.0)


def edm_weighting(sigma: jax.Array, sigma_data: float = EDM_SIGMA_DATA) -> jax.Array:
    """`(sigma^2 + sigma_data^2) / (sigma * sigma_data)^2` (Karras et al. 2022, Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def eps_weighting(sigma: jax.Array) -> jax.Array:
    """`sigma^-2`."""
    return sigma**-2.0


def unit_weighting(sigma: jax.Array) -> jax.Array:
    """One at every noise level."""
    return jnp.ones_like(sigma)
