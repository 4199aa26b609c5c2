"""The speech encoders' parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.converters import speech
from keysync_jax.converters.assemble_stage import refuse
from keysync_jax.converters.containers import Source
from keysync_jax.converters.lazy import Tensors
from keysync_jax.converters.parts import Part, audio_part_name
from keysync_jax.core.differences import compare
from keysync_jax.core.errors import KeySyncError

# Kept or not, depending on how the checkpoint was saved.
_MASK_KEYS = {"hubert": "masked_spec_embed", "wavlm": "mask_emb"}


def assemble(source: Source, options: Any, used: set[str]) -> Part:
    """The part of a HuBERT or WavLM source, under its published names.

    Raises:
      KeySyncError: no config beside or inside it, or tensors that are missing, unexpected or mis-shaped and not allowed.
    """
    config, tensors = read(source)
    table = speech.audio_table(config)
    found = compare(tensors.shapes, {e.torch_key: e.torch_shape for e in table})
    # A speech encoder with random tensors has no use, so nothing may be missing.
    if found.missing or found.wrong:
        raise KeySyncError(f"{source.path} does not fit its config: {found}")
    refuse(source.path, found.without((), options.allow_unexpected))
    used |= set(found.unexpected)
    return Part(audio_part_name(config.kind), config, tensors.select(e.torch_key for e in table), source.random)


def read(source: Source) -> tuple[AudioEncoderConfig, Tensors]:
    """Config and renamed tensors of a speech encoder source."""
    if isinstance(source.own, AudioEncoderConfig):
        return source.own, source.tensors
    if source.config is None:
        needed = "its cfg inside the file" if source.kind == "wavlm_microsoft" else "the config.json that belongs beside it"
        raise KeySyncError(f"{source.path} needs {needed}")
    if source.kind == "wavlm_microsoft":
        config, names = speech.config_from_microsoft(source.config, source.path), {}
    else:
        config = speech.config_from_hf(source.config, source.preprocessor, source.path)
        if config.kind != source.kind:
            raise KeySyncError(f"{source.path} holds {source.kind} tensors, but its config.json says {config.kind}")
        if config.kind == "hubert":
            names = {key: speech.rename_hf_hubert(key) for key in source.tensors}
        else:
            names = {key: speech.rename_hf_wavlm(key, config.extractor_mode) for key in source.tensors}
    tensors = source.tensors.renamed(names)
    return dataclasses.replace(config, mask_embedding=_MASK_KEYS[config.kind] in tensors), tensors


def without_weights(stages: Sequence[Part]) -> list[Part]:
    """The log-mel encoder's part, if a stage was trained with it: a config and no weights."""
    widths = {part.config.audio_feature_dim for part in stages if part.config.audio_encoder == "log_mel"}
    if len(widths) > 1:
        raise KeySyncError(f"the stages read log-mel features of different widths, {sorted(widths)}; one encoder cannot give both")
    return [
        Part(audio_part_name("log_mel"), AudioEncoderConfig(kind="log_mel", hidden_size=width, num_mels=width), Tensors({}, "log_mel"))
        for width in widths
    ]
