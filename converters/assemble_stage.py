"""A stage's part from a KeySync checkpoint, or from Stable Video Diffusion for training."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from keysync_jax.config import StageConfig, VAEConfig
from keysync_jax.converters import diffusers, sgm, shapes
from keysync_jax.converters.containers import Source
from keysync_jax.converters.fresh import fresh, stage_constants
from keysync_jax.converters.lazy import BFLOAT16, Tensors
from keysync_jax.converters.parts import DECODER, ENCODER, KL_PREFIX, Part, first_stage_encoder_table, kl_table, part_table
from keysync_jax.core.differences import Allowed, Differences, compare, patterns_for, some
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import Table

# Submodules of the SVD release that no part of KeySync comes from: its own embedders.
_SVD_EMBEDDERS = "conditioner.embedders."


def has_unet(source: Source) -> bool:
    return any(key.startswith(sgm.UNET_PREFIX) for key in source.tensors)


def filler_size(source: Source | None) -> int | None:
    """Side of the latent that an interpolation checkpoint's learned filler was made for."""
    if source is None:
        return None
    if isinstance(source.own, StageConfig):
        return source.own.latent_size
    return source.tensors.info(shapes.FILLER).shape[-1] if shapes.FILLER in source.tensors else None


def optional_copies(tensors: Tensors, vae: VAEConfig | None) -> set[str]:
    """Keys of the VAE copies that an engine may carry: its first stage's encoder, and interpolation's whole KL autoencoder."""
    if vae is None:
        return {key for key in tensors if key.startswith((ENCODER, f"{KL_PREFIX}."))}
    return {e.torch_key for e in (*kl_table(vae), *first_stage_encoder_table(vae))}


def from_checkpoint(
    source: Source, name: str, vae: Part[VAEConfig] | None, settings: Mapping[str, Any], options: Any, notes: list[str], used: set[str]
) -> Part[StageConfig]:
    """The part of a KeySync checkpoint: its U-Net, audio projection, learned filler and decoder, and nothing else.

    Raises:
      KeySyncError: tensors that are missing, unexpected or mis-shaped and not allowed, all of them named.
    """
    tensors = source.tensors
    if isinstance(source.own, StageConfig):
        config = source.own
    else:
        config = shapes.stage_config(tensors, name, options.head_channels, **settings)
        mask = f", {config.mask.kind} mask" if config.system == "keysync" else ""
        notes.append(
            f"{source.path} does not say what it was trained with; assumed: {config.audio_encoder} features{mask}, "
            f"attention heads of {config.unet.num_head_channels}, {config.resolution} pixels"
        )
    table = sgm.stage_table(config)
    expected = {e.torch_key: e.torch_shape for e in table}
    own_decoder = any(key.startswith(DECODER) for key in tensors)
    vae_config = vae.config if vae else None
    if own_decoder:
        vae_config = vae_config or shapes.vae_config(tensors, sgm.VAE_PREFIX, quant_conv=False)
        expected |= {e.torch_key: e.torch_shape for e in part_table(vae_config, ("decoder",))}
    elif vae:
        notes.append(f"{source.path} has no VAE decoder; its part gets the one of {vae.tensors.source}")
    lpips = {key for key in tensors if key.startswith(f"{sgm.LPIPS}.")}
    if lpips:
        notes.append(f"{source.path}: {len(lpips)} tensors of the perceptual loss that it was trained with were left out")
        tensors = tensors.select(key for key in tensors if key not in lpips)
    copies = optional_copies(tensors, vae_config) & set(tensors)
    if copies:
        notes.append(f"{source.path}: {len(copies)} optional VAE copies were recognised and left out")
    found = compare(tensors.select(key for key in tensors if key not in copies).shapes, expected)
    refuse(source.path, found.without(Allowed(options.allow_missing), Allowed(options.allow_unexpected)), tensors)
    used |= {*found.missing, *found.wrong, *found.unexpected}
    drawn = [key for key in (*found.missing, *found.wrong) if not key.startswith(DECODER)]
    decoder = [key for key in (*found.missing, *found.wrong) if key.startswith(DECODER)]
    if decoder and vae is None:
        raise KeySyncError(f"{source.path}: {some(decoder)} cannot be replaced without a VAE source; add Stable Video Diffusion")
    merged = _filled(tensors, table, drawn, config, options.seed)
    if vae and (decoder or not own_decoder):
        keys = [e.torch_key for e in part_table(vae.config, ("decoder",))] if not own_decoder else decoder
        merged = merged.updated({key: vae.tensors.info(key) for key in keys})
    if drawn:
        notes.append(f"{source.path}: drawn at random: {some(drawn)}")
    complete = [*table, *(part_table(vae_config, ("decoder",)) if vae_config else ())]
    return Part(name, config, merged.select(e.torch_key for e in complete), source.random, tuple(drawn))


def weak_network(source: Source, name: str, good: Part[StageConfig], notes: list[str]) -> Part[StageConfig]:
    """The part of a worse network: of a checkpoint, the U-Net and the learned filler, under whatever module they are; the rest is ignored.

    Raises:
      KeySyncError: tensors that are missing or mis-shaped for the network that it is a worse version of.
    """
    own = {_network_key(key): key for key in source.tensors}
    found = source.tensors.select(theirs for key, theirs in own.items() if key).renamed({theirs: key for key, theirs in own.items() if key})
    table = sgm.network_table(good.config)
    refuse(source.path, compare(found.shapes, {e.torch_key: e.torch_shape for e in table}), found)
    if ignored := len(source.tensors) - len(found):
        notes.append(f"{source.path}: {ignored} tensors beside the network were left out; it reads conditions as the good one does")
    return Part(name, good.config, found.select(e.torch_key for e in table), source.random)


def _network_key(key: str) -> str:
    """A tensor of a network by its name in an engine; "" for any other."""
    for module in (sgm.UNET.removeprefix("model."), "learned_mask"):
        if (place := key.find(module)) >= 0 and not key.startswith(_SVD_EMBEDDERS):
            return f"model.{key[place:]}"
    return ""


def refuse(path: str, differences: Differences, found: Collection[str] = ()) -> None:
    """Stops at tensors that do not fit.

    Args:
      path: where they are.
      differences: those that are not allowed.
      found: names that are there, for the nearest one to a missing one.

    Raises:
      KeySyncError: naming them and the patterns that would let them pass.
    """
    if differences:
        lacking = patterns_for([*differences.missing, *differences.wrong])
        options = [f"--allow-missing {shlex.quote(pattern)}" for pattern in lacking]
        options += [f"--allow-unexpected {shlex.quote(pattern)}" for pattern in patterns_for(differences.unexpected)]
        raise KeySyncError(f"{path}: {differences.in_words(found)} (to go on without them: {some(options, 6).replace(', ', ' ')})")


def _filled(tensors: Tensors, table: Table, keys: list[str], config: StageConfig, seed: int) -> Tensors:
    drawn = fresh(table, seed, keys=keys, constants=stage_constants(config))
    return tensors.updated(dict(drawn.lazy_items()))


def svd_unet(source: Source, options: Any) -> Tensors:
    """An SVD source's U-Net in sgm names."""
    if source.kind == "svd":
        return source.tensors
    return diffusers.unet_to_sgm(source.tensors, _diffusers_config(source))


def _diffusers_config(source: Source) -> Any:
    if source.config is None:
        raise KeySyncError(f"{source.path} needs the config.json that belongs beside it; keep the diffusers folder together")
    return diffusers.unet_config_from_diffusers(source.config, source.path)


def from_svd(
    source: Source, name: str, vae: Part[VAEConfig] | None, settings: Mapping[str, Any], options: Any, notes: list[str], used: set[str]
) -> Part[StageConfig]:
    """A stage to train: SVD's U-Net with a new audio path, and the new channels of interpolation.

    Raises:
      KeySyncError: SVD lacks a tensor that should come from it, or holds one that is unknown.
    """
    tensors = svd_unet(source, options)
    plain = _diffusers_config(source) if source.kind != "svd" else shapes.unet_config(tensors, options.head_channels)
    settings = {"audio_encoder": shapes.RELEASED_ENCODERS["keysync"][name], **{k: v for k, v in settings.items() if v is not None}}
    config = StageConfig(stage=name, unet=shapes.with_audio(plain, name), **settings)
    table = sgm.stage_table(config)
    expected = {e.torch_key: e.torch_shape for e in table}
    found = compare(tensors.select(key for key in tensors if not _is_svd_extra(key)).shapes, expected)
    new = new_since_svd(table, name)
    refuse(source.path, found.without(Allowed((*new, *options.allow_missing)), Allowed(options.allow_unexpected)), tensors)
    used |= {*found.missing, *found.wrong, *found.unexpected} - new
    drawn = [*found.wrong, *found.missing]
    for key, (theirs, ours) in found.wrong.items():
        notes.append(f"{name}: {key} is {theirs} in SVD and {ours} in KeySync; drawn at random")
    notes.append(f"{name}: initialised from {source.path} for training, it cannot dub yet; drawn at random: {some(drawn)}")
    merged = _filled(tensors, table, drawn, config, options.seed).select(e.torch_key for e in table)
    if vae:
        merged = merged.updated({e.torch_key: vae.tensors.info(e.torch_key) for e in part_table(vae.config, ("decoder",))})
    return Part(name, config, merged, fresh=tuple(drawn))


def new_since_svd(table: Table, name: str) -> set[str]:
    """Keys of a stage's table that SVD does not have, or has for something else; all others come from it.

    SVD has no audio path; its `label_emb` reads another vector, and its first convolution other channels than interpolation's.
    """
    first = {f"{sgm.UNET_PREFIX}input_blocks.0.0.weight"} if name == "interpolation" else set()
    own = {e.torch_key for e in table if not e.torch_key.startswith(sgm.UNET_PREFIX)}
    return own | {f"{sgm.UNET_PREFIX}label_emb.0.0.weight"} | first


def _is_svd_extra(key: str) -> bool:
    return key.startswith((_SVD_EMBEDDERS, ENCODER, DECODER, sgm.VAE_PREFIX))


def compare_frozen(part: Part[StageConfig], svd: Source) -> str:
    """Whether a stage's temporal layers are SVD's, as they are if it was trained with the reference's freeze rule."""
    reference = svd_unet(svd, None)
    keys = [key for key in part.tensors if sgm.is_frozen(key)]
    shared = [key for key in keys if key in reference and reference.info(key).shape == part.tensors.info(key).shape]
    different, rounded = [], False
    for key in shared:
        ours, theirs = np.asarray(part.tensors[key]), np.asarray(reference[key])
        if ours.dtype != theirs.dtype:
            rounded = True
            narrow = min(ours.dtype, theirs.dtype, key=_mantissa_bits)
            ours, theirs = ours.astype(narrow), theirs.astype(narrow)
        if ours.tobytes() != theirs.tobytes():
            different.append(key)
    how = "after rounding to the narrower type" if rounded else "bit for bit"
    if len(shared) < len(keys):
        return f"{part.name}: {len(keys) - len(shared)} of {len(keys)} temporal tensors have no counterpart in {svd.path}"
    if not different:
        return f"{part.name}: all {len(keys)} temporal tensors equal SVD's {how}"
    return f"{part.name}: {len(different)} of {len(keys)} temporal tensors differ from SVD's, so they were trained: {some(different, 3)}"


def _mantissa_bits(dtype: np.dtype) -> int:
    return 8 if dtype == BFLOAT16 else np.finfo(dtype).nmant
