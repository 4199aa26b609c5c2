"""Parity runner of KeyFace's interpolation stage: sampling with two networks, whose ends stay as they were sampled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import schedules
from keysync_jax.diffusion.conditions import Conditions, without
from keysync_jax.diffusion.guidance import MAIN, WEAK, AutoGuidance
from keysync_jax.diffusion.inpainting import denoise
from keysync_jax.verify import reference_sampling
from keysync_jax.verify.case_tools import from_images, from_video, params_of, to_images, to_video
from keysync_jax.verify.diffusion_cases import trajectory_tensors
from keysync_jax.verify.harness import Case, runner
from keysync_jax.verify.stage_cases import Engine, build_engine, decode_frames, merged_video

_BAD = "bad."


@runner("keyface_sampler_interpolation")
def run_sampler_interpolation(case: Case) -> dict[str, np.ndarray]:
    inputs, num_frames = case.inputs, case.meta["num_frames"]
    if case.meta["overlap"] != 1:
        raise KeySyncError(f"segments overlap by one frame, not by {case.meta['overlap']}")
    engine = build_engine(case, num_frames)
    keyframes = np.asarray(to_images(inputs["samples_z"]))[~np.array(case.meta["to_remove"])]
    endpoints = np.stack([keyframes[:-1], keyframes[1:]], axis=1)
    conditions = engine.conditions(engine.params, {"endpoints": endpoints, "audio": inputs["audio_interpolation"]})
    noise = jnp.asarray(to_video(inputs["noise"], num_frames))
    latents, tensors = _sample(case, engine, noise, conditions)
    flat = latents.reshape(-1, *latents.shape[2:])
    images = decode_frames(jax.jit(engine.decode), flat / np.float32(engine.scale), case.meta["decoding_t"])
    for name, given in (("c", conditions), ("uc", without(conditions, "audio", "identity"))):
        tensors |= {f"{name}.concat": from_images(given.concat), f"{name}.crossattn": np.asarray(given.crossattn)}
    return {
        "out.samples_z": from_images(flat),
        "out.samples_x": from_images(images),
        "out.vid": from_images(merged_video(images.reshape(*latents.shape[:2], *images.shape[1:]))),
    } | {f"mid.{name}": value for name, value in tensors.items()}


def _sample(case: Case, engine: Engine, noise: jax.Array, conditions: Conditions) -> tuple[np.ndarray, dict[str, Any]]:
    """Latents `[W, T, h, w, 4]`, and every state on the way, with what both networks say in the first step."""
    entries = [entry for entry in engine.entries if entry.torch_key.startswith("model.")]
    weak = {key.removeprefix(_BAD): value for key, value in case.weights.items() if key.startswith(_BAD)}
    # The weak network reads the audio through the good one's projection.
    bad = params_of(entries, weak, f"{case.name} bad network", "model.") | {"conditioner": engine.params["conditioner"]}
    settings = engine.sampling
    guider = settings["guider_config"]
    if not guider["target"].endswith(".KarrasGuider"):
        raise KeySyncError(f"guider {guider['target']} is none of two networks; KarrasGuider is")
    rule = AutoGuidance(guider["params"]["scale"])
    sigmas = schedules.ays_sigmas(settings["num_steps"], case.meta["strength"])
    # Compiled a second time for it: only where the case looks.
    wanted = {ours: name for ours, name in (("first.good", MAIN), ("first.bad", WEAK)) if f"mid.{ours}" in case.expected}

    @jax.jit
    def run(params, noise, conditions):
        networks = {name: reference_sampling.in_chunks(engine.network(own), case.meta["chunk_size"]) for name, own in params.items()}
        result, trajectory = reference_sampling.sample(networks, noise, sigmas, conditions, rule)
        if not wanted:
            return result, trajectory, {}
        first = trajectory.x[0], jnp.full(len(noise), sigmas[0], jnp.float32), conditions
        return result, trajectory, {ours: denoise(networks[name], *first) for ours, name in wanted.items()}

    result, trajectory, first = run({MAIN: engine.params, WEAK: bad}, noise, conditions)
    return np.asarray(result), trajectory_tensors(trajectory, sigmas) | {name: from_video(value) for name, value in first.items()}
