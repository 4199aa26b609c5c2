"""Where the first weights of a run come from, and how they are split into trained and frozen."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from keysync_jax import assets
from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.trees import require_alike
from keysync_jax.models.freezing import frozen_mask
from keysync_jax.models.stage import abstract_params, abstract_vae_params, init_params, init_vae_params
from keysync_jax.training.config import InitConfig, TrainConfig
from keysync_jax.training.state import Tree, merge, partition
from keysync_jax.training.store import checkpoints


class Weights(NamedTuple):
    """Trained leaves, frozen leaves (with the pixel loss: the VAE's decoder under `first_stage_model`), that VAE's config, and lines
    that say what was taken from where and what was drawn at random."""

    params: Tree
    frozen: Tree
    vae: VAEConfig | None
    notes: tuple[str, ...] = ()


def split(config: TrainConfig, params: Tree) -> tuple[Tree, Tree]:
    """A stage's or autoencoder's parameters as (trained, frozen)."""
    if config.model == "vae" or config.freeze == "none":
        return params, {}
    return partition(params, frozen_mask(params))


def abstract_weights(config: TrainConfig) -> Weights:
    """Shapes of all leaves, from the config (and, with a pixel loss, the config of the VAE) alone."""
    if config.model == "vae":
        return Weights(abstract_weights_of(config), {}, config.vae)
    params, frozen = split(config, abstract_weights_of(config))
    vae = vae_config(config)
    if vae is not None:
        frozen = merge(frozen, _decoder(_abstract(vae)))
    return Weights(params, frozen, vae)


def abstract_weights_of(config: TrainConfig) -> Tree:
    """Shapes of the whole model, trained and frozen leaves together."""
    return _abstract(config.vae if config.model == "vae" else config.stage)


def _abstract(part: StageConfig | VAEConfig) -> Tree:
    return abstract_params(part) if isinstance(part, StageConfig) else abstract_vae_params(part)


def initial_weights(config: TrainConfig) -> Weights:
    """The weights before step 0, float32 NumPy arrays.

    Raises:
      KeySyncError: the source does not hold what the config describes; names the tensors or keys that differ.
    """
    params, notes = _model(config)
    params, frozen = split(config, params)
    vae = config.vae if config.model == "vae" else None
    if config.uses_pixels:
        part = _vae_part(config)
        if part is None:
            _require_no_pixels(config)
        vae = part.config
        frozen = merge(frozen, _decoder(_vae_params(part)))
        notes.append(f"pixel loss: decoder of the VAE of {part.tensors.source}")
    return Weights(params, frozen, vae, tuple(notes))


def checked(params: Tree, abstract: Tree, where: str) -> Tree:
    """`params` if its leaves have the names and shapes of `abstract`.

    Raises:
      KeySyncError: the first leaves that differ, by name and shape.
    """
    require_alike(params, abstract, f"{where} does not fit the recipe")
    return params


# -- the VAE of a stage -------------------------------------------------------------------------------------------------------------


def resolve(config: TrainConfig, workdir: str | os.PathLike | None = None) -> tuple[TrainConfig, list[str]]:
    """The config with what the VAE of a stage decides: its latent scale, and its sizes under `config.vae`. A VAE run is left alone.

    A run that is continued keeps what its workdir says, so that it needs its sources no more.

    Args:
      config: as the recipe says.
      workdir: of the run; its `config.json` is read if it is there.

    Returns:
      The config, and lines that say what was taken from where.

    Raises:
      UsageError: the workdir is empty.
      KeySyncError: the workdir is a file, a path of `config.init` does not exist, or the VAE does not fit the stage's latent size,
        resolution or channels; names both.
    """
    if workdir is not None and not os.fspath(workdir):
        raise UsageError("--workdir is empty; name a folder")
    if workdir is not None and "://" not in os.fspath(workdir) and os.path.exists(workdir) and not os.path.isdir(workdir):
        raise KeySyncError(f"--workdir {workdir} is a file; name a folder")
    stored = _stored(workdir)
    if stored is None:
        _require_sources(config)
    if config.model == "vae":
        return config, []
    if stored is not None and stored.model == "stage":
        part = None if config.init == stored.init else _vae_part(config, missing_ok=True)
        if part is not None:
            _check_vae(part, config.stage)
            if part.config.latent_scale != stored.stage.latent_scale:
                raise KeySyncError(
                    f"{part.tensors.source} makes latents of scale {part.config.latent_scale:g}, the run in {workdir} was trained at "
                    f"{stored.stage.latent_scale:g}: another VAE; take config.init.vae back, or start a new run"
                )
        return _at_scale(config, stored.vae, stored.stage.latent_scale), []
    part = _vae_part(config)
    if part is None:
        _require_no_pixels(config)
        return _at_scale(config, config.vae, config.stage.latent_scale), []
    _check_vae(part, config.stage)
    vae, stage = part.config, config.stage
    notes = []
    if stage.latent_scale != vae.latent_scale:
        notes.append(f"latent scale {vae.latent_scale:g} instead of {stage.latent_scale:g}: that of {part.tensors.source}")
    return _at_scale(config, vae, vae.latent_scale), notes


def _check_vae(part: Any, stage: StageConfig) -> None:
    vae, where = part.config, part.tensors.source
    if vae.latent_channels != stage.unet.out_channels:
        raise KeySyncError(
            f"{where} makes latents of {vae.latent_channels} channels, config.stage.unet.out_channels is {stage.unet.out_channels}"
        )
    if stage.latent_size * vae.downsample_factor != stage.resolution:
        raise KeySyncError(
            f"config.stage.resolution is {stage.resolution}, but latents of config.stage.latent_size={stage.latent_size} are "
            f"{stage.latent_size * vae.downsample_factor} pixels in {where} ({vae.downsample_factor} per cell); change one of them"
        )


_SOURCES = {
    "svd": "name Stable Video Diffusion there, a .safetensors file or a diffusers folder, or choose another config.init.kind",
    "model": "name a model directory there (keysync convert, export or init makes one)",
    "run": "name the workdir of a run there",
}


def located(init: InitConfig) -> InitConfig:
    """With the bundled model's directory in place of "demo". The recipe keeps the word: the package may lie elsewhere on another host."""
    path = assets.resolve(init.path) if init.kind == "model" else init.path
    return dataclasses.replace(init, path=path, vae=assets.resolve(init.vae))


def _require_sources(config: TrainConfig) -> None:
    init = located(config.init)
    needed = {"path": (init.path, _SOURCES.get(init.kind, "")), "vae": (init.vae, "name a model directory with a VAE there")}
    if init.kind == "scratch":
        del needed["path"]
    for key, (path, advice) in needed.items():
        if path and not path.startswith("hub:") and not epath.Path(path).exists():
            raise KeySyncError(f"config.init.{key}: {path} does not exist; {advice}")


def _require_no_pixels(config: TrainConfig) -> None:
    """Raised where no VAE is named."""
    if config.uses_pixels:
        raise KeySyncError(
            "the pixel loss decodes frames: name a model directory with a VAE in config.init.vae, or set loss.pixel_weight=0"
        )


def _at_scale(config: TrainConfig, vae: VAEConfig, scale: float) -> TrainConfig:
    """Network and pixel loss see latents of one scale."""
    stage, loss = (dataclasses.replace(part, latent_scale=scale) for part in (config.stage, config.loss))
    return dataclasses.replace(config, stage=stage, loss=loss, vae=vae)


def check_latents(config: TrainConfig, reader: Any) -> None:
    """Refuses data whose latents have another scale than the stage.

    Args:
      config: resolved.
      reader: of the training data.

    Raises:
      KeySyncError: names the dataset and both scales.
    """
    if config.model == "vae":
        return
    for store in reader.stores:
        scale = store.info("latent").get("scale")
        if scale is not None and scale != config.stage.latent_scale:
            raise KeySyncError(
                f"{store.root} holds latents at scale {scale:g}, the stage works at {config.stage.latent_scale:g}; "
                f"prepare the data with the VAE of config.init.vae"
            )


def vae_config(config: TrainConfig) -> VAEConfig | None:
    """Of the autoencoder that a stage's pixel loss decodes with; None where none is needed."""
    if not config.uses_pixels:
        return None
    part = _vae_part(config, missing_ok=True)
    return config.vae if part is None else part.config


def _stored(workdir: str | os.PathLike | None) -> TrainConfig | None:
    from keysync_jax.training.start import runs

    if workdir is None or not (epath.Path(workdir) / checkpoints.CONFIG).exists():
        return None
    # Without a finished checkpoint the run begins again, from whatever the recipe names now.
    saved = epath.Path(workdir) / checkpoints.CHECKPOINTS
    if not saved.is_dir() or not any(path.name.isdigit() and _is_whole(path) for path in saved.iterdir()):
        return None
    return runs.read_config(workdir)


def _is_whole(checkpoint: epath.Path) -> bool:
    """An object store renames no folders: there Orbax writes in place, and this file last."""
    return "://" not in os.fspath(checkpoint) or (checkpoint / "commit_success.txt").exists()


def _vae_part(config: TrainConfig, missing_ok: bool = False) -> Any:
    """The VAE that `config.init` names, as a `converters.parts.Part`; None if it names none.

    Raises:
      KeySyncError: `init.vae` holds no VAE; a path does not exist, unless `missing_ok`.
    """
    from keysync_jax.converters import assemble_vae, containers, convert, model_directory
    from keysync_jax.converters.parts import Part
    from keysync_jax.training.start import runs

    init = located(config.init)
    path = init.vae or (init.path if init.kind != "scratch" else "")
    if not path or (missing_ok and not path.startswith("hub:") and not epath.Path(path).exists()):
        return None
    if not init.vae and init.kind == "run":
        other = runs.read_config(path)  # where that run found its own
        return None if other.model == "vae" else _vae_part(other, missing_ok)
    if path.startswith("hub:") or model_directory.is_model_directory(path):
        directory = model_directory.load(path, complete=False)
        if "vae" in directory.parts:
            return Part("vae", directory.vae, directory.tensors("vae"), directory.parts["vae"].random)
        part = None
    else:
        sources = containers.open_sources(path)
        sources = [s for s in sources if s.kind == "diffusers_vae" or (s.kind == "svd" and assemble_vae.has_vae(s))]
        part = assemble_vae.assemble(sources[0], [], convert.Options(), [], set()) if sources else None
    if part is None and init.vae:
        raise KeySyncError(f"config.init.vae: {init.vae} holds no VAE; name a model directory that has one")
    return part


def _vae_params(part: Any) -> Tree:
    from keysync_jax.converters.parts import part_table

    return _to_flax(part_table(part.config), part.tensors)


def _decoder(vae: Tree) -> Tree:
    part = vae["first_stage_model"]
    return {"first_stage_model": {name: part[name] for name in ("decoder", "post_quant_conv") if name in part}}


# -- sources of weights -------------------------------------------------------------------------------------------------------------


def _model(config: TrainConfig) -> tuple[Tree, list[str]]:
    """The whole model and notes."""
    source = {"scratch": _scratch, "svd": _from_svd, "model": _from_directory, "run": _from_run}[config.init.kind]
    params, notes = source(config)
    checked(params, abstract_weights_of(config), config.init.path or "config.init")
    return params, notes


def _scratch(config: TrainConfig) -> tuple[Tree, list[str]]:
    if config.model == "vae":
        params = init_vae_params(config.vae, config.seed, gain=1.0)
    else:
        params = init_params(config.stage, config.seed, zero_init=config.init.zero_init)
    notes = [f"all {sum(x.size for x in jax.tree.leaves(params)):,} parameters are drawn at random, seed {config.seed}"]
    if jax.tree.leaves(split(config, params)[1]):
        notes.append("the temporal layers stay random: freeze 'temporal' holds them; --config.freeze=none trains them")
    return params, notes


def _from_svd(config: TrainConfig) -> tuple[Tree, list[str]]:
    """Stable Video Diffusion, an sgm file or a diffusers folder: only what a KeySync stage cannot take from it is drawn anew."""
    from keysync_jax.converters import assemble_stage, containers, diffusers, sgm

    path = config.init.path
    if config.model == "vae":
        return _from_vae(config)
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
    # SVD has no audio path; its `label_emb` reads another vector, and its first convolution other channels than interpolation's.
    new = {e.torch_key for e in table if not e.torch_key.startswith(diffusers.UNET_PREFIX)}
    new.add(f"{diffusers.UNET_PREFIX}label_emb.0.0.weight")
    if config.stage.stage == "interpolation":
        new.add(f"{diffusers.UNET_PREFIX}input_blocks.0.0.weight")
    # An image model has no temporal layers to put SVD's into.
    spare = set() if any(map(sgm.is_frozen, (e.torch_key for e in table))) else {key for key in tensors if sgm.is_frozen(key)}
    return _compose(config, tensors, new, spare, path)


def _from_directory(config: TrainConfig) -> tuple[Tree, list[str]]:
    from keysync_jax.converters import model_directory
    from keysync_jax.converters.parts import DECODER, STAGES

    path = located(config.init).path
    directory = model_directory.load(path, complete=False)
    if config.model == "vae":
        return _from_vae(config)
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


def _from_run(config: TrainConfig) -> tuple[Tree, list[str]]:
    from keysync_jax.converters.lazy import from_params
    from keysync_jax.converters.parts import part_table
    from keysync_jax.training.start import runs

    init = config.init
    run = runs.read_weights(init.path, init.step, init.ema)
    where = f"step {run.step} of {init.path}{', averaged weights' * init.ema}"
    if run.config.model != config.model:
        raise KeySyncError(f"config.init.path: {init.path} trains a {run.config.model}, this run a {config.model}")
    if config.model == "vae":
        _same("vae", run.config.vae, config.vae, {"latent_scale"}, where)
        return checked(run.params, abstract_weights_of(config), where), [f"all parameters come from {where}"]
    stage = run.config.stage
    return _from_stage(config, stage, from_params(part_table(stage), run.params, where), where)


def _from_vae(config: TrainConfig) -> tuple[Tree, list[str]]:
    part = _vae_part(dataclasses.replace(config, init=dataclasses.replace(config.init, vae=located(config.init).path)))
    where = part.tensors.source
    _same("vae", part.config, config.vae, {"latent_scale", "video_kernel_size"}, where)
    return checked(_vae_params(part), abstract_weights_of(config), where), [f"all parameters come from {where}"]


def _from_stage(config: TrainConfig, other: StageConfig, tensors: Any, where: str) -> tuple[Tree, list[str]]:
    """A stage's weights; from the other stage, what the two do not share is drawn anew, as it is from SVD."""
    from keysync_jax.converters import diffusers

    mine, new, spare = config.stage, set(), set()
    free = {"num_frames", "merge_factor", "extra_ff_mix_layer", "reference_diffusers_eps"}
    if other.stage != mine.stage:
        filler = "model.learned_mask"
        new = {f"{diffusers.UNET_PREFIX}input_blocks.0.0.weight", filler} - ({filler} if not mine.has_learned_filler else set())
        spare, free = {filler}, free | {"in_channels"}
    _same("stage.unet", other.unet, mine.unet, free, where)
    params, notes = _compose(config, tensors, new, spare, where)
    shared = ("audio_encoder", "audio_merge", "mask", "latent_scale", "resolution", "num_frames")
    differ = [f"{name} {getattr(other, name)} -> {getattr(mine, name)}" for name in shared if getattr(other, name) != getattr(mine, name)]
    if differ:
        notes.append(f"{where} was trained for something else: {'; '.join(differ)}")
    return params, notes


def _compose(config: TrainConfig, tensors: Any, new: set[str], spare: set[str], where: str) -> tuple[Tree, list[str]]:
    """A stage from `tensors` (torch layout); those in `new` are drawn where they are missing or of another shape, `spare` may be left over.

    What `config.init.redraw` names is drawn in any case.

    Raises:
      KeySyncError: anything else is missing, unexpected or mis-shaped.
    """
    from keysync_jax.converters import sgm
    from keysync_jax.converters.fresh import fresh, stage_constants
    from keysync_jax.converters.lazy import constant
    from keysync_jax.core.differences import compare, some

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
    from keysync_jax.converters import sgm

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


def _to_flax(table: Any, tensors: Any) -> Tree:
    from keysync_jax.weights.table import to_flax

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


def describe(config: TrainConfig, workdir: str | os.PathLike) -> list[str]:
    """Opens data and weights and says what a run would begin with, or go on from.

    Raises:
      KeySyncError: whatever would stop the run at its start.
    """
    from keysync_jax.parallel.mesh import check_batch, train_mesh
    from keysync_jax.training import data, lpips, resume
    from keysync_jax.training.start import runs
    from keysync_jax.training.watch import metrics, validation

    config, lines = resolve(config, workdir)
    check_batch(train_mesh(config.mesh), config.data.batch_size, config.optimizer.accumulate)
    reader = data.make_reader(config)
    check_latents(config, reader)
    validation.open_reader(config, lines.append)
    if config.uses_lpips:
        lpips.load(config.lpips)
    if config.log.wandb:
        metrics.require_wandb()
    latest = runs.last_step(workdir)
    if latest is not None:
        with checkpoints.Checkpoints(workdir, read_only=True) as saved:
            changes = resume.changes(saved.meta(latest), config, f"checkpoint {latest} of {workdir}")
        changed = [f"the recipe changed: {change}" for change in changes]
        if latest >= config.num_steps:
            return [*lines, *changed, f"nothing to do: step {latest} of {workdir} is reached, the recipe asks for {config.num_steps}"]
        return [*lines, *changed, f"goes on from step {latest} of {workdir}"]
    weights = initial_weights(config)
    count, held = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (weights.params, weights.frozen))
    todo = f"{count:,} parameters are trained, {held:,} are frozen; {config.num_steps} steps of {config.data.batch_size} samples"
    return [*lines, *weights.notes, todo]
