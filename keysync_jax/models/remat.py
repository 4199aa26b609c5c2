"""What the backward pass keeps of the forward pass, by the names of `config.Remat`.

Blocks of the U-Net are rematerialised one by one. `saved` in `models.layers` tags the outputs of convolutions and attention, which are
the expensive things to compute again: `dots_with_no_batch_dims_saveable` alone would recompute every convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax

from keysync_jax.config import Remat

M = TypeVar("M", bound=nn.Module)


def policy(remat: Remat) -> Callable | None:
    """The `jax.checkpoint` policy; None recomputes everything."""
    named = jax.checkpoint_policies.save_only_these_names("conv", "attention")
    policies = jax.checkpoint_policies
    return {
        Remat.DOTS: policies.dots_saveable,
        Remat.CONV_AWARE: policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named),
        Remat.NAMES: named,
        Remat.FULL: None,
    }[remat]


def rematerialised(module: type[M], remat: str) -> type[M]:
    """`module` with the policy of that name around its call; parameter names do not change."""
    choice = Remat(remat)
    return module if choice is Remat.NONE else nn.remat(module, policy=policy(choice))
