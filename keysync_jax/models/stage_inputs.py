"""What stands between a stage's conditions and its U-Net: the audio projection, and the network input that latent conditions make."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.conditions import repeat_frames
from keysync_jax.models import layers

Array = jax.Array


class AudioEmbedder(nn.Module):
    """Merges the two 20 ms speech tokens of a 40 ms frame and projects them.

    Attributes:
      features: width of the projection; None for no projection.
      merge: "mean", "add", or "concat" (twice as wide).
      dtype: compute type.
    """

    features: int | None
    merge: str = "mean"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, audio: Array) -> Array:
        """`[B, T, 2, D]` to tokens `[B, T, features]` (`[B, T, D]` or `[B, T, 2D]` without projection)."""
        if audio.ndim != 4:
            raise KeySyncError(f"audio features must be [B, T, 2, D], not {audio.shape}")
        if self.merge == "mean":
            merged = audio.mean(axis=2)
        elif self.merge == "add":
            merged = audio.sum(axis=2)
        elif self.merge == "concat":
            merged = audio.reshape(*audio.shape[:2], -1)
        else:
            raise KeySyncError(f"audio merge {self.merge!r} is unknown; choose mean, add or concat")
        return merged if self.features is None else layers.dense(self.features, "linear", self.dtype)(merged)


def keyframe_input(x: Array, identity: Array) -> Array:
    """Input of the keyframe network: noisy latents, then the identity latent.

    Args:
      x: `[B, T, h, w, 4]`.
      identity: raw latent `[B, h, w, 4]` for all frames, or `[B, T, h, w, 4]` per frame.

    Returns:
      `[B, T, h, w, 8]`.
    """
    if identity.ndim == 4:
        identity = repeat_frames(identity, x.shape[1])
    return jnp.concatenate([x, identity.astype(x.dtype)], axis=-1)


def interpolation_input(x: Array, endpoints: Array, filler: Array | None, add_indicator: bool = True) -> Array:
    """Input of the interpolation network: noisy latents, per-frame condition, and a channel that marks the given frames.

    Args:
      x: `[B, T, h, w, C]`.
      endpoints: raw latents of the first and the last frame, `[B, h, w, 2C]` (first, then last).
      filler: `[h, w, C]` what stands between them; None repeats the nearer endpoint (first half, second half).
      add_indicator: append the channel that is 1 on the first and last frame and 0 elsewhere.

    Returns:
      `[B, T, h, w, 2C]`, plus one channel for the indicator.

    Raises:
      KeySyncError: fewer than two frames, or a filler of another latent size than `x`.
    """
    b, t, h, w, _ = x.shape
    if t < 2:
        raise KeySyncError(f"interpolation needs at least the two endpoint frames, not {t}")
    first, last = jnp.split(endpoints.astype(x.dtype), 2, axis=-1)
    if filler is None:
        condition = jnp.concatenate([repeat_frames(first, t // 2), repeat_frames(last, t - t // 2)], axis=1)
    else:
        if filler.shape[:2] != (h, w):
            raise KeySyncError(f"the learned filler is for latents of {filler.shape[0]}x{filler.shape[1]}, not {h}x{w}; set latent_size")
        middle = jnp.broadcast_to(filler.astype(x.dtype), (b, t - 2, *filler.shape))
        condition = jnp.concatenate([first[:, None], middle, last[:, None]], axis=1)
    parts = [x, condition]
    if add_indicator:
        frame = jnp.arange(t)
        given = ((frame == 0) | (frame == t - 1)).astype(x.dtype)
        parts.append(jnp.broadcast_to(given[None, :, None, None, None], (b, t, h, w, 1)))
    return jnp.concatenate(parts, axis=-1)
