"""Parity runners of the diffusion mathematics on closed-form networks: schedules, denoiser, guidance, sampler."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import guidance, inpainting, preconditioning, schedules, sigma_sampling
from keysync_jax.diffusion.conditions import Conditions, known, paste, without
from keysync_jax.verify import reference_sampling, reference_scalings
from keysync_jax.verify.case_tools import from_images, from_video, to_images, to_video
from keysync_jax.verify.harness import Case, runner

# Names of the reference's classes, as cases and configurations give them.
SCALINGS = {
    "VScalingWithEDMcNoise": preconditioning.v_scaling_edm_noise,
    "VScaling": reference_scalings.v_scaling,
    "EDMScaling": reference_scalings.edm_scaling,
    "EpsScaling": reference_scalings.eps_scaling,
}
WEIGHTINGS = {
    "VWeighting": preconditioning.v_weighting,
    "EDMWeighting": reference_scalings.edm_weighting,
    "EpsWeighting": reference_scalings.eps_weighting,
    "UnitWeighting": reference_scalings.unit_weighting,
}


def require(config: dict[str, Any], name: str) -> None:
    """Refuses a reference configuration (`target`, `params`) that names another class than ours, or gives it parameters."""
    if config["target"].rsplit(".", 1)[-1] != name or config.get("params"):
        raise KeySyncError(f"{config} has no counterpart here, only {name} without parameters")


def guidance_from(config: dict[str, Any]) -> guidance.Guidance:
    """The guidance that a reference `guider_config` describes."""
    name, params = config["target"].rsplit(".", 1)[-1], dict(config.get("params", {}))
    match name:
        case "AudioRefMultiCondGuider":
            scales = {"audio": params.pop("audio_ratio", 5.0), "identity": params.pop("ref_ratio", 3.0)}
            if params.pop("use_normalized", False):
                return guidance.AdaptiveProjectedGuidance(**scales, **params)
            return guidance.AudioIdentityGuidance(**scales)
        case "VanillaCFG":
            return guidance.ClassifierFreeGuidance(params["scale"])
        case "IdentityGuider":
            return guidance.NoGuidance()
    raise KeySyncError(f"guider {config['target']} has no counterpart here")


def toy_network(x: jax.Array, c_noise: jax.Array, conditions: Conditions) -> jax.Array:
    """The closed-form network that the cases describe in `toy_network`."""
    identity = conditions.concat[:, None, :, :, :4]
    audio = conditions.crossattn.mean(-1)[:, :, None, None, None]
    noise = c_noise.reshape(c_noise.shape + (1,) * (x.ndim - c_noise.ndim))
    return 0.5 * jnp.tanh(x) + 0.1 * identity + 0.3 * audio + 0.05 * jnp.cos(noise) * x


@runner("schedules")
def run_schedules(case: Case) -> dict[str, np.ndarray]:
    out: dict[str, Any] = {}
    for n in case.meta["n_steps"]:
        if str(n) in case.meta.get("ays_errors", {}):
            case.check(f"ays.{n} is refused", _refuses(schedules.ays_sigmas, n), "a schedule came back")
            continue
        out[f"out.ays.{n}"] = schedules.ays_sigmas(n)
        for strength in case.meta["strengths"]:
            sigmas = schedules.ays_sigmas(n, strength)
            out[f"out.strength.{n}.{strength}.sigmas"] = sigmas
            out[f"out.strength.{n}.{strength}.x_scale"] = np.sqrt(1 + sigmas[:1] ** 2)
    sigma = jnp.asarray(case.inputs["sigma_grid"])
    for name, scaling in SCALINGS.items():
        out |= {f"out.{name}.{field}": value for field, value in scaling(sigma)._asdict().items()}
    for name, weighting in WEIGHTINGS.items():
        out[f"out.weight.{name.removesuffix('Weighting')}"] = weighting(sigma)
    for i, params in enumerate(case.meta["edm_sampling"]):
        out[f"out.edm_sampling.{i}"] = sigma_sampling.sigmas_from_normals(jnp.asarray(case.inputs["normals"]), **params)
    return out


def _refuses(function, *args) -> bool:
    try:
        function(*args)
    except KeySyncError:
        return True
    return False


@runner("denoiser_dub")
def run_denoiser_dub(case: Case) -> dict[str, np.ndarray]:
    inputs, num_frames = case.inputs, case.meta["num_frames"]
    conditions = _conditions(inputs, "")
    whole = _video(inputs["x4d"], num_frames), jnp.asarray(inputs["sigma_bt"].reshape(-1, num_frames)), conditions
    results = {
        "train": inpainting.denoise(toy_network, _images(inputs["x5d"]), jnp.asarray(inputs["sigma_b"]), conditions),
        "sample": inpainting.denoise(toy_network, *whole),
        # The known region pasted into the output alone.
        "sample_nomaskinput": paste(inpainting.denoise(toy_network, *whole[:2], conditions._replace(gt=None, masks=None)), conditions),
        "sample_chunked": inpainting.denoise(reference_sampling.in_chunks(toy_network, case.meta["chunk_size"] // num_frames), *whole),
    }
    return {f"out.{name}": from_video(x) for name, x in results.items()}


@runner("guiders")
def run_guiders(case: Case) -> dict[str, np.ndarray]:
    inputs, config = case.inputs, case.config
    num_frames = inputs["c.gt"].shape[2]
    conditions, nothing = (_conditions(inputs, prefix) for prefix in ("c.", "uc."))
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, nothing, without(conditions, "audio", "identity")))):
        raise KeySyncError(f"{case.folder}: the unconditional branch (uc.*) is not the conditional one with zero audio and identity")
    x = _video(inputs["x"], num_frames)
    sigma = jnp.asarray(inputs["sigma"].reshape(-1, num_frames))
    scales = {"audio": config["audio_ratio"], "identity": config["ref_ratio"]}
    cfg = guidance.ClassifierFreeGuidance(config["cfg_scale"])
    audio_identity = guidance.AudioIdentityGuidance(**scales)
    projected = guidance.AdaptiveProjectedGuidance(
        **scales, momentum=config["momentum"], eta=config["eta"], norm_threshold=config["norm_threshold"]
    )
    out: dict[str, Any] = {}
    for name, rule in (("cfg", cfg), ("audioref", audio_identity)):
        stacked_x, stacked_sigma, stacked = guidance.prepare(rule.branches, x, sigma, conditions)
        out |= {
            f"out.{name}.prep.x": from_video(stacked_x),
            f"out.{name}.prep.sigma": np.ravel(stacked_sigma),
            f"out.{name}.prep.c.crossattn": stacked.crossattn,
            f"out.{name}.prep.c.concat": from_images(stacked.concat),
            f"out.{name}.prep.c.gt": from_images(known(stacked)[0]),
            f"out.{name}.prep.c.masks": from_images(known(stacked)[1]),
        }
    rescaled = re.search(r"set_scale\(\[([\d.]+), *([\d.]+)\]\)", case.meta["call"])
    if rescaled is None:
        raise KeySyncError(f"{case.folder}: case.json does not say which scales audioref_scaled has")
    predictions = {name: _video(inputs[name], num_frames) for name in ("pred2", "pred3", "pred3_b")}
    first, state = projected.combine(predictions["pred3"], projected.initial_state(x))
    results = {
        "cfg.y": cfg.combine(predictions["pred2"], ())[0],
        "audioref.y": audio_identity.combine(predictions["pred3"], ())[0],
        "audioref_scaled.y": guidance.AudioIdentityGuidance(float(rescaled[1]), float(rescaled[2])).combine(predictions["pred3"], ())[0],
        "apg.y": first,
        "apg.y2": projected.combine(predictions["pred3_b"], state)[0],
    }
    return out | {f"out.{name}": from_video(y) for name, y in results.items()}


@runner("sampler_toy")
def run_sampler_toy(case: Case) -> dict[str, np.ndarray]:
    conditions = _conditions(case.inputs, "c.")
    noise = _video(case.inputs["noise"], conditions.crossattn.shape[1])
    out: dict[str, Any] = {}
    for name, run in case.meta["runs"].items():
        sigmas = schedules.ays_sigmas(run["num_steps"], run["strength"])
        result, trajectory = reference_sampling.sample(toy_network, noise, sigmas, conditions, guidance_from(run["guider"]))
        out[f"out.{name}"] = from_video(result)
        out |= {f"mid.{name}.{key}": value for key, value in trajectory_tensors(trajectory, sigmas).items()}
    return out


def trajectory_tensors(trajectory: reference_sampling.Trajectory, sigmas: np.ndarray) -> dict[str, np.ndarray]:
    """The states in the layout of the stored Euler states: `(step, (b t), c, h, w)` and the level before and after each step."""
    return {
        "x": np.stack([from_video(x) for x in trajectory.x]),
        "denoised": np.stack([from_video(x) for x in trajectory.denoised]),
        "sigmas": np.stack([sigmas[:-1], sigmas[1:]], axis=1),
    }


def _images(x: np.ndarray) -> jax.Array:
    return jnp.asarray(to_images(x))


def _video(x: np.ndarray, frames: int) -> jax.Array:
    return jnp.asarray(to_video(x, frames))


def _conditions(inputs: dict[str, np.ndarray], prefix: str) -> Conditions:
    """Conditions from stored tensors; gt and masks may be stored without the prefix."""
    gt, masks = (_images(inputs[name if f"{prefix}{name}" not in inputs else f"{prefix}{name}"]) for name in ("gt", "masks"))
    return Conditions(_images(inputs[f"{prefix}concat"]), jnp.asarray(inputs[f"{prefix}crossattn"]), gt, masks)
