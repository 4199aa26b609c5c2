"""Scorer plug-ins: learned measures that decide what is kept. None is shipped with weights; one without weights is off.

Three kinds, each named in `Curation.scorers` with a plug-in and the local path of its weights:

    quality          `QualityScorer`   mean score of nine views of the whole video, 0 to 1
    active_speaker   `ClipScorer`      how surely the visible face is the one who speaks, 0 to 1
    sync             `ClipScorer`      shift between voice and mouth in frames (0 is in sync)

A plug-in is the name of a built-in one ("torchscript", see `torch_scorers`) or `module:Class`, whose constructor takes the path.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from keysync_jax.core.errors import KeySyncError, UsageError

KINDS = ("quality", "active_speaker", "sync")

BUILT_IN = {
    ("quality", "torchscript"): "keysync_jax.data_pipeline.prepare.torch_scorers:ViewQuality",
    ("active_speaker", "torchscript"): "keysync_jax.data_pipeline.prepare.torch_scorers:ActiveSpeaker",
    ("sync", "torchscript"): "keysync_jax.data_pipeline.prepare.torch_scorers:SyncOffset",
}

_WORDS = {
    "quality": "picture quality (HyperIQA-style, nine views per video)",
    "active_speaker": "active speaker (Light-ASD-style)",
    "sync": "audio-visual offset (SyncNet-style)",
}


class QualityScorer(Protocol):
    """Scores pictures by themselves."""

    def __call__(self, views: np.ndarray) -> np.ndarray:
        """uint8 `[N, 224, 224, 3]` -> float `[N]`, 0 (bad) to 1."""
        ...


class ClipScorer(Protocol):
    """Scores a clip by its face and its sound."""

    def __call__(self, faces: np.ndarray, samples: np.ndarray) -> Mapping[str, float]:
        """Grey faces uint8 `[T, 112, 112]` at 25 fps and their sound float32 `[640 T]` -> named scores.

        "active_speaker" scorers give `active_speaker`; "sync" scorers `sync_offset` (frames) and may add `sync_confidence`.
        """
        ...


def parse(text: str) -> tuple[str, str, str]:
    """Read `KIND=PATH` (the built-in plug-in) or `KIND=module:Class@PATH`.

    Raises:
      UsageError: no such kind, or no path.
    """
    kind, separator, rest = text.partition("=")
    if kind not in KINDS or not separator or not rest:
        raise UsageError(f"scorer {text!r} must read KIND=WEIGHTS or KIND=module:Class@WEIGHTS with KIND among {', '.join(KINDS)}")
    plugin, at, path = rest.partition("@")
    return (kind, plugin, path) if at else (kind, "torchscript", rest)


def open_scorer(kind: str, plugin: str, path: str) -> Any:
    """The scorer, with its weights loaded.

    Raises:
      UsageError: no such plug-in. KeySyncError: its weights or its packages are missing.
    """
    target = BUILT_IN.get((kind, plugin), plugin)
    module, separator, name = target.partition(":")
    if not separator:
        known = ", ".join(sorted(name for k, name in BUILT_IN if k == kind))
        raise UsageError(f"{kind} scorer {plugin!r} is neither one of {known} nor module:Class")
    if not os.path.isfile(path):  # clips are looked at again when the file's content changes: a folder will not do
        state = "are a folder" if os.path.isdir(path) else "do not exist"
        raise KeySyncError(f"{kind} scorer: its weights {path} {state}; give a local file or leave the scorer off")
    try:
        return getattr(importlib.import_module(module), name)(path)
    except ImportError as error:
        raise KeySyncError(f"{kind} scorer {plugin!r} cannot be loaded: {error}") from error
    except AttributeError as error:
        raise UsageError(f"{kind} scorer {plugin!r}: {error}") from error


def in_words(scorers: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """One sentence per kind for the report: on, and with what, or off."""
    chosen = {kind: (plugin, path) for kind, plugin, path in scorers}
    out = {}
    for kind in KINDS:
        if kind in chosen:
            out[kind] = f"{_WORDS[kind]}: on, plug-in {chosen[kind][0]}, weights {os.path.basename(chosen[kind][1])}"
        else:
            out[kind] = f"{_WORDS[kind]}: OFF, because no weights were given; nothing was dropped for it and no clip has this score"
    return out
