"""Parity runners of the encoders that KeyFace reads beside WavLM: BEATs and wav2vec2."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.models.speech import beats, registry, speech_layers, wav2vec2
from keysync_jax.models.speech.beats import Beats
from keysync_jax.models.table import to_flax
from keysync_jax.verify.case_tools import apply, params_of
from keysync_jax.verify.harness import Case, runner


@runner("keyface_beats")
def run_beats(case: Case) -> dict[str, np.ndarray]:
    out: dict[str, Any] = {}
    for variant, values in case.config.items():
        out |= _beats_variant(case, variant, beats.config_from_microsoft(values, case.name))
    return out


def _beats_variant(case: Case, variant: str, config: beats.BeatsConfig) -> dict[str, Any]:
    prefix = f"{variant}."
    weights = {key.removeprefix(prefix): value for key, value in case.weights.items() if key.startswith(prefix)}
    params = params_of(registry.audio_table(config), weights, f"{case.name} {variant}")
    longest = max((len(wav) for wav in case.inputs.values()), default=0)  # the reference attends over the whole clip, whatever its length
    features, module = AudioFeatures(config, params, window_seconds=max(24.0, longest / SAMPLE_RATE + 1)), Beats(config)
    out: dict[str, Any] = {}
    for key in case.expected:
        kind, *rest = key.split(".")
        if rest[0] in case.config and rest[0] != variant:
            continue
        name, quantity = rest[-2:]
        if quantity == "bucket_of_distance":
            out[key] = speech_layers.relative_buckets((len(case.expected[key]) + 1) // 2, config.num_buckets, config.max_distance)
            continue
        given = _waveform(case, name)
        if quantity == "emb":
            out[key] = features.offline(given)
            continue
        wav = features.prepare(given)[None]
        if quantity == "fbank":
            out[key] = apply(module, params, wav, method="spectrogram")
        elif quantity == "patches":
            out[key] = apply(module, params, wav, method="features")
        elif quantity == "buckets":
            length = features.tokens(wav[0]).shape[0]
            table = speech_layers.relative_buckets(length, config.num_buckets, config.max_distance)
            place = np.arange(length)
            out[key] = table[place[None, :] - place[:, None] + length - 1]
        else:
            tokens, layer = _tokens(module, params, wav)
            out[key] = {"features": tokens, "layer0": np.moveaxis(np.asarray(layer), 0, 1)}.get(quantity)
            if quantity == "probs":
                out[key] = apply(module, params, tokens, method="classify")
    return {key: np.asarray(value) for key, value in out.items() if value is not None}


@functools.partial(jax.jit, static_argnums=0)
def _tokens(module: Beats, params: dict[str, Any], wav: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens `[1, N, D]` in one pass, and what the first layer makes."""
    options = {"capture_intermediates": lambda m, _: m.name == "layers_0", "mutable": ["intermediates"]}
    applied: Any = module.apply({"params": params}, jnp.asarray(wav), **options)
    tokens, state = applied
    return tokens, state["intermediates"]["encoder"]["layers_0"]["__call__"][0][0]


@runner("keyface_wav2vec2")
def run_wav2vec2(case: Case) -> dict[str, np.ndarray]:
    config = wav2vec2.config_from_hf(case.config, source=case.name)
    form = wav2vec2.ENCODER.published[0]
    weights = {form.rename(key, config): value for key, value in case.weights.items() if not key.startswith(form.unused)}
    config = wav2vec2.ENCODER.settle(config, weights)
    params = to_flax(registry.audio_table(config), weights, case.name)
    longest = max(len(_waveform(case, key.split(".")[1])) for key in case.expected)
    features = AudioFeatures(config, params, window_seconds=max(24.0, longest / SAMPLE_RATE + 1))  # the reference's path is one pass
    out = {}
    for key in case.expected:
        name, quantity = key.split(".")[1:]
        wav = _waveform(case, name)
        prepared = features.prepare(wav)
        if quantity == "normalised":
            out[key] = prepared[None]
        elif quantity == "hidden":
            out[key] = features.tokens(prepared)[None]
        elif quantity == "emb_offline":
            out[key] = features.offline(wav)
    return out


def _waveform(case: Case, name: str) -> np.ndarray:
    """An input by its name; long ones are stored as 16-bit integers."""
    return case.inputs[name] if name in case.inputs else case.inputs[f"{name}_int16"].astype(np.float32) / 32768
