"""The reference's constructor arguments (its YAML files) as our configs.

Every argument is accounted for: taken over, known to have no effect on the result, or required to have the one value that is built
here. Anything else is refused by name, so that no setting is silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.core.errors import KeySyncError

Arguments = Mapping[str, Any]
_DEFAULT_WRAPPER = "sgm.modules.diffusionmodules.wrappers.OpenAIWrapper"

# Memory, initialisation or freezing only: the forward pass does not depend on them.
_UNET_NO_EFFECT = ("use_checkpoint", "dropout", "fine_tuning_method", "unfreeze_blocks", "num_heads_upsample", "extra_ff_mix_layer")
_UNET_ONLY = {
    "conv_resample": (True,),
    "dims": (2,),
    "num_heads": (-1,),
    "use_scale_shift_norm": (False,),
    "resblock_updown": (False,),
    "time_downup": (False,),
    "time_context_dim": (None,),
    "spatial_transformer_attn_type": ("softmax", "softmax-xformers"),
    "use_linear_in_transformer": (True,),
    "disable_temporal_crossattention": (False,),
    "adapter_kwargs": (None, {}),
    "skip_time": (False,),
    "use_ada_aug": (False,),
    "encode_landmarks": (False,),
    "reference_to": (None,),
}
_UNET_COPIED = ("in_channels", "out_channels", "model_channels", "num_res_blocks", "num_head_channels", "context_dim")
# The reference's defaults where they are not ours.
_UNET_DEFAULTS = {
    "channel_mult": (1, 2, 4, 8),
    "transformer_depth": 1,
    "use_spatial_context": False,
    "merge_strategy": "fixed",
    "merge_factor": 0.5,
    "video_kernel_size": 3,
    "adm_in_channels": None,
    "max_ddpm_temb_period": 10000,
    "audio_dim": 0,
    "additional_audio_frames": 0,
    "num_classes": None,
    "use_linear_in_transformer": False,
    "num_head_channels": -1,
    "audio_cond_method": None,
    "attention_resolutions": (),
    "transformer_depth_middle": None,
}


def unet_config_from_sgm(arguments: Arguments, num_frames: int = 14) -> UNetConfig:
    """`UNetConfig` from the arguments of the reference's `VideoUNet`.

    Raises:
      KeySyncError: an argument that is unknown, missing, or has a value that is not built here, by name.
    """
    where = "VideoUNet"
    given = {**_UNET_DEFAULTS, **arguments}
    known = {*_UNET_COPIED, *_UNET_DEFAULTS, *_UNET_ONLY, *_UNET_NO_EFFECT}
    _refuse_unknown(where, given, known)
    _require(where, given, _UNET_ONLY)
    missing = [name for name in _UNET_COPIED if name not in given]
    if missing:
        raise KeySyncError(f"{where}: argument {', '.join(missing)} is missing")
    method = given["audio_cond_method"] or "none"
    if given["num_classes"] not in (None, "sequential"):
        raise KeySyncError(f"{where}: num_classes {given['num_classes']!r} is not supported; only 'sequential' is")
    adm = given["adm_in_channels"] or 0
    if given["num_classes"] is None:  # no label path: audio is context only, a vector is ignored
        method, adm = "none", 0
    depths = _numbers(given["transformer_depth"])
    if given["transformer_depth_middle"] is not None:
        depths += (given["transformer_depth_middle"],)
    if len(set(depths)) != 1:
        raise KeySyncError(f"{where}: transformer_depth {depths} differs between levels, which is not supported")
    factors = [2**level for level in range(len(given["channel_mult"]))]
    return UNetConfig(
        **{name: given[name] for name in _UNET_COPIED},
        channel_mult=tuple(given["channel_mult"]),
        # The reference ignores factors that no level has, and its own configs name some.
        attention_resolutions=tuple(factor for factor in given["attention_resolutions"] if factor in factors),
        transformer_depth=depths[0],
        audio_cond_method=method,
        audio_dim=given["audio_dim"],
        additional_audio_frames=given["additional_audio_frames"],
        adm_in_channels=adm,
        num_frames=num_frames,
        merge_strategy=given["merge_strategy"],
        merge_factor=float(given["merge_factor"]),
        use_spatial_context=given["use_spatial_context"],
        video_kernel_size=temporal_kernel(where, given["video_kernel_size"]),
        max_time_embed_period=given["max_ddpm_temb_period"],
    )


_VAE_ONLY = {
    "double_z": (True,),
    "attn_type": ("vanilla", "vanilla-xformers"),
    "attn_resolutions": ([], (), None),
    "resamp_with_conv": (True,),
    "use_linear_attn": (False,),
    "give_pre_end": (False,),
    "tanh_out": (False,),
    "time_mode": ("conv-only",),
    "merge_strategy": ("learned",),
}
_VAE_NO_EFFECT = ("resolution", "dropout", "alpha")
_VAE_COPIED = {
    "in_channels": "in_channels",
    "out_ch": "out_channels",
    "ch": "base_channels",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "latent_channels",
}
_TEMPORAL_DECODER = "VideoDecoder"
_IMAGE_DECODER = "Decoder"


def vae_config_from_sgm(arguments: Arguments) -> VAEConfig:
    """`VAEConfig` from the arguments of `AutoencoderKLModeOnly` (`ddconfig`, `embed_dim`) or of `AutoencodingEngine`
    (`encoder_config`, `decoder_config`).

    Raises:
      KeySyncError: an argument that is unknown or has a value that is not built here, by name.
    """
    if "ddconfig" in arguments:
        where = "AutoencoderKLModeOnly"
        known = {"ddconfig", "embed_dim", "monitor", "lossconfig", "loss_config", "ckpt_path", "ckpt_engine", "max_batch_size", "ema_decay"}
        _refuse_unknown(where, arguments, known)
        config = autoencoder_config(arguments["ddconfig"], decoder="image", quant_conv=True, post_quant_conv=True)
        if arguments.get("embed_dim", config.latent_channels) != config.latent_channels:
            raise KeySyncError(f"{where}: embed_dim {arguments['embed_dim']} is not z_channels {config.latent_channels}; not supported")
        return config
    where = "AutoencodingEngine"
    known = {"encoder_config", "decoder_config", "loss_config", "regularizer_config", "monitor", "ema_decay", "input_key", "ckpt_path"}
    _refuse_unknown(where, arguments, known)
    try:
        encoder, decoder = arguments["encoder_config"], arguments["decoder_config"]
    except KeyError as error:
        raise KeySyncError(f"{where}: argument {error} is missing") from None
    target = decoder["target"].rsplit(".", 1)[-1]
    if target not in (_TEMPORAL_DECODER, _IMAGE_DECODER):
        raise KeySyncError(f"{where}: decoder {decoder['target']} is not supported; {_TEMPORAL_DECODER} and {_IMAGE_DECODER} are")
    kind = "temporal" if target == _TEMPORAL_DECODER else "image"
    config = autoencoder_config(decoder.get("params", {}), decoder=kind, quant_conv=False)
    other = autoencoder_config(encoder.get("params", {}), decoder="image", quant_conv=False)
    sizes = [{name: getattr(c, name) for name in (*_VAE_COPIED.values(), "channel_mult")} for c in (config, other)]
    different = [name for name in sizes[0] if sizes[0][name] != sizes[1][name]]
    if different:
        raise KeySyncError(f"{where}: encoder and decoder differ in {', '.join(different)}, which is not supported")
    return config


def autoencoder_config(arguments: Arguments, *, decoder: str, quant_conv: bool, post_quant_conv: bool = False) -> VAEConfig:
    """`VAEConfig` from the arguments shared by `Encoder`, `Decoder` and `VideoDecoder` (a `ddconfig`)."""
    where = "autoencoder"
    _refuse_unknown(where, arguments, {*_VAE_COPIED, *_VAE_ONLY, *_VAE_NO_EFFECT, "ch_mult", "video_kernel_size"})
    _require(where, arguments, _VAE_ONLY)
    missing = [name for name in _VAE_COPIED if name not in arguments]
    if missing:
        raise KeySyncError(f"{where}: argument {', '.join(missing)} is missing")
    kernel: dict[str, Any] = {}
    if decoder == "temporal":
        kernel = {"video_kernel_size": temporal_kernel("VideoDecoder", arguments.get("video_kernel_size", 3))}
    return VAEConfig(
        **{ours: arguments[theirs] for theirs, ours in _VAE_COPIED.items()},
        channel_mult=tuple(arguments.get("ch_mult", (1, 2, 4, 8))),
        decoder=decoder,
        quant_conv=quant_conv,
        post_quant_conv=post_quant_conv,
        **kernel,
    )


def stage_config_from_sgm(engine: Arguments, num_frames: int = 14) -> tuple[StageConfig, tuple[int, int] | None]:
    """`StageConfig` from the arguments of the reference's `DiffusionEngine`, and the latent (height, width) that its learned filler
    has (None for a keyframe engine, whose config does not say).

    Only what the network and its conditioner are is read; sampler, loss and optimiser settings are the caller's.

    Raises:
      KeySyncError: a wrapper, embedder or argument that is not built here, by name.
    """
    unet = unet_config_from_sgm(engine["network_config"]["params"], num_frames)
    embedders = engine["conditioner_config"]["params"]["emb_models"]
    audio = [e for e in embedders if e["target"].endswith(".WhisperAudioEmbedder")]
    if len(audio) != 1:
        raise KeySyncError(f"DiffusionEngine: {len(audio)} audio embedders; exactly one WhisperAudioEmbedder is supported")
    embedder = audio_embedder_arguments(audio[0].get("params", {}))
    if embedder["features"] not in (None, unet.context_dim):
        raise KeySyncError(f"WhisperAudioEmbedder: linear_dim {embedder['features']} is not the U-Net's context_dim {unet.context_dim}")
    wrapper, latent_shape = wrapper_from_sgm(*_wrapper(engine))
    masked = any(e["target"].endswith(".IdentityEncoder") for e in embedders)  # hands KeySync's mask and known region on
    if not masked:
        wrapper |= {"system": "keyface", "emotion_dim": emotion_from_sgm(embedders)}
    elif wrapper.get("system") == "keyface":
        raise KeySyncError("OpenAIWrapper reads no mask, but the conditioner hands one on (IdentityEncoder)")
    size: dict[str, Any] = {"latent_size": latent_shape[0], "resolution": 8 * latent_shape[0]} if latent_shape else {}
    config = StageConfig(
        unet=unet,
        num_frames=num_frames,
        audio_feature_dim=embedder["audio_dim"],
        audio_merge=embedder["merge"],
        audio_linear=embedder["features"] is not None,
        latent_scale=float(engine.get("scale_factor", StageConfig.latent_scale)),
        **wrapper,
        **size,
    )
    return config, latent_shape


def _wrapper(engine: Arguments) -> tuple[str, Arguments]:
    """Target and arguments of an engine's network wrapper; the reference's default where it names none."""
    given: dict[str, Any] = engine.get("network_wrapper") or {"target": _DEFAULT_WRAPPER}
    return given["target"], given.get("params", {})


def emotion_from_sgm(embedders: Sequence[Arguments]) -> int:
    """Width of the sinusoids of valence and of arousal; 0 for a conditioner that reads neither.

    Raises:
      KeySyncError: other scalars than these two, in another order, or of unequal width.
    """
    scalars = [e for e in embedders if e["target"].endswith(".ConcatTimestepEmbedderND")]
    if not scalars:
        return 0
    names, widths = [e["input_key"] for e in scalars], {e["params"]["outdim"] for e in scalars}
    if names != ["valence", "arousal"] or len(widths) > 1 or not all(e["params"].get("is_temporal") for e in scalars):
        raise KeySyncError(
            f"ConcatTimestepEmbedderND of {', '.join(names)}: only valence, then arousal, of one width per frame is supported"
        )
    return widths.pop()


def wrapper_from_sgm(target: str, arguments: Arguments) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Fields of `StageConfig` that a network wrapper decides, and the (height, width) of its learned filler.

    Raises:
      KeySyncError: another wrapper than DubbingWrapper, OpenAIWrapper and InterpolationWrapper, or an argument that is not built here.
    """
    name = target.rsplit(".", 1)[-1]
    if name == "DubbingWrapper":
        _refuse_unknown(name, arguments, {"compile_model", "mask_input"})  # neither changes the result
        return {"stage": "keyframe"}, None
    if name == "OpenAIWrapper":  # joins the latents by channel as DubbingWrapper does
        _refuse_unknown(name, arguments, {"compile_model", "fix_image_leak", "add_embeddings", "ada_aug_percent"})
        off = (False, None, 0, 0.0)
        _require(name, arguments, {"fix_image_leak": off, "add_embeddings": off, "ada_aug_percent": off})
        return {"stage": "keyframe", "system": "keyface"}, None
    if name != "InterpolationWrapper":
        raise KeySyncError(f"network wrapper {target} is not supported; DubbingWrapper, OpenAIWrapper and InterpolationWrapper are")
    known = {"compile_model", "im_size", "n_channels", "starting_mask_method", "add_mask", "fix_image_leak"}
    _refuse_unknown(name, arguments, known)
    _require(name, arguments, {"fix_image_leak": (False,), "n_channels": (4,)})
    height, width = (side // 8 for side in arguments.get("im_size", (512, 512)))
    filler = arguments.get("starting_mask_method", "zeros")
    return {"stage": "interpolation", "filler": filler, "add_indicator": arguments.get("add_mask", True)}, (height, width)


def audio_embedder_arguments(arguments: Arguments) -> dict[str, Any]:
    """Merge kind ("merge"), projection width or None ("features") and input width ("audio_dim") of a `WhisperAudioEmbedder`."""
    _refuse_unknown("WhisperAudioEmbedder", arguments, {"merge_method", "linear_dim", "cond_type", "audio_dim"})
    _require("WhisperAudioEmbedder", arguments, {"merge_method": ("mean", "add", "concat")})
    return {
        "merge": arguments.get("merge_method", "mean"),
        "features": arguments.get("linear_dim"),
        "audio_dim": arguments.get("audio_dim") or 768,
    }


def temporal_kernel(where: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    """A temporal kernel (k, 1, 1), k odd.

    Raises:
      KeySyncError: a kernel that mixes space too.
    """
    kernel = _numbers(value)
    kernel = kernel * 3 if len(kernel) == 1 else kernel
    if len(kernel) != 3 or kernel[1:] != (1, 1) or kernel[0] % 2 == 0:
        raise KeySyncError(f"{where}: video_kernel_size {value} is not supported; temporal kernels are [k, 1, 1] with odd k")
    return kernel


def _numbers(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _refuse_unknown(where: str, arguments: Arguments, known: set[str]) -> None:
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise KeySyncError(f"{where}: argument {', '.join(unknown)} is unknown")


def _require(where: str, arguments: Arguments, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in allowed.items():
        if name in arguments and arguments[name] not in values:
            raise KeySyncError(f"{where}: {name} {arguments[name]!r} is not supported; it must be {' or '.join(map(repr, values))}")
