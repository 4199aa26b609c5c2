"""Validated, frozen descriptions of every part of the system.

A part's `config.json`, a `configs/*.py` recipe and the constructors of `keysync_jax.models` all speak these dataclasses. They
carry no arrays and import no JAX, so that `converters` can walk them to list parameter names and shapes.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from keysync_jax.core.errors import KeySyncError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # exists for type checkers alone

T = TypeVar("T", bound="DataclassInstance")

# Speech encoders by name. Each is the file `speech/NAME.py`, whose record says everything else about it (`speech.registry`).
AUDIO_ENCODERS = ["hubert", "wavlm", "wav2vec2", "beats", "log_mel"]
# Those that run in PyTorch alone: `keysync prepare` computes columns of their tokens, which a stage can be trained on; it cannot dub.
COLUMN_ENCODERS = ["whisper"]

# Rules of guidance (`diffusion.guidance`), and the numbers that each reads: of a stage its `audio_scale` and `identity_scale`, the others
# of its `GuidanceConfig`.
GUIDANCES = {
    "audio-identity": ("audio", "identity"),
    "cfg": ("scale",),
    "apg": ("audio", "identity", "momentum", "eta", "norm_threshold"),
    "auto": ("scale",),
    "none": (),
}

# Scale between raw VAE latents and the latents the diffusion works on (Stable Video Diffusion).
SVD_LATENT_SCALE = 0.18215

# Every list of choices that commands and recipes read.
SYSTEMS = ("keysync", "keyface")  # what a stage belongs to: dubbing of a masked mouth, animation of a whole face
STAGES = ("keyframe", "interpolation")  # of diffusion, in the order in which they run
# Parts that hold a worse version of a stage's network, from which autoguidance leads away, and the stage.
WEAK_PARTS = {"interpolation_bad": "interpolation"}
MASK_KINDS = ["box", "full", "mouth", "heart", "face"]  # drawn by `media.masks`, whose `register` adds to them
FACE_BACKENDS = ("mediapipe", "fan")  # landmark detectors, opened by `media.faces`; the first is the default
OCCLUSION_BACKENDS = ("flax", "sam2")  # what follows objects, opened by `segmentation.segmenters`; the first is the default
COMPUTE_DTYPES = ("float32", "bfloat16")  # of the networks' computation
STORED_DTYPES = ("float32", "float16", "bfloat16")  # of weights on disk
ATTENTION = ("auto", "xla", "cudnn", "splash")  # kernels, see `models.attention`
MODEL_SIZES = ("tiny", "full")  # of `keysync init`
BENCH_SIZES = ("tiny", "medium", "full")
TORCH_FORMATS = ("keysync", "diffusers")  # folders that PyTorch code reads
EXPORT_FORMATS = ("model", *TORCH_FORMATS)
RETIMED = ("loop", "bounce", "remap")  # the pictures are shown at other times than the source's, until the voice ends
MISMATCHES = ("source", "cut_off", *RETIMED, "silence")  # a voice that is longer or shorter than the video, see `inference.lengths`
CODECS = ("h264", "hevc", "vp9", "av1", "prores", "dnxhr", "ffv1")  # of a dubbed video
CONTAINERS = ("pt", "safetensors")  # files of the keysync format
LIP_RATIOS = ("inner", "inner centre", "outer")  # lip points of the mouth aspect ratio, see `evaluation.video_metrics`
HELD_OUT = ("test", "validation")  # splits of drawn talkers that no model was trained on


def optional_columns() -> tuple[str, ...]:
    """Column groups that may stand beside a dataset's base group of latents, audio tokens and landmarks, each written on its own.

    A speech encoder of the model directory is in the base group; to name it here changes nothing.
    """
    return ("jpeg", "sound", *AUDIO_ENCODERS, *COLUMN_ENCODERS, "emotion", "occluder")


class Remat(enum.Enum):
    """What the backward pass keeps of the forward pass (`models.remat`), from most memory to least."""

    NONE = "none"  # keep everything
    DOTS = "dots"  # keep matrix products and convolutions, the S x S logits of attention included
    CONV_AWARE = "conv_aware"  # keep matrix products but no S x S logits, convolutions and attention outputs (the default)
    NAMES = "names"  # keep convolutions and attention outputs
    FULL = "full"  # keep only what enters a block


def encoder_names(encoder: str) -> tuple[str, ...]:
    """The encoders in a stage's `audio_encoder`: "hubert" is one, "hubert+wavlm" two whose tokens stand side by side in this order."""
    return tuple(encoder.split("+"))


def _choice(config: Any, field: str, allowed: Sequence[str]) -> None:
    value = getattr(config, field)
    if value not in allowed:
        raise KeySyncError(f"{type(config).__name__}.{field} is {value!r}; choose one of {', '.join(allowed)}")


def _at_least(config: Any, least: int, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        values = value if isinstance(value, (tuple, list)) else (value,)
        if not values or min(values) < least:
            raise KeySyncError(f"{type(config).__name__}.{field} is {value!r}; it must be at least {least}")


def _temporal_kernel(config: Any) -> None:
    """Frames before and after count alike, and a frame's own positions are the 2-D convolutions' business."""
    kernel = config.video_kernel_size
    if len(kernel) != 3 or tuple(kernel[1:]) != (1, 1) or kernel[0] < 1 or kernel[0] % 2 == 0:
        raise KeySyncError(f"{type(config).__name__}.video_kernel_size is {tuple(kernel)}; temporal kernels are (k, 1, 1) with odd k")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Latent video U-Net (SVD's `VideoUNet`). Defaults are the full-size keyframe network."""

    in_channels: int = 8
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # downsampling factors that carry attention
    num_head_channels: int = 64
    transformer_depth: int = 1
    context_dim: int = 1024
    # How audio enters: "both_keyframes" (cross-attention and, per frame, time embedding; the released models), "to_time_emb" (time
    # embedding only, separate context), "both" and "to_time_emb_image" (likewise, but all audio tokens of a sample side by side in one
    # time embedding: image models, whose tokens are the additional frames), "none" (plain SVD).
    audio_cond_method: str = "both_keyframes"
    audio_dim: int = 1024
    additional_audio_frames: int = 0
    adm_in_channels: int = 0  # width of an extra conditioning vector placed before the audio in `label_emb`
    num_frames: int = 14
    merge_strategy: str = "learned_with_images"  # "learned" | "fixed" | "learned_with_images"
    merge_factor: float = 0.5
    extra_ff_mix_layer: bool = True  # kept for the record: the reference builds this layer whatever its config says
    use_spatial_context: bool = True
    video_kernel_size: tuple[int, ...] = (3, 1, 1)
    max_time_embed_period: int = 10000
    temporal_layers: bool = True  # False: an image network, every frame on its own (the paper's ablation "two stages, no temporal layers")
    # diffusers' SVD normalises the residual blocks of its attention down blocks and of all up blocks with epsilon 1e-6, where the
    # reference has 1e-5 everywhere; set to reproduce diffusers' numbers.
    reference_diffusers_eps: bool = False
    # Groups of every group norm. As many groups as channels would be an instance norm, which forgets colours: narrow networks need fewer.
    norm_groups: int = 32

    def __post_init__(self):
        _choice(self, "audio_cond_method", ("both_keyframes", "both", "to_time_emb", "to_time_emb_image", "none"))
        _choice(self, "merge_strategy", ("learned", "fixed", "learned_with_images"))
        _at_least(
            self, 1, "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "num_head_channels", "context_dim",
            "num_frames", "norm_groups",
        )  # fmt: skip
        _temporal_kernel(self)
        factors = [2**level for level in range(len(self.channel_mult))]
        if self.attention_resolutions and not set(self.attention_resolutions) & set(factors):
            known = ", ".join(map(str, factors))
            raise KeySyncError(
                f"UNetConfig.attention_resolutions is {tuple(self.attention_resolutions)}, but the levels downsample by {known}: "
                "none would attend; name some of these, or none at all for a network without attention"
            )
        _at_least(self, 0, "transformer_depth", "audio_dim", "additional_audio_frames", "adm_in_channels")

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.model_channels

    @property
    def label_dim(self) -> int:
        """Width of the vector that `label_emb` reads; 0 means the network has no label path."""
        if self.audio_cond_method == "none":
            return self.adm_in_channels
        return self.adm_in_channels + self.audio_dim * (2 * self.additional_audio_frames + 1)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Autoencoder: 2-D encoder and temporal (`VideoDecoder`) or plain 2-D decoder."""

    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    decoder: str = "temporal"  # "temporal" | "image"
    video_kernel_size: tuple[int, ...] = (3, 1, 1)
    quant_conv: bool = True
    post_quant_conv: bool = False
    latent_scale: float = SVD_LATENT_SCALE
    norm_groups: int = 32  # groups of every group norm, see `UNetConfig.norm_groups`

    def __post_init__(self):
        _choice(self, "decoder", ("temporal", "image"))
        _temporal_kernel(self)
        _at_least(
            self, 1, "in_channels", "out_channels", "base_channels", "channel_mult", "num_res_blocks", "latent_channels", "norm_groups"
        )
        if any(self.base_channels * mult % self.norm_groups for mult in self.channel_mult):
            widths = [self.base_channels * mult for mult in self.channel_mult]
            raise KeySyncError(f"VAEConfig: channels {widths} are not all multiples of norm_groups {self.norm_groups}")

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)


@dataclasses.dataclass(frozen=True)
class SpeechEncoderConfig:
    """What every speech encoder's configuration has; an encoder with more to say has a subclass of its own.

    `kind` is one of `AUDIO_ENCODERS`, `hidden_size` the width of its tokens, of which there are two per 40 ms video frame.
    """

    kind: str
    hidden_size: int

    def __post_init__(self):
        _choice(self, "kind", AUDIO_ENCODERS)
        _at_least(self, 1, "hidden_size")


@dataclasses.dataclass(frozen=True)
class AudioEncoderConfig(SpeechEncoderConfig):
    """Speech encoders like HuBERT, and log-mel, whose stored configurations have always had these fields.

    `kind`: "hubert" and "wavlm" are transformer encoders with weights; "log_mel" computes a mel spectrogram and has none.
    Defaults are HuBERT-base.
    """

    kind: str = "hubert"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320  # WavLM's relative position bias
    max_distance: int = 800
    normalize_waveform: bool = True  # zero mean, unit variance over the clip (HuBERT); WavLM-Base+ reads the raw waveform
    layer_norm_eps: float = 1e-5
    num_mels: int = 0  # log_mel only: mel bands, equal to hidden_size (0 stands for it)
    # Variants of the transformer encoders; the defaults are the base models.
    extractor_mode: str = "group"  # "group": one norm over time after the first convolution; "layer": a layer norm after each
    layer_norm_first: bool = False  # pre-norm transformer layers with one norm at the end
    feature_layer_norm: bool = True  # layer norm on the convolutional features
    feature_projection: bool = True  # linear layer to hidden_size (Microsoft's WavLM has none where the widths are equal)
    relative_position: bool = True  # WavLM: bucketed relative position bias, owned by the first layer
    gated_relative_position: bool = True  # WavLM: each layer scales that bias by a gate of its input
    mask_embedding: bool = True  # the checkpoint carries the pre-training mask vector; never used here, kept so that export is complete

    def __post_init__(self):
        super().__post_init__()
        _choice(self, "extractor_mode", ("group", "layer"))
        for field in ("conv_dim", "conv_kernel", "conv_stride"):  # lists from JSON: a linen module's configuration must hash
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.kind == "log_mel":
            if self.num_mels not in (0, self.hidden_size):
                raise KeySyncError(f"AudioEncoderConfig.num_mels is {self.num_mels} but hidden_size is {self.hidden_size}; make them equal")
            return
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            raise KeySyncError("AudioEncoderConfig: conv_dim, conv_kernel and conv_stride must have one entry per convolution")
        for field, divisor in (("num_heads", self.num_heads), ("conv_pos_groups", self.conv_pos_groups)):
            if self.hidden_size % divisor:
                raise KeySyncError(f"AudioEncoderConfig.hidden_size {self.hidden_size} is not a multiple of {field} {divisor}")
        if not self.feature_projection and self.conv_dim[-1] != self.hidden_size:
            raise KeySyncError(
                f"AudioEncoderConfig: hidden_size {self.hidden_size} must equal conv_dim[-1] {self.conv_dim[-1]} without feature_projection"
            )


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Which region is regenerated; see `media.masks`."""

    kind: str = "box"  # one of `MASK_KINDS`
    nose_index: int = 28
    box_expand: float = 0.0

    def __post_init__(self):
        _choice(self, "kind", MASK_KINDS)


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """By which rule conditions are strengthened when sampling; `GUIDANCES` says which numbers a rule reads."""

    kind: str = "audio-identity"
    scale: float = 2.0  # "cfg": of both conditions together; "auto": away from the weaker network
    momentum: float = -0.75  # "apg", see `diffusion.guidance.AdaptiveProjectedGuidance`
    eta: float = 0.0
    norm_threshold: float = 2.5

    def __post_init__(self):
        _choice(self, "kind", tuple(GUIDANCES))


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One of the two diffusion stages together with everything it was trained for."""

    stage: str = "keyframe"  # one of `STAGES`
    unet: UNetConfig = UNetConfig()
    resolution: int = 512  # side of the face crop in pixels
    latent_size: int = 64  # side of the latent
    num_frames: int = 14
    audio_encoder: str = "hubert"  # whose tokens it was trained on: an encoder, or several side by side ("hubert+wavlm")
    audio_feature_dim: int = 768  # width of a token, of all its encoders together
    audio_merge: str = "mean"  # how the two tokens of a frame are merged: "mean" | "concat" | "add"
    audio_linear: bool = True
    mask: MaskConfig = MaskConfig()
    latent_scale: float = SVD_LATENT_SCALE
    filler: str = "zeros"  # interpolation: what stands between the endpoints ("zeros", "ones", "random" learnable; "fixed_*"; "none")
    add_indicator: bool = True  # interpolation: binary channel that marks the endpoint frames
    audio_scale: float = 5.0  # guidance scales recommended for this stage (paper Table 8)
    identity_scale: float = 2.0
    num_steps: int = 10
    guidance: GuidanceConfig = GuidanceConfig()
    # "keysync": what the mask leaves of the source is known; "keyface": no mask, the whole picture is generated.
    system: str = "keysync"
    emotion_dim: int = 0  # width of the sinusoids that valence, and arousal, become in front of the audio in `label_emb`; 0: none is read

    def __post_init__(self):
        _choice(self, "stage", STAGES)
        _choice(self, "system", SYSTEMS)
        if self.emotion_dim % 2 or self.emotion_dim < 0 or (self.emotion_dim and self.unet.adm_in_channels != 2 * self.emotion_dim):
            raise KeySyncError(
                f"StageConfig: emotion_dim {self.emotion_dim} must be even, and unet.adm_in_channels twice as much, "
                f"not {self.unet.adm_in_channels}"
            )
        _choice(self, "audio_merge", ("mean", "concat", "add"))
        _choice(self, "filler", ("zeros", "ones", "random", "fixed_zeros", "fixed_ones", "none"))
        names, known = self.audio_encoders, (*AUDIO_ENCODERS, *COLUMN_ENCODERS)
        if not set(names) <= set(known) or len(set(names)) < len(names):
            raise KeySyncError(
                f"StageConfig.audio_encoder is {self.audio_encoder!r}; choose one of {', '.join(known)}, or different ones side by side, "
                f"joined by + ({known[0]}+{known[1]})"
            )
        _at_least(self, 1, "resolution", "latent_size", "num_frames", "audio_feature_dim", "num_steps")

    @property
    def audio_encoders(self) -> tuple[str, ...]:
        """The speech encoders whose tokens it reads, in the order in which they stand side by side."""
        return encoder_names(self.audio_encoder)

    @property
    def has_learned_filler(self) -> bool:
        return self.stage == "interpolation" and self.filler in ("zeros", "ones", "random")

    @property
    def guidance_numbers(self) -> dict[str, float]:
        """What the stage's guidance reads, by the names of `GUIDANCES`."""
        own = {"audio": self.audio_scale, "identity": self.identity_scale, **vars(self.guidance)}
        return {name: own[name] for name in GUIDANCES[self.guidance.kind]}


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dict (lists, not tuples) that `from_dict` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build a dataclass from JSON values, refusing unknown keys, missing ones and wrong types by name.

    Args:
      cls: one of the dataclasses above, or another whose fields are numbers, texts, lists (as tuples), mappings, or dataclasses of these.
      values: field values; missing ones take the default.
      where: what to call the source in error messages (a file path).

    Raises:
      KeySyncError: an unknown key, a missing one without default, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise KeySyncError(f"{where}: unknown key {', '.join(unknown)} for {cls.__name__}; known: {', '.join(fields)}")
    needed = {f.name for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - set(values)):
        raise KeySyncError(f"{where} lacks {', '.join(missing)}")
    return cls(**{name: _typed(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as a field of that type has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # X | None
        return None if value is None else _typed(arguments[0], value, where)
    if dataclasses.is_dataclass(hint) or hint is dict or origin is dict:
        if not isinstance(value, dict):
            raise KeySyncError(f"{where} must be a mapping, not {value!r}")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return from_dict(hint, value, where)
        for name, item in value.items() if arguments else ():
            _typed(arguments[1], item, f"{where}: {name}")
        return value  # its numbers as they are: what is written again has the same bytes
    if origin is tuple:
        count = None if arguments[-1] is ... else len(arguments)
        if not isinstance(value, (list, tuple)) or count not in (None, len(value)):
            raise KeySyncError(f"{where} must be a list{'' if count is None else f' of {count}'}, not {value!r}")
        kind = arguments[0]
        if typing.get_origin(kind) or dataclasses.is_dataclass(kind):
            return tuple(_typed(kind, item, f"{where}[{number}]") for number, item in enumerate(value))
        if wrong := [v for v in value if not _is(kind, v)]:
            raise KeySyncError(f"{where} must hold {kind.__name__} values, not {wrong[0]!r}")
        return tuple(kind(v) for v in value)
    if hint is Any:
        return value
    if not _is(hint, value):
        raise KeySyncError(f"{where} must be {hint.__name__}, not {value!r}")
    return float(value) if hint is float else value


def _is(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
