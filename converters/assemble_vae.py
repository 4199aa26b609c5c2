"""The VAE part: encoder and quant_conv from Stable Video Diffusion, decoder from the KeySync checkpoint where that has one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keysync_jax.config import VAEConfig
from keysync_jax.converters import diffusers, sgm, shapes
from keysync_jax.converters.assemble_stage import refuse
from keysync_jax.converters.containers import Source
from keysync_jax.converters.lazy import LazyTensor, Tensors
from keysync_jax.converters.parts import DECODER, ENCODER, Part, part_table
from keysync_jax.core.differences import Allowed, Differences, compare
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import Table

_KL_ENCODER = re.compile(r"(conditioner\.embedders\.\d+\.encoder)\.encoder\.conv_in\.weight")


def has_vae(source: Source) -> bool:
    return any(key.startswith((ENCODER, DECODER)) or _KL_ENCODER.fullmatch(key) for key in source.tensors)


def assemble(svd: Source | None, checkpoints: Sequence[Source], options: Any, notes: list[str], used: set[str]) -> Part[VAEConfig] | None:
    """The VAE part, or None if nothing gives an encoder.

    Args:
      svd: the source with SVD's VAE.
      checkpoints: KeySync checkpoints, the one whose decoder counts first.
      options: see `convert.Options`.
      notes: lines to report, added to.
      used: keys whose allowance was used, added to.

    Raises:
      KeySyncError: tensors of the VAE that are missing, unexpected or mis-shaped.
    """
    halves = _encoder_and_decoder(svd, checkpoints, notes)
    if halves is None:
        return None
    config, tensors = halves
    table = part_table(config)
    found = compare(tensors.shapes, {e.torch_key: e.torch_shape for e in table})
    where = tensors.source
    own = [source for source in checkpoints if any(key.startswith(DECODER) for key in source.tensors)]
    missing_decoder = [key for key in found.missing if key.startswith(DECODER)]
    if missing_decoder and own:
        found = found.without(missing_decoder)
    # A random VAE tensor has no use, so a missing one cannot be allowed.
    refuse_vae(where, found.without((), Allowed(options.allow_unexpected)))
    used |= set(found.unexpected)
    if own:
        tensors = _with_decoder(tensors, own, config, notes)
    random = any(source.random for source in (svd, *checkpoints) if source is not None)
    return Part("vae", config, tensors.select(e.torch_key for e in table), random)


def refuse_vae(where: str, found: Differences) -> None:
    if found.missing or found.wrong:
        raise KeySyncError(f"{where}: the VAE does not fit: {found.in_words(())}")
    refuse(where, found)


def _encoder_and_decoder(svd: Source | None, checkpoints: Sequence[Source], notes: list[str]) -> tuple[VAEConfig, Tensors] | None:
    if svd is not None and svd.kind == "diffusers_vae":
        if svd.config is None:
            raise KeySyncError(f"{svd.path} needs the config.json that belongs beside it; keep the diffusers folder together")
        config = diffusers.vae_config_from_diffusers(svd.config, svd.path)
        return config, diffusers.vae_to_sgm(svd.tensors, config)
    if svd is not None and isinstance(svd.own, VAEConfig):
        return svd.own, svd.tensors
    if svd is not None:
        return _from_sgm(svd, notes)
    for source in checkpoints:
        if f"{ENCODER}conv_in.weight" in source.tensors:
            notes.append(f"{source.path}: its own first-stage encoder is used, which has no quant_conv")
            config = shapes.vae_config(source.tensors, sgm.VAE_PREFIX, quant_conv=False)
            return config, source.tensors.select(key for key in source.tensors if key.startswith((ENCODER, DECODER)))
    return None


def same_encoder(first: Source, second: Source) -> bool:
    """Whether two VAE sources agree in everything but the decoder, so that either will do (our diffusers exports each bring one)."""

    def encoder(source: Source) -> dict[str, LazyTensor]:
        return {key: tensor for key, tensor in source.tensors.lazy_items() if "decoder." not in key}

    a, b = encoder(first), encoder(second)
    return first.kind == second.kind and a.keys() == b.keys() and not _different(a, b)


def _from_sgm(svd: Source, notes: list[str]) -> tuple[VAEConfig, Tensors] | None:
    """SVD's single file has two encoders: the image conditioner's, with its quant_conv, and the first stage's, without one.

    The former is what diffusers ships and what latents are made with; the latter serves only if it is alone.
    """
    tensors = svd.tensors
    first = {key: tensor for key, tensor in tensors.lazy_items() if key.startswith((ENCODER, DECODER))}
    prefixes = [match[1] for key in tensors if (match := _KL_ENCODER.fullmatch(key))]
    if prefixes:
        prefix = f"{prefixes[0]}."
        kl = {key.removeprefix(prefix): tensor for key, tensor in tensors.lazy_items() if key.startswith(prefix)}
        has_quant = "quant_conv.weight" in kl
        merged = {key: tensor for key, tensor in first.items() if key.startswith(DECODER)}
        merged |= {sgm.VAE_PREFIX + key: tensor for key, tensor in kl.items() if key.startswith(("encoder.", "quant_conv."))}
        notes.append(f"{svd.path}: VAE encoder{' and quant_conv' * has_quant} taken from {prefixes[0]}")
        out = Tensors(merged, svd.path)
        return shapes.vae_config(out, sgm.VAE_PREFIX, quant_conv=has_quant), out
    if f"{ENCODER}conv_in.weight" not in tensors:
        return None
    notes.append(f"{svd.path}: VAE encoder taken from first_stage_model, which has no quant_conv")
    out = Tensors(first, svd.path)
    return shapes.vae_config(out, sgm.VAE_PREFIX, quant_conv=False), out


def _with_decoder(tensors: Tensors, own: Sequence[Source], config: VAEConfig, notes: list[str]) -> Tensors:
    """Puts the checkpoints' decoder in place of SVD's, saying where they differ."""
    table: Table = part_table(config, ("decoder",))
    chosen = own[0]
    usable = {
        e.torch_key: chosen.tensors.info(e.torch_key)
        for e in table
        if e.torch_key in chosen.tensors and chosen.tensors.info(e.torch_key).shape == e.torch_shape
    }
    here = {key: tensors.info(key) for key in usable if key in tensors}
    different = _different(usable, here)
    if different:
        others = f"{different} of {len(here)} VAE decoder tensors differ from those of {tensors.source}"
        notes.append(f"{chosen.path}: {others}; its own are used")
    for other in own[1:]:
        both = {key: other.tensors.info(key) for key in usable if key in other.tensors}
        if count := _different(usable, both):
            notes.append(f"{chosen.path} and {other.path} differ in {count} VAE decoder tensors; those of the former are used to decode")
    return tensors.updated(usable)


def _different(first: Mapping[str, LazyTensor], second: Mapping[str, LazyTensor]) -> int:
    count = 0
    for key, tensor in second.items():
        a, b = np.asarray(first[key].read()), np.asarray(tensor.read())
        if a.shape != b.shape or not np.array_equal(a.astype(np.float32), b.astype(np.float32)):
            count += 1
    return count
