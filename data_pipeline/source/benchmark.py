"""How many training windows per second a dataset gives on this machine: `keysync data benchmark`.

Arrays are decoded, stacked and summed, so that nothing is left undone.
"""

from __future__ import annotations

import os
import time

import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.memory import peak_bytes
from keysync_jax.data_pipeline.source.loader import Batches
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
from keysync_jax.data_pipeline.source.windows import windows_for


def benchmark(directory: str, stage: str, split: str = "train", encoder: str = "hubert", *, pixels: int = 0, **settings) -> dict:
    """What `measure` finds for the windows of a stage, with the size of a latent `[h, w, 4]` and the width of an audio token.

    Args:
      directory: dataset directory.
      stage: whose windows are read.
      split: which of the dataset's splits.
      encoder: whose audio tokens are read.
      pixels: how many JPEGs of each window are decoded as well.
      settings: of `measure`.

    Raises:
      KeySyncError: no dataset there, or one without what is asked for.
    """
    reader = WindowReader(SourceConfig((DatasetChoice(directory, split),), windows_for(stage), encoder, pixel_frames=pixels))
    return {"latent": list(reader.latent_shape), "audio_dim": reader.audio_dim} | measure(reader, **settings)


def measure(reader: WindowReader, batch_size: int = 16, seconds: float = 5.0, threads: int = 2, workers: int = 0) -> dict:
    """Windows per second after a warm-up of two batches, and CPU time of this process (all threads) per window."""
    with Batches(reader, batch_size, threads=threads, workers=workers) as batches:
        for _ in range(2):
            next(batches)
        begin, cpu, count, total = time.perf_counter(), time.process_time(), 0, 0.0
        while time.perf_counter() - begin < seconds:
            batch = next(batches)
            total += sum(float(batch[name].sum(dtype=np.float64)) for name in ("known", "audio", "mask"))
            count += batch_size
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if not np.isfinite(total):
        raise KeySyncError(f"{reader.stores[0].root}: the sum of all values is {total}")
    return {
        "windows_per_s": round(count / wall, 1), "cpu_ms_per_window": round(1e3 * cpu / count, 2), "windows": count, "threads": threads,
        "workers": workers, "batch": batch_size, "load": round(os.getloadavg()[0], 1),
        "peak_mb": round(peak_bytes() / 2**20),
    }  # fmt: skip
