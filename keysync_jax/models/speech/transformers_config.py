"""What the HuBERT-like encoders share in transformers: fields of `config.json`, names of convolutions, two spellings of weight norm.

Our tables also share their first and last tensors: convolutions with their norms, and the position embedding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech.speech_layers import Transformer
from keysync_jax.models.table import Entry, conv, fold, norm, raw

# Weight norm as torch's parametrization stores it -> as it was published.
_PARAMETRIZATION = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
_TASK_MODELS = ("hubert.", "wavlm.", "wav2vec2.")  # where a task model keeps its encoder
_SIZES = {
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "conv_dim": ("conv_dim", (512,) * 7),
    "conv_kernel": ("conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
    "conv_stride": ("conv_stride", (5, 2, 2, 2, 2, 2, 2)),
    "conv_bias": ("conv_bias", False),
    "conv_pos": ("num_conv_pos_embeddings", 128),
    "conv_pos_groups": ("num_conv_pos_embedding_groups", 16),
    "layer_norm_eps": ("layer_norm_eps", 1e-5),
    "extractor_mode": ("feat_extract_norm", "group"),
    "layer_norm_first": ("do_stable_layer_norm", False),
}


def shared_fields(values: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, source: str, normalize: bool) -> dict[str, Any]:
    """Fields of `AudioEncoderConfig` that all of these models say in the same words.

    Args:
      values: a `config.json` (missing keys take the library's defaults).
      preprocessor: its `preprocessor_config.json`; `do_normalize` there decides about waveform normalisation.
      source: what to call the file in errors.
      normalize: whether the waveform is normalised where there is no preprocessor.

    Raises:
      KeySyncError: a feature that the encoders here do not have, by name.
    """
    refuse(values, source, {"hidden_act": "gelu", "feat_extract_activation": "gelu", "conv_pos_batch_norm": False, "add_adapter": False})
    fields = {ours: values.get(theirs, default) for ours, (theirs, default) in _SIZES.items()}
    # transformers creates the mask vector only where masking can happen.
    masked = values.get("mask_time_prob", 0.05) > 0 or values.get("mask_feature_prob", 0.0) > 0
    return fields | {"normalize_waveform": bool((preprocessor or {}).get("do_normalize", normalize)), "mask_embedding": masked}


def refuse(values: Mapping[str, Any], source: str, supported: Mapping[str, Any]) -> None:
    """Refuses a configuration with another value for a key than the one that is supported."""
    for key, value in supported.items():
        if values.get(key, value) != value:
            raise KeySyncError(f"{source}: {key} is {values[key]!r}; only {value!r} is supported")


def bare(key: str) -> str:
    """A tensor's name without the name of the encoder in a task model, weight norm as it was published."""
    for prefix in _TASK_MODELS:
        key = key.removeprefix(prefix)
    for new, published in _PARAMETRIZATION.items():
        key = key.replace(new, published)
    return key


def has_convolutions(keys: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether tensors belong to one of these encoders, whatever their `config.json` says: they all begin with the same convolutions."""
    return any(bare(key).startswith("feature_extractor.conv_layers.") for key in keys)


def convolution(config: AudioEncoderConfig, index: int, conv_key: str, norm_key: str) -> Iterator[Entry]:
    """One strided convolution of the waveform, and its norm if it has one."""
    channels = config.conv_dim[index - 1] if index else 1
    yield from conv(conv_key, "conv1d", channels, config.conv_dim[index], (config.conv_kernel[index],), bias=config.conv_bias)
    if index == 0 or config.extractor_mode == "layer":
        yield from norm(norm_key, config.conv_dim[index])


def positional(config: Transformer, key: str) -> Iterator[Entry]:
    """The convolutional position embedding, whose weight is stored as direction and length."""
    width = config.hidden_size
    yield Entry(f"{key}.bias", fold(f"{key}.bias", "bias"), (width,), "same")
    yield from raw(f"{key}.weight_g", (1, 1, config.conv_pos), "conv1d")
    yield from raw(f"{key}.weight_v", (width, width // config.conv_pos_groups, config.conv_pos), "conv1d")
