"""Runners of the cases about the networks: U-Net, wrappers, blocks, autoencoders, conditioner.

Sizes and options come from `case.json` alone, weights go through the conversion tables, and every stored intermediate is returned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import StageConfig, UNetConfig
from keysync_jax.converters import sgm, sgm_config
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.conditions import Conditions, repeat_frames, zero_where_dropped
from keysync_jax.models import layers
from keysync_jax.models.conditioning import join_frames, raw_latents
from keysync_jax.models.resblock import VideoResBlock
from keysync_jax.models.stage import StageModel
from keysync_jax.models.stage_inputs import AudioEmbedder, interpolation_input, keyframe_input
from keysync_jax.models.table import linear, prefixed, to_flax
from keysync_jax.models.transformer import SpatialVideoTransformer
from keysync_jax.models.vae import VAE
from keysync_jax.models.video_unet import VideoUNet
from keysync_jax.verify.case_tools import apply, apply_with_blocks, from_images, from_video, params_of, to_images, to_video
from keysync_jax.verify.harness import Case, runner

Tensors = dict[str, np.ndarray]


# -- U-Net -------------------------------------------------------------------------------------------------------------------------


def _unet_params(config: UNetConfig, case: Case, prefix: str) -> dict[str, Any]:
    table = prefixed(prefix, sgm.unet_table(config))
    tree = params_of(table, case.weights, case.name, f"{prefix}.")
    for name in prefix.split("."):
        tree = tree[name]
    return tree


def _unet_inputs(case: Case, frames: int) -> dict[str, Any]:
    """Arguments of `VideoUNet` from the inputs of a U-Net case."""
    x = to_video(case.inputs["x"], frames)
    context = case.inputs["context"]
    if len(context) != len(x):  # rows per frame
        context = context.reshape(len(x), frames, *context.shape[1:])
    vector = case.inputs.get("y")
    if vector is not None and len(vector) != len(x):
        vector = vector.reshape(len(x), frames, -1)
    return {
        "x": x,
        "c_noise": case.inputs["timesteps"].reshape(-1, frames),
        "context": context,
        "audio_emb": case.inputs.get("audio_emb"),
        "vector": vector,
    }


def _unet_block(outputs: Mapping[str, jax.Array], name: str) -> jax.Array:
    """Output of a block of the reference's U-Net: that of its last layer, which is a module of ours."""
    stem = {"label_emb": "label_emb_0"}.get(name, name.replace(".", "_"))
    last = max((int(m[1]), key) for key in outputs if (m := re.fullmatch(rf"{stem}_(\d+)", key)))
    return outputs[last[1]]


def _run_unet(case: Case) -> Tensors:
    frames = case.meta["num_video_frames"]
    config = sgm.unet_config_from_sgm(case.config, frames)
    params = _unet_params(config, case, case.meta["weight_prefix"].rstrip("."))
    inputs = _unet_inputs(case, frames)
    indicator = case.inputs.get("image_only_indicator")
    sample, blocks = apply_with_blocks(VideoUNet(config), params, **inputs, image_only_indicator=indicator)
    out = {"out.sample": from_video(sample)}
    for key in case.expected:
        if key.startswith("mid."):
            block = _unet_block(blocks, key.removeprefix("mid."))
            out[key] = from_video(block) if block.ndim == 5 else np.asarray(block).reshape(-1, block.shape[-1])
    if "image_only_indicator_nonzero" in case.inputs:
        indicator = case.inputs["image_only_indicator_nonzero"]
        sample, _ = apply_with_blocks(VideoUNet(config), params, **inputs, image_only_indicator=indicator)
        out["out.sample_ioi"] = from_video(sample)
    return out


@runner("unet_keyframe")
def unet_keyframe(case: Case) -> Tensors:
    return _run_unet(case)


@runner("unet_to_time_emb")
def unet_to_time_emb(case: Case) -> Tensors:
    return _run_unet(case)


@runner("diffusers_unet")
def diffusers_unet(case: Case) -> Tensors:
    """The same weights as diffusers' SVD U-Net (with its epsilon in attention down blocks) and as the reference's."""
    frames = case.meta["num_video_frames"]
    config = sgm.unet_config_from_sgm(case.meta["sgm_config"], frames)
    key_map = case.json("key_map.json")
    weights = {key_map[key]: value for key, value in case.weights.items()}
    params = params_of(sgm.unet_table(config), weights, case.name)
    inputs = case.inputs
    x = np.moveaxis(inputs["sample"], 2, -1)
    c_noise = np.broadcast_to(inputs["timestep"], len(x))
    ids = inputs["added_time_ids"]
    vector = layers.sinusoidal_embedding(jnp.asarray(ids), case.config["addition_time_embed_dim"]).reshape(len(ids), -1)
    out = {"mid.y": np.asarray(vector)}
    theirs = UNetConfig(**{**vars(config), "reference_diffusers_eps": True})
    for suffix in ("", "_multi"):
        context = inputs[f"encoder_hidden_states{suffix}"]
        sample = apply(VideoUNet(theirs), params, x, c_noise, context, vector=vector)
        out[f"out.sample{suffix}"] = np.moveaxis(np.asarray(sample), -1, 2)
        sample = apply(VideoUNet(config), params, x, c_noise, context, vector=vector)
        out[f"out.sgm_sample{suffix}"] = from_video(sample)
        if not suffix:
            out["out.sample_eps1e5"] = np.moveaxis(np.asarray(sample), -1, 2)
    return out


# -- wrappers ----------------------------------------------------------------------------------------------------------------------


def _run_wrapper(case: Case, wrapper: str) -> tuple[StageModel, dict[str, Any], dict[str, Any]]:
    """The stage model of a wrapper case, its parameters, and the inputs that all calls share."""
    frames = case.meta["num_video_frames"]
    unet = sgm.unet_config_from_sgm(case.config["network"], frames)
    fields, latent_shape = sgm_config.wrapper_from_sgm(wrapper, case.config["wrapper"])
    config = StageConfig(unet=unet, num_frames=frames, **fields)
    latent_shape = latent_shape or case.inputs["x"].shape[2:]
    table = [e for e in sgm.stage_table(config, latent_shape) if e.torch_key.startswith("model.")]
    inputs = {
        "x": to_video(case.inputs["x"], frames),
        "c_noise": case.inputs["t"].reshape(-1, frames),
        "image_only_indicator": case.inputs.get("image_only_indicator"),
    }
    return StageModel(config, latent_shape=latent_shape), params_of(table, case.weights, case.name, "model."), inputs


def _given(case: Case, concat: np.ndarray) -> Conditions:
    return Conditions(jnp.asarray(concat), jnp.asarray(case.inputs["c.crossattn"]))


@runner("wrapper_interpolation")
def wrapper_interpolation(case: Case) -> Tensors:
    model, params, inputs = _run_wrapper(case, case.meta["reference"])
    concat = to_images(case.inputs["c.concat"])
    config = model.config
    filler = params["model"].get("learned_mask")
    if config.filler.startswith("fixed_"):
        filler = jnp.full((*inputs["x"].shape[2:4], 4), float(config.filler == "fixed_ones"), jnp.float32)
    unet_in = interpolation_input(jnp.asarray(inputs["x"]), jnp.asarray(concat), filler, config.add_indicator)
    return {
        "out.sample": from_video(apply(model, params, conditions=_given(case, concat), **inputs)),
        "mid.unet_in": from_video(unet_in),
    }


@runner("wrapper_dubbing")
def wrapper_dubbing(case: Case) -> Tensors:
    model, params, inputs = _run_wrapper(case, case.meta["reference"])
    concat = to_images(case.inputs["c.concat"])
    out = {
        "out.sample": from_video(apply(model, params, conditions=_given(case, concat), **inputs)),
        "mid.unet_in": from_video(keyframe_input(jnp.asarray(inputs["x"]), jnp.asarray(concat))),
    }
    if "c.concat_per_frame" in case.inputs:
        concat = to_video(case.inputs["c.concat_per_frame"], case.meta["num_video_frames"])
        out["out.sample_per_frame"] = from_video(apply(model, params, conditions=_given(case, concat), **inputs))
    return out


# -- blocks ------------------------------------------------------------------------------------------------------------------------


def _indicators(case: Case) -> dict[str, np.ndarray]:
    return {"y": case.inputs["image_only_indicator"], "y_ioi": case.inputs["image_only_indicator_nonzero"]}


@runner("block_spatial_video_transformer")
def block_spatial_video_transformer(case: Case) -> Tensors:
    options, frames = case.config, case.meta["timesteps"]
    if not options["use_linear"] or options["dropout"] or options["time_context_dim"] not in (None, options["context_dim"]):
        raise KeySyncError(f"{case.name}: use_linear False, dropout and an own time_context_dim are not supported")
    if options["disable_self_attn"] or options["disable_temporal_crossattention"]:
        raise KeySyncError(f"{case.name}: no network here has disable_self_attn or disable_temporal_crossattention; set both to false")
    shared = {"depth": options["depth"], "use_spatial_context": options["use_spatial_context"]}
    inner = options["n_heads"] * options["d_head"]
    table = list(sgm.transformer_table("block", options["in_channels"], options["context_dim"], inner=inner, **shared))
    params = params_of(table, {f"block.{key}": value for key, value in case.weights.items()}, case.name)["block"]
    module = SpatialVideoTransformer(
        options["n_heads"],
        options["d_head"],
        merge_strategy=options["merge_strategy"],
        merge_factor=options["merge_factor"],
        max_period=options["max_time_embed_period"],
        **shared,
    )
    x = to_video(case.inputs["x"], frames)
    context = case.inputs["context"]
    context = context.reshape(-1, frames, *context.shape[1:])
    out = {}
    for name, indicator in _indicators(case).items():
        y, blocks = apply_with_blocks(module, params, x, context, indicator)
        out[f"out.{name}"] = from_video(y)
        if name == "y":
            for depth in range(options["depth"]):
                tokens = np.asarray(blocks[f"transformer_blocks_{depth}"])
                out[f"mid.spatial.{depth}"] = tokens.reshape(-1, *tokens.shape[2:])
                tokens = np.asarray(blocks[f"time_stack_{depth}"]).swapaxes(1, 2)  # ours is [B, S, T, C]
                out[f"mid.temporal.{depth}"] = tokens.reshape(-1, *tokens.shape[2:])
    return out


@runner("block_video_resblock")
def block_video_resblock(case: Case) -> Tensors:
    frames, out = case.meta["num_video_frames"], {}
    for key, options in case.config.items():
        features = options["out_channels"] or options["channels"]
        kernel = sgm_config.temporal_kernel(case.name, options["video_kernel_size"])[0]
        table = list(sgm.resblock_table(key, options["channels"], features, options["emb_channels"], kernel))
        params = params_of(table, case.weights, case.name, f"{key}.")[key]
        module = VideoResBlock(features, kernel, options["merge_strategy"], options["merge_factor"])
        x = to_video(case.inputs[f"{key}.x"], frames)
        emb = case.inputs[f"{key}.emb"].reshape(-1, frames, options["emb_channels"])
        for name, indicator in _indicators(case).items():
            out[f"out.{key}.{name}"] = from_video(apply(module, params, x, emb, indicator))
    return out


@runner("block_alpha_blender")
def block_alpha_blender(case: Case) -> Tensors:
    out = {}
    for strategy in case.meta["strategies"]:
        for pattern in case.meta["patterns"]:
            for kind, name in (("zero", "ioi_zero"), ("nonzero", "ioi")):
                indicator = case.inputs[name]
                spatial, temporal = (case.inputs[f"x_{branch}_{pattern}"] for branch in ("spatial", "temporal"))
                if pattern == "5d":  # (b, c, t, h, w)
                    spatial, temporal = to_images(spatial), to_images(temporal)
                else:  # ((b t), s, c)
                    spatial, temporal = (x.reshape(*indicator.shape, *x.shape[1:]) for x in (spatial, temporal))
                y = apply(layers.AlphaBlender(strategy), dict(case.weights), spatial, temporal, indicator)
                y = from_images(y) if pattern == "5d" else np.asarray(y).reshape(-1, *y.shape[2:])
                out[f"out.{strategy}.{pattern}.{kind}"] = y
    return out


# -- autoencoders ------------------------------------------------------------------------------------------------------------------


def _moments(model: VAE, params: Mapping[str, Any], image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moments (N, 2C, h, w) and mode (N, C, h, w) of images (N, 3, H, W)."""
    images = to_images(image)
    moments = apply(model, params, images, method="raw_moments")
    mean, _ = apply(model, params, images, method="encode_moments")
    return from_images(moments), from_images(mean)


def _decode(model: VAE, params: Mapping[str, Any], z: np.ndarray, frames: int) -> np.ndarray:
    return from_video(apply(model, params, to_video(z, frames), method="decode"))


@runner("vae_autoencoding_engine")
def vae_autoencoding_engine(case: Case) -> Tensors:
    config = sgm.vae_config_from_sgm(case.config)
    prefix = case.meta["weight_prefix"]
    params = params_of(sgm.vae_table(config, prefix.rstrip(".")), case.weights, case.name, prefix)
    model, frames, z = VAE(config), case.meta["timesteps"], case.inputs["z"]
    out = {}
    for suffix in ("", "_odd"):
        out[f"out.moments{suffix}"], out[f"out.mode{suffix}"] = _moments(model, params, case.inputs[f"image{suffix}"])
    # The dev case decodes its two clips as one of 2T frames; another set may hold another number of clips.
    clips = re.search(r"dec_all = decode\(z, timesteps=(\d+)T\)", case.meta.get("call", ""))
    every = len(z) if clips is None else int(clips[1]) * frames
    for suffix, together in (("T", frames), ("1", 1), ("all", every)):
        out[f"out.dec_{suffix}"] = _decode(model, params, z, together)
    return out


@runner("vae_kl_mode_only")
def vae_kl_mode_only(case: Case) -> Tensors:
    config = sgm.vae_config_from_sgm(case.config)
    prefix = case.meta["weight_prefix"]
    params = params_of(sgm.vae_table(config, prefix.rstrip(".")), case.weights, case.name, prefix)
    model = VAE(config)
    return {"out.mode": _moments(model, params, case.inputs["image"])[1], "out.dec": _decode(model, params, case.inputs["z"], 1)}


@runner("diffusers_vae")
def diffusers_vae(case: Case) -> Tensors:
    """diffusers' temporal autoencoder, which the latents of the reference were made with; also through the reference's classes."""
    config = sgm_config.autoencoder_config(
        {**case.meta["sgm_ddconfig"], "video_kernel_size": (3, 1, 1)}, decoder="temporal", quant_conv=True
    )
    table = sgm.vae_table(config, prefix="")
    shapes, key_map = {e.torch_key: e.torch_shape for e in table}, case.json("key_map.json")
    # The middle attention is made of linear layers there and of 1x1 convolutions here.
    weights = {key_map[key]: value.reshape(shapes[key_map[key]]) for key, value in case.weights.items()}
    params = params_of(table, weights, case.name)
    model, frames, z = VAE(config), case.meta["num_frames"], case.inputs["z"]
    out = {}
    for suffix in ("", "_odd"):
        out[f"out.moments{suffix}"], out[f"out.mode{suffix}"] = _moments(model, params, case.inputs[f"image{suffix}"])
    out["out.sgm_mode"] = out["out.mode"]
    out["out.dec"] = out["out.sgm_dec"] = _decode(model, params, z, frames)
    out["out.dec_1"] = _decode(model, params, z, 1)
    return out


# -- conditioner -------------------------------------------------------------------------------------------------------------------


def _embed_audio(arguments: Mapping[str, Any], weights: Mapping[str, np.ndarray], key: str, audio: np.ndarray) -> np.ndarray:
    """Runs the audio embedder whose projection is stored under `key`."""
    options = sgm_config.audio_embedder_arguments(arguments)
    params = {}
    if options["features"] is not None:
        width = options["audio_dim"] * (2 if options["merge"] == "concat" else 1)
        weights = {"linear." + name: weights[f"{key}.linear.{name}"] for name in ("weight", "bias")}
        params = to_flax(list(linear("linear", width, options["features"])), weights, key)
    return np.asarray(apply(AudioEmbedder(options["features"], options["merge"]), params, audio))


@runner("audio_embedder")
def audio_embedder(case: Case) -> Tensors:
    return {f"out.{name}": _embed_audio(options, case.weights, name, case.inputs["audio"]) for name, options in case.config.items()}


def _latent_condition(
    arguments: Mapping[str, Any], weights: Mapping[str, np.ndarray], key: str, frames: np.ndarray, keep: np.ndarray | None
) -> np.ndarray:
    """`concat` from condition frames (B, C, [F,] H, W), latents or pixels, with the embedder's copies and dropout, torch layout."""
    known = {"disable_encoder_autocast", "n_cond_frames", "n_copies", "is_ae", "load_encoder", "encoder_config", "scale_factor"}
    if unknown := set(arguments) - known:
        raise KeySyncError(f"{key}: argument {', '.join(sorted(unknown))} is not supported")
    frames = np.moveaxis(frames, 1, -1)
    frames = frames[:, None] if frames.ndim == 4 else frames  # [B, F, H, W, C]
    if frames.shape[-1] == 4:
        latents = raw_latents(frames, StageConfig.latent_scale)
    else:
        config = sgm.vae_config_from_sgm(arguments["encoder_config"]["params"])
        params = params_of(sgm.vae_table(config, f"{key}.encoder"), weights, key, f"{key}.encoder.")
        mean, _ = apply(VAE(config), params, frames.reshape(-1, *frames.shape[2:]), method="encode_moments")
        latents = np.asarray(mean).reshape(*frames.shape[:2], *mean.shape[1:]) * arguments.get("scale_factor", 1.0)
    copies = repeat_frames(join_frames(latents), arguments["n_copies"])
    if keep is not None:  # one draw per copy
        copies = zero_where_dropped(copies, jnp.asarray(keep.reshape(copies.shape[:2])))
    return from_video(copies)


def _condition(
    embedders: list[Mapping[str, Any]],
    weights: Mapping[str, np.ndarray],
    prefix: str,
    batch: Mapping[str, np.ndarray],
    zero: tuple[str, ...] = (),
    keep: Mapping[str, np.ndarray] | None = None,
) -> Tensors:
    """What the reference's conditioner makes of a batch: `concat`, `crossattn`, and what passes through.

    `zero` names the inputs whose embedding is replaced by zeros, `keep` the draws of the dropout.
    """
    out: Tensors = {}
    for i, embedder in enumerate(embedders):
        key, name = f"{prefix}.conditioner.embedders.{i}", embedder["input_key"]
        arguments, value = embedder.get("params", {}), batch[embedder["input_key"]]
        draw = (keep or {}).get(name)
        kind = embedder["target"].rsplit(".", 1)[-1]
        if kind == "VideoPredictionEmbedderWithEncoder":
            target, embedding = "concat", _latent_condition(arguments, weights, key, value, draw)
        elif kind == "WhisperAudioEmbedder":
            target, embedding = arguments.get("cond_type") or "audio_emb", _embed_audio(arguments, weights, key, value)
            if draw is not None:
                embedding = np.asarray(zero_where_dropped(jnp.asarray(embedding), jnp.asarray(draw)))
        elif kind == "ConcatTimestepEmbedderND":
            target, embedding = "vector", np.asarray(layers.sinusoidal_embedding(jnp.asarray(value).ravel(), arguments["outdim"]))
            embedding = np.concatenate([out[target], embedding], axis=-1) if target in out else embedding
        elif kind == "IdentityEncoder":
            target, embedding = arguments["cond_type"], value
        else:
            raise KeySyncError(f"embedder {embedder['target']} is not supported")
        out[target] = np.zeros_like(embedding) if name in zero else embedding
    return out


@runner("keyface_conditioner")
@runner("conditioner")
def conditioner(case: Case) -> Tensors:
    zero = tuple(case.meta["force_uc_zero_embeddings"])
    out = {}

    def add(name: str, values: Tensors) -> None:
        out.update({f"out.{name}.{key}": value for key, value in values.items()})

    def batch_of(name: str) -> Tensors:
        return {key.removeprefix(f"{name}."): value for key, value in case.inputs.items() if key.startswith(f"{name}.")}

    for stage in ("keyframe", "interpolation"):
        batch, embedders = batch_of(stage), case.config[stage]
        add(f"{stage}.c", _condition(embedders, case.weights, stage, batch))
        add(f"{stage}.uc", _condition(embedders, case.weights, stage, batch, zero))
        add(f"{stage}.uc_nozero", _condition(embedders, case.weights, stage, batch))
        if "cond_frames_pixels" in batch:
            pixels = {**batch, "cond_frames": batch["cond_frames_pixels"]}
            add(f"{stage}_pixels.c", _condition(embedders, case.weights, stage, pixels))
    batch = batch_of("train")
    keep = {"cond_frames": batch["bernoulli_cond_frames"], "audio_emb": batch["bernoulli_audio"]}
    embedders = case.config.get("train", case.config["keyframe"])
    add("train", _condition(embedders, case.weights, "keyframe", batch, keep=keep))
    return out
