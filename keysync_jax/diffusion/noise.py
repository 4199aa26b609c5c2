"""Random numbers of a seed: one stream for each purpose, so that no two draw the same."""

from __future__ import annotations

from collections.abc import Sequence

import jax

# The values are arbitrary but fixed, since a seed must keep meaning the same video.
_STREAMS = {"keyframe": 1, "interpolation": 2, "posterior": 3}


def stream_key(seed: jax.typing.ArrayLike, stream: str) -> jax.Array:
    """Key of one stream of a seed's random numbers: "keyframe", "interpolation" or "posterior"."""
    return jax.random.fold_in(jax.random.key(seed), _STREAMS[stream])


def keyed_noise(seeds: jax.Array, stream: str, indices: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Standard normal numbers `[B, *shape]`, row i a function of its own seed and index alone.

    Args:
      seeds: uint32 `[B]`.
      stream: see `stream_key`.
      indices: int32 `[B]`: which window of its clip, or which frame.
      shape: of a row.
    """
    return jax.vmap(lambda seed, index: jax.random.normal(jax.random.fold_in(stream_key(seed, stream), index), shape))(seeds, indices)
