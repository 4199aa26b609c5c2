"""Which parameters of a stage the paper's recipe keeps as SVD left them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

# The reference's training scripts freeze every U-Net tensor whose name contains "time_" and thaw the module `time_embed`: the
# temporal blocks, their mixers and frame positions stay, everything else of the U-Net is trained.
_FROZEN = "time_"
_THAWED = "time_embed"


def is_frozen(name: str) -> bool:
    """Whether a U-Net parameter stays frozen, by its dotted or slashed name after `diffusion_model`, in either naming."""
    return _FROZEN in name and not name.startswith(_THAWED)


def frozen_mask(params: Mapping[str, Any]) -> dict[str, Any]:
    """Tree of bools like a `StageModel`'s parameters, true = frozen. The audio projection and the learned filler are trained."""

    def frozen(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(key.key) for key in path]
        return "diffusion_model" in names and is_frozen("/".join(names[names.index("diffusion_model") + 1 :]))

    return jax.tree_util.tree_map_with_path(frozen, params)
