"""Drawn talkers to training shards in one process, with a big batch on the accelerator and neither Beam nor a video codec.

    keysync data synth -n 1000 --arrays -o talkers
    python -m data_pipeline.synthetic.shards talkers/manifest.csv -o data --model vae_model

`keysync prepare` is the way for videos: it finds faces, curates, and restarts. Drawn clips need none of that, since frames, landmarks and
voice are exact; the shards have the same format and are read alike.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.clip_index import Clip
from data_pipeline.layout import BASE
from data_pipeline.prepare.groups import Output, checked_float16, plan_features
from data_pipeline.prepare.item import derived_seed
from data_pipeline.records import AUDIO_PREFIX, LANDMARKS, LATENT
from data_pipeline.shard_plan import Piece
from data_pipeline.shards import write_group
from data_pipeline.synthetic.dataset import MANIFEST_FIELDS
from data_pipeline.synthetic.write import VOICE, sidecar
from keysync_jax import assets
from keysync_jax.errors import KeySyncError
from keysync_jax.progress import Bars


def write_shards(manifest: str | Path, output: str, model: str, *, microbatch: int = 64, seed: int = 0, progress: bool = True) -> int:
    """Encode every clip of a manifest of `.npy` clips and write them as shards.

    Args:
      manifest: `manifest.csv` of `synth_dataset` with `suffix=".npy"`; speaker, split, source and terms are taken over.
      output: dataset directory.
      model: model directory with a VAE and speech encoders.
      microbatch: frames that the VAE encodes at once.
      seed: of the posterior samples.
      progress: show how much is done.

    Returns:
      How many clips were written.

    Raises:
      KeySyncError: no clip, clips that are not square arrays of one size, or a model without VAE or speech encoder.
    """
    from converters import model_directory
    from keysync_jax.inference.audio_features import AudioFeatures
    from keysync_jax.inference.generate import LatentCoder
    from keysync_jax.parallel.mesh import data_mesh

    rows = _rows(Path(manifest))
    paths = {Path(row["path"]).stem: Path(manifest).parent / row["path"] for row in rows}
    wrong = next((p for p in paths.values() if p.suffix != ".npy"), None)
    if not rows or wrong is not None:
        raise KeySyncError(
            f"{manifest}: {wrong or 'no clip'}; draw the clips as arrays (keysync data synth --arrays), or use keysync prepare"
        )
    # What is not there is found before hours of encoding.
    for path in paths.values():
        for each in (path, sidecar(path, VOICE), sidecar(path, "landmarks.npy")):
            if not each.is_file():
                raise KeySyncError(
                    f"{each} does not exist, but {manifest} lists its clip; draw the set again (keysync data synth --arrays)"
                )
    if "://" not in output and Path(output).is_file():
        raise KeySyncError(f"{output} is a file; name a folder for the shards")
    size = np.load(next(iter(paths.values())), mmap_mode="r").shape[1]
    plan = plan_features(model, Output(columns=(), seed=seed), crop_size=size)
    directory = model_directory.load(model, complete=False)
    coder = LatentCoder(directory.vae, directory.params("vae"), data_mesh(), microbatch=microbatch)
    encoders = {name: AudioFeatures(config, directory.params(f"audio/{name}")) for name, config in plan.encoders.items()}

    def encode(name: str, path: Path) -> dict[str, np.ndarray]:
        frames = np.load(path, mmap_mode="r")
        if frames.shape[1:] != (size, size, 3):
            raise KeySyncError(f"{path}: frames are {frames.shape[1:]}, those of the first clip {(size, size, 3)}; use one size")
        images = ((i, frame.astype(np.float32) / 127.5 - 1.0) for i, frame in enumerate(frames))
        latents = np.stack(list(coder.encode(images, derived_seed(seed, name))))
        samples = np.load(sidecar(path, VOICE))
        tokens = {AUDIO_PREFIX + kind: checked_float16(features(samples), f"{name}: {kind}") for kind, features in encoders.items()}
        return {LATENT: checked_float16(latents, name), LANDMARKS: np.load(sidecar(path, "landmarks.npy")), **tokens}

    values: dict[str, dict[str, np.ndarray]] = {}
    with Bars(quiet=not progress) as bars:
        task = bars.add_task("encode", total=len(paths))
        for name, path in paths.items():
            values[name] = encode(name, path)
            bars.advance(task)

    def load(piece: Piece) -> dict[str, np.ndarray]:
        return {name: array[piece.start : piece.stop] for name, array in values[piece.clip].items()}

    clips = [
        Clip(
            Path(row["path"]).stem, len(values[Path(row["path"]).stem][LATENT]), split=row["split"], speaker=row["speaker"],
            source=row["source"], video=row["path"], licence=row["licence"], consent=row["consent"],
        )
        for row in rows
    ]  # fmt: skip
    base = next(group for group in plan.groups if group.name == BASE)
    write_group(output, base, load, clips)
    return len(clips)


def _rows(manifest: Path) -> list[dict[str, str]]:
    try:
        with manifest.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise KeySyncError(f"{manifest} cannot be read ({error}); give the manifest.csv of keysync data synth --arrays") from None
    missing = [name for name in MANIFEST_FIELDS if rows and rows[0].get(name) is None]
    if missing:
        raise KeySyncError(f"{manifest} has no column {missing[0]!r}; give the manifest.csv of keysync data synth --arrays")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.synthetic.shards", description=__doc__.splitlines()[0])
    parser.add_argument("manifest", metavar="MANIFEST", help="manifest.csv of keysync data synth --arrays")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="dataset directory")
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory with a VAE and speech encoders")
    parser.add_argument("--microbatch", type=int, default=64, metavar="N", help="frames encoded at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.microbatch < 1 or args.seed < 0:
        parser.error(f"--microbatch {args.microbatch} --seed {args.seed}: at least one frame, and no negative seed")
    try:
        count = write_shards(args.manifest, args.output, assets.resolve(args.model), microbatch=args.microbatch, seed=args.seed)
    except (KeySyncError, OSError, ValueError) as error:  # a damaged array, a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} clips: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
