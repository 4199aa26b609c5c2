"""What encoders that run in PyTorch share: a local transformers folder, looked at and opened. Nothing is downloaded.

They give two tokens per 40 ms frame, laid out like HuBERT's: frame f has tokens 2f and 2f + 1, missing ones at the end are zero.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.core.errors import KeySyncError, first_line
from keysync_jax.models.speech.speech_encoder import ColumnEncoder
from keysync_jax.models.speech.waveform import TOKENS_PER_FRAME, fill, pair


def look(encoder: ColumnEncoder, folder: str) -> tuple[int, list[Path]]:
    """Width of the tokens and the files with the weights, without loading them.

    Raises:
      KeySyncError: no model of that kind there.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KeySyncError(f"{path} cannot be read ({error}); give a local Hugging Face folder of {encoder.name}") from None
    if config.get("model_type") != encoder.name:
        raise KeySyncError(f"{folder} holds a {config.get('model_type')!r} model, not {encoder.name}")
    width = config.get(encoder.width_field)
    weights = sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin"))
    if not weights or not isinstance(width, int):
        raise KeySyncError(f"{folder} holds no weights (.safetensors or .bin) of {encoder.name}")
    return width, weights


def load(kind: str, model_class: str, folder: str) -> Any:
    """The folder's model of a class of transformers, on the CPU.

    Raises:
      KeySyncError: transformers is missing, or the folder does not fit.
    """
    try:
        import torch  # noqa: F401  (an optional package, as is transformers, which needs it)
        import transformers
    except ImportError as error:
        raise KeySyncError(f"{kind} tokens need PyTorch and transformers ({error}); pip install 'keysync-jax[torch]'") from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from safetensors import SafetensorError

    try:
        model, loaded = getattr(transformers, model_class).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise KeySyncError(f"{folder} cannot be loaded as {kind}: {first_line(error)}") from error
    # transformers would fill up what is missing with random numbers. The mask embedding is used in training only.
    lacking = sorted(k for k in loaded["missing_keys"] if not k.startswith("decoder.") and not k.endswith("masked_spec_embed"))
    if lacking:
        raise KeySyncError(f"{folder} lacks {len(lacking)} weights of {kind}, the first is {lacking[0]}; give the complete model")
    return model


def on_device(model: Any) -> tuple[Any, str]:
    """The model ready to run where there is most to run it with, and that device's name."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), device


def hidden_state(model: Any, inputs: Any) -> np.ndarray:
    """Tokens `[N, D]` of a batch of one."""
    import torch

    with torch.inference_mode():
        return model(inputs).last_hidden_state[0].float().cpu().numpy()


def in_frames(tokens: np.ndarray, frames: int) -> np.ndarray:
    """`[N, D]` -> `[frames, 2, D]`, zeros where tokens are missing."""
    return pair(fill(tokens, TOKENS_PER_FRAME * frames))
