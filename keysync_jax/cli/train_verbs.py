"""`keysync train`, and `keysync ablate`, which trains and judges several runs."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys

from keysync_jax.cli.verbs import add_verb
from keysync_jax.core.errors import KeySyncError, UsageError

_TRAIN_EXAMPLES = """\
  keysync train --config keyframe --workdir runs/keyframe --config.data.datasets=data --config.init.path=svd/ --config.init.kind=svd
  keysync train --config keyframe --workdir runs/keyframe --config.data.datasets=data      once more: goes on from the last checkpoint
  keysync train --config interpolation --workdir runs/i --config.data.datasets=hdtf,celebv --config.data.weights=0.7,0.3
  keysync train --config runs/keyframe/config.json --workdir runs/again                    the recipe of another run
  keysync inspect --config keyframe                                                        every key that --config.KEY=VALUE can set"""


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
    p.add_argument("--allow-mismatch", action="store_true", help="mix datasets prepared with other weights of VAE or speech encoder")
    hosts = p.add_argument_group("several hosts (TPU pods, GKE, Slurm and Open MPI are recognised; elsewhere give all three)")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--num-processes", type=int, metavar="N")
    hosts.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def _train(args) -> int:
    from keysync_jax.parallel import distributed
    from keysync_jax.training import recipes
    from keysync_jax.training.config import train_config
    from keysync_jax.training.profiling import parse_profile_steps
    from keysync_jax.training.trainables import trainable_of

    # Whatever can be wrong in the command is found before devices are touched.
    profile = None if args.profile_steps is None else parse_profile_steps(args.profile_steps)
    allowed = ["--config.data.allow_mismatch=True"] if args.allow_mismatch else []
    config = train_config(recipes.load(args.config, [*args.overrides, *allowed]))
    if profile and profile[1] > config.num_steps:
        raise UsageError(f"--profile_steps {args.profile_steps}: the run ends with step {config.num_steps}")
    trainable_of(config)
    distributed.start(args.coordinator, args.num_processes, args.process_id)

    from keysync_jax.training.loop import train
    from keysync_jax.training.start import check

    if args.check:
        for line in check.describe(config, args.workdir):
            print(line)
        return 0
    train(config, args.workdir, profile_steps=profile, command=shlex.join(["keysync", *sys.argv[1:]]))
    return 0


def add_ablate(verbs) -> None:
    """Add `keysync ablate`."""
    example = "  keysync ablate --data data -o ablations --config.init.vae=vae_model --jobs 2"
    p = add_verb(verbs, "ablate", _ablate, "train and judge the ablations on drawn talkers", example)
    p.add_argument("--data", required=True, metavar="DIR", help="shards of drawn talkers (docs/ablations.md)")
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the runs; the same folder goes on")
    p.add_argument("--only", metavar="RUN,…", help="of box, mouth, one_stage, interpolation (default: all)")
    p.add_argument("--interpolation", metavar="DIR", help="take this model's interpolation stage where none is trained")
    p.add_argument("--clips", type=int, default=24, metavar="N", help="held-out clips (default 24)")
    p.add_argument("--seed", type=int, default=0, help="another seed is another set of clips")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs that train at once (default 1)")
    p.add_argument("--quiet", action="store_true", help="no progress")
    p.add_argument(
        "--config.KEY=VALUE", dest="_", action="store_true",
        help="change the recipe of every run, for example --config.init.vae=vae_model --config.num_steps=500",
    )  # fmt: skip
    p.set_defaults(takes_overrides=True)


def _ablate(args: argparse.Namespace) -> int:
    from keysync_jax.evaluation import ablations

    # A scheduler at its time limit: the runs save what they have, then this process ends as they do.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    only = ablations.RUNS if args.only is None else [name.strip() for name in args.only.split(",")]
    try:
        report = ablations.run(
            args.output, args.data, args.overrides, only=tuple(only), interpolation=args.interpolation, clips=args.clips, seed=args.seed,
            jobs=args.jobs, quiet=args.quiet,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise KeySyncError("stopped; the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    print(ablations.tables(report))
    return 0
