"""Deterministic Euler sampler of the probability flow ODE (Karras et al. 2022, Algorithm 1 without churn)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import inpainting
from keysync_jax.diffusion.guidance import Guidance, unconditional
from keysync_jax.diffusion.inpainting import Conditions, Network
from keysync_jax.diffusion.preconditioning import Scaling, v_scaling_edm_noise


class Trajectory(NamedTuple):
    """Every state of a sampling run of n evaluations."""

    x: jax.Array  # [n + 1, B, T, h, w, 4]: the state before each step, and the result
    denoised: jax.Array  # [n, B, T, h, w, 4]: guided prediction at each step


def sample(
    network: Network,
    noise: jax.Array,
    sigmas: np.ndarray,
    conditions: Conditions,
    guidance: Guidance,
    return_trajectory: bool = False,
    *,
    without: Conditions | None = None,
    scaling: Scaling = v_scaling_edm_noise,
    mask_input: bool = True,
    videos_per_call: int | None = None,
) -> jax.Array | tuple[jax.Array, Trajectory]:
    """Latents generated from noise, in one `lax.scan` over the noise levels.

    Args:
      network: F, see `inpainting.Network`.
      noise: standard normal `[B, T, h, w, 4]`.
      sigmas: decreasing noise levels `[n + 1]`, concrete (see `schedules`); each but the last costs one evaluation of
        `guidance.branches * B` videos.
      conditions: what to generate.
      guidance: how the branches combine.
      return_trajectory: also return every state.
      without: conditions of the unconditional branch; None drops audio and identity.
      scaling: preconditioning coefficients.
      mask_input: see `inpainting.denoise`.
      videos_per_call: at most this many videos per network call, branches counted; None means all.

    Returns:
      float32 scaled latents `[B, T, h, w, 4]`, equal to the source outside the mask if the last level is zero; with
      `return_trajectory` a pair of these and the `Trajectory`.
    """
    without = unconditional(conditions) if without is None else without
    sigmas = np.asarray(sigmas, np.float64)
    x = jnp.asarray(noise, jnp.float32) * np.float32(np.sqrt(1.0 + sigmas[0] ** 2))

    def step(carry: tuple[jax.Array, Any], level: tuple[jax.Array, jax.Array]):
        x, state = carry
        sigma, ratio = level
        inputs = guidance.prepare(x, jnp.full(x.shape[0], sigma), conditions, without)
        branches = inpainting.denoise(network, *inputs, scaling=scaling, mask_input=mask_input, videos_per_call=videos_per_call)
        denoised, state = guidance.combine(branches, state)
        # Euler's x + (sigma' - sigma) (x - D) / sigma, written so that sigma' = 0 gives D itself without rounding.
        following = denoised + ratio * (x - denoised)
        return (following, state), ((x, denoised) if return_trajectory else None)

    levels = (jnp.asarray(sigmas[:-1], jnp.float32), jnp.asarray(sigmas[1:] / sigmas[:-1], jnp.float32))
    (x, _), states = jax.lax.scan(step, (x, guidance.initial_state(x)), levels)
    if not return_trajectory:
        return x
    return x, Trajectory(jnp.concatenate([states[0], x[None]]), states[1])


def require_finite(values: jax.Array | np.ndarray, what: str) -> None:
    """Stops loudly, outside `jit`, if anything in `values` is NaN or infinite.

    Raises:
      KeySyncError: naming `what` and how many values are bad.
    """
    values = np.asarray(values)
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise KeySyncError(
            f"{what}: {bad} of {values.size} values are not finite; try --dtype float32, or check the weights with keysync inspect"
        )
