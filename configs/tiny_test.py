"""Keyframe stage in miniature (8 x 8 latents, 4 frames, one level of 32 channels), for trying the trainer out and for its tests.

A step takes milliseconds on a CPU; what it makes is of no use. Data: any prepared 64-px dataset with log-mel tokens of 8 numbers.

    keysync train --config tiny_test --workdir runs/tiny --config.data.datasets=DIR
"""

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, to_dict
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.training.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig

STAGE = StageConfig(
    stage="keyframe",
    unet=UNetConfig(
        in_channels=8, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_head_channels=16,
        context_dim=32, audio_dim=32, num_frames=4,
    ),
    resolution=64,
    latent_size=8,
    num_frames=4,
    audio_encoder="log_mel",
    audio_feature_dim=8,
)  # fmt: skip


def get_config() -> ConfigDict:
    return ConfigDict(
        to_dict(
            TrainConfig(
                stage=STAGE,
                num_steps=30,
                dtype="float32",
                remat="none",
                attention="auto",
                loss=LossConfig(pixel_weight=0.0),
                optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5, ema_decay=0.99),
                data=DataConfig(batch_size=8, threads=1, prefetch=2, min_spacing=2),
                checkpoint=CheckpointConfig(every=5, keep_last=2, keep_every=0),
                log=LogConfig(every=1, validate_every=0, samples_every=0, tensorboard=False),
            )
        )
    )
