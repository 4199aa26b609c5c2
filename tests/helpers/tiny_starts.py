"""A tiny model directory to start runs from, runs of it, and their recipes; weights of every tensor are different random numbers."""

import dataclasses
import io

import jax
import numpy as np
import tiny
from PIL import Image
from tiny import SIZE, STAGES
from tiny_runs import write_dataset

from keysync_jax.config import VAEConfig, to_dict
from keysync_jax.converters import model_directory
from keysync_jax.converters.fresh import NON_DEGENERATE, VAE_CONSTANTS, fresh, stage_constants
from keysync_jax.converters.parts import Part, part_table
from keysync_jax.data_pipeline.dataset_layout import make_group
from keysync_jax.data_pipeline.records import jpeg_column
from keysync_jax.data_pipeline.shards import write_group
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.training import resume, state
from keysync_jax.training.config import CheckpointConfig, DataConfig, InitConfig, LogConfig, OptimizerConfig, TrainConfig
from keysync_jax.training.start import check
from keysync_jax.training.store import checkpoints

SCALE = 0.25  # of the tiny VAE; not the default
# Their decoder mixes frames, as Stable Video Diffusion's does: the freezing and the export of temporal layers are tested with it.
VAE = dataclasses.replace(tiny.VAE, decoder=VAEConfig().decoder, latent_scale=SCALE)


def vae_part(seed=0, config=VAE) -> Part:
    return Part("vae", config, fresh(part_table(config), seed, gain=NON_DEGENERATE, constants=VAE_CONSTANTS))


def write_model(path, *names, seed=0, vae_config=VAE):
    """A model directory with a VAE and the named stages; mixers are no constants, or a frozen one could be lost unseen."""
    parts, vae = [], vae_part(seed, vae_config)
    decoder = {e.torch_key: vae.tensors.info(e.torch_key) for e in part_table(vae_config, ("decoder",))}
    for i, name in enumerate(names):
        stage = dataclasses.replace(STAGES[name], latent_scale=SCALE)
        constants = stage_constants(stage) | {"mix_factor": 0.3 + i}
        own = fresh(part_table(stage), seed + i, zero_init=False, constants=constants)
        parts.append(Part(name, stage, own.updated(decoder)))
    return model_directory.save(path, [*parts, vae])


def write_frames(root):
    """`tiny_runs.write_dataset` with pictures."""
    write_dataset(root)
    rng = np.random.default_rng(5)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(buffer, "jpeg")
    group = make_group((jpeg_column(SIZE, SIZE),), (SIZE, SIZE), 5000, 5000 * 100, name="jpeg", info={"quality": 75})
    write_group(str(root), group, lambda piece: {"jpeg": [buffer.getvalue()] * (piece.stop - piece.start)})
    return str(root)


def recipe(stage="keyframe", dataset="", pixels=False, ema=0.9, **changes) -> TrainConfig:
    """Two steps of a stage in float32, large enough to see."""
    return TrainConfig(
        **{
            "stage": STAGES[stage],
            "num_steps": 2,
            "dtype": "float32",
            "remat": "none",
            "loss": LossConfig(pixel_weight=1.0 if pixels else 0.0),
            "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=0, ema_decay=ema),
            "data": DataConfig(datasets=(str(dataset),), batch_size=1, validation_split="", threads=1, prefetch=1),
            "checkpoint": CheckpointConfig(every=1, keep_last=5, keep_every=0),
            "log": LogConfig(every=1, validate_every=0, samples_every=0, tensorboard=False),
            **changes,
        }
    )


def save_run(workdir, config, step=1, nudge=0.0):
    """A workdir as the loop leaves it, without training: the first weights plus `nudge`; the average lags behind."""
    trainable, _ = check.resolve(config)
    config, weights = trainable.config, trainable.initial_weights()
    params = jax.tree.map(lambda x: x + np.float32(nudge), weights.params)
    mean = jax.tree.map(lambda x: x - np.float32(nudge / 2), params) if config.optimizer.ema_decay else None
    moments = {"count": np.int32(step)}  # nobody reads the optimizer's part here
    made = state.TrainState(np.int32(step), params, weights.frozen, mean, moments, np.int32(0))
    checkpoints.save_frozen(workdir, jax.tree.map(jax.numpy.asarray, weights.frozen))
    checkpoints.write_config(workdir, to_dict(config))
    with checkpoints.Checkpoints(workdir, config.checkpoint) as saved:
        made = jax.tree.map(jax.numpy.asarray, made)
        saved.save(made, {"step": step, "skipped": 0, "data": "none", "samples": step * config.data.batch_size}, resume.describe(trainable))
        saved.wait()
    return workdir


def start_from(kind, path, **more) -> InitConfig:
    return InitConfig(kind=kind, path=str(path), **more)


def leaves(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
