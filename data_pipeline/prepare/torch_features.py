"""Tokens of wav2vec2 and Whisper for the paper's encoder ablation (Table 3), through transformers (extra "torch").

Weights come from a local folder in Hugging Face's layout; nothing is downloaded. Both give two tokens per 40 ms frame, laid out like
HuBERT's: frame f has tokens 2f and 2f + 1, missing ones at the end are zero.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from keysync_jax.core.clock import SAMPLE_RATE, SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError, first_line
from keysync_jax.data_pipeline.prepare.work import digest, file_digest
from keysync_jax.encoders.audio_features import HUBERT_VARIANCE_EPS, num_frames, standardise

_WHISPER_SECONDS = 30  # what Whisper's encoder reads at once


def describe(kind: str, folder: str) -> tuple[int, str]:
    """Width of the tokens and a hash of the weights, without loading them.

    Raises:
      KeySyncError: no model of that kind there.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KeySyncError(f"{path} cannot be read ({error}); give a local Hugging Face folder of {kind}") from None
    if config.get("model_type") != kind:
        raise KeySyncError(f"{folder} holds a {config.get('model_type')!r} model, not {kind}")
    width = config.get("d_model" if kind == "whisper" else "hidden_size")
    weights = sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin"))
    if not weights or not isinstance(width, int):
        raise KeySyncError(f"{folder} holds no weights (.safetensors or .bin) of {kind}")
    return width, digest([file_digest(p) for p in weights])


def open_encoder(kind: str, folder: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from 16 kHz samples float32 `[S]` to tokens float32 `[ceil(S / 640), 2, D]`.

    Raises:
      KeySyncError: transformers is missing or the folder does not fit.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise KeySyncError(f"{kind} tokens need PyTorch and transformers ({error}); pip install 'keysync-jax[torch]'") from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from safetensors import SafetensorError

    kinds = {"wav2vec2": transformers.Wav2Vec2Model, "whisper": transformers.WhisperModel}
    try:
        model, loaded = kinds[kind].from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise KeySyncError(f"{folder} cannot be loaded as {kind}: {first_line(error)}") from error
    # transformers would fill up what is missing with random numbers. The mask embedding is used in training only.
    lacking = sorted(k for k in loaded["missing_keys"] if not k.startswith("decoder.") and not k.endswith("masked_spec_embed"))
    if lacking:
        raise KeySyncError(f"{folder} lacks {len(lacking)} weights of {kind}, the first is {lacking[0]}; give the complete model")
    if kind == "whisper":
        model = model.get_encoder()
        extractor = transformers.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()

    def wav2vec2(samples: np.ndarray) -> np.ndarray:
        frames = num_frames(len(samples))
        wav = np.pad(standardise(samples, unbiased=True, eps=HUBERT_VARIANCE_EPS), (0, frames * SAMPLES_PER_FRAME - len(samples)))
        with torch.inference_mode():
            tokens = model(torch.from_numpy(wav[None]).to(device)).last_hidden_state[0].float().cpu().numpy()
        return _pairs(tokens, frames)

    def whisper(samples: np.ndarray) -> np.ndarray:
        frames = num_frames(len(samples))
        parts = []
        for start in range(0, len(samples), _WHISPER_SECONDS * SAMPLE_RATE):
            piece = samples[start : start + _WHISPER_SECONDS * SAMPLE_RATE]
            mel = extractor(piece, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features.to(device)
            with torch.inference_mode():
                tokens = model(mel).last_hidden_state[0].float().cpu().numpy()
            parts.append(tokens[: 2 * num_frames(len(piece))])
        return _pairs(np.concatenate(parts), frames)

    return wav2vec2 if kind == "wav2vec2" else whisper


def _pairs(tokens: np.ndarray, frames: int) -> np.ndarray:
    """`[N, D]` -> `[frames, 2, D]`, zeros where tokens are missing."""
    tokens = tokens[: 2 * frames]
    return np.pad(tokens, ((0, 2 * frames - len(tokens)), (0, 0))).reshape(frames, 2, -1)
