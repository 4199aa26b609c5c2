"""The denoiser that regenerates only the masked region (paper Eq. 2): the known latents are pasted before and after the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keysync_jax.diffusion.preconditioning import Scaling, v_scaling_edm_noise


class Conditions(NamedTuple):
    """What one batch of windows is generated from.

    Attributes:
      concat: unscaled latents that join the network input by channel: identity `[B, h, w, 4]` or one per frame
        `[B, T, h, w, 4]`, or the two endpoints `[B, h, w, 8]` (start, then end).
      crossattn: audio tokens `[B, T, D]`; all zero means no audio.
      gt: scaled latents of the source video `[B, T, h, w, 4]`.
      masks: `[B, T, h, w, 1]`, 1 = regenerate, 0 = known.
    """

    concat: jax.Array
    crossattn: jax.Array
    gt: jax.Array
    masks: jax.Array


# (input [B, T, h, w, 4], c_noise [B] or [B, T], conditions) -> network output [B, T, h, w, 4]
Network = Callable[[jax.Array, jax.Array, Conditions], jax.Array]


def paste(x: jax.Array, conditions: Conditions) -> jax.Array:
    """`x` where the mask is 1, the known latents elsewhere."""
    return x * conditions.masks + conditions.gt * (1.0 - conditions.masks)


def denoise(
    network: Network,
    x: jax.Array,
    sigma: jax.Array,
    conditions: Conditions,
    *,
    scaling: Scaling = v_scaling_edm_noise,
    mask_input: bool = True,
    videos_per_call: int | None = None,
) -> jax.Array:
    """Denoised latents `D(x; sigma)` whose known region equals the source exactly.

    Args:
      network: F, the preconditioned network; it may compute in any type.
      x: noisy scaled latents `[B, T, h, w, 4]`, float32.
      sigma: noise level of each video `[B]`, or of each frame `[B, T]`.
      conditions: what the network reads besides `x`, and the known region.
      scaling: preconditioning coefficients.
      mask_input: paste the known latents before the network as well, clean rather than re-noised (as in training).
      videos_per_call: evaluate the network on at most this many videos at a time; None means all at once.

    Returns:
      float32 `[B, T, h, w, 4]`.
    """
    coefficients = scaling(jnp.asarray(sigma, jnp.float32))
    c_skip, c_out, c_in = (c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) for c in coefficients[:3])
    if mask_input:
        x = paste(x, conditions)
    output = _in_chunks(network, videos_per_call, x * c_in, coefficients.c_noise, conditions)
    return paste(output.astype(jnp.float32) * c_out + x * c_skip, conditions)


def _in_chunks(network: Network, size: int | None, *inputs) -> jax.Array:
    """`network(*inputs)` in groups of `size` along the batch axis, one group after the other; the last may be smaller."""
    batch = inputs[0].shape[0]
    if size is None or size >= batch:
        return network(*inputs)
    whole = batch // size * size
    groups = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), inputs)
    output = jax.lax.map(lambda group: network(*group), groups)
    output = output.reshape(whole, *output.shape[2:])
    if whole == batch:
        return output
    return jnp.concatenate([output, network(*jax.tree.map(lambda a: a[whole:], inputs))])
