"""`keysync bench`; `python -m keysync_jax bench` runs where little more than JAX is installed."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

from keysync_jax.cli.verbs import add_group, add_verb
from keysync_jax.config import ATTENTION, BENCH_SIZES, COMPUTE_DTYPES, Remat
from keysync_jax.core.errors import UsageError

_BUDGET, _LEAST_BUDGET = 600.0, 60.0  # seconds; to start JAX and to end a process that fills a device takes some


def add_bench(verbs) -> None:
    """Add `keysync bench` and its verbs."""
    parts = add_group(
        verbs, "bench", "time, memory and FLOPs of the network and a training step",
        "  keysync bench unet --size tiny                                        one forward pass\n"
        "  keysync bench train --size full --dtype bfloat16 --batch 4 --pixels   one update\n"
        "  keysync bench gpu -o bench.json                                       the set that matters on one GPU",
    )  # fmt: skip
    unet = add_verb(parts, "unet", _bench, "one forward pass", "  keysync bench unet --size tiny")
    _add_case(unet, BENCH_SIZES)
    _add_batch(unet)
    train = add_verb(
        parts, "train", _bench, "one update",
        "  keysync bench train --size medium --remat full --repeats 5\n"
        "  keysync bench train --size full --dtype bfloat16 --batch 4 --pixels",
    )  # fmt: skip
    _add_case(train, BENCH_SIZES)
    _add_batch(train)
    train.add_argument("--remat", choices=[each.value for each in Remat], help="what the backward pass keeps (default conv_aware)")
    train.add_argument("--train-all", dest="freeze", action="store_const", const="none", help="train the temporal layers too")
    train.add_argument("--pixels", action="store_true", default=None, help="with the pixel loss on one frame")
    attention = add_verb(
        parts, "attention", _bench, "forward and gradient of attention, for each of the network's shapes",
        "  keysync bench attention --size full --dtype bfloat16 --attention xla",
    )  # fmt: skip
    _add_case(attention, [size for size in BENCH_SIZES if size != "medium"])  # which has no shapes of its own
    gpu = add_verb(parts, "gpu", _bench_gpu, "a set of cases at full size on one GPU", "  keysync bench gpu -o bench.json")
    _add_output(gpu)
    gpu.add_argument(
        "--budget", type=float, default=_BUDGET, metavar="S",
        help=f"end within so many seconds (default {_BUDGET:.0f}, at least {_LEAST_BUDGET:.0f})",
    )  # fmt: skip


def _add_output(p: argparse.ArgumentParser) -> None:
    p.add_argument("-o", "--output", metavar="JSON", help="write all figures, with device, date and versions")


def _add_case(p: argparse.ArgumentParser, sizes) -> None:
    """Fields of `planning.bench.Case`, which has the defaults."""
    p.set_defaults(task=p.prog.split()[-1])
    _add_output(p)
    p.add_argument("--size", choices=sizes, help="tiny (default); medium: 59.7 M parameters; full: 1.5 G")
    p.add_argument("--dtype", choices=COMPUTE_DTYPES, help="of the computation (default float32)")
    p.add_argument("--attention", choices=ATTENTION, help="(default auto)")
    p.add_argument("--repeats", type=int, metavar="N", help="timed calls (default 20, on a CPU 5)")
    p.add_argument("--warmup", type=int, metavar="N", help="calls before (default 3, on a CPU 1)")


def _add_batch(p: argparse.ArgumentParser) -> None:
    p.add_argument("--batch", type=int, metavar="N", help="windows of 14 frames (default 1)")


def _bench(args: argparse.Namespace) -> int:
    import jax

    from keysync_jax.planning import bench

    fields = [field for field in bench.Case.__dataclass_fields__ if getattr(args, field, None) is not None]
    settings: dict[str, Any] = {field: getattr(args, field) for field in fields}
    if jax.default_backend() == "cpu":
        settings = {"repeats": 5, "warmup": 1} | settings
    return _status(bench.run_all([bench.Case(**settings)], args.output))


def _bench_gpu(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    if not _LEAST_BUDGET <= args.budget < math.inf:
        raise UsageError(f"--budget {args.budget:g}: give the seconds to end within, at least {_LEAST_BUDGET:.0f}")

    from keysync_jax.planning import bench

    # Does not touch the device here, as each case has it in turn.
    return _status(bench.run_all(bench.gpu_set(), args.output, args.budget - (time.monotonic() - begin), accelerator=True))


def _status(report: dict[str, Any]) -> int:
    return int(not report["results"] or any("error" in result for result in report["results"]))
