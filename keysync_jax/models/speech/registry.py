"""The speech encoders by name. A new one is a file in this folder with an `ENCODER`, and its name in `config.AUDIO_ENCODERS`."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from keysync_jax.config import AUDIO_ENCODERS, COLUMN_ENCODERS, SpeechEncoderConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech.speech_encoder import ColumnEncoder, Geometry, Published, SpeechEncoder
from keysync_jax.models.table import Table


def _own(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}").ENCODER


ENCODERS: dict[str, SpeechEncoder[Any]] = {name: _own(name) for name in AUDIO_ENCODERS}
COLUMNS: dict[str, ColumnEncoder] = {name: _own(name) for name in COLUMN_ENCODERS}


def register(encoder: SpeechEncoder[Any]) -> None:
    """Adds an encoder that is defined elsewhere, for this process: its name then stands for it wherever one of ours would.

    Raises:
      KeySyncError: the name is taken, or holds what separates encoders or folders.
    """
    if encoder.name in (*ENCODERS, *COLUMNS):
        raise KeySyncError(f"there is a speech encoder {encoder.name!r} already; choose another name")
    if not encoder.name.isidentifier():
        raise KeySyncError(f"a speech encoder cannot be called {encoder.name!r}; use letters, digits and _")
    ENCODERS[encoder.name] = encoder
    AUDIO_ENCODERS.append(encoder.name)


def record_of(config: SpeechEncoderConfig) -> SpeechEncoder[Any]:
    """The record of a configuration's kind."""
    return ENCODERS[config.kind]


def has_weights(name: str) -> bool:
    """Whether an encoder needs a file to run; one without weights follows from the width of its tokens."""
    return name not in ENCODERS or ENCODERS[name].of_width is None


def build(config: SpeechEncoderConfig, dtype: Any = jnp.float32) -> nn.Module:
    """The encoder's module; `dtype` is what matmuls and convolutions compute in (norms and softmax stay in float32)."""
    return record_of(config).module(config, dtype)


def geometry(config: SpeechEncoderConfig) -> Geometry:
    """Hop, receptive field and left margin of a token, in samples."""
    return record_of(config).geometry(config)


def audio_table(config: SpeechEncoderConfig) -> Table:
    """One entry per tensor of the encoder; empty for one without weights."""
    return record_of(config).table(config)


def published() -> dict[str, tuple[SpeechEncoder[Any], Published[Any]]]:
    """Every form in which weights are published, by its kind, with the encoder it belongs to."""
    return {form.kind: (encoder, form) for encoder in ENCODERS.values() for form in encoder.published}


def recognise(names: Collection[str], config: Mapping[str, Any] | None = None) -> str | None:
    """The published form of tensors of these names, with the `config.json` beside them; None if they are no encoder's.

    The encoder that came last is asked first: what sets it apart from those before it, only its own file knows.
    """
    forms = [form for encoder in reversed(ENCODERS.values()) for form in encoder.published]
    return next((form.kind for form in forms if form.recognise(names, config or {})), None)


def config_from_hf(
    values: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None, source: str = "config.json"
) -> SpeechEncoderConfig:
    """Configuration of a transformers folder, by its `model_type`.

    Args:
      values: its `config.json` (missing keys take the library's defaults).
      preprocessor: its `preprocessor_config.json`, if there is one.
      source: what to call the file in errors.

    Raises:
      KeySyncError: another model type, or a feature that the encoders here do not have, by name.
    """
    known = {name: (encoder.title, encoder.from_hf) for name, encoder in ENCODERS.items() if encoder.from_hf}
    kind = values.get("model_type", "hubert")
    if kind not in known:
        titles = " or ".join(title for title, _ in known.values())
        raise KeySyncError(f"{source}: model_type is {kind!r}; a {titles} encoder is needed")
    return known[kind][1](values, preprocessor, source)
