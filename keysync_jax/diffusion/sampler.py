"""Deterministic Euler sampler of the probability flow ODE (Karras et al. 2022, Algorithm 1 without churn)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import inpainting
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.diffusion.guidance import MAIN, Guidance, prepare
from keysync_jax.diffusion.inpainting import Network

# (x [B, T, h, w, 4], state of the guidance)
Carry = tuple[jax.Array, Any]


def sample(
    network: Network | Mapping[str, Network], noise: jax.Array, sigmas: np.ndarray, conditions: Conditions, guidance: Guidance
) -> jax.Array:
    """Latents generated from noise, in one `lax.scan` over the noise levels.

    Args:
      network: F, see `inpainting.Network`; by name (`guidance.MAIN`, ...) where the guidance asks another one as well.
      noise: standard normal `[B, T, h, w, 4]`.
      sigmas: decreasing noise levels `[n + 1]`, concrete (see `schedules`); each but the last costs one evaluation of
        `len(guidance.branches) * B` videos.
      conditions: what to generate.
      guidance: which evaluations are made, and how they combine.

    Returns:
      float32 scaled latents `[B, T, h, w, 4]`, equal to the source outside the mask, if there is one and the last level is zero.

    Raises:
      KeySyncError: the guidance asks a network that is not given.
    """
    step = euler_step(network, conditions, guidance)
    (x, _), _ = jax.lax.scan(lambda carry, level: (step(carry, level)[0], None), *start(noise, sigmas, guidance))
    return x


def start(noise: jax.Array, sigmas: np.ndarray, guidance: Guidance) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
    """State before the first step, and the levels `([n], [n])` that a scan of `euler_step` walks over; arguments as in `sample`."""
    sigmas = np.asarray(sigmas, np.float64)
    x = jnp.asarray(noise, jnp.float32) * np.float32(np.sqrt(1.0 + sigmas[0] ** 2))
    return (x, guidance.initial_state(x)), (jnp.asarray(sigmas[:-1], jnp.float32), jnp.asarray(sigmas[1:] / sigmas[:-1], jnp.float32))


def euler_step(
    network: Network | Mapping[str, Network], conditions: Conditions, guidance: Guidance
) -> Callable[[Carry, tuple[jax.Array, jax.Array]], tuple[Carry, jax.Array]]:
    """The body of the scan: `((x, state), (sigma, next sigma / sigma))` to the next carry and the guided prediction."""
    networks = network if isinstance(network, Mapping) else {MAIN: network}
    require_networks(guidance, networks)

    def step(carry: Carry, level: tuple[jax.Array, jax.Array]) -> tuple[Carry, jax.Array]:
        x, state = carry
        sigma, ratio = level
        results = [
            inpainting.denoise(networks[name], *prepare(tuple(branches), x, jnp.full(x.shape[0], sigma), conditions))
            for name, branches in itertools.groupby(guidance.branches, lambda branch: branch.network)
        ]
        denoised, state = guidance.combine(results[0] if len(results) == 1 else jnp.concatenate(results), state)
        # Euler's x + (sigma' - sigma) (x - D) / sigma, written so that sigma' = 0 gives D itself without rounding.
        return (denoised + ratio * (x - denoised), state), denoised

    return step


def require_networks(guidance: Guidance, names: Collection[str]) -> None:
    """Refuses a guidance that asks a network beside those named.

    Raises:
      KeySyncError: naming what is missing.
    """
    if missing := sorted({branch.network for branch in guidance.branches} - set(names)):
        raise KeySyncError(
            f"{type(guidance).__name__} asks a second network, {', '.join(missing)!r}, which is not there; "
            "hand over its parameters, or choose another guidance"
        )


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
