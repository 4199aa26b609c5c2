"""The weights before step 0: drawn at random, or taken from Stable Video Diffusion, a model directory or another run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.converters import assemble_stage, containers, diffusers, model_directory, sgm
from keysync_jax.converters.fresh import fresh, stage_constants
from keysync_jax.converters.lazy import Tensors, constant, from_params
from keysync_jax.converters.parts import DECODER, STAGES, Part, part_table
from keysync_jax.core.differences import compare, some
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.stage import init_params, init_vae_params
from keysync_jax.models.table import Table, to_flax
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.start import weights_layout
from keysync_jax.training.start.runs import RunWeights
from keysync_jax.training.start.stage_vae import config_of, located, open_vae
from keysync_jax.training.start.weights_layout import checked
from keysync_jax.training.state import Tree

Found = tuple[Tree, list[str]]  # a whole model, float32 NumPy arrays, and lines that say where it comes from


def stage_weights(config: TrainConfig, run: RunWeights | None = None) -> Found:
    """A stage before step 0, from where `config.init` says; `run` are the weights that a start from a run takes.

    Raises:
      KeySyncError: the source does not hold what the config describes; names the tensors or keys that differ.
    """
    if run is not None:
        stage = run.config.stage
        return _from_stage(config, stage, from_params(part_table(stage), run.params, run.said), run.said)
    return {"scratch": _scratch, "svd": _from_svd, "model": _from_directory}[config.init.kind](config)


def vae_weights(config: TrainConfig, run: RunWeights | None = None) -> Found:
    """An autoencoder before step 0; arguments and errors as for `stage_weights`."""
    if run is not None:
        _same("vae", run.config.vae, config.vae, {"latent_scale"}, run.said)
        where, params = run.said, run.params
    elif config.init.kind == "scratch":
        params = init_vae_params(config.vae, config.seed, gain=1.0)
        return params, [_drawn(params, config.seed)]
    else:
        if config.init.kind == "model":
            model_directory.load(located(config.init).path, complete=False)  # which says what is wrong with it
        part = open_vae(dataclasses.replace(config.init, vae=located(config.init).path))
        assert part is not None  # else it was said that there is none
        where, params = part.tensors.source, vae_params(part)
        _same("vae", config_of(part), config.vae, {"latent_scale", "video_kernel_size"}, where)
    return checked(params, weights_layout.abstract(config.vae), where), [f"all parameters come from {where}"]


def vae_params(part: Part) -> Tree:
    """The parameters of a VAE's part."""
    return _to_flax(part_table(part.config), part.tensors)


def _drawn(params: Tree, seed: int) -> str:
    return f"all {sum(x.size for x in jax.tree.leaves(params)):,} parameters are drawn at random, seed {seed}"


def _scratch(config: TrainConfig) -> Found:
    params = init_params(config.stage, config.seed, zero_init=config.init.zero_init)
    notes = [_drawn(params, config.seed)]
    if jax.tree.leaves(weights_layout.split_stage(params, config.freeze)[1]):
        notes.append("the temporal layers stay random: freeze 'temporal' holds them; --config.freeze=none trains them")
    return params, notes


def _from_svd(config: TrainConfig) -> Found:
    """Stable Video Diffusion, an sgm file or a diffusers folder: only what a KeySync stage cannot take from it is drawn anew."""
    path = config.init.path
    sources = containers.open_sources(path)
    source = next((s for s in sources if s.kind == "diffusers_unet" or (s.kind == "svd" and assemble_stage.has_unet(s))), None)
    if source is None:
        kinds = ", ".join(containers.title(s.kind) for s in sources)
        raise KeySyncError(f"config.init.path: {path} holds no U-Net of Stable Video Diffusion, but {kinds}")
    if source.kind == "diffusers_unet" and source.config is not None:
        heads = diffusers.unet_config_from_diffusers(source.config, source.path).num_head_channels
        if heads != config.stage.unet.num_head_channels:
            raise KeySyncError(f"{path} has attention heads of {heads}, config.stage.unet.num_head_channels is not; set it to {heads}")
    tensors = assemble_stage.svd_unet(source, None)
    tensors = tensors.select(key for key in tensors if key.startswith(diffusers.UNET_PREFIX))
    table = sgm.stage_table(config.stage)
    # An image model has no temporal layers to put SVD's into.
    spare = set() if any(map(sgm.is_frozen, (e.torch_key for e in table))) else {key for key in tensors if sgm.is_frozen(key)}
    return _compose(config, tensors, assemble_stage.new_since_svd(table, config.stage.stage), spare, path)


def _from_directory(config: TrainConfig) -> Found:
    path = located(config.init).path
    directory = model_directory.load(path, complete=False)
    name = config.stage.stage
    if name not in directory.parts:
        others = [stage for stage in STAGES if stage in directory.parts]
        if not others:
            raise KeySyncError(f"config.init.path: model directory {path} has no stage; it has {', '.join(directory.parts) or 'nothing'}")
        name = others[0]
    tensors = directory.tensors(name)
    tensors = tensors.select(key for key in tensors if not key.startswith(DECODER))
    params, notes = _from_stage(config, directory.stage(name), tensors, path)
    return params, notes + [f"{path} holds RANDOM weights"] * directory.parts[name].random


def _from_stage(config: TrainConfig, other: StageConfig, tensors: Tensors, where: str) -> Found:
    """A stage's weights; from the other stage, what the two do not share is drawn anew, as it is from SVD."""
    mine = config.stage
    new: set[str] = set()
    spare: set[str] = set()
    free = {"num_frames", "merge_factor", "extra_ff_mix_layer", "reference_diffusers_eps"}
    if other.stage != mine.stage:
        filler = "model.learned_mask"
        new = {f"{diffusers.UNET_PREFIX}input_blocks.0.0.weight", filler} - ({filler} if not mine.has_learned_filler else set())
        spare, free = {filler}, free | {"in_channels"}
    if mine.emotion_dim and mine.unet.adm_in_channels != other.unet.adm_in_channels:  # an emotion in front of the audio is new
        new, free = new | {f"{diffusers.UNET_PREFIX}label_emb.0.0.weight"}, free | {"adm_in_channels"}
    theirs, ours = sgm.audio_linear(other), sgm.audio_linear(mine)
    tensors = tensors.renamed({f"{theirs}.{leaf}": f"{ours}.{leaf}" for leaf in ("weight", "bias")})
    _same("stage.unet", other.unet, mine.unet, free, where)
    params, notes = _compose(config, tensors, new, spare, where)
    shared = ("system", "emotion_dim", "audio_encoder", "audio_merge", "mask", "latent_scale", "resolution", "num_frames")
    differ = [f"{name} {getattr(other, name)} -> {getattr(mine, name)}" for name in shared if getattr(other, name) != getattr(mine, name)]
    if differ:
        notes.append(f"{where} was trained for something else: {'; '.join(differ)}")
    return params, notes


def _compose(config: TrainConfig, tensors: Tensors, new: set[str], spare: set[str], where: str) -> Found:
    """A stage from `tensors` (torch layout); those in `new` are drawn where they are missing or of another shape, `spare` may be left over.

    What `config.init.redraw` names is drawn in any case.

    Raises:
      KeySyncError: anything else is missing, unexpected or mis-shaped.
    """
    stage = config.stage
    table = sgm.stage_table(stage)
    found = compare(tensors.shapes, {e.torch_key: e.torch_shape for e in table})
    wrong = found.without(new, spare)
    if wrong:
        raise KeySyncError(f"config.init.path: {where} does not fit the recipe: {wrong}")
    drawn = [*found.wrong, *found.missing]
    drawn += [key for key in _redrawn(config, [e.torch_key for e in table]) if key not in drawn]
    values = dict(fresh(table, config.seed, keys=drawn, zero_init=config.init.zero_init, constants=stage_constants(stage)).lazy_items())
    if stage.filler == "random" and "model.learned_mask" in values:
        shape = values["model.learned_mask"].shape
        values["model.learned_mask"] = constant(np.random.default_rng([config.seed, 1]).standard_normal(shape, np.float32))
    params = _to_flax(table, tensors.updated(values))
    notes = [f"{len(table) - len(drawn)} of {len(table)} tensors come from {where}"]
    notes += [f"drawn at random, seed {config.seed}: {some(drawn)}"] * bool(drawn)
    notes += [f"left out: {some(found.unexpected, 3)}"] * bool(found.unexpected)
    return params, notes


def _redrawn(config: TrainConfig, keys: Sequence[str]) -> list[str]:
    out: list[str] = []
    for pattern in config.init.redraw:
        matches = [key for key in keys if re.search(pattern, key)]
        if not matches:
            raise KeySyncError(f"config.init.redraw: {pattern!r} is found in no tensor's name; the first is {keys[0]}")
        held = [key for key in matches if config.freeze == "temporal" and sgm.is_frozen(key)]
        if held:
            raise KeySyncError(
                f"config.init.redraw: {pattern!r} is found in {held[0]}, which would stay random: freeze 'temporal' holds it"
            )
        out += matches
    return out


def _to_flax(table: Table, tensors: Tensors) -> Tree:
    params = to_flax(table, tensors, tensors.source, np.float32)
    # Leaves that needed no change are still views of the file: copied, so that they outlive it.
    return jax.tree.map(lambda leaf: leaf if leaf.flags.owndata and leaf.flags.writeable else np.array(leaf), params)


def _same(what: str, found: UNetConfig | VAEConfig, wanted: UNetConfig | VAEConfig, free: set[str], where: str) -> None:
    """Refuses a network that would compute something else with the same tensors, such as one with other attention heads.

    Raises:
      KeySyncError: names the keys of the recipe to change.
    """
    pairs = {f.name: (getattr(found, f.name), getattr(wanted, f.name)) for f in dataclasses.fields(found) if f.name not in free}
    differ = [f"--config.{what}.{name}={_word(theirs)} (is {_word(ours)})" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if differ:
        raise KeySyncError(f"config.init.path: {where} is another network than the recipe's; set {', '.join(differ[:4])}")


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
