"""Parity runners of the speech encoders and of the audio features made from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.converters import speech
from keysync_jax.core.clock import SAMPLE_RATE, SAMPLES_PER_FRAME
from keysync_jax.encoders import audio_features
from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.verify.harness import Case, runner
from keysync_jax.weights import table


@runner("hubert")
def hubert(case: Case) -> dict[str, np.ndarray]:
    offline, raw = _features(case, speech.config_from_hf(case.config | {"model_type": "hubert"}))
    out = {}
    for name, quantity, wav in _wanted(case):
        key = f"out.{name}.{quantity}"
        prepared = offline.prepare(wav)
        if quantity == "normalised":
            out[key] = prepared[None]
        elif quantity == "hidden":
            out[key] = offline.tokens(prepared)[None]
        elif quantity == "emb_chunked":
            out[key] = offline.chunked(prepared, case.meta["encode_chunks"])
        else:
            out |= _embedding(key, quantity, wav, offline, raw)
    if (case.folder / "splits.json").is_file():
        expected = case.json("splits.json")
        got = {
            chunk: {
                total: {path: audio_features.calculate_splits(int(total), int(chunk.removeprefix("chunk_"))) for path in paths}
                for total, paths in totals.items()
            }
            for chunk, totals in expected.items()
        }
        case.check_equal("splits.json", got, expected)
    return out


@runner("wavlm")
def wavlm(case: Case) -> dict[str, np.ndarray]:
    offline, raw = _features(case, speech.config_from_microsoft(case.config))
    out = {}
    for name, quantity, wav in _wanted(case):
        key = f"out.{name}.{quantity}"
        if quantity == "features":
            out[key] = offline.tokens(offline.prepare(wav))[None]
        else:
            out |= _embedding(key, quantity, wav, offline, raw)
    return out


def _features(case: Case, config: AudioEncoderConfig) -> tuple[AudioFeatures, AudioFeatures]:
    params = table.to_flax(speech.audio_table(config), case.weights, str(case.folder))
    # The reference's offline path is one pass whatever the length.
    longest = max(len(wav) for _, quantity, wav in _wanted(case) if quantity != "emb_raw_pipeline")
    offline = AudioFeatures(config, params, window_seconds=max(24.0, longest / SAMPLE_RATE + 1))
    return offline, AudioFeatures(config, params, reference_chunking=True)


def _wanted(case: Case) -> Iterator[tuple[str, str, np.ndarray]]:
    """(input name, quantity, waveform) of each expected tensor; long inputs are stored as 16-bit integers."""
    for key in case.expected:
        name, _, quantity = key.removeprefix("out.").rpartition(".")
        wav = case.inputs[name] if name in case.inputs else case.inputs[f"{name}_int16"].astype(np.float32) / 32768
        yield name, quantity, wav


def _embedding(key: str, quantity: str, wav: np.ndarray, offline: AudioFeatures, raw: AudioFeatures) -> dict[str, np.ndarray]:
    if quantity == "raw_frames":
        return {key: audio_features.pad_to_frames(wav).reshape(-1, SAMPLES_PER_FRAME)}
    if quantity == "emb_offline":
        return {key: offline.offline(wav)}
    if quantity == "emb_raw_pipeline":
        return {key: raw(wav)}
    return {}  # something new: the harness reports it as not returned
