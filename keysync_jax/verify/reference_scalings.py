"""The reference's preconditionings and loss weights that KeySync does not use; the stored schedules hold them all."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from keysync_jax.diffusion.preconditioning import Preconditioning, v_scaling_edm_noise

# EDM's own data scale; the velocity forms have a data scale of one.
EDM_SIGMA_DATA = 0.5

Scaling = Callable[[jax.Array], Preconditioning]
Weighting = Callable[[jax.Array], jax.Array]


def v_scaling(sigma: jax.Array) -> Preconditioning:
    """Velocity prediction for unit data variance; the noise label is sigma itself."""
    return v_scaling_edm_noise(sigma)._replace(c_noise=sigma)


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


def edm_weighting(sigma: jax.Array, sigma_data: float = EDM_SIGMA_DATA) -> jax.Array:
    """`(sigma^2 + sigma_data^2) / (sigma * sigma_data)^2` (Karras et al. 2022, Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def eps_weighting(sigma: jax.Array) -> jax.Array:
    """`sigma^-2`."""
    return sigma**-2.0


def unit_weighting(sigma: jax.Array) -> jax.Array:
    """One at every noise level."""
    return jnp.ones_like(sigma)
