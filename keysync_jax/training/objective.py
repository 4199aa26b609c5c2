"""What is minimised: the diffusion loss of a stage, or the reconstruction loss of the autoencoder.

An objective draws all random numbers of a step at once (`draw`), for the whole batch, and its loss is then a plain function of arrays.
So a step is the same whether the batch is computed at once, in microbatches, or over many devices, and a test can hand in the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from keysync_jax.diffusion.conditions import drop
from keysync_jax.diffusion.inpainting import denoise
from keysync_jax.diffusion.loss import Perceptual, PixelTargets, noised, prediction_loss
from keysync_jax.diffusion.sigma_sampling import sigmas_from_normals
from keysync_jax.models import conditioning
from keysync_jax.models.stage import StageModel
from keysync_jax.models.vae import VAE, sample_posterior
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.state import Tree, merge

Batch = Mapping[str, jax.Array]


class Objective(Protocol):
    """A loss with its random numbers; every array of a batch and of the drawn numbers has the batch axis first."""

    def draw(self, key: jax.Array, batch: Batch) -> dict[str, jax.Array]: ...

    def loss(self, params: Tree, frozen: Tree, batch: Batch, drawn: Batch) -> tuple[jax.Array, dict[str, jax.Array]]: ...


class DiffusionObjective:
    """Masked denoising loss of a stage (paper Eqs. 2 to 6), with conditioning dropout.

    A batch holds what `conditioning.batch_shapes` names; of that `known` is the target too. With a pixel loss it also holds
    `original_frames [B, n, H, W, 3]` and `original_indices [B, n]` (equal in all rows).
    """

    def __init__(self, config: TrainConfig, vae: Any = None, lpips: Perceptual | None = None):
        """Args:
        config: the run.
        vae: `VAEConfig` of the decoder under `frozen["first_stage_model"]`, needed with a pixel loss.
        lpips: perceptual distance, needed with the pixel loss "lpips".
        """
        self._config, self._lpips = config, lpips
        self._stage = config.stage
        self._model = StageModel(self._stage, dtype=jnp.dtype(config.dtype), attention=config.attention, remat=config.remat)
        # The reference decodes in float32: the pixel loss is a small difference of large values.
        # The loss recomputes the decoder as a whole; where memory is scarcest, its blocks once more, one by one.
        self._vae = VAE(vae, remat="full" if config.remat == "full" else "none") if config.uses_pixels else None

    def draw(self, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Noise levels, noise and dropout of every sample: `normals [B]`, `noise` like the latents, `keep_audio [B]`, `keep_identity`
        (`[B]`, or `[B, T]` where the identity is dropped frame by frame)."""
        shape, dropout = batch["known"].shape, self._config.dropout
        sigma, noise, audio, identity = jax.random.split(key, 4)
        per_frame = self._stage.stage == "keyframe" and dropout.identity_per_frame
        return {
            "normals": jax.random.normal(sigma, shape[:1]),
            "noise": jax.random.normal(noise, shape),
            "keep_audio": jax.random.uniform(audio, shape[:1]) >= dropout.audio,
            "keep_identity": jax.random.uniform(identity, shape[: 2 if per_frame else 1]) >= dropout.identity,
        }

    def loss(self, params: Tree, frozen: Tree, batch: Batch, drawn: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss and its parts."""
        config = self._config
        decoder = {"first_stage_model": frozen["first_stage_model"]} if "first_stage_model" in frozen else {}
        variables = {"params": merge(params, {k: v for k, v in frozen.items() if k != "first_stage_model"})}
        network = functools.partial(self._model.apply, variables)
        latents = batch["known"]
        keep = {"audio": drawn["keep_audio"], "identity": drawn["keep_identity"]}
        conditions = drop(conditioning.conditions(self._model, variables, batch), keep)
        sigma = sigmas_from_normals(drawn["normals"], config.noise.p_mean, config.noise.p_std)
        denoised = denoise(network, noised(latents, drawn["noise"], sigma), sigma, conditions)

        decode = None if self._vae is None else functools.partial(self._vae.apply, {"params": decoder}, method="decode")
        pixels = PixelTargets(batch["original_indices"][0], batch["original_frames"]) if config.uses_pixels else None
        losses = prediction_loss(denoised, latents, sigma, conditions.masks, config.loss, decode=decode, pixels=pixels, lpips=self._lpips)
        parts = {"latent": jnp.mean(losses.latent)} | {f"pixel_{name}": value for name, value in losses.pixels.items()}
        return losses.mean, parts


class VaeObjective:
    """Autoencoder: L1 + KL, optionally with more weight on the mouth and LPIPS (Rombach et al. 2022, without the adversarial term).

    A batch holds `images [B, H, W, 3]` in [-1, 1] and `mouth [B, H, W, 1]` in [0, 1], 1 around the mouth.
    """

    def __init__(self, config: TrainConfig, lpips: Perceptual | None = None):
        """`lpips` is needed with `vae_loss.lpips_weight`."""
        self._config = config
        self._model = VAE(config.vae, dtype=jnp.dtype(config.dtype), attention=config.attention)
        self._lpips = lpips

    def draw(self, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """`noise [B, h, w, C]` of the posterior samples."""
        b, height, width, _ = batch["images"].shape
        factor = self._config.vae.downsample_factor
        return {"noise": jax.random.normal(key, (b, height // factor, width // factor, self._config.vae.latent_channels))}

    def loss(self, params: Tree, frozen: Tree, batch: Batch, drawn: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss, and scalars for the log: "l1" and "l1_mouth" (mean absolute error on [-1, 1]), "kl" per latent element, "latent_std"
        of the sampled latents before scaling, and "lpips" where it counts."""
        weights, images = self._config.vae_loss, batch["images"]
        variables = {"params": merge(params, frozen)}
        mean, logvar = self._model.apply(variables, images, method="encode_moments")
        z = sample_posterior(mean, logvar, drawn["noise"])
        decoded = self._model.apply(variables, z[:, None], method="decode")[:, 0]
        error = jnp.abs(decoded - images)
        emphasis = 1.0 + weights.mouth_weight * batch["mouth"]
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        parts = {"l1": jnp.mean(error), "kl": kl, "latent_std": jnp.sqrt(jnp.mean(jnp.square(z)) - jnp.square(jnp.mean(z)))}
        parts["l1_mouth"] = jnp.sum(error * batch["mouth"]) / (3 * jnp.sum(batch["mouth"]) + 1e-6)
        total = weights.l1_weight * jnp.mean(error * emphasis) + weights.kl_weight * kl
        if weights.lpips_weight:
            assert self._lpips is not None
            parts["lpips"] = jnp.mean(self._lpips(decoded, images))
            total = total + weights.lpips_weight * parts["lpips"]
        return total, parts
