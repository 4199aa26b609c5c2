"""wav2vec2 (Baevski et al., 2020): HuBERT's network under the names of its own task models, with HuBERT's alignment.

KeyFace's interpolation stage reads it. Of a model that was fine-tuned to transcribe only the encoder counts; its head is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.models.speech import hubert
from keysync_jax.models.speech import speech_layers as layers
from keysync_jax.models.speech import transformers_config as names
from keysync_jax.models.speech.speech_encoder import Published, SpeechEncoder

_OWN = "wav2vec2."
# Of models that transcribe or are being pre-trained.
_HEADS = ("lm_head.", "quantizer.", "project_q.", "project_hid.")


def _is_wav2vec2(keys: Collection[str], config: Mapping[str, Any]) -> bool:
    own = any(key.startswith(_OWN) for key in keys)
    return names.has_convolutions(keys, config) and (own or config.get("model_type") == "wav2vec2")


def config_from_hf(
    values: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None, source: str = "config.json"
) -> AudioEncoderConfig:
    """Configuration of a Hugging Face wav2vec2 folder, see `registry.config_from_hf`."""
    fields = names.shared_fields(values, preprocessor, source, normalize=True)  # as wav2vec2-base-960h does
    return AudioEncoderConfig(kind="wav2vec2", **fields)


ENCODER = SpeechEncoder(
    name="wav2vec2",
    title="wav2vec2",
    config=AudioEncoderConfig,
    module=hubert.Hubert,
    geometry=layers.convolution_geometry,
    first_convolution=layers.first_convolution,
    prepare=hubert.prepare,
    table=hubert.ENCODER.table,
    settle=lambda config, keys: dataclasses.replace(config, mask_embedding=hubert.MASK in keys),
    published=(Published("wav2vec2", "wav2vec2 (Hugging Face)", _is_wav2vec2, lambda key, config: names.bare(key), unused=_HEADS),),
    from_hf=config_from_hf,
)
