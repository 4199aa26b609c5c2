"""The verbs around training: `keysync train`, and `keysync export`, which takes its result back to PyTorch."""

from __future__ import annotations

import argparse
import shlex
import sys

from keysync_jax import assets
from keysync_jax.cli.verbs import add_verb
from keysync_jax.core.errors import UsageError

_TRAIN_EXAMPLES = """\
  keysync train --config keyframe --workdir runs/keyframe --config.data.datasets=data --config.init.path=svd/ --config.init.kind=svd
  keysync train --config keyframe --workdir runs/keyframe --config.data.datasets=data      once more: goes on from the last checkpoint
  keysync train --config interpolation --workdir runs/i --config.data.datasets=hdtf,celebv --config.data.weights=0.7,0.3
  keysync train --config runs/keyframe/config.json --workdir runs/again                    the recipe of another run
  keysync inspect --config keyframe                                                        every key that --config.KEY=VALUE can set"""

_EXPORT_EXAMPLES = """\
  keysync export runs/vae --ema -o vae_model                                   a run's last checkpoint as a model directory
  keysync export runs/vae runs/keyframe runs/interpolation --ema -o model      several runs make one directory
  keysync export runs/keyframe --step 60000 --format keysync -o out            keyframe_dub.pt, as the PyTorch code reads it
  keysync export DIR --format diffusers -o out                                 SVD folder with unet/ and vae/
  keysync export runs/keyframe runs/interpolation -o model --push hub:owner/name"""


def add_train(verbs) -> None:
    """Add `keysync train`."""
    p = add_verb(verbs, "train", _train, "train a stage or an autoencoder, or go on with a run", _TRAIN_EXAMPLES)
    p.add_argument("--config", required=True, metavar="NAME", help="recipe: a shipped name, a .py file, or a run's config.json")
    p.add_argument(  # for --help alone: `cli` takes such words out before
        "--config.KEY=VALUE", dest="_", action="store_true", help="set a key of the recipe, as --config.data.batch_size=8; a list as a,b"
    )
    p.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run, local or gs://; a run in it is continued")
    p.add_argument("--profile_steps", metavar="A:B", help="write a profile of steps A to B to WORKDIR/profile")
    p.add_argument("--check", action="store_true", help="open data and weights, say what would be trained from what, and stop")
    hosts = p.add_argument_group("several hosts (TPU pods, GKE, Slurm and Open MPI are recognised; elsewhere give all three)")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--num-processes", type=int, metavar="N")
    hosts.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def _train(args) -> int:
    from keysync_jax.parallel import distributed
    from keysync_jax.training import recipes
    from keysync_jax.training.config import train_config
    from keysync_jax.training.profiling import parse_profile_steps

    # Whatever can be wrong in the command is found before devices are touched.
    profile = None if args.profile_steps is None else parse_profile_steps(args.profile_steps)
    config = train_config(recipes.load(args.config, args.overrides))
    if profile and profile[1] > config.num_steps:
        raise UsageError(f"--profile_steps {args.profile_steps}: the run ends with step {config.num_steps}")
    distributed.start(args.coordinator, args.num_processes, args.process_id)

    from keysync_jax.training.loop import train
    from keysync_jax.training.start import initial

    if args.check:
        for line in initial.describe(config, args.workdir):
            print(line)
        return 0
    train(config, args.workdir, profile_steps=profile, command=shlex.join(["keysync", *sys.argv[1:]]))
    return 0


def add_export(verbs) -> None:
    """Add `keysync export`."""
    p = add_verb(verbs, "export", _export, "write training runs or a model directory, ours or for PyTorch", _EXPORT_EXAMPLES)
    p.add_argument("sources", nargs="+", metavar="SRC", help="workdir of a run, or model directory (local, gs://, hub:owner/name or demo)")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write")
    p.add_argument("--format", choices=["model", "keysync", "diffusers"], help="default: model directory for runs")
    p.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="type to store (default: as it is)")
    p.add_argument("--force", action="store_true", help="replace an existing export")
    run = p.add_argument_group("training runs")
    run.add_argument("--step", action="append", default=[], metavar="N", help="checkpoint (default: the last); PART=N for one of several")
    run.add_argument("--ema", action="store_true", help="the averaged weights")
    run.add_argument("--log-mel", type=int, metavar="N", help="add a log-mel encoder of N bands (default: what the stages read, else 80)")
    run.add_argument("--latent-scale", type=float, metavar="X", help="of a VAE run (default: measured on its training frames)")
    torch = p.add_argument_group("PyTorch formats")
    torch.add_argument("--container", choices=["pt", "safetensors"], default="pt", help="keysync format: file type (default pt)")
    torch.add_argument("--vae-copies", action="store_true", help="keysync format: add the optional VAE encoder copies")
    torch.add_argument("--stage", action="append", choices=["keyframe", "interpolation"], help="only this stage (repeat for both)")
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
