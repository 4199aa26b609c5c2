"""The tests' networks in miniature, defined once: files that use them share weights, shapes and compiled programs.

The stage is that of the recipe `tiny_test`: 8 x 8 latents of 64 pixels, four frames, one level of 32 channels with attention in its middle
(spatial and temporal), log-mel tokens of eight numbers. Every kind of path of the full networks is in it, and compiling it is what tests
spend their time with. A test that needs another network changes one field of these and says why.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from keysync_jax.config import VAEConfig
from keysync_jax.models.stage import init_params
from keysync_jax.parallel.mesh import AXES
from keysync_jax.training import recipes
from keysync_jax.training.config import train_config

CONFIG = train_config(recipes.load("tiny_test"))
KEYFRAME = CONFIG.stage
UNET = KEYFRAME.unet
INTERPOLATION = dataclasses.replace(KEYFRAME, stage="interpolation", unet=dataclasses.replace(UNET, in_channels=9))
STAGES = {"keyframe": KEYFRAME, "interpolation": INTERPOLATION}
SIZE, LATENT, FRAMES, MELS = KEYFRAME.resolution, KEYFRAME.latent_size, KEYFRAME.num_frames, KEYFRAME.audio_feature_dim
# 64 pixels to 8 x 8 latents, frame by frame.
VAE = VAEConfig(base_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1, decoder="image")
# For a program that runs a few times at most: the networks are too small to gain what LLVM's optimisations cost.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def params(stage: str = "keyframe", seed: int = 0):
    """Weights of a stage in which no layer starts at zero; not to be written to."""
    return init_params(STAGES[stage], seed, zero_init=False)


def batch(stage: str = "keyframe", size: int = 4, seed: int = 1) -> dict[str, np.ndarray]:
    """A batch of training, random throughout, half of it to generate."""
    rng = np.random.default_rng(seed)
    name, ends = ("identity", ()) if stage == "keyframe" else ("endpoints", (2,))
    return {
        "known": rng.standard_normal((size, FRAMES, LATENT, LATENT, 4), np.float32),
        "audio": rng.standard_normal((size, FRAMES, 2, MELS), np.float32),
        "mask": (rng.random((size, FRAMES, LATENT, LATENT, 1)) < 0.5).astype(np.float32),
        name: rng.standard_normal((size, *ends, LATENT, LATENT, 4), np.float32),
    }


def one_device() -> jax.sharding.Mesh:
    """The mesh of a process with one device."""
    return jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)
