"""A dataset of noise in the real layout, to measure how fast datasets are written and read."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
from scipy.ndimage import gaussian_filter

from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.dataset_layout import WRITER_OPTIONS, make_group
from keysync_jax.data_pipeline.prepare.features import encode_jpeg
from keysync_jax.data_pipeline.prepare.settings import Output
from keysync_jax.data_pipeline.records import JPEG, audio_column, jpeg_column, landmarks_column, latent_column, record_bytes
from keysync_jax.data_pipeline.shard_plan import Piece
from keysync_jax.data_pipeline.shards import write_group
from keysync_jax.data_pipeline.synthetic.clip import make_clip

_DRAWN_FRAMES = 50  # different pictures that --jpeg draws


def write_noise(
    root: str, clips: int, latent: int, frames: int = 200, audio_dim: int = 768, options: str = WRITER_OPTIONS, jpeg: bool = False
) -> dict:
    """A dataset of the real layout (latents, HuBERT, WavLM and log-mel tokens, landmarks) filled with smooth noise.

    Args:
      jpeg: also write the pictures of one drawn talker, as `keysync prepare` encodes them, in another order for each clip.

    Returns:
      Records, bytes on disk, seconds, and records and megabytes per second.
    """
    columns = (
        latent_column(latent, latent), audio_column("hubert", audio_dim), audio_column("wavlm", audio_dim), audio_column("log_mel", 80),
        landmarks_column(),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {c.name: (frames, *c.shape) for c in columns}
    values = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    # Latents vary slowly over space and carry the fine noise of a posterior sample; landmarks move within the crop.
    values["latent"] = 4 * gaussian_filter(values["latent"], (1, 2, 2, 0)) + 0.1 * rng.standard_normal(shapes["latent"], np.float32)
    values["landmarks"] = 8 * latent * rng.random(shapes["landmarks"], np.float32)

    def load(piece: Piece) -> dict[str, np.ndarray]:
        turn = int(piece.clip[1:]) % frames
        return {name: np.roll(v, turn, axis=0)[piece.start : piece.stop] for name, v in values.items()}

    group = dataclasses.replace(make_group(columns, (8 * latent, 8 * latent), record_bytes(columns)), writer_options=options)
    begin = time.perf_counter()
    done = write_group(root, group, load, [Clip(f"c{i:05d}", frames, split="train") for i in range(clips)])
    seconds = time.perf_counter() - begin
    size = sum(s.bytes for s in done.shards)
    if jpeg:
        _write_jpeg(root, 8 * latent, frames)
    return {
        "records": clips * frames, "bytes": size, "seconds": round(seconds, 2), "records_per_s": round(clips * frames / seconds),
        "mb_per_s": round(size / 1e6 / seconds), "shards": len(done.shards),
    }  # fmt: skip


def _write_jpeg(root: str, side: int, frames: int) -> None:
    pictures = [encode_jpeg(frame, Output.jpeg_quality) for frame in make_clip(0, min(frames, _DRAWN_FRAMES), side).frames]

    def load(piece: Piece) -> dict[str, list[bytes]]:
        return {JPEG: [pictures[(int(piece.clip[1:]) + frame) % len(pictures)] for frame in range(piece.start, piece.stop)]}

    size = max(len(picture) for picture in pictures)
    write_group(root, make_group((jpeg_column(side, side),), (side, side), size, name=JPEG), load)
