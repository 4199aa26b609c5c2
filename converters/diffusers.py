"""Names of SVD's U-Net and VAE in diffusers, generated from the config that the model is built from.

`UNetSpatioTemporalConditionModel` and `AutoencoderKLTemporalDecoder` hold the same tensors as sgm's `VideoUNet`, `Encoder`
and `VideoDecoder` under other names; the only other shape is the VAE's mid attention, whose projections are 1x1 convolutions in sgm
and linear layers in diffusers. Every sgm key of a table is translated by its position, so the two name sets are always in bijection.

One numerical difference is not a matter of weights: diffusers normalises the res blocks of its cross-attention *down* blocks with
eps 1e-6 where sgm (and KeySync, trained with it) uses 1e-5; outputs differ by about 1e-4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from keysync_jax.config import SVD_LATENT_SCALE, UNetConfig, VAEConfig
from keysync_jax.converters import sgm
from keysync_jax.converters.lazy import LazyTensor, Tensors
from keysync_jax.converters.sgm import UNET_PREFIX, VAE_PREFIX
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import Table

UNET_CLASS = "UNetSpatioTemporalConditionModel"
VAE_CLASS = "AutoencoderKLTemporalDecoder"
NORM_GROUPS = 32  # of every group norm, in both classes and in the reference's own code

_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _split(key: str) -> tuple[str, str]:
    module, _, leaf = key.rpartition(".")
    return module, leaf


def _unet_name(key: str, levels: int, blocks: int) -> str:
    """diffusers' name of a `VideoUNet` key (without prefix) for `levels` resolutions of `blocks` res blocks each."""
    module, leaf = _split(key)
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    if match := re.fullmatch(r"input_blocks\.(\d+)\.(\d)\.(.+)", key):
        level, position = divmod(int(match[1]) - 1, blocks + 1)
        if position == blocks:  # the extra block that ends a level
            return f"down_blocks.{level}.downsamplers.0.conv.{leaf}"
        return f"down_blocks.{level}.{_unet_layer(match[2], position, match[3])}"
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", key):
        index = int(match[1])
        return f"mid_block.{_unet_layer(str(index % 2), index // 2, match[2])}"
    if match := re.fullmatch(r"output_blocks\.(\d+)\.(\d)\.(.+)", key):
        level, position = divmod(int(match[1]), blocks + 1)
        if match[3] == f"conv.{leaf}":  # `.1` on levels without attention, `.2` on the others
            return f"up_blocks.{level}.upsamplers.0.{match[3]}"
        return f"up_blocks.{level}.{_unet_layer(match[2], position, match[3])}"
    raise KeySyncError(f"{key} has no place in diffusers' U-Net")


def _unet_layer(slot: str, position: int, rest: str) -> str:
    if slot == "0":
        return f"resnets.{position}.{_res_name(rest)}"
    rest = re.sub(r"^time_stack\.(\d+)", r"temporal_transformer_blocks.\1", rest)
    rest = re.sub(r"^time_pos_embed\.([02])", lambda m: f"time_pos_embed.linear_{1 + int(m[1]) // 2}", rest)
    return f"attentions.{position}.{rest}"


def _res_name(rest: str) -> str:
    if rest == "time_mixer.mix_factor":
        return rest
    module, leaf = _split(rest)
    if module.startswith("time_stack."):
        return f"temporal_res_block.{_RES[module.removeprefix('time_stack.')]}.{leaf}"
    return f"spatial_res_block.{_RES[module]}.{leaf}"


def unet_map(config: UNetConfig) -> dict[str, str]:
    """diffusers key -> sgm key without `model.diffusion_model.`, for every tensor of the U-Net.

    Raises:
      KeySyncError: the config uses something that diffusers' class has no place for.
    """
    _check_unet(config)
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    keys = [e.torch_key for e in sgm.unet_table(config)]
    return _bijection({_unet_name(key, levels, blocks): key for key in keys}, len(keys))


def _check_unet(config: UNetConfig) -> None:
    wrong = []
    if config.merge_strategy == "fixed":
        wrong.append("merge_strategy='fixed'")
    if not config.temporal_layers:
        wrong.append("temporal_layers=False")
    if config.video_kernel_size != (3, 1, 1):
        wrong.append(f"video_kernel_size={config.video_kernel_size}")
    if not config.label_dim:
        wrong.append("no label_emb")
    if config.norm_groups != NORM_GROUPS:
        wrong.append(f"norm_groups={config.norm_groups}")
    if config.channel_mult[0] != 1:  # one number there is both the first level's width and the width of the first convolution
        wrong.append(f"channel_mult={config.channel_mult}")
    if not config.use_spatial_context:
        wrong.append("use_spatial_context=False")
    if config.max_time_embed_period != 10000:
        wrong.append(f"max_time_embed_period={config.max_time_embed_period}")
    if wrong:
        raise KeySyncError(f"diffusers' {UNET_CLASS} cannot express {', '.join(wrong)}")


def _vae_name(key: str, levels: int) -> str:
    """diffusers' name of a first-stage key (without prefix)."""
    module, leaf = _split(key)
    if module in ("quant_conv", "encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"):
        return key
    if module in ("encoder.norm_out", "decoder.norm_out"):
        return f"{module.replace('norm_out', 'conv_norm_out')}.{leaf}"
    if module == "decoder.conv_out.time_mix_conv":
        return f"decoder.time_conv_out.{leaf}"
    side, rest = key.split(".", 1)
    temporal = side == "decoder"
    if match := re.fullmatch(r"mid\.block_([12])\.(.+)", rest):
        return f"{side}.mid_block.resnets.{int(match[1]) - 1}.{_vae_res_name(match[2], temporal)}"
    if match := re.fullmatch(r"mid\.attn_1\.(\w+)\.(\w+)", rest):
        return f"{side}.mid_block.attentions.0.{_VAE_ATTENTION[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", rest):
        level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
        place = f"{side}.{match[1]}_blocks.{level}"
        if sampler := re.fullmatch(r"(downsample|upsample)\.(conv\.\w+)", match[3]):
            return f"{place}.{sampler[1]}rs.0.{sampler[2]}"
        if block := re.fullmatch(r"block\.(\d+)\.(.+)", match[3]):
            return f"{place}.resnets.{block[1]}.{_vae_res_name(block[2], temporal)}"
    raise KeySyncError(f"{key} has no place in diffusers' VAE")


def _vae_res_name(rest: str, temporal: bool) -> str:
    if rest == "mix_factor":
        return "time_mixer.mix_factor"
    module, leaf = _split(rest)
    if module.startswith("time_stack."):
        return f"temporal_res_block.{_RES[module.removeprefix('time_stack.')]}.{leaf}"
    name = f"{module.replace('nin_shortcut', 'conv_shortcut')}.{leaf}"
    return f"spatial_res_block.{name}" if temporal else name


def vae_map(config: VAEConfig) -> dict[str, str]:
    """diffusers key -> sgm key without `first_stage_model.`; `quant_conv` has the same name in both.

    Raises:
      KeySyncError: the config is not an SVD-like VAE (temporal decoder, quant_conv, two res blocks per level).
    """
    if config.decoder != "temporal" or config.post_quant_conv or config.video_kernel_size != (3, 1, 1):
        raise KeySyncError(f"diffusers' {VAE_CLASS} needs a temporal decoder without post_quant_conv")
    if config.num_res_blocks != 2:
        # diffusers gives the decoder's mid block as many res blocks as a level; sgm always has two there.
        raise KeySyncError(f"diffusers' {VAE_CLASS} needs num_res_blocks 2, this VAE has {config.num_res_blocks}")
    if config.norm_groups != NORM_GROUPS or config.channel_mult[0] != 1:
        given = f"norm_groups={config.norm_groups}, channel_mult={config.channel_mult}"
        raise KeySyncError(f"diffusers' {VAE_CLASS} needs norm_groups={NORM_GROUPS} and a channel_mult that begins with 1, not {given}")
    keys = [e.torch_key.removeprefix(VAE_PREFIX) for e in sgm.vae_table(config)]
    return _bijection({_vae_name(key, len(config.channel_mult)): key for key in keys}, len(keys))


def _bijection(names: dict[str, str], count: int) -> dict[str, str]:
    if len(names) != count:
        raise KeySyncError(f"two of {count} tensors got the same diffusers name")
    return names


def _reshaped(tensors: Tensors, table: Table) -> Tensors:
    """Tensors whose shape differs from the table's by axes of length one only, viewed as the table says."""
    shapes = {e.torch_key: e.torch_shape for e in table}
    changed: dict[str, LazyTensor] = {}
    for key, tensor in tensors.lazy_items():
        want = shapes.get(key, tensor.shape)
        if want != tensor.shape and [n for n in want if n != 1] == [n for n in tensor.shape if n != 1]:
            changed[key] = tensor.reshape(want)
    return tensors.updated(changed)


def unet_to_sgm(tensors: Tensors, config: UNetConfig) -> Tensors:
    """A diffusers U-Net under KeySync's names, `model.diffusion_model.` included; unknown keys keep their name."""
    return tensors.renamed({theirs: UNET_PREFIX + ours for theirs, ours in unet_map(config).items()})


def vae_to_sgm(tensors: Tensors, config: VAEConfig) -> Tensors:
    """A diffusers VAE under KeySync's names, `first_stage_model.` included."""
    renamed = tensors.renamed({theirs: VAE_PREFIX + ours for theirs, ours in vae_map(config).items()})
    return _reshaped(renamed, sgm.vae_table(config))


def unet_to_diffusers(tensors: Tensors, config: UNetConfig) -> Tensors:
    """The inverse of `unet_to_sgm`; tensors outside the U-Net are left out."""
    return tensors.under(UNET_PREFIX).renamed({ours: theirs for theirs, ours in unet_map(config).items()})


def vae_to_diffusers(tensors: Tensors, config: VAEConfig) -> Tensors:
    """The inverse of `vae_to_sgm`."""
    renamed = tensors.under(VAE_PREFIX).renamed({ours: theirs for theirs, ours in vae_map(config).items()})
    linear = {
        key: tensor.reshape(tensor.shape[:2])
        for key, tensor in renamed.lazy_items()
        if ".attentions." in key and tensor.shape[2:] == (1, 1)
    }
    return renamed.updated(linear)


def unet_config_to_diffusers(config: UNetConfig, latent_size: int) -> dict[str, Any]:
    """`config.json` of `UNetSpatioTemporalConditionModel`.

    KeySync's `label_emb` reads audio tokens (1024) where SVD's reads three sinusoids of 256 (768); `in_channels` is 9 for interpolation.
    """
    _check_unet(config)
    levels = range(len(config.channel_mult))
    attends = [2**level in config.attention_resolutions for level in levels]
    channels = [config.model_channels * m for m in config.channel_mult]
    return {
        "_class_name": UNET_CLASS,
        "_diffusers_version": "0.42.1",
        "sample_size": latent_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal" if a else "DownBlockSpatioTemporal" for a in attends],
        "up_block_types": ["CrossAttnUpBlockSpatioTemporal" if a else "UpBlockSpatioTemporal" for a in reversed(attends)],
        "block_out_channels": channels,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.label_dim,
        "layers_per_block": config.num_res_blocks,
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        "num_attention_heads": [c // config.num_head_channels for c in channels],
        "num_frames": config.num_frames,
    }


def unet_config_from_diffusers(values: Mapping[str, Any], where: str) -> UNetConfig:
    """The U-Net that a diffusers `config.json` describes, as SVD is: an extra vector, no audio.

    Raises:
      KeySyncError: another class, or heads whose width differs between levels.
    """
    if values.get("_class_name", UNET_CLASS) != UNET_CLASS:
        raise KeySyncError(f"{where} describes a {values['_class_name']}; only {UNET_CLASS} (Stable Video Diffusion) can be read")
    try:
        channels = _widths(values["block_out_channels"], where)
        blocks = _per_level(values.get("layers_per_block", 2), len(channels), "layers_per_block", where)
        depth = _per_level(values.get("transformer_layers_per_block", 1), len(channels), "transformer_layers_per_block", where)
        context = _per_level(values.get("cross_attention_dim", 1024), len(channels), "cross_attention_dim", where)
        heads = values.get("num_attention_heads", (5, 10, 20, 20))  # the class's own default
        heads = [int(h) for h in heads] if isinstance(heads, list | tuple) else [int(heads)] * len(channels)
        widths = {c // h for c, h in zip(channels, heads, strict=True)}
        if len(widths) != 1:
            raise KeySyncError(f"{where}: attention heads are {sorted(widths)} wide at different levels; one width is supported")
        return UNetConfig(
            in_channels=int(values["in_channels"]),
            out_channels=int(values["out_channels"]),
            model_channels=channels[0],
            channel_mult=tuple(c // channels[0] for c in channels),
            num_res_blocks=blocks,
            attention_resolutions=tuple(2**i for i, name in reversed(list(enumerate(values["down_block_types"]))) if "CrossAttn" in name),
            num_head_channels=widths.pop(),
            transformer_depth=depth,
            context_dim=context,
            audio_cond_method="none",
            adm_in_channels=int(values["projection_class_embeddings_input_dim"]),
            num_frames=int(values.get("num_frames", 14)),
        )
    except KeyError as error:
        raise KeySyncError(f"{where} lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise KeySyncError(f"{where} holds a value that cannot be read ({error}); download it again") from None


def _widths(values: Any, where: str) -> list[int]:
    """`block_out_channels`: channels of each level, multiples of the first."""
    channels = [int(c) for c in values]
    if not channels or channels[0] < 1 or any(c % channels[0] for c in channels):
        raise KeySyncError(f"{where}: block_out_channels {channels} are not multiples of the first, which is not supported")
    return channels


def _per_level(value: Any, levels: int, name: str, where: str) -> int:
    each = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)] * levels
    if len(set(each)) != 1:
        raise KeySyncError(f"{where}: {name} {each} differs between levels; one value is supported")
    return each[0]


def vae_config_to_diffusers(config: VAEConfig, resolution: int) -> dict[str, Any]:
    """`config.json` of `AutoencoderKLTemporalDecoder`."""
    channels = [config.base_channels * m for m in config.channel_mult]
    return {
        "_class_name": VAE_CLASS,
        "_diffusers_version": "0.42.1",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.latent_channels,
        "sample_size": resolution,
        "scaling_factor": config.latent_scale,
        "force_upcast": True,
    }


def vae_config_from_diffusers(values: Mapping[str, Any], where: str) -> VAEConfig:
    """The VAE that a diffusers `config.json` describes.

    Raises:
      KeySyncError: another class, e.g. `AutoencoderKL` of an image model.
    """
    if values.get("_class_name", VAE_CLASS) != VAE_CLASS:
        raise KeySyncError(f"{where} describes a {values['_class_name']}; only {VAE_CLASS} (Stable Video Diffusion) can be read")
    try:
        channels = _widths(values["block_out_channels"], where)
        return VAEConfig(
            in_channels=int(values.get("in_channels", 3)),
            out_channels=int(values.get("out_channels", 3)),
            base_channels=channels[0],
            channel_mult=tuple(c // channels[0] for c in channels),
            num_res_blocks=int(values.get("layers_per_block", 2)),
            latent_channels=int(values.get("latent_channels", 4)),
            latent_scale=float(values.get("scaling_factor", SVD_LATENT_SCALE)),
        )
    except KeyError as error:
        raise KeySyncError(f"{where} lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise KeySyncError(f"{where} holds a value that cannot be read ({error}); download it again") from None
