"""What a checkpoint was made with, and which changes of the recipe a run may go on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from keysync_jax.config import GuidanceConfig, to_dict
from keysync_jax.core.errors import KeySyncError
from keysync_jax.training.config import TrainConfig, with_defaults
from keysync_jax.version import __version__

META_FORMAT = 1

# Keys that say how a model is used or judged, not what it is.
_USE_ONLY = {"stage.audio_scale", "stage.identity_scale", "stage.num_steps", "vae.latent_scale"}
_USE_ONLY |= {f"stage.guidance.{field.name}" for field in dataclasses.fields(GuidanceConfig)}


def describe(config: TrainConfig) -> dict[str, Any]:
    """The `meta` item of a checkpoint: the resolved recipe, what the model is trained for, and the versions that made it."""
    if config.model == "vae":
        trained_for = {"model": "vae", "resolution": config.resolution, "downsample_factor": config.vae.downsample_factor}
    else:
        stage = config.stage
        trained_for = {
            "model": stage.stage, "audio_encoder": stage.audio_encoder, "mask": to_dict(stage.mask), "resolution": stage.resolution,
            "latent_size": stage.latent_size, "latent_scale": stage.latent_scale, "num_frames": stage.num_frames,
        }  # fmt: skip
    return {
        "format": META_FORMAT,
        "keysync_jax": __version__,
        "jax": jax.__version__,
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "trained_for": trained_for,
        "config": to_dict(config),
    }


def changes(meta: Mapping[str, Any], config: TrainConfig, where: str) -> list[str]:
    """How the recipe differs from the one a checkpoint was made with, e.g. `["num_steps 30 -> 60"]`.

    Args:
      meta: of the checkpoint (`describe`).
      config: what the run is to go on with.
      where: what to call the checkpoint in an error.

    Raises:
      KeySyncError: a difference that makes it another model; names the keys.
    """
    # A key that an older version did not know had today's default.
    if not isinstance(meta.get("config"), Mapping):
        raise KeySyncError(f"{where} is damaged: its meta holds no recipe; remove it to continue from the one before")
    old, new = (_flat(values) for values in (with_defaults(meta["config"]), to_dict(config)))
    different = [name for name in new if old.get(name) != new[name]]
    words = {name: f"{name} {_short(old.get(name))} -> {_short(new[name])}" for name in different}
    fatal = [words[name] for name in different if _defines_model(name, config)]
    # The frozen leaves hold the decoder of the pixel loss, or do not.
    pixels = [name for name in ("loss.pixel_weight",) if name in different and bool(old.get(name)) != bool(new[name])]
    fatal += [words[name] for name in pixels if config.model == "stage"]
    if fatal:
        shown = "; ".join(fatal[:6]) + (" …" if len(fatal) > 6 else "")
        advice = "take these back, or start a new run in another workdir (config.init.kind=run takes its weights)"
        raise KeySyncError(f"{where} is of another model: {shown}; {advice}")
    return [words[name] for name in different if not name.startswith("vae." if config.model == "stage" else "stage.")]


def _defines_model(name: str, config: TrainConfig) -> bool:
    if config.model == "vae":
        return name in ("model", "resolution") or (name.startswith("vae.") and name not in _USE_ONLY)
    return name in ("model", "freeze") or (name.startswith("stage.") and name not in _USE_ONLY)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
