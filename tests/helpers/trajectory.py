"""What the stored trajectory was trained on, shared by the script that made it and the test that repeats it: NumPy and configs only."""

from pathlib import Path

import numpy as np

from keysync_jax.config import StageConfig, UNetConfig
from keysync_jax.training.config import OptimizerConfig, TrainConfig

FILE = Path(__file__).parent / "data" / "trajectory.npz"
STEPS, BATCH, FRAMES, SIZE, AUDIO, CONTEXT = 20, 2, 3, 8, 16, 24

UNET = UNetConfig(
    model_channels=64,  # two channels per norm group: with one, biases before a norm have no gradient but rounding
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1,),
    num_head_channels=32,
    context_dim=CONTEXT,
    audio_dim=CONTEXT,
    num_frames=FRAMES,
)
CONFIG = TrainConfig(
    stage=StageConfig(unet=UNET, latent_size=SIZE, num_frames=FRAMES, audio_feature_dim=AUDIO),
    num_steps=STEPS,
    dtype="float32",
    remat="none",
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=12),  # so that ramp and plateau both count
)
# At 1e-5 the decay is lost in rounding; a second run of the optimizer alone, on given gradients, shows every term of the update.
ALONE = OptimizerConfig(learning_rate=1e-2, warmup_steps=7, weight_decay=0.1)
SEED = 11


def batch(step: int) -> dict[str, np.ndarray]:
    """The data of a step, as the trainer reads them."""
    rng = np.random.default_rng([SEED, step, 0])
    latents = rng.standard_normal((BATCH, FRAMES, SIZE, SIZE, 4), np.float32)
    masks = np.zeros((BATCH, FRAMES, SIZE, SIZE, 1), np.float32)
    masks[:, :, SIZE // 3 :, 1:-1] = 1
    return {
        "known": latents,
        "audio": rng.standard_normal((BATCH, FRAMES, 2, AUDIO), np.float32),
        "mask": masks,
        "identity": rng.standard_normal((BATCH, SIZE, SIZE, 4), np.float32),
    }


def drawn(step: int) -> dict[str, np.ndarray]:
    """The random numbers of a step, in place of those that the trainer draws."""
    rng = np.random.default_rng([SEED, step, 1])
    return {
        "normals": rng.standard_normal(BATCH, np.float32),
        "noise": rng.standard_normal((BATCH, FRAMES, SIZE, SIZE, 4), np.float32),
        "keep_audio": rng.random(BATCH) >= 0.2,
        "keep_identity": rng.random((BATCH, FRAMES)) >= 0.1,
    }


def given(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and gradients of the optimizer's own run; some gradients are zero, one is large, magnitudes span five decades."""
    rng = np.random.default_rng([SEED, 2])
    params = rng.standard_normal(40, np.float32)
    rng = np.random.default_rng([SEED, step, 3])
    gradients = rng.standard_normal(40, np.float32) * np.logspace(-4, 1, 40, dtype=np.float32)
    gradients[::7] = 0
    return params, gradients
