"""BEATs (Chen et al., 2022): sound of any kind, laughter and sighs included, to 50 tokens a second, under the published names.

The spectrogram is cut into patches of 160 ms by 16 mel bands, eight to a moment, and a token is a patch: token 8t + m is moment t, bands
16m to 16m + 15. KeyFace (commit 9226167) spreads a clip's N tokens over two places for each of its F frames, an even number: place i takes
token floor(i N / 2F). So a frame sees two of the eight patches of its moment. That is what the stages were trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import SpeechEncoderConfig
from keysync_jax.core.clock import SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech import fbank
from keysync_jax.models.speech import speech_layers as layers
from keysync_jax.models.speech import transformers_config as names
from keysync_jax.models.speech.speech_encoder import Geometry, Moments, Published, SpeechEncoder
from keysync_jax.models.speech.waveform import pad_to_frames, stretch
from keysync_jax.models.table import Entry, Table, conv, fold, linear, norm, raw

Array = jax.Array

BANDS = 128
# Mean and twice the deviation of AudioSet's log-mel, by which the spectrogram is normalised.
MEAN, SPREAD = 15.41663, 2 * 6.55582
FULL_SCALE = 2**15
# Fewer frames hold no whole patch: a shorter clip is followed by silence.
_LEAST_FRAMES = 6


@dataclasses.dataclass(frozen=True)
class BeatsConfig(SpeechEncoderConfig):
    """Sizes of a BEATs encoder; defaults are those of the iter3+ base models."""

    kind: str = "beats"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    patch: int = 16  # side of a patch: frames of 10 ms, and mel bands
    patch_width: int = 512  # width of an embedded patch
    patch_bias: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    deep_norm: bool = True  # residual branches are added to a multiple of what they start from
    layer_norm_first: bool = False
    relative_position: bool = True
    gated_relative_position: bool = True
    num_classes: int = 0  # of the head of a fine-tuned model, 0 without
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        for field in ("num_heads", "conv_pos_groups"):
            if self.hidden_size % getattr(self, field):
                raise KeySyncError(f"BeatsConfig.hidden_size {self.hidden_size} is not a multiple of {field} {getattr(self, field)}")
        if BANDS % self.patch:
            raise KeySyncError(f"BeatsConfig.patch {self.patch} does not divide the {BANDS} mel bands")

    @property
    def per_moment(self) -> int:
        """Tokens of one moment."""
        return BANDS // self.patch


class EncoderLayer(nn.Module):
    """A transformer layer; with deep norm, what it starts from counts `(2 layers) ** 0.25` times beside each half's result."""

    config: BeatsConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array | None) -> tuple[Array, Array | None]:
        config = self.config
        # Every layer carries the table of distances, as published files do; the first one's is what all of them use.
        attention = layers.SelfAttention(
            config, config.relative_position, config.gated_relative_position, self.dtype, gate_reads_query=True, name="self_attn"
        )
        first = layers.layer_norm("self_attn_layer_norm", config.layer_norm_eps, self.dtype)
        last = layers.layer_norm("final_layer_norm", config.layer_norm_eps, self.dtype)
        fc1 = nn.Dense(config.intermediate_size, dtype=self.dtype, name="fc1")
        fc2 = nn.Dense(config.hidden_size, dtype=self.dtype, name="fc2")
        alpha = (2 * config.num_layers) ** 0.25 if config.deep_norm else 1.0
        if config.layer_norm_first:
            y, bias = attention(first(x), mask, bias)
            x = x + y
            return x + fc2(layers.gelu(fc1(last(x)))), bias
        y, bias = attention(x, mask, bias)
        x = first(alpha * x + y)
        return last(alpha * x + fc2(layers.gelu(fc1(x)))), bias


class Encoder(nn.Module):
    config: BeatsConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """`[B, N, D]`, mask `[B, N]` of tokens that exist -> `[B, N, D]`."""
        return layers.transformer(
            self.config,
            x,
            mask,
            layers.PositionalConv(self.config, self.dtype, name="pos_conv_0"),
            layers.layer_norm("layer_norm", self.config.layer_norm_eps, self.dtype),
            [EncoderLayer(self.config, self.dtype, name=f"layers_{i}") for i in range(self.config.num_layers)],
        )


class Beats(nn.Module):
    """Waveform `[B, S]` (16 kHz, full scale 1) -> tokens `[B, N, D]`, the last layer's output."""

    config: BeatsConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        side = (config.patch, config.patch)
        self.patch_embedding = nn.Conv(config.patch_width, side, side, padding="VALID", use_bias=config.patch_bias, dtype=self.dtype)
        self.layer_norm = layers.layer_norm(None, config.layer_norm_eps, self.dtype)
        if config.patch_width != config.hidden_size:
            self.post_extract_proj = nn.Dense(config.hidden_size, dtype=self.dtype)
        self.encoder = Encoder(config, self.dtype)
        if config.num_classes:
            self.predictor = nn.Dense(config.num_classes, dtype=self.dtype)

    def __call__(self, waveform: Array) -> Array:
        patches = self.features(waveform)
        tokens = self.encode(patches, jnp.full(len(patches), patches.shape[1]))
        if self.is_initializing() and self.config.num_classes:
            self.predictor(tokens)
        return tokens

    def spectrogram(self, waveform: Array) -> Array:
        """`[B, S]` -> `[B, frames, 128]`, normalised; digital silence is -2.39."""
        return (fbank.log_mel(waveform * FULL_SCALE, BANDS) - MEAN) / SPREAD

    def features(self, waveform: Array, moments: Moments | None = None) -> Array:
        """The local part: `[B, S]` -> embedded patches `[B, 8 t, patch_width]`. No statistics of the clip are needed."""
        x = self.patch_embedding(self.spectrogram(waveform)[..., None])  # [B, t, 8, C]
        return x.reshape(len(x), -1, x.shape[-1])

    def encode(self, features: Array, count: Array) -> Array:
        """Transformer part: patches `[B, N, C]` of which the first `count` `[B]` are real -> tokens `[B, N, D]`."""
        x = self.layer_norm(features)
        if self.config.patch_width != self.config.hidden_size:
            x = self.post_extract_proj(x)
        return self.encoder(x, jnp.arange(x.shape[1]) < count[:, None])

    def classify(self, tokens: Array) -> Array:
        """What the head of a fine-tuned model hears: tokens `[B, N, D]` -> probability of each class `[B, classes]`."""
        return nn.sigmoid(self.predictor(tokens).astype(jnp.float32).mean(axis=1))


# --- weights and configurations --------------------------------------------------------------------------------------------------


def _table(config: BeatsConfig) -> Table:
    return list(_entries(config))


def _entries(config: BeatsConfig) -> Iterator[Entry]:
    width = config.hidden_size
    if config.patch_width != width:
        yield from linear("post_extract_proj", config.patch_width, width)
    yield from conv("patch_embedding", "conv2d", 1, config.patch_width, (config.patch, config.patch), bias=config.patch_bias)
    yield from names.positional(config, "encoder.pos_conv.0")
    for key in (f"encoder.layers.{i}" for i in range(config.num_layers)):
        if config.gated_relative_position:
            yield from raw(f"{key}.self_attn.grep_a", (1, config.num_heads, 1, 1))
        if config.relative_position:
            bias = f"{key}.self_attn.relative_attention_bias.weight"
            yield Entry(bias, fold(bias, "embedding"), (config.num_buckets, config.num_heads), "same")
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{key}.self_attn.{name}", width, width)
        if config.gated_relative_position:
            yield from linear(f"{key}.self_attn.grep_linear", width // config.num_heads, 8)
        yield from norm(f"{key}.self_attn_layer_norm", width)
        yield from linear(f"{key}.fc1", width, config.intermediate_size)
        yield from linear(f"{key}.fc2", config.intermediate_size, width)
        yield from norm(f"{key}.final_layer_norm", width)
    yield from norm("encoder.layer_norm", width)
    yield from norm("layer_norm", config.patch_width)
    if config.num_classes:
        yield from linear("predictor", width, config.num_classes)


def config_from_microsoft(values: Mapping[str, Any], source: str = "cfg") -> BeatsConfig:
    """Configuration of a published BEATs file (its `cfg`; missing keys take that code's defaults).

    Raises:
      KeySyncError: a feature that the encoder here does not have, by name.
    """
    names.refuse(values, source, {"activation_fn": "gelu"})
    return BeatsConfig(
        hidden_size=values.get("encoder_embed_dim", 768),
        num_layers=values.get("encoder_layers", 12),
        num_heads=values.get("encoder_attention_heads", 12),
        intermediate_size=values.get("encoder_ffn_embed_dim", 3072),
        patch=values.get("input_patch_size", 16),
        patch_width=values.get("embed_dim", 512),
        patch_bias=values.get("conv_bias", False),
        conv_pos=values.get("conv_pos", 128),
        conv_pos_groups=values.get("conv_pos_groups", 16),
        num_buckets=values.get("num_buckets", 320),
        max_distance=values.get("max_distance", 1280),
        deep_norm=values.get("deep_norm", False),
        layer_norm_first=values.get("layer_norm_first", False),
        relative_position=values.get("relative_position_embedding", False),
        gated_relative_position=values.get("gru_rel_pos", False),
        num_classes=values.get("predictor_class", 527) if values.get("finetuned_model", False) else 0,
    )


def _is_beats(keys: Collection[str], config: Mapping[str, Any]) -> bool:
    return "patch_embedding.weight" in keys and any(key.startswith("encoder.pos_conv.") for key in keys)


def _geometry(config: BeatsConfig) -> Geometry:
    hop = config.patch * fbank.SHIFT
    receptive = hop - fbank.SHIFT + fbank.WINDOW
    return Geometry(hop // config.per_moment, receptive, group=config.per_moment)


def prepare(config: BeatsConfig, wav: np.ndarray) -> np.ndarray:
    """The waveform `[S]` with silence behind, up to an even number of frames: `[640 F]`."""
    padded = pad_to_frames(wav, multiple=2)
    return np.pad(padded, (0, max(0, _LEAST_FRAMES * SAMPLES_PER_FRAME - len(padded))))


ENCODER = SpeechEncoder(
    name="beats",
    title="BEATs",
    config=BeatsConfig,
    module=Beats,
    geometry=_geometry,
    prepare=prepare,
    align=stretch,
    table=_table,
    published=(Published("beats", "BEATs (Microsoft)", _is_beats, lambda key, config: key, config_from_microsoft),),
)
