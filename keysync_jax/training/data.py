"""Batches of a run, for this process."""

from __future__ import annotations

import numpy as np

from keysync_jax.core.errors import UsageError
from keysync_jax.data_pipeline.source.frames import FrameConfig, FrameReader
from keysync_jax.data_pipeline.source.loader import Batches, Reader
from keysync_jax.data_pipeline.source.mixture import ClipFilter, DatasetChoice
from keysync_jax.data_pipeline.source.sample import WindowReader, check_stage, source_config
from keysync_jax.training.config import DataConfig, TrainConfig


def frame_reader(config: TrainConfig, split: str | None = None) -> FrameReader:
    """Opens the videos of an autoencoder's recipe; `split` other than the training split reads the validation data.

    Raises:
      UsageError: no dataset is named.
      KeySyncError: nothing to read.
    """
    paths, validate = _datasets(config.data, split)
    crop = 0 if validate else config.data.crop
    return FrameReader(FrameConfig(paths, split or config.data.split, config.resolution, crop, config.data.frames_per_clip, config.seed))


def window_reader(config: TrainConfig, split: str | None = None) -> WindowReader:
    """Opens the prepared datasets of a stage's recipe; `split` as for `frame_reader`.

    Raises:
      UsageError: no dataset is named.
      KeySyncError: nothing to read, or data that do not fit the stage (encoder, resolution, pixels), by name.
    """
    data = config.data
    paths, validate = _datasets(data, split)
    split = split or data.split
    chosen = ClipFilter(min_scores=dict(data.min_scores), sources=tuple(data.sources))
    weights = data.weights if data.weights and len(paths) == len(data.weights) else (1.0,) * len(paths)
    datasets = [DatasetChoice(path, split, weight, chosen) for path, weight in zip(paths, weights, strict=True)]
    windows = {"identity": data.identity} | (
        {"spacing": data.spacing, "min_spacing": min(data.min_spacing, data.spacing)} if config.stage.stage == "keyframe" else {}
    )
    reader = WindowReader(
        source_config(
            config.stage, datasets, windows, seed=config.seed, sampling=data.sampling, flip=not validate and data.flip,
            box_jitter=0.0 if validate else data.box_jitter, use_occluder=data.use_occluder,
            pixel_frames=config.pixel_frames if config.uses_pixels else 0, emotion=data.emotion if config.stage.emotion_dim else "",
            allow_mismatch=data.allow_mismatch,
        )
    )  # fmt: skip
    check_stage(reader, config.stage)
    return reader


def _datasets(data: DataConfig, split: str | None) -> tuple[tuple[str, ...], bool]:
    """Paths to read, and whether they are read for validation."""
    if not data.datasets:
        raise UsageError("config.data.datasets is empty; name at least one dataset, for example --config.data.datasets=DIR")
    validate = split is not None and split != data.split
    return (data.validation,) if validate and data.validation else data.datasets, validate


def make_batches(config: TrainConfig, reader: Reader, first_step: int, host: int, hosts: int, seen: int | None = None) -> Batches:
    """This host's batches from a step on, before which `seen` samples came (None: a batch per step)."""
    data = config.data
    return Batches(
        reader, data.batch_size, first_step, host, hosts, threads=data.threads, workers=data.workers, prefetch=data.prefetch, seen=seen
    )  # fmt: skip


def step_arrays(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a step reads of a batch; numbers that only say where a sample came from stay on the host."""
    return {name: value for name, value in batch.items() if name not in ("frames", "dataset", "clip")}
