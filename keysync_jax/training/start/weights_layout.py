"""Which leaves a model has, of which shapes, and how a run divides them into trained and frozen."""

from __future__ import annotations

from typing import NamedTuple

from keysync_jax.config import StageConfig, VAEConfig
from keysync_jax.core.trees import require_alike
from keysync_jax.models.freezing import frozen_mask
from keysync_jax.models.stage import abstract_params, abstract_vae_params
from keysync_jax.training.state import Tree, partition

# Under this name a run that decodes keeps the VAE's decoder among its frozen leaves.
FIRST_STAGE = "first_stage_model"


class Weights(NamedTuple):
    """Trained leaves, frozen leaves (with the pixel loss: the VAE's decoder under `first_stage_model`), that VAE's config, and lines
    that say what was taken from where and what was drawn at random."""

    params: Tree
    frozen: Tree
    vae: VAEConfig | None
    notes: tuple[str, ...] = ()


def abstract(network: StageConfig | VAEConfig) -> Tree:
    """Shapes of all leaves of a stage or an autoencoder."""
    return abstract_params(network) if isinstance(network, StageConfig) else abstract_vae_params(network)


def split_stage(params: Tree, freeze: str) -> tuple[Tree, Tree]:
    """A stage's parameters as (trained, frozen), by `config.freeze`."""
    return (params, {}) if freeze == "none" else partition(params, frozen_mask(params))


def decoder(vae: Tree) -> Tree:
    """The half of an autoencoder's parameters that decodes, under `first_stage_model`."""
    part = vae[FIRST_STAGE]
    return {FIRST_STAGE: {name: part[name] for name in ("decoder", "post_quant_conv") if name in part}}


def checked(params: Tree, wanted: Tree, where: str) -> Tree:
    """`params` if its leaves have the names and shapes of `wanted`.

    Raises:
      KeySyncError: the first leaves that differ, by name and shape.
    """
    require_alike(params, wanted, f"{where} does not fit the recipe")
    return params
