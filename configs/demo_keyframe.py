"""The demo's keyframe stage: 128-px drawn faces, log-mel voice, trained from scratch on a CPU.

keysync export runs/vae --ema -o vae_model
keysync data shards talkers/manifest.csv -o data --model vae_model
keysync train --config demo_keyframe --workdir runs/keyframe --config.data.datasets=data --config.init.vae=vae_model
"""

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, to_dict
from keysync_jax.training.config import CheckpointConfig, DataConfig, DropoutConfig, LogConfig, OptimizerConfig, TrainConfig

# Two levels of equal width: 16 x 16 without attention, 8 x 8 with.
UNET = UNetConfig(
    in_channels=8,
    model_channels=32,
    channel_mult=(2, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=32,
    context_dim=128,
    audio_dim=128,
    norm_groups=8,
)
STAGE = StageConfig(
    stage="keyframe",
    unet=UNET,
    resolution=128,
    latent_size=16,
    audio_encoder="log_mel",
    audio_feature_dim=80,
)
TRAIN = TrainConfig(
    stage=STAGE,
    num_steps=50_000,
    freeze="none",
    remat="none",
    # Identity is dropped per video, as the paper says; the released model's per-frame draw was an accident.
    dropout=DropoutConfig(identity_per_frame=False),
    # A constant rate and averaged weights, so that a run can be stopped, judged and continued at any time.
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, clip_norm=1.0, ema_decay=0.999),
    data=DataConfig(batch_size=64, threads=4, prefetch=8, sampling="duration"),
    checkpoint=CheckpointConfig(every=1000, keep_last=2, keep_every=0),
    log=LogConfig(every=100, validate_every=2000, samples_every=0),
)


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(TRAIN))
