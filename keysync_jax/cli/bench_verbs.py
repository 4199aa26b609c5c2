"""`keysync bench`; `python -m keysync_jax bench` runs where little more than JAX is installed."""

from __future__ import annotations

import argparse
import math
import time

from keysync_jax.cli.verbs import add_verb
from keysync_jax.core.errors import UsageError

_EXAMPLES = """\
  keysync bench unet --size tiny                                        one forward pass
  keysync bench train --size medium --remat full --repeats 5            one update
  keysync bench train --size full --dtype bfloat16 --batch 4 --pixels
  keysync bench attention --size full --dtype bfloat16 --attention xla  forward and gradient of the network's shapes
  keysync bench gpu -o bench.json                                       the set that matters on one GPU, within ten minutes"""

_ATTENTION = ("size", "dtype", "attention", "repeats", "warmup")
_UNET = (*_ATTENTION, "batch")
# Which flags each task takes, besides -o and -v. None of them has a default here, so that a given one is told apart; see `bench.Case`.
_FLAGS = {"unet": _UNET, "train": (*_UNET, "remat", "train_all", "pixels"), "attention": _ATTENTION, "gpu": ("budget",)}
_BUDGET, _LEAST_BUDGET = 600.0, 60.0  # seconds; to start JAX and to end a process that fills a device takes some


def add_bench(verbs) -> None:
    """Add `keysync bench`."""
    p = add_verb(verbs, "bench", _bench, "time, memory and FLOPs of the network and a training step", _EXAMPLES)
    p.add_argument("what", choices=list(_FLAGS), help="gpu: a set of cases at full size")
    p.add_argument("-o", "--output", metavar="JSON", help="write all figures, with device, date and versions")
    case = p.add_argument_group("unet, train and attention")
    case.add_argument(
        "--size", choices=["tiny", "medium", "full"], help="tiny (default); medium: 59.7 M parameters, not for attention; full: 1.5 G"
    )
    case.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the computation (default float32)")
    case.add_argument("--attention", choices=["auto", "xla", "cudnn", "splash"], help="(default auto)")
    case.add_argument("--repeats", type=int, metavar="N", help="timed calls (default 20, on a CPU 5)")
    case.add_argument("--warmup", type=int, metavar="N", help="calls before (default 3, on a CPU 1)")
    case.add_argument("--batch", type=int, metavar="N", help="windows of 14 frames, not for attention (default 1)")
    train = p.add_argument_group("train")
    train.add_argument(
        "--remat", choices=["none", "dots", "conv_aware", "names", "full"], help="what the backward pass keeps (default conv_aware)"
    )
    train.add_argument("--train-all", action="store_true", default=None, help="train the temporal layers too")
    train.add_argument("--pixels", action="store_true", default=None, help="with the pixel loss on one frame")
    gpu = p.add_argument_group("gpu")
    gpu.add_argument(
        "--budget", type=float, metavar="S", help=f"end within so many seconds (default {_BUDGET:.0f}, at least {_LEAST_BUDGET:.0f})"
    )


def _bench(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    settings = _settings(args)
    budget = settings.pop("budget", _BUDGET)
    if not _LEAST_BUDGET <= budget < math.inf:
        raise UsageError(f"--budget {budget:g}: give the seconds to end within, at least {_LEAST_BUDGET:.0f}")

    import jax

    from keysync_jax.planning import bench

    if args.what == "gpu":  # which must not touch the device here, as each case has it in turn
        report = bench.run_all(bench.gpu_set(), args.output, budget - (time.monotonic() - begin), accelerator=True)
    else:
        if settings.pop("train_all", False):
            settings["freeze"] = "none"
        if jax.default_backend() == "cpu":
            settings = {"repeats": 5, "warmup": 1} | settings
        report = bench.run_all([bench.Case(args.what, **settings)], args.output)
    return int(not report["results"] or any("error" in result for result in report["results"]))


def _settings(args: argparse.Namespace) -> dict:
    """The flags that were given. Raises UsageError for one that the task does not take."""
    given = {name: value for name, value in vars(args).items() if value is not None and any(name in flags for flags in _FLAGS.values())}
    for name in given:
        if name not in _FLAGS[args.what]:
            others = ", ".join(task for task, flags in _FLAGS.items() if name in flags)
            raise UsageError(f"bench {args.what} takes no --{name.replace('_', '-')}, which is for {others}")
    return given
