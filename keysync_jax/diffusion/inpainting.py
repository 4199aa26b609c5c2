"""The denoiser that regenerates only the masked region (paper Eq. 2): the known latents are pasted before and after the network."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from keysync_jax.diffusion.conditions import Conditions, paste
from keysync_jax.diffusion.preconditioning import v_scaling_edm_noise

# (input [B, T, h, w, 4], c_noise [B] or [B, T], conditions) -> network output [B, T, h, w, 4]
Network = Callable[[jax.Array, jax.Array, Conditions], jax.Array]


def denoise(network: Network, x: jax.Array, sigma: jax.Array, conditions: Conditions) -> jax.Array:
    """Denoised latents `D(x; sigma)` whose known region, if there is one, equals the source exactly.

    Args:
      network: F, the preconditioned network; it may compute in any type.
      x: noisy scaled latents `[B, T, h, w, 4]`, float32. The known latents enter clean rather than re-noised, as in training.
      sigma: noise level of each video `[B]`, or of each frame `[B, T]`.
      conditions: what the network reads besides `x`, and the known region.

    Returns:
      float32 `[B, T, h, w, 4]`.
    """
    coefficients = v_scaling_edm_noise(jnp.asarray(sigma, jnp.float32))
    c_skip, c_out, c_in = (c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) for c in coefficients[:3])
    x = paste(x, conditions)
    output = network(x * c_in, coefficients.c_noise, conditions)
    return paste(output.astype(jnp.float32) * c_out + x * c_skip, conditions)
