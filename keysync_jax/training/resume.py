"""What a checkpoint was made with, and which changes of the recipe a run may go on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from keysync_jax.config import GuidanceConfig, to_dict
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.version import __version__
from keysync_jax.training.config import with_defaults
from keysync_jax.training.trainable import Trainable

META_FORMAT = 1

# Keys that say how a model is used or judged, not what it is.
_USE_ONLY = {"stage.audio_scale", "stage.identity_scale", "stage.num_steps", "vae.latent_scale"}
_USE_ONLY |= {f"stage.guidance.{field.name}" for field in dataclasses.fields(GuidanceConfig)}


def describe(trainable: Trainable) -> dict[str, Any]:
    """The `meta` item of a checkpoint: the resolved recipe, what the model is trained for, and the versions that made it."""
    return {
        "format": META_FORMAT,
        "keysync_jax": __version__,
        "jax": jax.__version__,
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "trained_for": trainable.trained_for(),
        "config": to_dict(trainable.config),
    }


def changes(meta: Mapping[str, Any], trainable: Trainable, where: str) -> list[str]:
    """How the recipe differs from the one a checkpoint was made with, e.g. `["num_steps 30 -> 60"]`.

    Args:
      meta: of the checkpoint (`describe`).
      trainable: what the run is to go on with.
      where: what to call the checkpoint in an error.

    Raises:
      KeySyncError: a difference that makes it another model; names the keys.
    """
    # A key that an older version did not know had today's default.
    if not isinstance(meta.get("config"), Mapping):
        raise KeySyncError(f"{where} is damaged: its meta holds no recipe; remove it to continue from the one before")
    old, new = (_flat(values) for values in (with_defaults(meta["config"]), to_dict(trainable.config)))
    different = [name for name in new if old.get(name) != new[name]]
    words = {name: f"{name} {_short(old.get(name))} -> {_short(new[name])}" for name in different}
    fatal = [words[name] for name in different if _among(name, trainable.defining) and name not in _USE_ONLY]
    fatal += [words[name] for name in trainable.switches if name in different and bool(old.get(name)) != bool(new[name])]
    if fatal:
        shown = "; ".join(fatal[:6]) + (" …" if len(fatal) > 6 else "")
        advice = "take these back, or start a new run in another workdir (config.init.kind=run takes its weights)"
        raise KeySyncError(f"{where} is of another model: {shown}; {advice}")
    return [words[name] for name in different if not _among(name, trainable.unread)]


def _among(name: str, keys: tuple[str, ...]) -> bool:
    """Whether a key is one of `keys`, of which those that end in a dot stand for all keys below."""
    return name in keys or any(name.startswith(key) for key in keys if key.endswith("."))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
