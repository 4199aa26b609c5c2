"""Drawn talkers to training shards in one process, with a big batch on the accelerator and neither Beam nor a video codec.

    keysync data synth -n 1000 --arrays -o talkers
    keysync data shards talkers/manifest.csv -o data --model vae_model

`keysync prepare` is the way for videos: it finds faces, curates, and restarts. Drawn clips need none of that, since frames, landmarks and
voice are exact; the shards have the same format and are read alike.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from keysync_jax.converters import model_directory
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import is_local
from keysync_jax.core.progress import Bars
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.dataset_layout import BASE, Group, make_folder
from keysync_jax.data_pipeline.prepare.groups import Output, checked_float16, plan_features
from keysync_jax.data_pipeline.prepare.item import derived_seed
from keysync_jax.data_pipeline.prepare.work import digest, file_digest
from keysync_jax.data_pipeline.records import AUDIO_PREFIX, LANDMARKS, LATENT
from keysync_jax.data_pipeline.shard_plan import Piece
from keysync_jax.data_pipeline.shards import prepare_group, write_group
from keysync_jax.data_pipeline.synthetic.dataset import MANIFEST_FIELDS, SPLITS
from keysync_jax.data_pipeline.synthetic.write import ARRAYS, LANDMARK_FILE, VOICE_FILE, check_clip, sidecar
from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.parallel.mesh import data_mesh


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
      KeySyncError: no clip, clips that are damaged or not square arrays of one size, a model without VAE or speech encoder, or an output
        that holds other shards or cannot be written to. All of it is found before anything is encoded.
    """
    rows = _rows(Path(manifest))
    names = [Path(row["path"]).stem for row in rows]
    paths = {name: Path(manifest).parent / row["path"] for name, row in zip(names, rows, strict=True)}
    lengths, size = _check_clips(paths, manifest)
    plan = plan_features(model, Output(columns=(), seed=seed), crop_size=size)
    base = next(group for group in plan.groups if group.name == BASE)
    clips = [
        Clip(
            name, lengths[name], split=row["split"], speaker=row["speaker"], source=row["source"], video=row["path"],
            licence=row["licence"], consent=row["consent"], fingerprint=_fingerprint(paths[name]),
        )
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip
    _check_output(output, base, clips)
    directory = model_directory.load(model, complete=False)
    # A larger batch than a clip would only be filled up.
    coder = LatentCoder(directory.vae, directory.params("vae"), data_mesh(), microbatch=min(microbatch, max(lengths.values())))
    encoders = {name: AudioFeatures(config, directory.params(f"audio/{name}")) for name, config in plan.encoders.items()}

    def encode(name: str, path: Path) -> dict[str, np.ndarray]:
        frames = np.load(path, mmap_mode="r")
        images = ((i, frame.astype(np.float32) / 127.5 - 1.0) for i, frame in enumerate(frames))
        latents = np.stack(list(coder.encode(images, derived_seed(seed, name))))
        samples = np.load(sidecar(path, VOICE_FILE))
        tokens = {AUDIO_PREFIX + kind: checked_float16(features(samples), f"{name}: {kind}") for kind, features in encoders.items()}
        return {LATENT: checked_float16(latents, name), LANDMARKS: np.load(sidecar(path, LANDMARK_FILE)), **tokens}

    values: dict[str, dict[str, np.ndarray]] = {}
    with Bars(quiet=not progress) as bars:
        task = bars.add_task("encode", total=len(paths))
        for name, path in paths.items():
            values[name] = encode(name, path)
            bars.advance(task)

    def load(piece: Piece) -> dict[str, np.ndarray]:
        if piece.clip not in values:  # of an earlier manifest, in a shard that is written again
            raise KeySyncError(f"{output} holds clip {piece.clip!r}, which {manifest} does not list; write to another folder")
        return {name: array[piece.start : piece.stop] for name, array in values[piece.clip].items()}

    write_group(output, base, load, clips)
    return len(clips)


def _rows(manifest: Path) -> list[dict[str, str]]:
    advice = "give the manifest.csv of keysync data synth --arrays"
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            rows = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise KeySyncError(f"{manifest} cannot be read ({error}); {advice}") from None
    if not rows:
        raise KeySyncError(f"{manifest} lists no clip; {advice}")
    for line, row in rows:
        missing = next((name for name in MANIFEST_FIELDS if not row.get(name)), None)
        if missing is not None:
            raise KeySyncError(f"{manifest}, line {line}: no {missing!r}; {advice}")
        if row["split"] not in SPLITS:
            raise KeySyncError(f"{manifest}, line {line}: split {row['split']!r}; write {', '.join(SPLITS)}")
        if Path(row["path"]).suffix != ARRAYS:
            raise KeySyncError(
                f"{manifest}, line {line}: {row['path']}; draw the clips as arrays (keysync data synth --arrays), or use keysync prepare"
            )
    return [row for _, row in rows]


def _check_clips(paths: Mapping[str, Path], manifest: str | Path) -> tuple[dict[str, int], int]:
    """Length of every clip and the side of their frames; what is damaged is found before hours of encoding."""
    lengths, sizes = {}, {}
    for name, path in paths.items():
        try:
            lengths[name], sizes[name] = check_clip(path)
        except KeySyncError as error:
            raise KeySyncError(f"{error}; {manifest} lists this clip: repeat the keysync data synth that drew the set") from error
    first = next(iter(sizes))
    other = next((name for name in sizes if sizes[name] != sizes[first]), None)
    if other is not None:
        raise KeySyncError(f"{manifest}: {first} is {sizes[first]} pixels wide, {other} {sizes[other]}; use clips of one size")
    return lengths, sizes[first]


def _fingerprint(path: Path) -> str:
    """Of all that a clip's values depend on beside the model: shards of another clip of that name are not taken for its own."""
    return digest(*(file_digest(each) for each in (path, sidecar(path, VOICE_FILE), sidecar(path, LANDMARK_FILE))))


def _check_output(output: str, base: Group, clips: Sequence[Clip]) -> None:
    """Raises what writing there would raise, before anything is encoded."""
    if not output:
        raise UsageError("the output is empty; name a dataset directory")
    if is_local(output) and Path(output).is_file():
        raise KeySyncError(f"{output} is a file; name a folder for the shards")
    try:
        prepare_group(output, base, clips)
        make_folder(output)
    except ImportError as error:  # the package that speaks gs:// is not installed
        raise KeySyncError(f"cannot write {output}: {error}") from None
