"""Opens a SAM 2.1 checkpoint as it was released, without torch."""

from __future__ import annotations

import os
from typing import Any

from etils import epath

from keysync_jax.converters.containers import read_tensors
from keysync_jax.core.differences import some
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.sam2.sam2_config import UNUSED, Sam2Config, config_from_shapes
from keysync_jax.models.sam2.sam2_table import sam2_table
from keysync_jax.models.table import to_flax


def load_sam2(path: str | os.PathLike) -> tuple[Sam2Config, dict[str, Any]]:
    """Sizes and float32 parameters of a checkpoint `sam2.1_hiera_{tiny,small,base_plus,large}.pt`, or the same tensors as safetensors.

    Which size it is follows from the tensors' shapes, whatever the file is called.

    Raises:
      KeySyncError: the file cannot be read, holds SAM 2.0 or something else, or tensors are missing, unknown or of another shape.
    """
    if not os.path.exists(path):
        raise KeySyncError(f"{path} does not exist; give a local SAM 2.1 checkpoint")
    tensors = read_tensors(epath.Path(path))
    config = config_from_shapes(tensors.shapes, str(path))
    table = sam2_table(config)
    unknown = sorted(set(tensors) - {entry.torch_key for entry in table} - set(UNUSED))
    if unknown:
        raise KeySyncError(f"{path}: {len(unknown)} tensors that SAM 2.1 does not have: {some(unknown)}")
    return config, to_flax(table, tensors, str(path))
