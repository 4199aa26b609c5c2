"""What stored samplings show and generation has no use for: every state on the way, and networks called on a part of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.diffusion import sampler
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.diffusion.guidance import Guidance
from keysync_jax.diffusion.inpainting import Network


class Trajectory(NamedTuple):
    """Every state of a sampling run of n evaluations."""

    x: jax.Array  # [n + 1, B, T, h, w, 4]: the state before each step, and the result
    denoised: jax.Array  # [n, B, T, h, w, 4]: guided prediction at each step


def sample(
    network: Network | Mapping[str, Network], noise: jax.Array, sigmas: np.ndarray, conditions: Conditions, guidance: Guidance
) -> tuple[jax.Array, Trajectory]:
    """`sampler.sample` with every state."""
    step = sampler.euler_step(network, conditions, guidance)

    def states(carry, level):
        following, denoised = step(carry, level)
        return following, (carry[0], denoised)

    (x, _), (before, denoised) = jax.lax.scan(states, *sampler.start(noise, sigmas, guidance))
    return x, Trajectory(jnp.concatenate([before, x[None]]), denoised)


def in_chunks(network: Network, size: int) -> Network:
    """The network called on at most `size` videos at a time, one group after the other; the last may be smaller."""

    def chunked(*inputs):
        batch = inputs[0].shape[0]
        if size >= batch:
            return network(*inputs)
        whole = batch // size * size
        groups = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), inputs)
        output = jax.lax.map(lambda group: network(*group), groups)
        output = output.reshape(whole, *output.shape[2:])
        if whole == batch:
            return output
        return jnp.concatenate([output, network(*jax.tree.map(lambda a: a[whole:], inputs))])

    return chunked
