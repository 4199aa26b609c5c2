"""Configs read off the shapes of a checkpoint in sgm names, which carries none itself.

Everything but two things shows in the shapes: the width of an attention head, and which speech encoder a stage was trained with.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from keysync_jax.config import GuidanceConfig, SpeechEncoderConfig, StageConfig, UNetConfig, VAEConfig
from keysync_jax.converters.lazy import Tensors
from keysync_jax.converters.sgm import UNET_PREFIX
from keysync_jax.core.errors import KeySyncError

FILLER = "model.learned_mask"
# Which encoders' features the released stages read, as their authors say, by system.
RELEASED_ENCODERS = {
    "keysync": {"keyframe": "hubert", "interpolation": "wavlm"},
    "keyface": {"keyframe": "wavlm+beats", "interpolation": "wav2vec2+beats"},
}
_AUDIO_LINEAR = re.compile(r"conditioner\.embedders\.(\d+)\.linear\.weight")
_SVD_CHANNELS, _SVD_HEAD = 320, 64


def _shape(tensors: Tensors, key: str, rank: int) -> tuple[int, ...]:
    if key not in tensors:
        raise KeySyncError(f"{tensors.source}: {key} is missing, so the sizes of the network are unknown")
    shape = tensors.info(key).shape
    if len(shape) != rank:
        raise KeySyncError(f"{tensors.source}: {key} is {shape}, expected {rank} dimensions")
    return shape


def _count(tensors: Tensors, pattern: str) -> int:
    """One more than the largest number that the pattern's group matches at the start of a key; 0 for none."""
    found = (re.match(pattern, key) for key in tensors)
    return max((int(m[1]) + 1 for m in found if m), default=0)


def model_channels(tensors: Tensors) -> int:
    """Width of the U-Net's first level."""
    return _shape(tensors, f"{UNET_PREFIX}time_embed.0.weight", 2)[1]


def unet_config(tensors: Tensors, head_channels: int | None = None) -> UNetConfig:
    """A plain SVD-like U-Net (no audio path yet) from its shapes.

    Args:
      tensors: with keys under `model.diffusion_model.`.
      head_channels: width of an attention head; None is SVD's 64, and only for SVD's own width.

    Raises:
      KeySyncError: a tensor that fixes a size is missing, blocks that do not form equal levels, or an unknown head width.
    """
    channels = model_channels(tensors)
    if head_channels is None:
        if channels != _SVD_CHANNELS:
            raise KeySyncError(
                f"{tensors.source}: shapes do not show how wide the heads of a {channels}-channel U-Net are; give head_channels"
            )
        head_channels = _SVD_HEAD
    blocks = _count(tensors, re.escape(UNET_PREFIX) + r"input_blocks\.(\d+)\.") - 1
    downs = sum(bool(re.fullmatch(re.escape(UNET_PREFIX) + r"input_blocks\.\d+\.0\.op\.weight", key)) for key in tensors)
    levels = downs + 1
    if blocks < levels or (blocks - downs) % levels:
        raise KeySyncError(f"{tensors.source}: {blocks} input blocks with {downs} downsamplings do not form levels of equal depth")
    per_level = (blocks - downs) // levels
    first = [1 + level * (per_level + 1) for level in range(levels)]
    widths = [_shape(tensors, f"{UNET_PREFIX}input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in first]
    if any(width % channels for width in widths):
        raise KeySyncError(f"{tensors.source}: level widths {widths} are not multiples of {channels}")
    attends = [f"{UNET_PREFIX}input_blocks.{i}.1.norm.weight" in tensors for i in first]
    middle = f"{UNET_PREFIX}middle_block.1."
    context = _shape(tensors, f"{middle}transformer_blocks.0.attn2.to_k.weight", 2)[1]
    label = f"{UNET_PREFIX}label_emb.0.0.weight"
    return UNetConfig(
        in_channels=_shape(tensors, f"{UNET_PREFIX}input_blocks.0.0.weight", 4)[1],
        out_channels=_shape(tensors, f"{UNET_PREFIX}out.2.weight", 4)[0],
        model_channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=per_level,
        attention_resolutions=tuple(2**level for level in reversed(range(levels)) if attends[level]),
        num_head_channels=head_channels,
        transformer_depth=_count(tensors, re.escape(middle) + r"transformer_blocks\.(\d+)\."),
        context_dim=context,
        audio_cond_method="none",
        adm_in_channels=_shape(tensors, label, 2)[1] if label in tensors else 0,
        use_spatial_context=_shape(tensors, f"{middle}time_stack.0.attn2.to_k.weight", 2)[1] == context,
        video_kernel_size=(_shape(tensors, f"{UNET_PREFIX}middle_block.0.time_stack.in_layers.2.weight", 5)[2], 1, 1),
    )


def with_audio(plain: UNetConfig, stage: str, add_indicator: bool = True) -> UNetConfig:
    """The U-Net of a KeySync stage that starts from a plain one: `label_emb` reads audio tokens, interpolation has more channels."""
    values = {f: getattr(plain, f) for f in plain.__dataclass_fields__}
    extra = plain.out_channels * 2 + (stage == "interpolation" and add_indicator)
    values |= {"audio_cond_method": "both_keyframes", "audio_dim": plain.context_dim, "adm_in_channels": 0, "in_channels": extra}
    values["num_frames"] = StageConfig.num_frames  # KeySync's windows, also where SVD was made for others (25 in SVD-XT)
    return UNetConfig(**values)


def system_of(tensors: Tensors) -> str:
    """Which system a checkpoint belongs to: KeySync's conditioner has a mask before the audio, which is therefore number 2."""
    return "keyface" if any((found := _AUDIO_LINEAR.fullmatch(key)) and found[1] in ("1", "3") for key in tensors) else "keysync"


def stage_config(tensors: Tensors, kind: str, head_channels: int | None = None, **settings: Any) -> StageConfig:
    """The stage that a KeySync or KeyFace checkpoint holds.

    Args:
      tensors: checkpoint in sgm names.
      kind: "keyframe" or "interpolation".
      head_channels: see `unet_config`.
      **settings: further fields of `StageConfig` that shapes do not show (`latent_size`, `resolution`, `audio_encoder`, `mask`).

    Raises:
      KeySyncError: see `unet_config`; a learned filler that is not square.
    """
    plain = unet_config(tensors, head_channels)
    unet = with_audio(plain, kind)
    system = system_of(tensors)
    values: dict[str, Any] = {"audio_encoder": RELEASED_ENCODERS[system][kind], "num_frames": unet.num_frames, "system": system}
    if linear := next(filter(_AUDIO_LINEAR.fullmatch, tensors), None):
        values["audio_feature_dim"] = _shape(tensors, linear, 2)[1]
    if kind == "interpolation":
        values["add_indicator"] = plain.in_channels > 2 * plain.out_channels
        unet = with_audio(plain, kind, values["add_indicator"])
        if system == "keyface":
            values["guidance"] = GuidanceConfig(kind="auto", scale=2.0)
        if FILLER in tensors:
            _, height, width = _shape(tensors, FILLER, 3)
            if height != width:
                raise KeySyncError(f"{tensors.source}: {FILLER} is {height}x{width}; only square latents are supported")
            values["latent_size"] = height
    emotion = plain.adm_in_channels - plain.context_dim  # `label_emb` reads valence and arousal in front of the audio
    if system == "keyface" and emotion > 0 and emotion % 4 == 0:
        values["emotion_dim"] = emotion // 2
        unet = dataclasses.replace(unet, adm_in_channels=emotion)
    values |= {name: value for name, value in settings.items() if value is not None}
    return StageConfig(stage=kind, unet=unet, **values)


def vae_config(tensors: Tensors, prefix: str, quant_conv: bool, post_quant_conv: bool = False) -> VAEConfig:
    """The autoencoder under `prefix`, from its decoder where there is one, else from its encoder.

    Raises:
      KeySyncError: neither half is there.
    """
    decoder = f"{prefix}decoder."
    if f"{decoder}conv_in.weight" in tensors:
        levels = _count(tensors, re.escape(decoder) + r"up\.(\d+)\.")
        widths = [_shape(tensors, f"{decoder}up.{i}.block.0.conv2.weight", 4)[0] for i in range(levels)]
        latent = _shape(tensors, f"{decoder}conv_in.weight", 4)[1]
        image = _shape(tensors, f"{decoder}conv_out.weight", 4)[0]
        depth = _count(tensors, re.escape(decoder) + r"up\.0\.block\.(\d+)\.") - 1
        base = widths[0]
        if f"{prefix}encoder.conv_in.weight" in tensors:
            base = _shape(tensors, f"{prefix}encoder.conv_in.weight", 4)[0]
    else:
        encoder = f"{prefix}encoder."
        levels = _count(tensors, re.escape(encoder) + r"down\.(\d+)\.")
        base, image = _shape(tensors, f"{encoder}conv_in.weight", 4)[:2]
        widths = [_shape(tensors, f"{encoder}down.{i}.block.0.conv2.weight", 4)[0] for i in range(levels)]
        latent = _shape(tensors, f"{encoder}conv_out.weight", 4)[0] // 2
        depth = _count(tensors, re.escape(encoder) + r"down\.0\.block\.(\d+)\.")
    temporal = f"{decoder}conv_out.time_mix_conv.weight"
    kernel: dict[str, Any] = {"video_kernel_size": (_shape(tensors, temporal, 5)[2], 1, 1)} if temporal in tensors else {}
    return VAEConfig(
        in_channels=image,
        out_channels=image,
        base_channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_res_blocks=depth,
        latent_channels=latent,
        decoder="temporal" if temporal in tensors or f"{decoder}conv_in.weight" not in tensors else "image",
        quant_conv=quant_conv,
        post_quant_conv=post_quant_conv,
        **kernel,
    )


def check_encoders(stage: StageConfig, encoders: Mapping[str, SpeechEncoderConfig], where: str) -> None:
    """Refuses speech encoders that the stage was not trained with.

    Args:
      stage: the stage.
      encoders: part name -> config of those of its encoders that there are.
      where: what to call the place in errors.

    Raises:
      KeySyncError: another kind, or, where all are there, features of another width.
    """
    for part, encoder in encoders.items():
        if encoder.kind not in stage.audio_encoders:
            raise KeySyncError(
                f"{where}: {part} is a {encoder.kind} encoder, but the {stage.stage} stage was trained with {stage.audio_encoder}"
            )
    width = sum(encoder.hidden_size for encoder in encoders.values())
    if len(encoders) == len(stage.audio_encoders) and width != stage.audio_feature_dim:
        verb = "gives" if len(encoders) == 1 else "give"
        raise KeySyncError(
            f"{where}: {' and '.join(encoders)} {verb} {width} features per token, "
            f"but the {stage.stage} stage reads {stage.audio_feature_dim}"
        )
