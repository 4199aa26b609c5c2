"""`keysync bench`, also as `python -m keysync_jax.bench` on machines that hold little more than JAX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from keysync_jax.errors import KeySyncError, UsageError
from keysync_jax.verbs import add_verb

_EXAMPLES = """\
  keysync bench unet --size tiny                                        one forward pass
  keysync bench train --size medium --remat full --repeats 5            one update
  keysync bench train --size full --dtype bfloat16 --batch 4 --pixels
  keysync bench attention --size full --dtype bfloat16 --attention xla  forward and gradient of the network's shapes
  keysync bench gpu -o bench.json                                       the set that matters on one GPU, within ten minutes"""


def add_bench(verbs) -> None:
    """Add `keysync bench`."""
    _options(add_verb(verbs, "bench", run, "time, memory and FLOPs of the network and a training step", _EXAMPLES))


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument("what", choices=["unet", "train", "attention", "gpu"], help="gpu: a set of cases at full size")
    p.add_argument("--size", choices=["tiny", "medium", "full"], default="tiny", help="tiny; medium: 59.7 M parameters; full: 1.5 G")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation (default float32)")
    p.add_argument("--attention", choices=["auto", "xla", "cudnn", "splash"], default="auto")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="windows of 14 frames (default 1)")
    p.add_argument("--repeats", type=int, metavar="N", help="timed calls (default 20, on a CPU 5)")
    p.add_argument("--warmup", type=int, metavar="N", help="calls before (default 3, on a CPU 1)")
    train = p.add_argument_group("training")
    train.add_argument(
        "--remat", choices=["none", "dots", "conv_aware", "names", "full"], default="conv_aware", help="what the backward pass keeps"
    )
    train.add_argument("--train-all", action="store_true", help="train the temporal layers too")
    train.add_argument("--pixels", action="store_true", help="with the pixel loss on one frame")
    p.add_argument("--budget", type=float, default=540.0, metavar="S", help="gpu: begin no case after so many seconds (default 540)")
    p.add_argument("-o", "--output", metavar="JSON", help="write all figures, with device, date and versions")


def run(args: argparse.Namespace) -> int:
    import jax

    from keysync_jax import bench

    on_cpu = jax.default_backend() == "cpu"
    repeats = {
        "repeats": (5 if on_cpu else 20) if args.repeats is None else args.repeats,
        "warmup": (1 if on_cpu else 3) if args.warmup is None else args.warmup,
    }
    if args.what == "gpu":
        if on_cpu:
            raise UsageError("keysync bench gpu measures the full-size network on an accelerator; this machine has none")
        report = bench.run_all(bench.gpu_set(), args.output, args.budget)
    else:
        case = bench.Case(
            args.what, args.size, args.dtype, args.attention, args.remat, "none" if args.train_all else "temporal", args.pixels, args.batch,
            **repeats,
        )  # fmt: skip
        report = bench.run_all([case], args.output)
    return int(any("error" in result for result in report["results"]))


def main(argv: Sequence[str] | None = None) -> int:
    """The verb on its own; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m keysync_jax.bench", epilog=f"examples:\n{_EXAMPLES}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _options(parser)
    try:
        return run(parser.parse_args(argv))
    except KeySyncError as error:
        print(f"keysync bench: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
