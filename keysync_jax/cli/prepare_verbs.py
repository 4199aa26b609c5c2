"""`keysync prepare`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from keysync_jax.cli.verbs import add_verb, check_remote, number
from keysync_jax.config import COLUMN_ENCODERS, FACE_BACKENDS, OCCLUSION_BACKENDS, optional_columns
from keysync_jax.core.errors import UsageError

_LARGEST_CROP = 4096


def add_prepare(verbs) -> None:
    """Add `keysync prepare`."""
    p = add_verb(
        verbs, "prepare", _prepare, "turn raw videos into curated, precomputed training shards (restartable)",
        "  keysync prepare videos/ -o data --model DIR --workers 4\n"
        "  keysync prepare manifest.csv -o gs://bucket/data --model DIR --runner FlinkRunner --beam='--flink_master=host:8081'\n"
        "  keysync prepare raw/ --annotations HDTF_dataset/ -o data --model DIR --scorer quality=hyperiqa.pt",
    )  # fmt: skip
    p.add_argument("input", metavar="INPUT", help="folder, video, list of paths (.txt), or manifest (.csv, .json)")
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="dataset directory, local or gs://; run again to go on or to add")
    p.add_argument(
        "--model", required=True, metavar="DIR", help="model directory whose VAE and speech encoders compute the features, or demo"
    )
    p.add_argument("--annotations", metavar="PATH", help="annotations of HDTF, CelebV-HQ or CelebV-Text; INPUT holds the videos")
    p.add_argument("--source", default="", metavar="NAME", help="name of the collection, for items that do not state one")
    p.add_argument("--seed", type=int, default=0, help="of posterior samples, random views and splits")
    keep = p.add_argument_group("what is kept")
    keep.add_argument("--crop-size", type=int, metavar="PX", help="side of the face crop (default: the model's resolution)")
    keep.add_argument("--min-frames", type=int, metavar="N", help="shortest clip at 25 fps (default 25)")
    keep.add_argument("--max-frames", type=int, metavar="N", help="longest clip; longer shots are cut (default 500)")
    keep.add_argument("--min-face", type=number, metavar="X", help="smallest face as a fraction of the crop (default 0.3)")
    keep.add_argument("--max-silence", type=number, metavar="X", help="largest share of silence (default: no limit)")
    keep.add_argument("--faces", choices=FACE_BACKENDS, help="landmark detector where a video has no landmark file")
    keep.add_argument("--face-weights", metavar="DIR", help="folder with FAN's weight files")
    keep.add_argument(
        "--scorer", action="append", default=[], metavar="KIND=PATH",
        help="quality, active_speaker or sync, with a TorchScript file or module:Class@PATH (repeat); without weights a scorer is off",
    )  # fmt: skip
    out = p.add_argument_group("output")
    out.add_argument("--columns", metavar="LIST", help=f"of {','.join(optional_columns())} (default jpeg,sound,log_mel)")
    out.add_argument(
        "--column-weights",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"local weights of {', '.join(COLUMN_ENCODERS)}, occluder, or a speech encoder that the model lacks (beats=BEATs.pt)",
    )
    out.add_argument(
        "--occlusion-backend", choices=OCCLUSION_BACKENDS,
        help="what follows the clicks of X.occluder.json: SAM 2 in Flax (default), or the sam2 package, which needs torch",
    )  # fmt: skip
    out.add_argument("--shard-mb", type=number, metavar="MB", help="size of a shard (default 256)")
    out.add_argument("--splits", metavar="LIST", help="shares of speakers (default train=0.9,validation=0.05,test=0.05)")
    out.add_argument("--discard-work", action="store_true", help="delete the computed features once all shards are written")
    job = p.add_argument_group("running")
    job.add_argument("--workers", type=int, default=1, metavar="N", help="local processes (default 1); the result does not depend on it")
    job.add_argument("--work", metavar="DIR", help="folder for finished work that all workers reach (default: OUTPUT/.work)")
    job.add_argument("--runner", metavar="NAME", help="Apache Beam runner (default DirectRunner)")
    job.add_argument("--beam", default="", metavar="FLAGS", help="further Beam flags in one string, e.g. --beam='--flink_master=host:8081'")
    job.add_argument("--quiet", action="store_true", help="no progress")


def _prepare(args) -> int:
    from keysync_jax.core import assets
    from keysync_jax.data_pipeline.prepare.groups import plan_features
    from keysync_jax.data_pipeline.prepare.manifest import read_inputs
    from keysync_jax.data_pipeline.prepare.run import prepare
    from keysync_jax.data_pipeline.prepare.scorers import parse
    from keysync_jax.data_pipeline.prepare.settings import Curation, Output

    if args.workers < 1:
        raise UsageError(f"--workers is {args.workers}; it must be at least 1")
    if args.crop_size is not None and not 1 <= args.crop_size <= _LARGEST_CROP:
        raise UsageError(f"--crop-size is {args.crop_size}; choose 1 to {_LARGEST_CROP} pixels")
    if not args.output or ("://" not in args.output and Path(args.output).is_file()):
        raise UsageError(f"--output {args.output!r} is no folder; name a dataset directory")
    check_remote(args.output)
    items = read_inputs(args.input, args.annotations, args.source, (lambda _: None) if args.quiet else print)
    chosen = {
        "columns": _columns(args.columns), "shard_megabytes": args.shard_mb, "split_fractions": _shares(args.splits),
        "weights": dict(_pair(text, "--column-weights") for text in args.column_weights), "seed": args.seed,
        "discard_work": args.discard_work, "occlusion_backend": args.occlusion_backend,
    }  # fmt: skip
    target = Output(**{k: v for k, v in chosen.items() if v is not None})
    model = assets.resolve(args.model)
    size = plan_features(model, target, args.crop_size).crop_size
    wanted = {
        "crop_size": size, "min_frames": args.min_frames, "max_frames": args.max_frames, "min_face": args.min_face,
        "max_silence": args.max_silence, "faces": args.faces, "face_weights": args.face_weights, "seed": args.seed,
        "scorers": tuple(parse(text) for text in args.scorer),
    }  # fmt: skip
    curation = Curation(**{k: v for k, v in wanted.items() if v is not None})
    flags = ([f"--runner={args.runner}"] if args.runner else []) + _beam(args.beam)
    summary = prepare(items, args.output, model, curation, target, work=args.work, workers=args.workers, beam=flags, quiet=args.quiet)
    print(summary)
    return 0


def _beam(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--beam {text!r} cannot be split into flags: {str(error).lower()}") from None


def _columns(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _shares(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        return {name.strip(): number(share) for name, share in (part.split("=") for part in text.split(","))}
    except (ValueError, argparse.ArgumentTypeError):
        raise UsageError(f"--splits {text!r} must read like train=0.9,validation=0.1") from None


def _pair(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise UsageError(f"{option} {text!r} must read NAME=PATH")
    return name, value
