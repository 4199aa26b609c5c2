"""The demo's autoencoder: 128-px drawn faces to 16 x 16 latents, trained from scratch.

keysync data synth -n 800 --seed 2026 --arrays -o talkers
keysync train --config demo_vae --workdir runs/vae --config.data.datasets=talkers/manifest.csv
keysync export runs/vae --ema -o vae_model
keysync evaluate --vae --model vae_model          the gate: opening at least .97, width at least .93
"""

from ml_collections import ConfigDict

from keysync_jax.config import VAEConfig, to_dict
from keysync_jax.training.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig, VaeLossConfig

# Few groups per norm: with one channel to a group, the norms would forget colours.
VAE = VAEConfig(base_channels=32, channel_mult=(1, 1, 2, 2), num_res_blocks=1, decoder="image", norm_groups=8)


def get_config() -> ConfigDict:
    return ConfigDict(
        to_dict(
            TrainConfig(
                model="vae",
                vae=VAE,
                resolution=128,
                num_steps=50_000,
                dtype="float32",
                remat="none",
                vae_loss=VaeLossConfig(kl_weight=1e-4, mouth_weight=10.0),
                # A constant rate and averaged weights, so that a run can be stopped, judged and continued at any time.
                optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, clip_norm=1.0, ema_decay=0.998),
                data=DataConfig(batch_size=64, frames_per_clip=4, threads=8, prefetch=8),
                checkpoint=CheckpointConfig(every=1000, keep_last=2, keep_every=0),
                log=LogConfig(every=100, validate_every=2000, samples_every=0),
            )
        )
    )
