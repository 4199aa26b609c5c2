"""Parity runners of whole stages: sampling through the network and the decoder, and the training loss with its gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.converters import sgm
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import schedules, sigma_sampling
from keysync_jax.diffusion.conditions import Conditions, drop, without
from keysync_jax.diffusion.inpainting import Network, denoise
from keysync_jax.diffusion.loss import Decoder, LossConfig, Losses, PixelTargets, noised, prediction_loss
from keysync_jax.diffusion.preconditioning import v_weighting
from keysync_jax.models import conditioning, table
from keysync_jax.models.stage import StageModel
from keysync_jax.models.vae import VAE
from keysync_jax.verify.case_tools import from_images, from_video, params_of, to_images, to_video
from keysync_jax.verify.diffusion_cases import guidance_from, require, trajectory_tensors
from keysync_jax.verify.harness import DEFAULT_RELATIVE_TOLERANCE, Case, runner
from keysync_jax.verify.reference_sampling import in_chunks
from keysync_jax.verify.reference_sampling import sample as sample_states

# The reference's names of the conditions that can be left out, and ours.
_CONDITIONS = {"cond_frames": "identity", "audio_emb": "audio"}
# Of a stage that knows a part of the source: its latents and the mask.
_KNOWN = {"known": "gt_list", "mask": "masks_list"}
# With `cut_audio` the reference keeps this many features of the interpolation stage's audio.
_CUT_AUDIO = 768
# Smallest tolerance of the stored gradients; the norms come without tolerances of their own.
_GRADIENT_TOLERANCE = 1e-7


class Engine(NamedTuple):
    """A reference `DiffusionEngine` with a case's weights, rebuilt from our parts."""

    params: dict[str, Any]  # of `model`
    model: StageModel
    entries: table.Table  # names of `params`
    decode_params: dict[str, Any]
    vae: VAE
    config: dict[str, Any]  # the reference's engine configuration
    scale: float

    def conditions(self, params: dict[str, Any], batch: dict[str, Any]) -> Conditions:
        """Of a batch by the names of `conditioning.batch_shapes`."""
        return conditioning.conditions(self.model, {"params": params}, batch)

    def network(self, params: dict[str, Any]) -> Network:
        return functools.partial(self.model.apply, {"params": params})

    def decode(self, z: jax.Array) -> jax.Array:
        """Raw latents `[B, T, h, w, 4]` to images."""
        return self.vae.apply({"params": self.decode_params}, z, method="decode")

    @property
    def sampling(self) -> dict[str, Any]:
        return self.config["sampler_config"]["params"]


def build_engine(case: Case, num_frames: int) -> Engine:
    """Our models with the configuration and weights of a case."""
    config = case.config["engine"]
    stage, latent_shape = sgm.stage_config_from_sgm(config, num_frames)
    entries = sgm.stage_table(stage, latent_shape)
    require(config["denoiser_config"]["params"]["scaling_config"], "VScalingWithEDMcNoise")
    vae = sgm.vae_config_from_sgm(config["first_stage_config"]["params"])
    decoder = sgm.vae_table(vae, parts=("decoder",))
    return Engine(
        params=params_of(entries, case.weights, case.name, "model."),
        model=StageModel(stage, latent_shape=latent_shape),
        entries=entries,
        decode_params=params_of(decoder, case.weights, case.name, "first_stage_model.decoder."),
        vae=VAE(vae),
        config=config,
        scale=config["scale_factor"],
    )


@runner("keyface_sampler_keyframes")
@runner("sampler_keyframes")
def run_sampler_keyframes(case: Case) -> dict[str, np.ndarray]:
    inputs, num_frames = case.inputs, case.meta["num_frames"]
    engine = build_engine(case, num_frames)
    identity = to_images(inputs["embeddings"])
    sample = compiled_sampler(case, engine)
    out: dict[str, Any] = {}
    latents = []
    for i, audio in enumerate(inputs["audio_list"]):
        batch = {"identity": identity, "audio": audio[None]}
        batch |= {ours: to_images(inputs[name][i])[None] for ours, name in _KNOWN.items() if name in inputs}
        batch |= {name: inputs[f"{name}_list"][i][None] for name in conditioning.EMOTION if f"{name}_list" in inputs}
        conditions = engine.conditions(engine.params, batch)
        result, tensors = sample(engine.params, to_images(inputs["noise"][i])[None], conditions)
        latents.append(np.asarray(result[0]))
        out |= {f"mid.w{i}.{name}": value for name, value in tensors.items()}
    out["out.samples_z"] = from_video(np.stack(latents))
    decode_jitted = jax.jit(engine.decode)
    raw = [window / np.float32(engine.scale) for window in latents]
    images = [decode_frames(decode_jitted, window, case.meta["decoding_t"]) for window in raw]
    out["out.samples_x"] = from_images(np.concatenate(images))
    out["out.samples_x_all"] = from_images(decode_frames(decode_jitted, raw[-1], None))
    return out


@runner("sampler_interpolation")
def run_sampler_interpolation(case: Case) -> dict[str, np.ndarray]:
    inputs, num_frames = case.inputs, case.meta["num_frames"]
    if case.meta["overlap"] != 1:
        raise KeySyncError(f"segments overlap by one frame, not by {case.meta['overlap']}")
    engine = build_engine(case, num_frames)
    keyframes = np.asarray(to_images(inputs["samples_z"]))[~np.array(case.meta["to_remove"])]
    endpoints = np.stack([keyframes[:-1], keyframes[1:]], axis=1)  # [W, 2, h, w, 4]
    audio = inputs["audio_interpolation"]
    if case.meta["cut_audio"]:
        audio = audio[..., :_CUT_AUDIO]
    known, mask = (np.moveaxis(inputs[name], 2, -1) for name in ("gt_chunks", "masks_chunks"))
    conditions = engine.conditions(engine.params, {"endpoints": endpoints, "audio": audio, "known": known, "mask": mask})
    result, tensors = compiled_sampler(case, engine, case.meta["chunk_size"])(
        engine.params, to_video(inputs["noise"], num_frames), conditions
    )
    latents = np.array(result)
    latents[:, 0], latents[:, -1] = endpoints[:, 0], endpoints[:, 1]
    flat = latents.reshape(-1, *latents.shape[2:])
    images = decode_frames(jax.jit(engine.decode), flat / np.float32(engine.scale), case.meta["decoding_t"])
    return {
        "out.samples_z": from_images(flat),
        "out.samples_x": from_images(images),
        "out.vid": from_images(merged_video(images.reshape(*latents.shape[:2], *images.shape[1:]))),
    } | {f"mid.{name}": value for name, value in tensors.items()}


def merged_video(segments: np.ndarray) -> np.ndarray:
    """Segments `[W, T, H, W, 3]` in [-1, 1] to one 8-bit video; the frame that two segments share is averaged."""
    unit = np.clip((segments + 1) / 2, 0, 1)
    shared = (unit[:-1, -1] + unit[1:, 0]) / 2
    inner = [np.concatenate([unit[w, 1:-1], shared[w : w + 1]]) for w in range(len(unit) - 1)]
    frames = np.concatenate([unit[0, :1], *inner, unit[-1, 1:]])
    return (frames * 255).astype(np.uint8)


def compiled_sampler(case: Case, engine: Engine, videos_per_call: int | None = None):
    """`(params, noise, conditions) -> (latents, tensors to compare)` with the case's sampler settings."""
    settings = engine.sampling
    sigmas = schedules.ays_sigmas(settings["num_steps"], case.meta["strength"])
    rule = guidance_from(settings["guider_config"])
    dropped = sorted(str(_CONDITIONS.get(name, name)) for name in case.meta["force_uc_zero_embeddings"])
    if dropped != sorted(_CONDITIONS.values()):
        raise KeySyncError(f"{case.folder}: the unconditional branch leaves out audio and identity here, not {', '.join(dropped)}")

    @jax.jit
    def run(params, noise, conditions):
        network = engine.network(params)
        network = in_chunks(network, videos_per_call) if videos_per_call else network
        return sample_states(network, noise, sigmas, conditions, rule)

    def sample(params, noise, conditions):
        latents, trajectory = run(params, noise, conditions)
        tensors = trajectory_tensors(trajectory, sigmas)
        for name, given in (("c", conditions), ("uc", without(conditions, *dropped))):
            tensors[f"{name}.concat"] = from_images(given.concat)
            tensors[f"{name}.crossattn"] = np.asarray(given.crossattn)
            if given.vector is not None:
                tensors[f"{name}.vector"] = np.asarray(given.vector).reshape(-1, given.vector.shape[-1])
        return latents, tensors

    return sample


def decode_frames(decode: Decoder, raw: np.ndarray, at_a_time: int | None) -> np.ndarray:
    """Raw latents `[N, h, w, 4]` to images `[N, H, W, 3]`, `at_a_time` consecutive frames together (None: all)."""
    size = at_a_time or len(raw)
    return np.concatenate([decode(jnp.asarray(raw[i : i + size][None]))[0] for i in range(0, len(raw), size)])


@runner("keyface_loss")
@runner("loss")
def run_loss(case: Case) -> dict[str, np.ndarray]:
    inputs, num_frames = case.inputs, case.meta["num_video_frames"]
    engine = build_engine(case, num_frames)
    latents, noise, frames = (jnp.asarray(to_images(inputs[name])) for name in ("latents", "noise", "original_frames"))
    masks = jnp.asarray(to_images(inputs["masks"])) if "masks" in inputs else None
    batch, keep = _training_batch(case, num_frames)
    # NumPy divides by the latent scale; a compiled program may multiply by its inverse, which is another last digit.
    identity = drop(engine.conditions(engine.params, batch), keep).concat

    @jax.jit
    def pull(params, sigma, cotangent):
        """The prediction, and the gradient of `sum(prediction * cotangent)`: compiled once for all variants."""

        def prediction(params):
            conditions = drop(engine.conditions(params, batch), keep)._replace(concat=identity)
            return denoise(engine.network(params), noised(latents, noise, sigma), sigma, conditions)

        denoised, vjp = jax.vjp(prediction, params)
        return denoised, vjp(cotangent)[0]

    trainable = sorted(entry.torch_key for entry in engine.entries if not sgm.is_frozen(entry.torch_key))
    if (case.folder / "trainable_after_to_freeze.json").is_file():
        case.check_equal("parameters trained by the released scripts", trainable, sorted(case.json("trainable_after_to_freeze.json")))
    stored_norms = case.json("grad_norms.json")
    out: dict[str, Any] = {}
    for variant, settings in case.config["loss"].items():
        sigma = sigma_sampling.sigmas_from_normals(
            jnp.asarray(inputs["sigma_normals"]), **settings["sigma_sampler_config"].get("params", {})
        )
        require(settings["loss_weighting_config"], "VWeighting")
        chosen = inputs["randperm"][: settings.get("n_frames_pixel", 1)]
        of_prediction = functools.partial(
            prediction_loss,
            latents=latents,
            sigma=sigma,
            masks=masks,
            config=_loss_config(settings, engine.scale),
            decode=engine.decode,
            pixels=PixelTargets(jnp.asarray(chosen, jnp.int32), frames[:, chosen]),
            lpips=functools.partial(_mean_distance, v_weighting(sigma)),
        )
        denoised, _ = pull(engine.params, sigma, jnp.zeros_like(latents))
        (_, losses), cotangent = jax.jit(jax.value_and_grad(lambda d, f=of_prediction: _mean_first(f(d)), has_aux=True))(denoised)
        _, gradients = pull(engine.params, sigma, cotangent)
        out |= {
            f"out.{variant}.mean": losses.mean,
            f"out.{variant}.loss.{settings.get('loss_type', 'l2')}": np.ravel(losses.latent),
            f"out.{variant}.loss.loss": np.ravel(losses.per_frame),
            "out.sigmas": sigma,
            "out.model_output": from_video(denoised),
        }
        # The reference lists its perceptual term before it is weighted, the others after.
        unweighted = {"lpips": 1 / settings.get("weight_pixel", 1.0)}
        out |= {f"out.{variant}.loss.pixel_{name}": value * unweighted.get(name, 1.0) for name, value in losses.pixels.items()}
        named = dict(table.to_torch(engine.entries, gradients))
        out |= {f"out.grad.{variant}.{key}": value for key, value in named.items()}
        expected = stored_norms[variant]
        case.check_equal(f"{variant}: parameters with a gradient", sorted(named), sorted(expected))
        for key, norm in expected.items():
            atol = max(DEFAULT_RELATIVE_TOLERANCE * norm, _GRADIENT_TOLERANCE)
            case.compare(f"{variant}: norm of {key}", np.linalg.norm(named[key].astype(np.float64)), norm, atol)
    return out


def _training_batch(case: Case, num_frames: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The case's batch by our names, and what the dropout keeps of it, by frame if the conditioner repeats the identity over them."""
    inputs = case.inputs
    frames, keep = to_images(inputs["cond_frames"]), inputs["bernoulli_cond_frames"]
    batch = {
        "endpoints" if frames.ndim == 5 else "identity": frames, "audio": inputs["audio_emb"], "known": to_images(inputs["latents"]),
    }  # fmt: skip
    batch |= {"mask": to_images(inputs["masks"])} if "masks" in inputs else {}
    batch |= {name: inputs[name] for name in conditioning.EMOTION if name in inputs}
    return batch, {
        "audio": inputs["bernoulli_audio"],
        "identity": keep if keep.size == len(frames) else keep.reshape(-1, num_frames),
    }


def _mean_distance(weight: jax.Array, images: jax.Array, source: jax.Array) -> jax.Array:
    """The cases' stand-in for LPIPS, squared differences of images at half the size, as the reference weights it: `[N]`.

    It multiplies the mean distance by the mean weight, where the mean of the products is meant; divided by each row's weight here, since
    the loss multiplies by it.
    """
    difference = nn.avg_pool(images - source, (2, 2), strides=(2, 2))
    return jnp.mean(jnp.square(difference)) * jnp.mean(weight) / jnp.repeat(weight, len(images) // len(weight))


def _mean_first(losses: Losses) -> tuple[jax.Array, Losses]:
    return losses.mean, losses


def _loss_config(settings: dict[str, Any], latent_scale: float) -> LossConfig:
    return LossConfig(
        latent_loss=settings.get("loss_type", "l2"),
        upper_weight=float(settings.get("lambda_upper", 1.0)),
        lower_weight=float(settings.get("lambda_lower", 1.0)),
        pixel_weight=float(settings.get("weight_pixel", 0.0)),
        pixel_losses=tuple(settings.get("what_pixel_losses", ())),
        latent_scale=latent_scale,
    )
