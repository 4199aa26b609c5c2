"""Which columns are computed, how they were made, and into which groups of the dataset they go."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from keysync_jax.config import SpeechEncoderConfig, VAEConfig, to_dict
from keysync_jax.converters import assemble_audio, model_directory
from keysync_jax.core.clock import SAMPLE_RATE, SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.dataset_layout import BASE, Group, make_group
from keysync_jax.data_pipeline.prepare.settings import FEATURES_VERSION, Output
from keysync_jax.data_pipeline.prepare.work import digest, file_digest
from keysync_jax.data_pipeline.records import (
    AUDIO_PREFIX,
    SOUND,
    Column,
    audio_column,
    jpeg_column,
    landmarks_column,
    latent_column,
    record_bytes,
)
from keysync_jax.models.speech import registry, torch_encoder

# Bytes per pixel of a JPEG crop, measured on talking heads at quality 95; only decides how many frames share a shard.
_JPEG_BYTES_PER_PIXEL = 0.35
_LARGEST_LATENT = 60000.0  # float16 ends at 65504


@dataclasses.dataclass(frozen=True)
class FeaturePlan:
    """The groups to write and the model that fills them.

    Attributes:
      model: path of the model directory.
      vae: its autoencoder.
      encoders: the speech encoders that run in JAX, by name, in whichever group they go.
      groups: base group first.
      weights: local weights of optional columns.
      jpeg_quality: see `Output`.
      seed: of posterior samples.
      occlusion_backend: see `Output`.
    """

    model: str
    vae: VAEConfig
    encoders: dict[str, SpeechEncoderConfig]
    groups: tuple[Group, ...]
    weights: dict[str, str]
    jpeg_quality: int
    seed: int
    occlusion_backend: str = "flax"

    @property
    def crop_size(self) -> int:
        return self.groups[0].crop_size[0]

    def key(self, group: Group, fingerprint: str) -> str:
        """Hash of everything that a clip's values in a group depend on."""
        return digest(FEATURES_VERSION, fingerprint, [c.to_json() for c in group.columns], dict(group.info), list(group.crop_size))


def plan_features(model: str, output: Output, crop_size: int | None) -> FeaturePlan:
    """The base group (latents, tokens of every speech encoder in the model directory, landmarks) and the optional ones.

    Args:
      model: model directory; it need hold a VAE and at least one speech encoder.
      output: columns, sizes and seed.
      crop_size: side of the crop; None for the resolution of the model's stages (512 without any).

    Raises:
      KeySyncError: the model lacks a part, or the crop does not divide into latent cells.
    """
    directory = model_directory.load(model, complete=False)
    if "vae" not in directory.parts:
        raise KeySyncError(f"model directory {directory.path} has no part vae; latents cannot be computed")
    vae = directory.vae
    names = [name.removeprefix("audio/") for name in directory.parts if name.startswith("audio/")]
    own = {name: directory.audio(name) for name in names}
    if not own:
        raise KeySyncError(f"model directory {directory.path} has no speech encoder; add one with keysync convert")
    if crop_size is None:
        crop_size = next((directory.stage(n).resolution for n in ("keyframe", "interpolation") if n in directory.parts), 512)
    if crop_size % vae.downsample_factor:
        raise UsageError(f"crop size {crop_size} is not a multiple of {vae.downsample_factor}, the pixels of a latent cell")
    cells = crop_size // vae.downsample_factor
    hashes = {name: part.weights.sha256 if part.weights else "" for name, part in directory.parts.items()}

    info: dict[str, Any] = {
        "latent": {
            "vae": hashes["vae"], "scale": vae.latent_scale, "sample": "posterior", "seed": output.seed,
            "random_weights": directory.parts["vae"].random,
        }
    }  # fmt: skip
    columns = [latent_column(cells, cells, vae.latent_channels)]
    for name, config in sorted(own.items()):
        columns.append(audio_column(name, config.hidden_size))
        info[AUDIO_PREFIX + name] = _encoder_info(config, hashes[f"audio/{name}"])
    base = _group((*columns, landmarks_column()), crop_size, output, BASE, info)
    encoders = dict(own)
    groups = [base]
    for name in output.columns:
        if name in own:
            continue  # an encoder that the model itself holds
        if name in registry.ENCODERS:
            encoders[name], identity = _encoder(name, output)
            column = audio_column(name, encoders[name].hidden_size)
            made = {column.name: _encoder_info(encoders[name], identity)}
            groups.append(_group((column,), crop_size, output, column.name, made))
        else:
            groups.append(_optional(name, output, crop_size, cells))
    return FeaturePlan(
        model, vae, encoders, tuple(groups), dict(output.weights), output.jpeg_quality, output.seed, output.occlusion_backend
    )


def _optional(name: str, output: Output, crop_size: int, cells: int) -> Group:
    if name == "jpeg":
        info = {"jpeg": {"quality": output.jpeg_quality}}
        size = record_bytes((jpeg_column(crop_size, crop_size),), jpeg_bytes=int(_JPEG_BYTES_PER_PIXEL * crop_size**2))
        return _group((jpeg_column(crop_size, crop_size),), crop_size, output, name, info, size)
    if name == "sound":
        column = Column(SOUND, "int16", (SAMPLES_PER_FRAME,))
        return _group((column,), crop_size, output, name, {SOUND: {"rate": SAMPLE_RATE, "channels": 1}})
    if name in registry.COLUMNS:
        if name not in output.weights:
            raise UsageError(f"column {name!r} needs local weights: --column-weights {name}=DIR (a Hugging Face folder)")
        dim, files = torch_encoder.look(registry.COLUMNS[name], output.weights[name])
        column, identity = audio_column(name, dim), digest([file_digest(file) for file in files])
        return _group((column,), crop_size, output, column.name, {column.name: {"kind": name, "weights": identity}})
    if name == "emotion":
        columns = (Column("valence", "float32", ()), Column("arousal", "float32", ()), Column("emotion_known", "bool", ()))
        return _group(columns, crop_size, output, name, {"valence": {"source": "sidecar"}, "arousal": {"source": "sidecar"}})
    weights = output.weights.get("occluder", "")
    if weights and not epath.Path(weights).exists():
        raise KeySyncError(f"{weights} does not exist; give a local SAM 2.1 checkpoint, or leave --column-weights occluder out")
    made = {"source": "sidecar"}
    if weights:
        made = {"source": "sidecar or SAM 2 on the crop", "weights": file_digest(weights), "backend": output.occlusion_backend}
    return _group((Column("occluder", "bool", (cells, cells)),), crop_size, output, name, {"occluder": made})


def _encoder(name: str, output: Output) -> tuple[SpeechEncoderConfig, str]:
    """The configuration of an encoder that the model directory does not hold, and what tells its weights from others."""
    if path := output.weights.get(name):
        part, files = assemble_audio.open_encoder(name, path)
        return part.config, digest([file_digest(file) for file in files])
    config = registry.ENCODERS[name].column
    if config is None:
        raise UsageError(
            f"column {name!r} needs weights, which the model directory lacks; add {name} to it with keysync convert, "
            f"or give them: --column-weights {name}=PATH"
        )
    return config, ""


def _group(
    columns: Sequence[Column], crop_size: int, output: Output, name: str, info: dict[str, Any], frame_bytes: int | None = None
) -> Group:
    size = frame_bytes or record_bytes(columns)
    return make_group(tuple(columns), (crop_size, crop_size), size, int(output.shard_megabytes * 1e6), name, info)


def _encoder_info(config: SpeechEncoderConfig, sha256: str) -> dict[str, Any]:
    return {"kind": config.kind, "weights": sha256, "config": to_dict(config)}


def checked_float16(values: np.ndarray, what: str) -> np.ndarray:
    """`values` in float16 after a range check.

    Raises:
      KeySyncError: a value that is not finite, or so large that float16 would lose it.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= _LARGEST_LATENT:  # also for NaN
        raise KeySyncError(f"{what}: largest value is {largest}; float16 holds up to 65504 (wrong weights or another scale?)")
    return values.astype(np.float16)
