"""Chooses what follows objects: the network in Flax, or the `sam2` package."""

from __future__ import annotations

import os

from keysync_jax.config import OCCLUSION_BACKENDS
from keysync_jax.converters.sam2_file import load_sam2
from keysync_jax.core.errors import UsageError
from keysync_jax.segmentation.object_tracker import ObjectTracker, Segmenter
from keysync_jax.segmentation.sam2_package import Sam2Package


def open_segmenter(weights: str | os.PathLike, backend: str = "flax", size: int = 512) -> Segmenter:
    """A segmenter with the weights of a SAM 2.1 checkpoint.

    Args:
      weights: `sam2.1_hiera_{tiny,small,base_plus,large}.pt`; the size is read from shapes, not from the name.
      backend: "flax", or "sam2" for the package, which needs torch.
      size: side of the square picture that the network sees, a multiple of 32; 1024 is what the published ones were trained at.

    Raises:
      UsageError: an unknown backend.
      KeySyncError: the weights, or the package.
    """
    if backend not in OCCLUSION_BACKENDS:
        raise UsageError(f"occlusion backend {backend!r} is unknown; choose one of {', '.join(OCCLUSION_BACKENDS)}")
    if backend == "sam2":
        return Sam2Package(weights, size)
    return ObjectTracker(*load_sam2(weights), size)
