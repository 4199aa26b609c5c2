"""The verbs about weights: `keysync convert`, `export`, `inspect`, `init` and `verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from keysync_jax.cli.verbs import add_verb
from keysync_jax.config import AUDIO_ENCODERS, CONTAINERS, EXPORT_FORMATS, MASK_KINDS, MODEL_SIZES, STAGES, STORED_DTYPES, SYSTEMS
from keysync_jax.core import assets
from keysync_jax.core.errors import UsageError

_EXPORT_EXAMPLES = """\
  keysync export runs/vae --ema -o vae_model                                   a run's last checkpoint as a model directory
  keysync export runs/vae runs/keyframe runs/interpolation --ema -o model      several runs make one directory
  keysync export runs/keyframe --step 60000 --format keysync -o out            keyframe_dub.pt, as the PyTorch code reads it
  keysync export DIR --format diffusers -o out                                 SVD folder with unet/ and vae/
  keysync export runs/keyframe runs/interpolation -o model --push hub:owner/name"""


def add_verbs(verbs) -> None:
    """Add the verbs to the `keysync` command."""
    for add in (add_convert, add_export, add_inspect, add_init, add_verify):
        add(verbs)


def add_convert(verbs) -> None:
    """Add `keysync convert`."""
    p = add_verb(
        verbs, "convert", _convert, "turn PyTorch weights into a model directory (no PyTorch needed)",
        "  keysync convert keyframe_dub.pt interpolation_dub.pt stable-video-diffusion/ hubert-base/ WavLM-Base+.pt -o model\n"
        "  keysync convert keyframe.pt interpolation.pt interpolation_bad.pt svd/ WavLM-Base+.pt BEATs.pt wav2vec2-base-960h/ -o keyface",
    )  # fmt: skip
    p.add_argument("sources", nargs="+", metavar="SRC", help="checkpoint files and folders; see docs/convert.md")
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="model directory to write")
    p.add_argument(
        "--allow-missing", action="append", default=[], metavar="KEY", help="go on without this tensor or pattern ('loss.*'; repeat)"
    )
    p.add_argument("--allow-unexpected", action="append", default=[], metavar="KEY", help="ignore this tensor or pattern (repeat for each)")
    p.add_argument(
        "--ema", action="store_true", help="take the running average where a checkpoint carries one (default: the weights as trained)"
    )
    p.add_argument("--force", action="store_true", help="replace an existing model directory")
    known = p.add_argument_group("what a checkpoint does not say of itself (defaults are those of the released weights)")
    known.add_argument(
        "--encoder", action="append", default=[], metavar="STAGE=KIND", help=f"speech encoder of a stage: {', '.join(AUDIO_ENCODERS)}"
    )
    known.add_argument(
        "--bad", metavar="FILE", help="KeyFace: the worse interpolation network of its autoguidance, if not called interpolation_bad…"
    )
    known.add_argument("--mask", choices=MASK_KINDS, help="mask that it was trained with")
    known.add_argument("--resolution", type=int, metavar="PIXELS", help="side of the crop that it was trained with")
    known.add_argument("--head-channels", type=int, metavar="N", help="attention head size")
    p.add_argument("--dtype", choices=STORED_DTYPES, help="type to store (default: as it is)")


def _convert(args) -> int:
    from keysync_jax.converters.convert import convert

    wrong = [text for text in args.encoder if "=" not in text]
    if wrong:
        raise UsageError(f"--encoder {wrong[0]}: write STAGE=KIND, for example interpolation=hubert")
    options = {"bad": args.bad, "mask": args.mask, "resolution": args.resolution, "head_channels": args.head_channels, "dtype": args.dtype}
    convert(
        args.sources, args.output, allow_missing=args.allow_missing, allow_unexpected=args.allow_unexpected, force=args.force, ema=args.ema,
        encoders=dict(text.split("=", 1) for text in args.encoder), **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    return 0


def add_inspect(verbs) -> None:
    """Add `keysync inspect`."""
    p = add_verb(
        verbs, "inspect", _inspect, "say what a weights file, model directory or recipe holds",
        "  keysync inspect keyframe_dub.pt\n  keysync inspect DIR --tensors\n  keysync inspect --config keyframe",
    )  # fmt: skip
    p.add_argument("path", nargs="?", metavar="PATH", help="any file or folder that convert reads, a model directory, a dataset or a run")
    p.add_argument("--tensors", action="store_true", help="list every tensor with shape and type")
    p.add_argument("--json", action="store_true", help="machine-readable")
    p.add_argument("--config", metavar="NAME", help="show a recipe instead: a shipped name or a .py file; --config.KEY=VALUE overrides")


def _inspect(args) -> int:
    if args.config:
        from keysync_jax.training import recipes

        print(recipes.load(args.config, args.overrides))
        return 0
    if not args.path:
        raise UsageError("inspect needs a PATH or --config NAME")
    if _inspect_other(args.path, args.json):
        return 0
    from keysync_jax.converters.inspect_weights import show

    show(args.path, tensors=args.tensors, as_json=args.json)
    return 0


def _inspect_other(path: str, as_json: bool) -> bool:
    """Says what a dataset, a training run or one of its checkpoints is; False for anything else."""
    if "://" in path or path.startswith("hub:"):
        return False
    place = Path(path)
    if (place / "clips.jsonl").is_file() and (place / "keysync.json").is_file():
        from keysync_jax.data_pipeline.prepare.inspect_dataset import print_summary

        if not as_json:
            print(f"{path}: a dataset that keysync prepare wrote")
        print_summary(path, as_json=as_json)
        return True
    folders = (place, place.parent, place.parent.parent)
    if not place.is_dir() or not any((folder / "config.json").is_file() for folder in folders):
        return False
    from keysync_jax.training.start import runs  # after the cheap questions: this imports JAX

    workdir = next((folder for folder in folders if runs.is_run(folder)), None)
    if workdir is None:
        return False
    from keysync_jax.training.trainables import trainable_of

    config, last = runs.read_config(workdir), runs.last_step(workdir)
    found = {"path": path, "run": str(workdir), "part": trainable_of(config).part, "last_step": last, "num_steps": config.num_steps}
    if as_json:
        print(json.dumps(found, indent=1))
        return True
    what = "a training run" if workdir == place else f"a checkpoint in the training run {workdir}"
    steps = f"its last checkpoint is of step {last}" if last is not None else "it has no checkpoint yet"
    print(f"{path}: {what}: {found['part']}, {config.num_steps} steps; {steps}")
    print(f"recipe: keysync inspect --config {workdir / 'config.json'}; as a model directory: keysync export {workdir} -o DIR")
    return True


def add_init(verbs) -> None:
    """Add `keysync init`."""
    p = add_verb(
        verbs, "init", _init, "make a model directory with random weights, to try things out",
        "  keysync init --size tiny -o tiny\n  keysync init --size tiny --mode keyface -o face",
    )  # fmt: skip
    p.add_argument("--size", required=True, choices=MODEL_SIZES, help="tiny: 128-px crop, megabytes; full: the released layout, 14 GB")
    p.add_argument("--mode", choices=SYSTEMS, default=SYSTEMS[0], help="keysync dubs, keyface animates a picture (default keysync)")
    p.add_argument("-o", "--output", required=True, metavar="DIR")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--force", action="store_true", help="replace an existing model directory")


def _init(args) -> int:
    from keysync_jax.converters.initialize import initialize

    initialize(args.size, args.output, mode=args.mode, seed=args.seed, force=args.force)
    return 0


def add_verify(verbs) -> None:
    """Add `keysync verify`."""
    p = add_verb(
        verbs, "verify", _verify, "run reference cases through our code and compare the numbers",
        "  keysync verify tests/golden\n  keysync verify CASES_DIR --only wavlm --only masks",
    )  # fmt: skip
    p.add_argument("cases", metavar="CASES_DIR", help="folder of cases, each with case.json and io.safetensors")
    p.add_argument("--only", action="append", metavar="NAME", help="run this case only (repeat for more)")


def _verify(args) -> int:
    from keysync_jax.verify.harness import verify

    return verify(args.cases, names=args.only)


def add_export(verbs) -> None:
    """Add `keysync export`."""
    p = add_verb(verbs, "export", _export, "write training runs or a model directory, ours or for PyTorch", _EXPORT_EXAMPLES)
    p.add_argument("sources", nargs="+", metavar="SRC", help="workdir of a run, or model directory (local, gs://, hub:owner/name or demo)")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write")
    p.add_argument("--format", choices=EXPORT_FORMATS, help="default: model directory for runs")
    p.add_argument("--dtype", choices=STORED_DTYPES, help="type to store (default: as it is)")
    p.add_argument("--force", action="store_true", help="replace an existing export")
    run = p.add_argument_group("training runs")
    run.add_argument("--step", action="append", default=[], metavar="N", help="checkpoint (default: the last); PART=N for one of several")
    run.add_argument("--ema", action="store_true", help="the averaged weights")
    run.add_argument("--log-mel", type=int, metavar="N", help="add a log-mel encoder of N bands (default: what the stages read, else 80)")
    run.add_argument("--latent-scale", type=float, metavar="X", help="of a VAE run (default: measured on its training frames)")
    torch = p.add_argument_group("PyTorch formats")
    torch.add_argument("--container", choices=CONTAINERS, default=CONTAINERS[0], help="keysync format: file type (default pt)")
    torch.add_argument("--vae-copies", action="store_true", help="keysync format: add the optional VAE encoder copies")
    torch.add_argument("--stage", action="append", choices=STAGES, help="only this stage (repeat for both)")
    push = p.add_argument_group("publishing")
    push.add_argument("--push", metavar="hub:OWNER/NAME", help="upload the export with a model card; needs `hf auth login`")
    push.add_argument("--licence", default="other", metavar="ID", help="licence that the card states (default other)")
    push.add_argument("--private", action="store_true", help="make the repository private")


def _export(args: argparse.Namespace) -> int:
    from keysync_jax.converters.model_directory import is_model_directory
    from keysync_jax.training.export import model_card
    from keysync_jax.training.export.export_run import ExportOptions, export, parse_steps

    sources = [assets.resolve(each) for each in args.sources]
    source = sources[0]
    if args.format is None and not args.push and len(sources) == 1 and (source.startswith("hub:") or is_model_directory(source)):
        raise UsageError("--format is needed to export a model directory: keysync or diffusers")
    if args.push:
        model_card.check_target(args.push)
    options = ExportOptions(
        steps=parse_steps(args.step), ema=args.ema, format=args.format or "model", dtype=args.dtype, log_mel=args.log_mel,
        latent_scale=args.latent_scale, container=args.container, vae_copies=args.vae_copies, stages=args.stage, force=args.force,
        card=model_card.CardOptions(args.licence),
    )  # fmt: skip
    written = export(sources, args.output, options)
    if args.push:
        print(model_card.push(written, args.push, private=args.private))
    return 0
