"""Files inside the package (`keysync_jax/assets`): the small model that `keysync demo` and `keysync dub --model demo` use."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from keysync_jax.core.errors import KeySyncError

NAME = "demo"  # what `--model` calls it; a folder of that name is ./demo
WARNING = "the bundled demo model was trained on drawn faces only: it draws cartoon mouths, whoever is in the video"
NO_MODEL = (
    "dub needs --model DIR. Get the released weights (hub:toninio19/keysync, Stable Video Diffusion, HuBERT-base, WavLM-Base+) and turn "
    "them into a model directory with keysync convert (docs/convert.md), or try --model demo, which draws cartoon mouths"
)
NO_KEYFACE = (
    "animate needs --model DIR, a KeyFace model. Get its released weights (keyframe.pt, interpolation.pt, interpolation_bad.pt, Stable "
    "Video Diffusion, WavLM-Base+, BEATs iter3+ AS2M, wav2vec2-base-960h) and turn them into a model directory with keysync convert "
    "(docs/animate.md)"
)


def is_bundled() -> bool:
    """Whether this copy of the package holds the demo model."""
    return (_folder() / "model_index.json").is_file()


def _folder() -> Path:
    return Path(str(importlib.resources.files("keysync_jax"))) / "assets" / NAME


def bundled_model_path() -> Path:
    """The bundled model directory.

    Raises:
      KeySyncError: this copy of the package was built without it.
    """
    path = _folder()
    if not is_bundled():
        raise KeySyncError(f"this copy of keysync-jax holds no demo model ({path}); name a model directory with --model DIR")
    return path


def resolve(path: str | os.PathLike) -> str:
    """The path that `--model` means: the bundled model for "demo", anything else as it is.

    Raises:
      KeySyncError: "demo", but this copy of the package holds none.
    """
    path = os.fspath(path)
    return str(bundled_model_path()) if path == NAME else path
