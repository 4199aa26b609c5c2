"""Guidance: which conditions the network is evaluated under, and how the results combine.

Every guidance stacks its branches along the batch axis (branch-major), so that one network call evaluates them all, and may carry
state from step to step. Weights of the branches sum to one: the known region, equal in all branches, stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from keysync_jax.diffusion.inpainting import Conditions


def unconditional(conditions: Conditions, dropped: Sequence[str] = ("concat", "crossattn")) -> Conditions:
    """The same conditions with the named ones set to zero, which is what "no audio" and "no identity" mean in training."""
    return conditions._replace(**{name: jnp.zeros_like(getattr(conditions, name)) for name in dropped})


class Guidance(Protocol):
    """A guidance rule. `branches` network evaluations are made for every video."""

    branches: int

    def prepare(
        self, x: jax.Array, sigma: jax.Array, conditions: Conditions, without: Conditions
    ) -> tuple[jax.Array, jax.Array, Conditions]:
        """Stacks the branches.

        Args:
          x: `[B, T, h, w, C]`.
          sigma: `[B]` or `[B, T]`.
          conditions: the full conditions.
          without: the same with audio and identity dropped.

        Returns:
          The three inputs with batch `branches * B`.
        """

    def initial_state(self, x: jax.Array) -> Any:
        """State before the first step, for latents shaped like `x`."""

    def combine(self, denoised: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """`[branches * B, T, h, w, C]` to the guided `[B, T, h, w, C]`, and the next state."""


class _Stateless:
    def initial_state(self, x: jax.Array) -> tuple[()]:
        return ()


@dataclasses.dataclass(frozen=True)
class NoGuidance(_Stateless):
    """The conditional prediction alone, one evaluation per step."""

    branches = 1

    def prepare(self, x, sigma, conditions, without):
        return x, sigma, conditions

    def combine(self, denoised, state):
        return denoised, state


@dataclasses.dataclass(frozen=True)
class ClassifierFreeGuidance(_Stateless):
    """`D_u + scale * (D_c - D_u)`; branches: without, with. The baseline of the paper's guidance ablation."""

    scale: float = 2.0

    branches = 2

    def prepare(self, x, sigma, conditions, without):
        return jnp.concatenate([x] * 2), jnp.concatenate([sigma] * 2), _stack(without, conditions)

    def combine(self, denoised, state):
        without, conditional = jnp.split(denoised, 2)
        return without + self.scale * (conditional - without), state


@dataclasses.dataclass(frozen=True)
class _AudioIdentity:
    """Three branches: neither condition, identity only, identity and audio (paper Eq. 8)."""

    audio_scale: float = 5.0
    identity_scale: float = 2.0

    branches = 3

    def prepare(self, x, sigma, conditions, without):
        neither = conditions._replace(crossattn=without.crossattn, concat=without.concat)
        identity = conditions._replace(crossattn=without.crossattn)
        return jnp.concatenate([x] * 3), jnp.concatenate([sigma] * 3), _stack(neither, identity, conditions)


@dataclasses.dataclass(frozen=True)
class AudioIdentityGuidance(_AudioIdentity, _Stateless):
    """Separate scales for audio and identity: `D_0 + w_id (D_id - D_0) + w_audio (D_id+audio - D_id)` (paper Eq. 8, Table 8)."""

    def combine(self, denoised, state):
        neither, identity, both = jnp.split(denoised, 3)
        return self.audio_scale * (both - identity) + self.identity_scale * (identity - neither) + neither, state


@dataclasses.dataclass(frozen=True)
class AdaptiveProjectedGuidance(_AudioIdentity):
    """Audio and identity guidance with each direction normalized (Sadat et al. 2024, Algorithm 1), as the KeySync reference
    offers at commit cfff7cf.

    Each direction is its difference from the branch without conditions, averaged with (negative) momentum over steps, shortened
    to `norm_threshold`, and stripped of all but `eta` of its part parallel to the prediction. Norms and products are per frame.
    """

    momentum: float = -0.75
    eta: float = 0.0
    norm_threshold: float = 2.5

    def initial_state(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(x), jnp.zeros_like(x)

    def combine(self, denoised, state):
        neither, identity, both = jnp.split(denoised, 3)
        audio_average = both - neither + self.momentum * state[0]
        identity_average = identity - neither + self.momentum * state[1]
        guided = (
            neither
            + (self.audio_scale - 1.0) * self._direction(audio_average, both)
            + (self.identity_scale - 1.0) * self._direction(identity_average, identity)
        )
        return guided, (audio_average, identity_average)

    def _direction(self, difference: jax.Array, prediction: jax.Array) -> jax.Array:
        if self.norm_threshold > 0:
            # The floor only keeps 0 / 0 out; a difference that short is not shortened anyway.
            difference = difference * jnp.minimum(1.0, self.norm_threshold / jnp.maximum(_frame_norm(difference), 1e-12))
        unit = prediction / jnp.maximum(_frame_norm(prediction), 1e-12)
        parallel = jnp.sum(difference * unit, axis=(-3, -2, -1), keepdims=True) * unit
        return difference - parallel + self.eta * parallel


def _frame_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm over h, w and C of each frame, kept as axes of size one."""
    return jnp.sqrt(jnp.sum(x**2, axis=(-3, -2, -1), keepdims=True))


def _stack(*branches: Conditions) -> Conditions:
    return jax.tree.map(lambda *values: jnp.concatenate(values), *branches)
