"""`keysync plan`: what a recipe, or dubbing so much video, needs on given devices."""

from __future__ import annotations

import json
import sys

from keysync_jax.cli.batch_verbs import dub_columns
from keysync_jax.cli.verbs import add_verb, number
from keysync_jax.config import COMPUTE_DTYPES
from keysync_jax.core.errors import UsageError

_EXAMPLES = """\
  keysync plan --config keyframe --topology h200x8 --config.mesh.fsdp=8 --config.data.batch_size=32
  keysync plan --config keyframe --topology v5e:4x4 --config.mesh.fsdp=16 --config.data.batch_size=16 --config.remat=full
  keysync plan --config keyframe --topology v5e:4x4 --config.mesh.fsdp=16 --config.remat=full --compile    (needs libtpu)
  keysync plan --config keyframe --topology h200 --config.optimizer.accumulate=16 --compile    (needs jax[cuda13], no GPU)
  keysync plan --config interpolation --topology cpu:8 --json
  keysync plan --dub jobs.csv --model DIR --topology h200x8 --price 32     a list of keysync batch, at 32 an hour for all eight
  keysync plan --dub 3600 --topology v5e:2x2                               an hour of video with a model of the released size"""

_TOPOLOGY = (
    "v5e:4x4, v5p:2x2x2 (TPU chips), h200x8, a100x8 (GPUs) or cpu:8; with --config.mesh.slices=N this is one slice (or host) and the plan "
    "is for N of them"
)


def add_plan(verbs) -> None:
    """Add `keysync plan`."""
    p = add_verb(verbs, "plan", _plan, "memory, FLOPs and time of a recipe on devices you need not have", _EXAMPLES)
    p.add_argument("--config", metavar="NAME", help="recipe: a shipped name, a .py file, or a run's config.json")
    p.add_argument("--config.KEY", dest="_", metavar="VALUE", help="set a key of the recipe, for example --config.mesh.fsdp=8")
    p.add_argument("--topology", required=True, metavar="T", help=_TOPOLOGY)
    p.add_argument(
        "--compile", nargs="?", const="memory", choices=["memory", "whole"],
        help="compile the step for the topology (libtpu or JAX's CUDA plugin): until its memory is placed, or to the end (at full size "
        "over an hour for TPUs)",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="machine-readable")
    dub = p.add_argument_group("dubbing instead of training")
    dub.add_argument("--dub", metavar="JOBS|SECONDS", help="a list of keysync batch, or seconds of video in one clip")
    dub.add_argument("--model", metavar="DIR", help="model directory (default: networks of the released size)")
    dub.add_argument("--dtype", choices=COMPUTE_DTYPES, help="network compute type (default: bfloat16, on a CPU float32)")
    dub.add_argument("--microbatch", type=int, default=1, metavar="N", help="windows per device and call (default 1)")
    dub.add_argument("--steps", type=int, metavar="N", help="sampler steps (default: the model's own, 10)")
    dub.add_argument("--price", type=number, metavar="X", help="of an hour of all devices of the topology together")


def _plan(args) -> int:
    if (args.dub is None) == (args.config is None):
        raise UsageError("plan needs --config NAME, or --dub JOBS|SECONDS")
    if args.dub is not None:
        return _plan_dub(args)
    import jax

    from keysync_jax.planning import ahead_of_time, compile_targets
    from keysync_jax.planning import recipe_plan as plans
    from keysync_jax.training import recipes
    from keysync_jax.training.config import train_config

    # Shapes need no device: none is taken from a training beside the plan, and libtpu does not complain that this is no TPU.
    jax.config.update("jax_platforms", "cpu")
    topology = plans.parse_topology(args.topology)
    config = train_config(recipes.load(args.config, args.overrides), args.config)
    if args.compile:
        compile_targets.check(topology)  # said before anything else
    # Tracing takes up to a minute and compiling many: what is being done is said first.
    print(f"tracing a step of {args.config} for {topology.name} …", file=sys.stderr, flush=True)
    plan = plans.make_plan(config, topology)
    if not args.json:
        _print(plan, config)
    if args.compile:
        print(f"compiling it for {topology.name} …", file=sys.stderr, flush=True)
    compiled = ahead_of_time.compile_step(config, topology, whole=args.compile == "whole") if args.compile else None
    if args.json:
        more = {} if compiled is None else {"compiled": compiled._asdict() | {"total": compiled.total}}
        print(json.dumps(plans.as_json(plan) | more, indent=2))
    elif compiled is not None:
        _print_compiled(compiled, topology, config.mesh.slices)
    return 0


def _plan_dub(args) -> int:
    import jax

    from keysync_jax.converters import initialize, model_directory
    from keysync_jax.core import assets
    from keysync_jax.planning.dub_plan import make_dub_plan
    from keysync_jax.planning.recipe_plan import parse_topology

    jax.config.update("jax_platforms", "cpu")  # as for a recipe
    if args.compile:
        raise UsageError("--compile is for --config")
    if args.microbatch < 1 or (args.price is not None and args.price < 0):
        raise UsageError("--microbatch must be at least 1 and --price not negative")
    topology = parse_topology(args.topology)
    lengths = _lengths(args)
    if args.model is None:
        stages, vae, _ = initialize.configurations("full")
    else:
        directory = model_directory.load(assets.resolve(args.model))
        stages, vae = {name: directory.stage(name) for name in ("keyframe", "interpolation")}, directory.vae
    plan = make_dub_plan(lengths, stages, vae, topology, dtype=args.dtype, microbatch=args.microbatch, steps=args.steps, price=args.price)
    if args.json:
        print(json.dumps(plan.as_json(), indent=2))
        return 0
    memory = f" of {topology.device.memory / 1e9:.0f} GB" if topology.device.memory else ""
    speed = (
        f"{plan.seconds:.0f} s at the least, the networks alone ({plan.peak.name} on {topology.devices} devices)"
        if plan.peak
        else ("no time: what a CPU reaches differs too much")
    )
    print(f"{plan.clips} clips, {plan.video_seconds:.1f} s of video on {topology.name}, {plan.dtype}, microbatch {plan.microbatch}")
    print(f"windows      {plan.windows['keyframe']} of keyframes, {plan.segments} segments")
    print(f"evaluations  {plan.evaluations['keyframe']} and {plan.evaluations['interpolation']} of the network for a window")
    print(f"FLOPs        {plan.flops:.3g}")
    print(f"seconds      {speed}")
    print(f"cost         {'give --price' if plan.cost is None else f'{plan.cost:.2f} at the least'}")
    print(f"device       {plan.device_bytes / 1e9:.1f} GB{memory}{'' if plan.fits is not False else ': does not fit'}")
    print(f"host         about {plan.host_bytes / 1e9:.1f} GB for each worker")
    print(f"disk         {plan.scratch_bytes / 1e6:.1f} MB of scratch for each worker; outputs are about as large as their sources")
    return 0 if plan.fits is not False else 1


def _lengths(args) -> list[float]:
    """Seconds of each clip of `--dub`."""
    from keysync_jax.batch.dry_run import seconds_of
    from keysync_jax.batch.job_list import read_jobs

    try:
        return [float(args.dub)]
    except ValueError:
        jobs = read_jobs([args.dub], dub_columns())
    found = [seconds_of(job) for job in jobs]
    for job, (_, problem) in zip(jobs, found, strict=True):
        if problem:
            print(f"{job.id}: left out: {problem}")
    return [seconds for seconds, problem in found if not problem]


def _print(plan, config) -> None:
    from rich.console import Console

    from keysync_jax.parallel.sharding import rows_table

    console, topology = Console(highlight=False), plan.topology
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
    device = topology.device
    held = f", {device.memory / 2**30:.0f} GiB each" if device.memory else ""
    slices = f" ({config.mesh.slices} slices of {topology.name})" if config.mesh.slices > 1 else ""
    devices = f"{plan.devices} x {device.name}{held}{slices}"
    console.print(f"{devices}; mesh {mesh}; batch {plan.batch_size} ({config.dtype}, remat {config.remat})")
    trained, frozen = plan.parameters["trained"], plan.parameters["frozen"]
    console.print(f"{trained:,} parameters are trained, {frozen:,} are frozen")
    for note in plan.notes:
        console.print(note)
    console.print()
    console.print(rows_table(plan.rows, f"train state on {mesh}"))
    console.print(_flops_table(plan))
    console.print(_memory_table(plan, config))
    if plan.peak is None:
        console.print(f"no peak is known of {device.name} in {config.dtype}, so no least time")
    else:
        console.print(
            f"least time of a step: {plan.compute_seconds:.4g} s at {plan.peak.flops / 1e12:.0f} TFLOP/s, the peak of {plan.peak.name}, "
            f"+ {plan.update_seconds:.4g} s to move the {plan.update_bytes / 1e9:.3g} GB of an update at full bandwidth "
            f"= at most {plan.steps_per_second:.3g} steps/s, {plan.steps_per_second * plan.batch_size:.3g} samples/s"
        )
    console.print(f"(traced in {plan.seconds:.0f} s)")


def _flops_table(plan):
    from rich.table import Table

    table = Table(title="TFLOP (counted in the traced program, 2 per multiply-add)", title_justify="left")
    table.add_column("part")
    for name in ("per sample", "per step"):
        table.add_column(name, justify="right")
    labels = {
        "forward": "forward", "backward": "backward", "pixels": "pixel loss", "recompute": "recomputed by the backward pass",
        "pixels_recompute": "recomputed for the pixel loss",
    }  # fmt: skip
    for name, value in plan.flops._asdict().items():
        if value or name in ("forward", "backward"):
            table.add_row(labels[name], f"{value / plan.batch_size / 1e12:.4g}", f"{value / 1e12:.4g}")
    table.add_section()
    table.add_row("model (for MFU)", f"{plan.flops.model / plan.batch_size / 1e12:.4g}", f"{plan.flops.model / 1e12:.4g}")
    table.add_row("all", f"{plan.flops.total / plan.batch_size / 1e12:.4g}", f"{plan.flops.total / 1e12:.4g}")
    return table


def _memory_table(plan, config):
    from rich.table import Table

    from keysync_jax.parallel.sharding import gib

    table = Table(title="GiB per device", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column()
    memory = plan.memory
    table.add_row("train state", gib(memory.state), "exact, from the shardings")
    table.add_row("batch", gib(memory.batch), "exact")
    twice = ", twice: their sum and a microbatch's" if config.optimizer.accumulate > 1 else ""
    table.add_row("gradients", gib(memory.gradients), f"estimated: laid out as the parameters{twice}")
    table.add_row("gathered parameters", gib(memory.gathered), "estimated: the two largest blocks")
    waiting = f"{gib(memory.residuals)} of them wait for the backward pass"
    table.add_row("activations", gib(memory.activations), f"estimated before fusion; {waiting}")
    table.add_section()
    of = plan.topology.device.memory
    doubt = "may not fit" + ("; --compile knows" if plan.topology.device.platform == "tpu" else "")
    verdict = "" if not of else f"of {of / 2**30:.1f} GiB: " + ("fits" if memory.total < 0.95 * of else doubt)
    table.add_row("all", gib(memory.total), verdict)
    return table


def _print_compiled(compiled, topology, slices) -> None:
    from keysync_jax.parallel.sharding import gib

    code = "the program's own bytes not counted" if compiled.code is None else f"program {gib(compiled.code)}"
    name = topology.name if slices == 1 else f"{slices} slices of {topology.name}"
    print(
        f"compiled for {name} in {compiled.seconds:.0f} s; GiB per device: arguments {gib(compiled.arguments)}, "
        f"temporaries {gib(compiled.temporaries)}, {code}; together {gib(compiled.total)} of {topology.device.memory / 2**30:.1f}: "
        f"{'fits' if compiled.total <= topology.device.memory else 'does not fit'}"
    )
