"""How many training windows per second a dataset gives on this machine.

    keysync data benchmark DIR --stage keyframe
    keysync data benchmark DIR --make 110 --latent 64      write 110 clips of noise first
    keysync data benchmark DIR --make 110 --latent 16 --jpeg --pixels 14      with pictures of a drawn talker

Prints one line of JSON. Arrays are decoded, stacked and summed, so that nothing is left undone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence

import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.memory import peak_bytes
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.dataset_layout import WRITER_OPTIONS, make_group
from keysync_jax.data_pipeline.prepare.settings import Output
from keysync_jax.data_pipeline.records import JPEG, audio_column, jpeg_column, landmarks_column, latent_column, record_bytes
from keysync_jax.data_pipeline.shard_plan import Piece
from keysync_jax.data_pipeline.shards import write_group
from keysync_jax.data_pipeline.source.loader import Batches
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
from keysync_jax.data_pipeline.source.windows import windows_for

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
    from scipy.ndimage import gaussian_filter

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
    from keysync_jax.data_pipeline.prepare.features import encode_jpeg
    from keysync_jax.data_pipeline.synthetic import make_clip

    pictures = [encode_jpeg(frame, Output.jpeg_quality) for frame in make_clip(0, min(frames, _DRAWN_FRAMES), side).frames]

    def load(piece: Piece) -> dict[str, list[bytes]]:
        return {JPEG: [pictures[(int(piece.clip[1:]) + frame) % len(pictures)] for frame in range(piece.start, piece.stop)]}

    size = max(len(picture) for picture in pictures)
    write_group(root, make_group((jpeg_column(side, side),), (side, side), size, name=JPEG), load)


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="keysync data benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", help="dataset directory")
    parser.add_argument("--make", type=int, default=0, metavar="N", help="first write N clips of noise there")
    parser.add_argument("--latent", type=int, default=64, metavar="H", help="latent side for --make (default 64)")
    parser.add_argument("--jpeg", action="store_true", help="with --make: pictures, too")
    parser.add_argument("--options", default=WRITER_OPTIONS, help="ArrayRecord writer options for --make")
    parser.add_argument("--stage", choices=["keyframe", "interpolation"], default="keyframe")
    parser.add_argument("--split", default="train")
    parser.add_argument("--encoder", default="hubert", help="audio column to read")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pixels", type=int, default=0, metavar="N", help="also decode N JPEGs of each window")
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args(argv)
    try:
        result = {"stage": args.stage}
        if args.make:
            result["written"] = write_noise(args.directory, args.make, args.latent, options=args.options, jpeg=args.jpeg)
        choice = DatasetChoice(args.directory, args.split)
        reader = WindowReader(SourceConfig((choice,), windows_for(args.stage), args.encoder, pixel_frames=args.pixels))
        result |= {"latent": list(reader.latent_shape), "audio_dim": reader.audio_dim}
        result |= measure(reader, args.batch, args.seconds, args.threads, args.workers)
    except KeySyncError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
