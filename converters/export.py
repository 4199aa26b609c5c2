"""`keysync export`: a model directory, or Flax parameters, in the formats that PyTorch code reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console

from keysync_jax.config import CONTAINERS, TORCH_FORMATS, WEAK_PARTS, StageConfig, VAEConfig
from keysync_jax.converters import diffusers, model_directory, safetensors_file, sgm, torch_write
from keysync_jax.converters.byte_progress import byte_progress
from keysync_jax.converters.containers import SIDECAR
from keysync_jax.converters.lazy import FLOAT_TYPES, LazyTensor, Tensors, from_params
from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.converters.parts import (
    DECODER,
    ENCODER,
    KL_PREFIX,
    SELF_DESCRIPTION,
    STAGES,
    describe,
    first_stage_encoder_table,
    kl_table,
    part_table,
)
from keysync_jax.converters.staging import staged
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import is_local

# Which optional VAE copies a KeySync file can carry.
COPIES = ("conditioner", "first_stage")
_MARKER = "keysync_export.json"  # says that a folder is an export of ours, so that --force may replace it
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def export(
    model: str | os.PathLike,
    output: str | os.PathLike,
    format: str,
    *,
    container: str = "pt",
    vae_copies: bool | Iterable[str] = False,
    stages: Iterable[str] | None = None,
    dtype: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> list[str]:
    """Writes a model directory's stages for PyTorch.

    "keysync" writes `keyframe_dub.pt` and `interpolation_dub.pt` as KeySync reads them: `{"module": {name: tensor}}`; of a KeyFace model
    `keyframe.pt`, `interpolation.pt` and `interpolation_bad.pt`. "diffusers"
    writes a Stable Video Diffusion folder per stage (`unet/`, `vae/`), with the audio projection and the learned filler in
    `keysync.safetensors` beside them.

    Args:
      model: model directory, local, `gs://` or `hub:`.
      output: folder to write.
      format: "keysync" or "diffusers".
      container: file type of the keysync format, "pt" or "safetensors".
      vae_copies: keysync format: which optional VAE copies to add. True is those that a strict load of the reference's inference
        engines expects: the KL autoencoder of interpolation's conditioner ("conditioner"). "first_stage" adds the first stage's encoder.
      stages: which stages; None is all that the directory has.
      dtype: "float32", "float16" or "bfloat16"; None keeps the stored types.
      force: replace an earlier export in `output`.
      console: where progress and the list of files go; default stderr.

    Returns:
      Paths of the written files or folders, one per stage.

    Raises:
      KeySyncError: a part that the export needs is missing, a config that diffusers cannot express, or a folder that is in use.
      UsageError: unknown format, container, copy or stage.
    """
    console = console or Console(stderr=True)
    directory = model_directory.load(model, complete=False)
    names = _stages(directory, stages, format)
    copies = _check_options(format, container, vae_copies, dtype)
    stored = FLOAT_TYPES[dtype] if dtype else None
    with staged(output, force=force, replaceable=is_export) as folder:
        written = []
        for name in names:
            tensors = directory.tensors(name).astype(stored)
            if format == "keysync":
                if copies and name in STAGES:
                    tensors = tensors.updated(_vae_copies(name, directory.vae, directory.tensors("vae").astype(stored), copies))
                with byte_progress(console, name, tensors.nbytes) as advance:
                    written.append(_write_keysync(folder, directory, name, tensors, container, advance))
            else:
                vae = directory.tensors("vae").astype(stored)
                with byte_progress(console, name, tensors.nbytes) as advance:
                    written.append(_write_diffusers(folder, directory, name, tensors, vae, advance))
        (folder / _MARKER).write_text(json.dumps({"format": format, "stages": names}) + "\n")
    paths = [os.path.join(os.fspath(output), name) for name in written]
    for path in paths:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)
    for name in names:
        groups, theirs = directory.stage(name).unet.norm_groups, diffusers.NORM_GROUPS
        if groups != theirs:  # only the keysync format gets here, in which nothing says how many there are
            note = f"its group norms have {groups} groups, the reference's code always {theirs}: it loads the file and computes otherwise"
            console.print(f"note: {name}: {note}", highlight=False, soft_wrap=True, markup=False)
    return paths


def is_export(path: epath.Path) -> bool:
    """Whether a folder is an export of ours, which another may replace."""
    return (path / _MARKER).exists()


def export_params(
    path: str | os.PathLike,
    config: StageConfig,
    params: Mapping,
    *,
    vae: tuple[VAEConfig, Mapping] | None = None,
    container: str = "pt",
) -> None:
    """One stage's Flax parameters (e.g. restored from an Orbax checkpoint) as a KeySync file.

    Args:
      path: local file to create.
      config: the stage.
      params: tree of `models.stage.StageModel`.
      vae: config and parameters of the autoencoder, whose decoder the reference loads from a stage's file.
      container: "pt" or "safetensors".
    """
    if container not in CONTAINERS:
        raise UsageError(f"container {container!r}: choose one of {', '.join(CONTAINERS)}")
    tensors = from_params(part_table(config), params, config.stage)
    if vae:
        decoder = from_params(part_table(vae[0], ("decoder",)), vae[1], "vae")
        tensors = tensors.updated(dict(decoder.lazy_items()))
    _write_file(path, describe(config.stage, config, random=False), tensors, container, None)


def _stages(directory: ModelDirectory, stages: Iterable[str] | None, format: str) -> list[str]:
    weak = [name for name in WEAK_PARTS if name in directory.parts] if format == "keysync" else []  # a file like the others there alone
    names = [name for name in STAGES if name in directory.parts] if stages is None else list(stages)
    if not names:
        raise KeySyncError(f"model directory {directory.path} has no stage to export")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise UsageError(f"{', '.join(unknown)} is no stage; there are {', '.join(STAGES)}")
    return names + [name for name in weak if WEAK_PARTS[name] in names]


def _check_options(format: str, container: str, vae_copies: bool | Iterable[str], dtype: str | None) -> tuple[str, ...]:
    copies = (("conditioner",) if vae_copies else ()) if isinstance(vae_copies, bool) else tuple(vae_copies)
    dtypes = (None, *FLOAT_TYPES)
    for what, value, allowed in (
        ("format", format, TORCH_FORMATS),
        ("container", container, CONTAINERS),
        ("dtype", dtype, dtypes),
    ):
        if value not in allowed:
            raise UsageError(f"{what} {value!r}: choose one of {', '.join(a for a in allowed if a)}")
    unknown = [copy for copy in copies if copy not in COPIES]
    if unknown:
        raise UsageError(f"vae_copies {', '.join(unknown)}: choose among {', '.join(COPIES)}")
    if copies and format != "keysync":
        raise UsageError("vae_copies belong to the keysync format; a diffusers folder has the VAE in vae/")
    return copies


# -- KeySync ------------------------------------------------------------------------------------------------------------------------


def _write_keysync(folder: epath.Path, directory: ModelDirectory, name: str, tensors: Tensors, container: str, advance) -> str:
    if name in STAGES and not any(key.startswith(DECODER) for key in tensors):
        raise KeySyncError(f"the {name} part has no VAE decoder, which the reference loads from its checkpoint; convert again with one")
    file = f"{name}{'_dub' if directory.stage(name).system == 'keysync' else ''}.{container}"  # as each system's authors call it
    _write_file(folder / file, _describe(directory, name), tensors, container, advance)
    return file


def _describe(directory: ModelDirectory, name: str) -> dict[str, Any]:
    return describe(name, directory.stage(name), directory.parts[name].random)


def _write_file(path: str | os.PathLike, own: Mapping[str, Any], tensors: Tensors, container: str, advance) -> None:
    if container == "safetensors":
        safetensors_file.write(path, tensors, {SELF_DESCRIPTION: json.dumps(own)}, advance)
        return
    if not is_local(path):
        raise KeySyncError(f"{path}: torch files are written to a local disk; choose a local folder or the safetensors container")
    torch_write.write(path, tensors, extra={SELF_DESCRIPTION: own}, progress=advance)


def _vae_copies(stage: str, config: VAEConfig, vae: Tensors, copies: Iterable[str]) -> dict[str, LazyTensor]:
    """The VAE tensors that an engine may carry besides its decoder.

    The conditioner's KL autoencoder (interpolation only) is never run: its decoder is the spatial half of the temporal one, its
    post_quant_conv the identity. The first stage's encoder has no quant_conv, so ours is folded into its last convolution.
    """
    items: dict[str, LazyTensor] = {}
    encoder = {e.torch_key: vae.info(e.torch_key) for e in part_table(config, ("encoder",))}
    if "conditioner" in copies and stage == "interpolation":
        for entry in kl_table(config):
            key = entry.torch_key.replace(KL_PREFIX, "first_stage_model")
            if key in vae:
                items[entry.torch_key] = vae.info(key)
            else:
                items[entry.torch_key] = _identity(entry.torch_shape, vae.info(f"{ENCODER}conv_in.weight").dtype)
    if "first_stage" in copies:
        table = first_stage_encoder_table(config)
        items |= {e.torch_key: encoder[e.torch_key] for e in table}
        if config.quant_conv:
            items |= _folded(encoder)
    return items


def _identity(shape: tuple[int, ...], dtype: np.dtype) -> LazyTensor:
    """A 1x1 convolution that changes nothing: an identity matrix for its weight, zeros for its bias."""
    return LazyTensor(shape, dtype, lambda: (np.eye(shape[0]).reshape(shape) if len(shape) == 4 else np.zeros(shape)).astype(dtype))


def _folded(encoder: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """quant_conv after conv_out, as one convolution."""
    out = {}
    matrix = encoder["first_stage_model.quant_conv.weight"]
    offset = encoder["first_stage_model.quant_conv.bias"]
    for key in (f"{ENCODER}conv_out.weight", f"{ENCODER}conv_out.bias"):
        own = encoder[key]

        def read(own: LazyTensor = own) -> np.ndarray:
            q = np.asarray(matrix.read(), np.float64)[:, :, 0, 0]
            value = np.tensordot(q, np.asarray(own.read(), np.float64), 1)
            if len(own.shape) == 1:
                value = value + np.asarray(offset.read(), np.float64)
            return value.astype(own.dtype)

        out[key] = LazyTensor(own.shape, own.dtype, read)
    return out


# -- diffusers ----------------------------------------------------------------------------------------------------------------------


def _write_diffusers(folder: epath.Path, directory: ModelDirectory, name: str, tensors: Tensors, vae: Tensors, advance) -> str:
    root, config = folder / name, directory.stage(name)
    unet = diffusers.unet_to_diffusers(tensors, config.unet)
    _write_model(root / "unet", diffusers.unet_config_to_diffusers(config.unet, config.latent_size), unet, advance)
    vae_config = directory.vae
    # The decoder that this stage was trained with, and the directory's encoder.
    own = vae.updated({k: t for k, t in tensors.lazy_items() if k.startswith(DECODER)})
    own = diffusers.vae_to_diffusers(own, vae_config)
    _write_model(root / "vae", diffusers.vae_config_to_diffusers(vae_config, config.resolution), own, None)
    rest = tensors.select(k for k in tensors if not k.startswith((sgm.UNET_PREFIX, DECODER)))
    safetensors_file.write(root / SIDECAR, rest, {SELF_DESCRIPTION: json.dumps(_describe(directory, name))})
    return name


def _write_model(folder: epath.Path, config: Mapping, tensors: Tensors, advance) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors_file.write(folder / _DIFFUSERS_FILE, tensors, progress=advance)
