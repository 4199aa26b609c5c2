"""Parity runners of the speech encoders and of the audio features made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.clock import SAMPLE_RATE, SAMPLES_PER_FRAME
from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.models import table
from keysync_jax.models.speech import hubert, registry, wavlm
from keysync_jax.models.speech.waveform import pad_to_frames
from keysync_jax.verify import reference_audio
from keysync_jax.verify.harness import Case, runner
from keysync_jax.verify.reference_audio import Features


@runner("hubert")
def run_hubert(case: Case) -> dict[str, np.ndarray]:
    offline = _features(case, hubert.config_from_hf(case.config))
    out = {}
    for name, quantity, wav in _wanted(case):
        key = f"out.{name}.{quantity}"
        prepared = offline.prepare(wav)
        if quantity == "normalised":
            out[key] = prepared[None]
        elif quantity == "hidden":
            out[key] = offline.tokens(prepared)[None]
        elif quantity == "emb_chunked":
            out[key] = reference_audio.hubert_chunks(offline, prepared, case.meta["encode_chunks"])
        else:
            out |= _embedding(key, quantity, wav, offline, reference_audio.hubert_frames)
    if (case.folder / "splits.json").is_file():
        expected = case.json("splits.json")
        got = {
            chunk: {
                total: {path: reference_audio.calculate_splits(int(total), int(chunk.removeprefix("chunk_"))) for path in paths}
                for total, paths in totals.items()
            }
            for chunk, totals in expected.items()
        }
        case.check_equal("splits.json", got, expected)
    return out


@runner("wavlm")
def run_wavlm(case: Case) -> dict[str, np.ndarray]:
    offline = _features(case, wavlm.config_from_microsoft(case.config))
    out = {}
    for name, quantity, wav in _wanted(case):
        key = f"out.{name}.{quantity}"
        if quantity == "features":
            out[key] = offline.tokens(offline.prepare(wav))[None]
        else:
            out |= _embedding(key, quantity, wav, offline, reference_audio.wavlm_frames)
    return out


def _features(case: Case, config: AudioEncoderConfig) -> Features:
    params = table.to_flax(registry.audio_table(config), case.weights, str(case.folder))
    # The reference's offline path is one pass whatever the length.
    longest = max(len(wav) for _, quantity, wav in _wanted(case) if quantity != "emb_raw_pipeline")
    return AudioFeatures(config, params, window_seconds=max(24.0, longest / SAMPLE_RATE + 1))


def _wanted(case: Case) -> Iterator[tuple[str, str, np.ndarray]]:
    """(input name, quantity, waveform) of each expected tensor; long inputs are stored as 16-bit integers."""
    for key in case.expected:
        name, _, quantity = key.removeprefix("out.").rpartition(".")
        wav = case.inputs[name] if name in case.inputs else case.inputs[f"{name}_int16"].astype(np.float32) / 32768
        yield name, quantity, wav


def _embedding(
    key: str, quantity: str, wav: np.ndarray, offline: Features, raw: Callable[[Features, np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    if quantity == "raw_frames":
        return {key: pad_to_frames(wav).reshape(-1, SAMPLES_PER_FRAME)}
    if quantity == "emb_offline":
        return {key: offline.offline(wav)}
    if quantity == "emb_raw_pipeline":
        return {key: raw(offline, wav)}
    return {}  # something new: the harness reports it as not returned
