"""What a batch of windows is generated from, and what it means that one of these conditions is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keysync_jax.core.errors import KeySyncError


class Conditions(NamedTuple):
    """What one batch of windows is generated from.

    Attributes:
      concat: unscaled latents that join the network input by channel: identity `[B, h, w, 4]` or one per frame
        `[B, T, h, w, 4]`, or the two endpoints `[B, h, w, 8]` (start, then end).
      crossattn: audio tokens `[B, T, D]`; all zero means no audio.
      gt: scaled latents of the source video `[B, T, h, w, 4]`; None where nothing is known and every frame is generated whole.
      masks: `[B, T, h, w, 1]`, 1 = regenerate, 0 = known; given exactly where `gt` is.
      vector: further conditioning of the time embedding, `[B, V]` or one per frame `[B, T, V]` (`UNetConfig.adm_in_channels`).
    """

    concat: jax.Array
    crossattn: jax.Array
    gt: jax.Array | None = None
    masks: jax.Array | None = None
    vector: jax.Array | None = None


# The conditions that can be left out, and the field by which each reaches the network. Left out means zeros there: zero tokens, not
# the projection of zero features, and zero latents. What is in no branch left out (the vector) does not stand here.
FIELDS = {"audio": "crossattn", "identity": "concat"}


def without(conditions: Conditions, *names: str) -> Conditions:
    """The conditions with the named ones (of `FIELDS`) left out: the branches of guidance."""
    return conditions._replace(**{FIELDS[name]: jnp.zeros_like(getattr(conditions, FIELDS[name])) for name in names})


def drop(conditions: Conditions, keep: Mapping[str, jax.Array]) -> Conditions:
    """The conditions with the named ones left out in some rows: dropout in training.

    Args:
      conditions: a batch.
      keep: by name (of `FIELDS`) which rows keep the condition, `[B]`, or which frames of them, `[B, T]`; a latent that stands for all
        frames (`[B, h, w, C]`) is then repeated first, which is how the reference trains the identity of the keyframe stage.
    """
    dropped = {}
    for name, kept in keep.items():
        value = getattr(conditions, FIELDS[name])
        if kept.ndim == 2 and value.ndim == 4:
            value = repeat_frames(value, kept.shape[1])
        dropped[FIELDS[name]] = zero_where_dropped(value, kept)
    return conditions._replace(**dropped)


def zero_where_dropped(value: jax.Array, keep: jax.Array) -> jax.Array:
    """`value` with zeros where `keep`, which has its leading axes (`[B]` or `[B, T]`), is 0."""
    return value * keep.reshape(keep.shape + (1,) * (value.ndim - keep.ndim)).astype(value.dtype)


def repeat_frames(latents: jax.Array, copies: int) -> jax.Array:
    """`[B, h, w, C]` to `[B, copies, h, w, C]`, one per frame."""
    return jnp.broadcast_to(latents[:, None], (latents.shape[0], copies, *latents.shape[1:]))


def paste(x: jax.Array, conditions: Conditions) -> jax.Array:
    """`x` where the mask is 1, the known latents elsewhere; `x` itself where nothing is known.

    Raises:
      KeySyncError: a known region without a mask, or a mask without one.
    """
    if conditions.gt is None and conditions.masks is None:
        return x
    gt, masks = known(conditions)
    return x * masks + gt * (1.0 - masks)


def known(conditions: Conditions) -> tuple[jax.Array, jax.Array]:
    """The known region and its mask.

    Raises:
      KeySyncError: one is missing.
    """
    gt, masks = conditions.gt, conditions.masks
    if gt is None or masks is None:
        raise KeySyncError(f"conditions have no {'known region' if gt is None else 'mask'}; give both, or neither to generate all of it")
    return gt, masks
