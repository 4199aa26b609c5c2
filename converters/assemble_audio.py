"""The speech encoders' parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keysync_jax.config import SpeechEncoderConfig, StageConfig
from keysync_jax.converters.assemble_stage import refuse
from keysync_jax.converters.containers import Source, open_sources
from keysync_jax.converters.lazy import Tensors
from keysync_jax.converters.parts import Part, audio_part_name
from keysync_jax.core.differences import Allowed, compare
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech import registry


class _Strict:
    """Options by which no tensor may be missing or too many."""

    allow_missing = allow_unexpected = ()


NOTHING_ALLOWED = _Strict()


def assemble(source: Source, options: Any, used: set[str]) -> Part[SpeechEncoderConfig]:
    """The part of a speech encoder's source, under its published names.

    Raises:
      KeySyncError: no config beside or inside it, or tensors that are missing, unexpected or mis-shaped and not allowed.
    """
    config, tensors = read(source)
    table = registry.audio_table(config)
    found = compare(tensors.shapes, {e.torch_key: e.torch_shape for e in table})
    # A speech encoder with random tensors has no use, so nothing may be missing.
    if found.missing or found.wrong:
        raise KeySyncError(f"{source.path} does not fit its config: {found.in_words(tensors)}")
    refuse(source.path, found.without((), Allowed(options.allow_unexpected)))
    used |= set(found.unexpected)
    return Part(audio_part_name(config.kind), config, tensors.select(e.torch_key for e in table), source.random)


def read(source: Source) -> tuple[SpeechEncoderConfig, Tensors]:
    """Config and renamed tensors of a speech encoder source."""
    if isinstance(source.own, SpeechEncoderConfig):
        return source.own, source.tensors
    encoder, form = registry.published()[source.kind]
    if source.config is None:
        needed = "its cfg inside the file" if form.config else "the config.json that belongs beside it"
        raise KeySyncError(f"{source.path} needs {needed}")
    if form.config:
        config = form.config(source.config, source.path)
    else:
        config = registry.config_from_hf(source.config, source.preprocessor, source.path)
    if config.kind != encoder.name:
        raise KeySyncError(f"{source.path} holds {source.kind} tensors, but its config.json says {config.kind}")
    tensors = source.tensors.select(key for key in source.tensors if not key.startswith(form.unused))
    tensors = tensors.renamed({key: form.rename(key, config) for key in tensors})
    return encoder.settle(config, tensors), tensors


def open_encoder(name: str, path: str) -> tuple[Part[SpeechEncoderConfig], tuple[str, ...]]:
    """The speech encoder of that name in a file or folder of published weights, and the files that hold its tensors.

    Raises:
      KeySyncError: there is none, or it does not fit its configuration.
    """
    found = [source for source in open_sources(path) if source.kind in registry.published() or isinstance(source.own, SpeechEncoderConfig)]
    parts = [assemble(source, NOTHING_ALLOWED, set()) for source in found]
    wanted = audio_part_name(name)
    if not parts or parts[0].name != wanted:
        kind = parts[0].name.removeprefix("audio/") if parts else None
        raise KeySyncError(f"{path} holds {f'{kind} weights' if kind else 'no speech encoder'}; give the weights of {name}")
    return parts[0], found[0].files


def without_weights(stages: Sequence[StageConfig], parts: Mapping[str, Part]) -> list[Part]:
    """The encoders without weights that stages were trained with: a config, which follows from how wide the stage's tokens are.

    Args:
      stages: the stages.
      parts: the parts there are, by name: an encoder among them is not made again, and gives the width of what stands beside it.

    Raises:
      KeySyncError: two stages want different widths of one encoder.
    """
    configs = {config.kind: config for config in (part.config for part in parts.values()) if isinstance(config, SpeechEncoderConfig)}
    made: dict[str, SpeechEncoderConfig] = {}
    for stage in stages:
        lacking = [name for name in stage.audio_encoders if name not in configs]
        encoder = registry.ENCODERS.get(lacking[0]) if len(lacking) == 1 else None  # of two, no one knows which is how wide
        if encoder is None or encoder.of_width is None:
            continue
        width = stage.audio_feature_dim - sum(configs[name].hidden_size for name in stage.audio_encoders if name in configs)
        before = made.setdefault(encoder.name, encoder.of_width(width))
        if before.hidden_size != width:
            widths = sorted({before.hidden_size, width})
            raise KeySyncError(f"the stages read {encoder.title} features of different widths, {widths}; one encoder cannot give both")
    return [Part(audio_part_name(name), config, Tensors({}, name)) for name, config in made.items()]
