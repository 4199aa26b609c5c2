"""Parity runners of KeyFace's diffusion: wrappers with an emotion vector, guidance with a second network, denoisers without a mask."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import StageConfig
from keysync_jax.converters import sgm, sgm_config
from keysync_jax.diffusion import guidance, inpainting
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.models.stage import StageModel
from keysync_jax.models.stage_inputs import interpolation_input, keyframe_input
from keysync_jax.verify import reference_sampling
from keysync_jax.verify.case_tools import apply, from_images, from_video, params_of, to_images, to_video
from keysync_jax.verify.harness import Case, runner

Tensors = dict[str, np.ndarray]


# -- wrappers ----------------------------------------------------------------------------------------------------------------------


def _stage(case: Case, network: str, wrapper: str) -> StageConfig:
    """The stage of a wrapper case around one of its networks."""
    frames = case.meta["num_video_frames"]
    unet = sgm.unet_config_from_sgm(case.config[network], frames)
    options = {"im_size": case.config["im_size"]} if "im_size" in case.config else {}
    fields, _ = sgm_config.wrapper_from_sgm(wrapper, options)
    return StageConfig(unet=unet, num_frames=frames, **fields)


def _run(case: Case, config: StageConfig, weights: Tensors, **given: Any) -> np.ndarray:
    """The wrapper's output for the case's input under conditions."""
    frames, shape = case.meta["num_video_frames"], case.inputs["x"].shape[2:]
    entries = [e for e in sgm.stage_table(config, shape) if e.torch_key.startswith("model.")]
    concat = jnp.asarray(to_images(case.inputs["c.concat"]))
    conditions = Conditions(concat, jnp.asarray(case.inputs["c.crossattn"]), **given)
    params = params_of(entries, weights, case.name, "model.")
    inputs = {"x": to_video(case.inputs["x"], frames), "c_noise": case.inputs["t"].reshape(-1, frames)}
    indicator = case.inputs.get("image_only_indicator")
    model = StageModel(config, latent_shape=shape)
    return from_video(apply(model, params, conditions=conditions, image_only_indicator=indicator, **inputs))


def _label_in(case: Case, vector: np.ndarray | None) -> np.ndarray:
    """What the label path reads of each frame: the emotion, then the audio token."""
    tokens = case.inputs["c.crossattn"].reshape(-1, case.inputs["c.crossattn"].shape[-1])
    return tokens if vector is None else np.concatenate([vector, tokens], axis=-1)


def _per_frame(case: Case) -> jax.Array:
    vector = case.inputs["c.vector"]
    return jnp.asarray(vector.reshape(-1, case.meta["num_video_frames"], vector.shape[-1]))


@runner("keyface_wrapper_keyframe")
def wrapper_keyframe(case: Case) -> Tensors:
    config, frames = _stage(case, "network", "OpenAIWrapper"), case.meta["num_video_frames"]
    x, concat = to_video(case.inputs["x"], frames), to_images(case.inputs["c.concat"])
    return {
        "out.sample": _run(case, config, case.weights, vector=_per_frame(case)),
        "out.sample_static": _run(case, config, case.weights, vector=jnp.asarray(case.inputs["c.vector_static"])),
        "mid.unet_in": from_video(keyframe_input(jnp.asarray(x), jnp.asarray(concat))),
        "mid.label_in": _label_in(case, case.inputs["c.vector"]),
    }


@runner("keyface_wrapper_interpolation")
def wrapper_interpolation(case: Case) -> Tensors:
    config, frames = _stage(case, "network", "InterpolationWrapper"), case.meta["num_video_frames"]
    good = {key: value for key, value in case.weights.items() if key.startswith("model.")}
    bad = _under(case, "bad.")
    x, concat = (jnp.asarray(value) for value in (to_video(case.inputs["x"], frames), to_images(case.inputs["c.concat"])))
    filler = jnp.asarray(to_images(good["model.learned_mask"][None])[0])
    out = {
        "out.sample": _run(case, config, good),
        "out.sample_bad": _run(case, config, bad),
        "mid.unet_in": from_video(interpolation_input(x, concat, filler, config.add_indicator)),
        "mid.label_in": _label_in(case, None),
    }
    if "network_emotion" in case.config:
        emotional = _stage(case, "network_emotion", "InterpolationWrapper")
        out["out.sample_emotion"] = _run(case, emotional, good | _under(case, "emotion."), vector=_per_frame(case))
    return out


def _under(case: Case, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in case.weights.items() if key.startswith(prefix)}


# -- closed-form networks ----------------------------------------------------------------------------------------------------------


def _toy(a: float, x: jax.Array, c_noise: jax.Array, conditions: Conditions) -> jax.Array:
    """The network that the cases describe in `toy_network`."""
    identity = conditions.concat[:, None, :, :, :4]
    audio = conditions.crossattn.mean(-1)[:, :, None, None, None]
    noise = c_noise.reshape(c_noise.shape + (1,) * (x.ndim - c_noise.ndim))
    return 0.5 * jnp.tanh(a * x) + 0.1 * a * identity + 0.3 * audio + 0.05 * jnp.cos(noise) * x


@runner("keyface_denoiser")
def denoiser(case: Case) -> Tensors:
    frames, meta = case.meta["num_frames"], case.meta
    networks = {guidance.MAIN: functools.partial(_toy, meta["good_a"]), guidance.WEAK: functools.partial(_toy, meta["bad_a"])}
    conditions = Conditions(*(jnp.asarray(value) for value in (to_images(case.inputs["c.concat"]), case.inputs["c.crossattn"])))
    x, sigma = jnp.asarray(to_video(case.inputs["x4d"], frames)), jnp.asarray(case.inputs["sigma_bt"].reshape(-1, frames))
    rule = guidance.AutoGuidance()

    def both(size: int | None = None) -> jax.Array:
        """Each branch by its network, the weak one first; in the reference chunks run through both halves of the batch."""
        chosen = {name: reference_sampling.in_chunks(network, size) if size else network for name, network in networks.items()}
        return jnp.concatenate([inpainting.denoise(chosen[branch.network], x, sigma, conditions) for branch in rule.branches])

    together = both()
    results = {
        "train": inpainting.denoise(
            networks[guidance.MAIN], jnp.asarray(to_images(case.inputs["x5d"])), jnp.asarray(case.inputs["sigma_b"]), conditions
        ),
        "sample": inpainting.denoise(networks[guidance.MAIN], x, sigma, conditions),
        "auto": together,
        "auto_chunked": both(meta["chunk_size"] // frames),
        "auto_guidance": together,
        "guided": rule.combine(together, ())[0],
    }
    return {f"out.{name}": from_video(value) for name, value in results.items()}


@runner("keyface_guiders")
def guiders(case: Case) -> Tensors:
    inputs, config, frames = case.inputs, case.config, case.meta["num_frames"]
    vector = jnp.asarray(inputs["c.vector"].reshape(-1, frames, inputs["c.vector"].shape[-1]))
    conditions = Conditions(jnp.asarray(to_images(inputs["c.concat"])), jnp.asarray(inputs["c.crossattn"]), vector=vector)
    x, sigma = jnp.asarray(to_video(inputs["x"], frames)), jnp.asarray(inputs["sigma"].reshape(-1, frames))
    rules = {
        "karras": guidance.AutoGuidance(config["karras_scale"]),
        "audioref": guidance.AudioIdentityGuidance(config["audio_ratio"], config["ref_ratio"]),
        "cfg": guidance.ClassifierFreeGuidance(config["cfg_scale"]),
    }
    out: Tensors = {}
    for name, rule in rules.items():
        # One network after the other, those of a name in one batch: side by side they are the reference's batch.
        stacked_x, stacked_sigma, stacked = guidance.prepare(rule.branches, x, sigma, conditions)
        out |= {
            f"out.{name}.prep.x": from_video(stacked_x),
            f"out.{name}.prep.sigma": np.ravel(stacked_sigma),
            f"out.{name}.prep.c.crossattn": np.asarray(stacked.crossattn),
            f"out.{name}.prep.c.concat": from_images(stacked.concat),
        }
        if stacked.vector is not None:
            out[f"out.{name}.prep.c.vector"] = np.asarray(stacked.vector).reshape(-1, vector.shape[-1])
    predictions = {name: jnp.asarray(to_video(inputs[name], frames)) for name in ("pred2", "pred3")}
    results = {
        "karras": rules["karras"].combine(predictions["pred2"], ()),
        "karras_scaled": guidance.AutoGuidance(_scale(case, "karras_scaled")).combine(predictions["pred2"], ()),
        "audioref": rules["audioref"].combine(predictions["pred3"], ()),
        "cfg": rules["cfg"].combine(predictions["pred2"], ()),
    }
    return out | {f"out.{name}.y": from_video(value) for name, (value, _) in results.items()}


def _scale(case: Case, name: str) -> float:
    """The scale that a result was made with, as the case's `call` says in words."""
    words = case.meta["call"].split(f"out.{name}.y", 1)[1]
    return float(words.split("set_scale(", 1)[1].split(")", 1)[0])
