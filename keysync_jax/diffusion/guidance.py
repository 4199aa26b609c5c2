"""Guidance: which conditions, and which network, each evaluation of a step is made with, and how the results combine.

A guidance is an object with `branches`, `needed`, `initial_state` and `combine` (`Guidance`); nothing else knows its class. It is a
pytree: its scales are leaves, so that a program compiled once serves any scales (a number for the whole batch, or `[B]` for each
video), and all else is structure. Weights of the branches sum to one: the known region, equal in all, stays as it is.

Branches that cannot matter are not computed. `guidance.needed()` looks at concrete scales and leaves out every branch whose weight is
zero, so that audio 1 and identity 1 take one evaluation instead of three. What it returns is again a guidance, of another structure:
whoever batches windows lets only those share a batch for which `jax.tree.structure(guidance.needed())` is equal, and has then one
program for each set of branches, none for each scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import StageConfig
from keysync_jax.diffusion.conditions import Conditions, without

MAIN = "main"  # the name of the network that is sampled from
WEAK = "weak"  # of a worse version of it, for autoguidance

# A factor of a branch: one for the batch, or `[B]`.
Scale = jax.Array | np.ndarray | float


class Branch(NamedTuple):
    """One evaluation: the conditions that are left out (names of `conditions.FIELDS`), and the network that is asked."""

    without: tuple[str, ...] = ()
    network: str = MAIN


NEITHER, IDENTITY, FULL = Branch(("audio", "identity")), Branch(("audio",)), Branch()


class Guidance(Protocol):
    """A rule of guidance; see above for what else holds of it."""

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The evaluations made for every video, in the order in which `combine` reads them; those of one network side by side."""
        ...

    def needed(self) -> Guidance:
        """The same guidance without the branches that cannot matter at its scales, which are concrete (outside `jit`)."""
        ...

    def initial_state(self, x: jax.Array) -> Any:
        """State before the first step, for latents shaped like `x`."""
        ...

    def combine(self, denoised: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """`[branches * B, T, h, w, C]`, branch-major, to the guided `[B, T, h, w, C]`, and the next state."""
        ...


def prepare(branches: Sequence[Branch], x: jax.Array, sigma: jax.Array, conditions: Conditions) -> tuple[jax.Array, jax.Array, Conditions]:
    """The network inputs of the branches, stacked along the batch axis (branch-major), so that one call evaluates them all.

    Args:
      branches: what each leaves out.
      x: `[B, T, h, w, C]`.
      sigma: `[B]` or `[B, T]`.
      conditions: the full conditions.

    Returns:
      The three inputs with batch `len(branches) * B`.
    """
    stacked = [without(conditions, *branch.without) for branch in branches]
    every = jax.tree.map(lambda *values: jnp.concatenate(values), *stacked)
    return jnp.concatenate([x] * len(branches)), jnp.concatenate([sigma] * len(branches)), every


def of_stage(stage: StageConfig) -> Guidance:
    """The guidance that a stage's config asks for, its scales as float32."""
    return jax.tree.map(np.float32, RULES[stage.guidance.kind](**stage.guidance_numbers))


# Metadata of a field that is structure, not a leaf.
_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """A rule that walks from its first branch to its last: `D_0 + s_1 (D_1 - D_0) + s_2 (D_2 - D_1) + ...`.

    So branch k has the weight `s_k - s_(k+1)`, with `s_0 = 1` and 0 after the last. Where that is zero the two steps beside it are
    one, and the branch is not needed.
    """

    branches: tuple[Branch, ...] = dataclasses.field(default=(FULL,), kw_only=True, metadata=_STATIC)

    def scale_to(self, branch: Branch) -> Scale:
        """Factor of the step that ends at a branch."""
        raise NotImplementedError

    def needed(self) -> Self:
        scales = [np.float32(1), *(np.asarray(self.scale_to(branch), np.float32) for branch in self.branches[1:]), np.float32(0)]
        kept = tuple(b for b, own, after in zip(self.branches, scales, scales[1:], strict=False) if np.any(own != after))
        return dataclasses.replace(self, branches=kept)

    def initial_state(self, x: jax.Array) -> tuple[()]:
        return ()

    def combine(self, denoised: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        parts = jnp.split(denoised, len(self.branches))
        # From the last step to the first: a sum of floats has an order, and seeds must keep their bytes.
        steps = [
            _rows(self.scale_to(branch), part) * (part - before)
            for branch, before, part in zip(self.branches[1:], parts, parts[1:], strict=False)
        ]
        guided = sum(reversed(steps[:-1]), steps[-1]) + parts[0] if steps else parts[0]
        return guided, state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoGuidance(Chain):
    """The conditional prediction alone, one evaluation per step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFreeGuidance(Chain):
    """`D_u + scale * (D_c - D_u)`; branches: without, with. The baseline of the paper's guidance ablation."""

    scale: Scale = 2.0
    branches: tuple[Branch, ...] = dataclasses.field(default=(NEITHER, FULL), kw_only=True, metadata=_STATIC)

    def scale_to(self, branch: Branch) -> Scale:
        return self.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AudioIdentityGuidance(Chain):
    """Separate scales for audio and identity: `D_0 + w_id (D_id - D_0) + w_audio (D_id+audio - D_id)` (paper Eq. 8, Table 8).

    Branches: neither condition, identity only, identity and audio. Equal scales are classifier-free guidance and leave out the second.
    """

    audio: Scale = 5.0
    identity: Scale = 2.0
    branches: tuple[Branch, ...] = dataclasses.field(default=(NEITHER, IDENTITY, FULL), kw_only=True, metadata=_STATIC)

    def scale_to(self, branch: Branch) -> Scale:
        return self.identity if branch == IDENTITY else self.audio


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AutoGuidance(Chain):
    """Autoguidance (Karras et al. 2024, Eq. 3): `D_weak + scale * (D - D_weak)`, both under all conditions.

    The worse version of the network, one trained less for example, is the network named `WEAK`; at scale 1 it is not asked.
    """

    scale: Scale = 2.0
    branches: tuple[Branch, ...] = dataclasses.field(default=(Branch(network=WEAK), FULL), kw_only=True, metadata=_STATIC)

    def scale_to(self, branch: Branch) -> Scale:
        return self.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveProjectedGuidance:
    """Audio and identity guidance with each direction normalised (Sadat et al. 2024, Algorithm 1), as the KeySync reference
    offers at commit cfff7cf.

    Each direction is its difference from the branch without conditions, averaged with (negative) momentum over steps, shortened
    to `norm_threshold`, and stripped of all but `eta` of its part parallel to the prediction. Norms and products are per frame.
    A direction whose scale is 1 adds nothing.
    """

    audio: Scale = 5.0
    identity: Scale = 2.0
    momentum: float = dataclasses.field(default=-0.75, kw_only=True, metadata=_STATIC)
    eta: float = dataclasses.field(default=0.0, kw_only=True, metadata=_STATIC)
    norm_threshold: float = dataclasses.field(default=2.5, kw_only=True, metadata=_STATIC)
    branches: tuple[Branch, ...] = dataclasses.field(default=(NEITHER, IDENTITY, FULL), kw_only=True, metadata=_STATIC)

    def needed(self) -> Self:
        kept = tuple(b for b in self.branches[1:] if np.any(np.asarray(self._scale_of(b), np.float32) != 1))
        return dataclasses.replace(self, branches=(NEITHER, *kept))

    def initial_state(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return (jnp.zeros_like(x),) * (len(self.branches) - 1)

    def combine(self, denoised: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        neither, *others = jnp.split(denoised, len(self.branches))
        averages = tuple(other - neither + self.momentum * before for other, before in zip(others, state, strict=True))
        guided = neither
        for branch, other, average in reversed([*zip(self.branches[1:], others, averages, strict=True)]):
            guided = guided + _rows(self._scale_of(branch) - 1.0, other) * self._direction(average, other)
        return guided, averages

    def _scale_of(self, branch: Branch) -> Scale:
        return self.identity if branch == IDENTITY else self.audio

    def _direction(self, difference: jax.Array, prediction: jax.Array) -> jax.Array:
        if self.norm_threshold > 0:
            # The floor only keeps 0 / 0 out; a difference that short is not shortened anyway.
            difference = difference * jnp.minimum(1.0, self.norm_threshold / jnp.maximum(_frame_norm(difference), 1e-12))
        unit = prediction / jnp.maximum(_frame_norm(prediction), 1e-12)
        parallel = jnp.sum(difference * unit, axis=(-3, -2, -1), keepdims=True) * unit
        return difference - parallel + self.eta * parallel


# The rule of each kind that a config can name (`config.GUIDANCES`); its numbers are the arguments.
RULES: dict[str, Callable[..., Guidance]] = {
    "audio-identity": AudioIdentityGuidance,
    "cfg": ClassifierFreeGuidance,
    "apg": AdaptiveProjectedGuidance,
    "auto": AutoGuidance,
    "none": NoGuidance,
}


def _rows(scale: Scale, like: jax.Array) -> jax.Array:
    """A scale of each video `[B]` shaped to broadcast over `[B, ...]`; one scale of all as it is."""
    scale = jnp.asarray(scale)
    return scale.reshape(-1, *[1] * (like.ndim - 1)) if scale.ndim else scale


def _frame_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm over h, w and C of each frame, kept as axes of size one."""
    return jnp.sqrt(jnp.sum(x**2, axis=(-3, -2, -1), keepdims=True))
