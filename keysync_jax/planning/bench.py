"""Measures the network and the training step: time, compile time, memory, FLOPs, and the share of the device's peak.

Random data, never zeros (a GPU multiplies zeros faster than numbers). Imports neither data readers nor media, so that it runs on a bare
accelerator machine:

    python -m keysync_jax bench unet --size full --dtype bfloat16
    python -m keysync_jax bench gpu -o bench.json        the set that matters on one GPU, within ten minutes
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from keysync_jax.config import ATTENTION, COMPUTE_DTYPES, Remat, StageConfig, UNetConfig, VAEConfig
from keysync_jax.core.errors import KeySyncError, UsageError, in_one_line
from keysync_jax.core.files import check_target, write_text
from keysync_jax.core.processes import FailedError, OutOfTimeError, run_apart
from keysync_jax.core.version import __version__
from keysync_jax.costs import flops
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.models.attention import attention
from keysync_jax.models.conditioning import batch_shapes
from keysync_jax.models.freezing import frozen_mask
from keysync_jax.models.stage import StageModel, cast_matrices, init_params, init_vae_params
from keysync_jax.training import state
from keysync_jax.training.config import OptimizerConfig, TrainConfig
from keysync_jax.training.objective import DiffusionObjective
from keysync_jax.training.optimizer import make_optimizer
from keysync_jax.training.step import make_train_step

TASKS = ("unet", "train", "attention")
# "medium" is small enough for a CPU to compare and has all levels of the full network: 59.7 M parameters.
SIZES = {
    "tiny": StageConfig(
        unet=UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), num_head_channels=32,
                        context_dim=32, audio_dim=32, num_frames=4),
        resolution=64, latent_size=8, num_frames=4, audio_feature_dim=16,
    ),
    "medium": StageConfig(unet=UNetConfig(model_channels=64, context_dim=64, audio_dim=64), resolution=256, latent_size=32),
    "full": StageConfig(),
}  # fmt: skip
_VAES = {"tiny": VAEConfig(base_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1), "medium": VAEConfig(base_channels=32)}
# What attention sees in one window of the full-size network: (rows, queries, keys, heads).
ATTENTION_SHAPES = {
    "spatial 64x64": (14, 4096, 4096, 5),
    "spatial 32x32": (14, 1024, 1024, 10),
    "spatial 16x16": (14, 256, 256, 20),
    "audio 64x64": (1, 14 * 4096, 14, 5),
    "temporal 64x64": (4096, 14, 14, 5),
}
_TINY_ATTENTION = {"spatial 8x8": (4, 64, 64, 1)}
# Share of a set's budget that is kept for ending the case under way, whose process may hold a device full of memory.
_RESERVE = 0.05

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      task: "unet" (one forward pass), "train" (one update), or "attention" (forward and gradient of each of the network's shapes).
      size: "tiny", "medium" or "full"; attention has shapes for the first and the last.
      dtype: of the computation; a training step's parameters are float32.
      attention: what is asked for; see `models.attention`.
      remat: see `models.remat`; training only.
      freeze: "temporal" or "none"; training only.
      pixels: with the pixel loss on one frame of every window; training only.
      batch: windows.
      repeats, warmup: timed and untimed calls.
    """

    task: str = "unet"
    size: str = "tiny"
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "conv_aware"
    freeze: str = "temporal"
    pixels: bool = False
    batch: int = 1
    repeats: int = 20
    warmup: int = 3

    def __post_init__(self):
        for name, allowed in (
            ("task", TASKS), ("size", tuple(SIZES)), ("dtype", COMPUTE_DTYPES), ("attention", ATTENTION),
            ("remat", tuple(r.value for r in Remat)), ("freeze", ("temporal", "none")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise KeySyncError(f"bench {name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if min(self.batch, self.repeats) < 1 or self.warmup < 0:
            raise UsageError("bench: batch and repeats must be at least 1, warmup at least 0")
        if (self.task, self.size) == ("attention", "medium"):
            raise UsageError("bench attention has no medium size; give tiny or full")

    def title(self, ran: str | None = None) -> str:
        """The case in a line, with the attention that ran where that is known by now."""
        asked = self.attention
        chosen = asked if ran in (None, asked) else f"{ran} (auto)" if asked == "auto" else f"{ran} instead of {asked}"
        parts = [self.task, self.size, self.dtype, f"attention {chosen}"]
        if self.task != "attention":
            parts.append(f"batch {self.batch}")
        if self.task == "train":
            parts += [f"remat {self.remat}", f"freeze {self.freeze}", *(["pixel loss"] if self.pixels else [])]
        return ", ".join(parts)


class Program(NamedTuple):
    """A function to time. `again(arguments, result)` gives the next call's arguments (a train step consumes its state)."""

    function: Callable
    arguments: tuple
    donate: tuple[int, ...]
    again: Callable[[tuple, Any], tuple]
    parameters: int


# -- what is run ---------------------------------------------------------------------------------------------------------------------


def _unet(case: Case) -> Program:
    stage = SIZES[case.size]
    model = StageModel(stage, jnp.dtype(case.dtype), case.attention)
    params = jax.device_put(cast_matrices(init_params(stage, 0, zero_init=False), case.dtype))  # as a dub holds them
    batch = _batch(stage, case.batch)
    tokens = _normal(1, case.batch, stage.num_frames, stage.unet.context_dim)
    arguments = (params, batch["known"], jnp.zeros(case.batch), batch["identity"], tokens)

    def call(params: Any, x: jax.Array, c_noise: jax.Array, *conditions: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, c_noise, Conditions(*conditions))

    return Program(call, arguments, (), lambda arguments, result: arguments, _size(params))


def _train(case: Case) -> Program:
    stage = SIZES[case.size]
    loss = LossConfig(pixel_weight=1.0 if case.pixels else 0.0)
    config = TrainConfig(
        stage=stage, dtype=case.dtype, attention=case.attention, remat=case.remat, freeze=case.freeze, loss=loss,
        optimizer=OptimizerConfig(warmup_steps=0),
    )  # fmt: skip
    params, frozen = init_params(stage, 0, zero_init=False), {}
    count = _size(params)
    if case.freeze == "temporal":
        params, frozen = state.partition(params, frozen_mask(params))
    vae = _VAES.get(case.size, VAEConfig()) if case.pixels else None
    if vae is not None:
        decoder = init_vae_params(vae, 1)["first_stage_model"]["decoder"]
        frozen = state.merge(frozen, {"first_stage_model": {"decoder": decoder}})
    tx = make_optimizer(config.optimizer)
    batch = _batch(stage, case.batch)
    if case.pixels:
        batch["original_frames"] = jnp.tanh(_normal(5, case.batch, 1, stage.resolution, stage.resolution, 3))
        batch["original_indices"] = jnp.full((case.batch, 1), stage.num_frames // 2, jnp.int32)
    first = jax.jit(lambda p, f: state.create(p, f, tx, ema=False))(params, frozen)
    step = make_train_step(DiffusionObjective(config, vae), tx, config.optimizer, seed=0)
    return Program(step, (first, batch), (0,), lambda arguments, result: (result[0], arguments[1]), count)


def _attention(case: Case, shape: tuple[int, int, int, int]) -> Program:
    rows, queries, keys, heads = shape
    q, k, v = (_normal(i, rows, n, heads, 64).astype(case.dtype) for i, n in enumerate((queries, keys, keys)))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attention(q, k, v, case.attention).astype(jnp.float32)))

    return Program(jax.grad(loss, argnums=(0, 1, 2)), (q, k, v), (), lambda arguments, result: arguments, 0)


def _batch(stage: StageConfig, batch: int) -> dict[str, jax.Array]:
    seeds = {"known": 2, "audio": 3, "identity": 4}
    shapes, size = batch_shapes(stage), stage.latent_size
    mask = np.zeros((batch, *shapes.pop("mask")), np.float32)
    mask[:, :, size // 3 :, size // 8 : -size // 8] = 1
    return {name: _normal(seeds[name], batch, *shape) for name, shape in shapes.items()} | {"mask": jnp.asarray(mask)}


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# -- how it is measured --------------------------------------------------------------------------------------------------------------


def program(case: Case) -> Program:
    """What "unet" and "train" time, with random weights and data on the device."""
    return (_unet if case.task == "unet" else _train)(case)


def run(case: Case) -> Iterator[dict[str, Any]]:
    """Measures a case.

    Yields:
      One JSON-like dict for each shape of attention, else one; times in seconds, memory in bytes. A measurement that fails has
      the "error" in one line instead.
    """
    programs = {"": functools.partial(program, case)}
    if case.task == "attention":
        shapes = _TINY_ATTENTION if case.size == "tiny" else ATTENTION_SHAPES
        programs = {f", {name}": functools.partial(_attention, case, shape) for name, shape in shapes.items()}
    for suffix, make in programs.items():
        try:
            found = _measure(case, suffix, make())
        except Exception as error:  # kernels and compilers raise anything; the reason is in the report, and what follows still runs
            log.info("%s%s failed", case.title(), suffix, exc_info=True)
            found = _about(case, suffix) | {"error": in_one_line(error)}
        yield found
        jax.clear_caches()


def _about(case: Case, suffix: str = "", ran: str | None = None) -> dict[str, Any]:
    return {"title": case.title(ran) + suffix, "case": dataclasses.asdict(case)}


def _measure(case: Case, suffix: str, timed: Program) -> dict[str, Any]:
    begin = time.perf_counter()
    traced = jax.jit(timed.function, donate_argnums=timed.donate).trace(*timed.arguments)
    trace_time = time.perf_counter() - begin
    ran = attention_of(traced.jaxpr)
    work = flops.count_step(traced.jaxpr)
    with _cold():
        begin = time.perf_counter()
        compiled = traced.lower().compile()
        compile_time = time.perf_counter() - begin
    times, arguments = [], timed.arguments
    for i in range(case.warmup + case.repeats):
        begin = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        if i >= case.warmup:
            times.append(time.perf_counter() - begin)
        arguments = timed.again(arguments, result)
    if case.task == "train" and not float(result[1]["finite"]):
        raise KeySyncError("the loss is not finite, so the time means nothing")
    median = statistics.median(times)
    device = flops.device(jax.devices()[0].device_kind)
    peaks = [flops.peak(device, case.dtype, measured=measured) for measured in (False, True)]
    found = _about(case, suffix, ran) | {
        "attention": {"asked": case.attention, "ran": ran},
        "parameters": timed.parameters,
        "seconds": {
            "median": median, "min": min(times), "max": max(times), "p10": float(np.percentile(times, 10)),
            "p90": float(np.percentile(times, 90)), "repeats": len(times),
        },
        "trace_seconds": trace_time,
        "compile_seconds": compile_time,
        "memory": _memory(compiled),
        "flops": work._asdict() | {"model": work.model},
        "tflops_per_s": work.model / median / 1e12,
        "mfu": {peak.name: flops.mfu(work.model, median, peak.flops) for peak in peaks if peak is not None},
    }  # fmt: skip
    if case.task != "attention":
        found["clips_per_s"] = case.batch / median
    return found


# The primitives that the kernels of `models.attention` trace to.
_KERNELS = {"cudnn": "dot_product_attention_fwd_wrapper", "splash": "pallas_call"}


def attention_of(jaxpr: ClosedJaxpr) -> str:
    """The attention that a traced program runs: the fused kernels in it, else "xla", which takes the short sequences of any program."""
    names = set(_primitives(jaxpr))
    found = [kernel for kernel, primitive in _KERNELS.items() if primitive in names]
    return " and ".join(found) or "xla"


def _primitives(jaxpr: ClosedJaxpr | Jaxpr) -> Iterator[str]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(eqn.params):
            if isinstance(inner, (ClosedJaxpr, Jaxpr)):
                yield from _primitives(inner)


@contextlib.contextmanager
def _cold() -> Iterator[None]:
    """Compiles are not taken from the cache on disk."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that the compiler plans for, and the device's peak since the process began where it counts."""
    found: dict[str, int] = {}
    analysis = compiled.memory_analysis()
    if analysis is not None:
        parts = {name: int(getattr(analysis, f"{name}_size_in_bytes")) for name in ("argument", "output", "temp", "alias")}
        found |= parts | {"planned": parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]}
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        found["process_peak"] = int(stats["peak_bytes_in_use"])
    return found


def environment() -> dict[str, Any]:
    """Where and when: device, date, versions, and how busy the host was."""
    import flax
    import jaxlib.version
    import optax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "host": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load": list(os.getloadavg()),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "keysync_jax": __version__, "jax": jax.__version__, "jaxlib": jaxlib.version.__version__, "flax": flax.__version__,
            "optax": optax.__version__, "numpy": np.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip


# -- sets of cases -------------------------------------------------------------------------------------------------------------------


def gpu_set() -> list[Case]:
    """What matters on one GPU, most important first: forward, training step, with the pixel loss, then kernels and policies."""
    full = functools.partial(Case, size="full", dtype="bfloat16")
    return [
        full("unet"),
        full("train", batch=4),
        full("attention", attention="auto"),
        full("attention", attention="xla"),
        full("train", batch=4, pixels=True),
        full("unet", attention="xla"),
        full("train", batch=4, remat="dots"),
        full("train", batch=4, freeze="none"),
        full("train", batch=4, remat="full"),
    ]


def run_all(
    cases: Sequence[Case], output: str | os.PathLike | None = None, budget: float | None = None, *, accelerator: bool = False
) -> dict[str, Any]:
    """Runs cases one after the other, prints a line for each measurement, and writes everything found so far after it.

    Args:
      cases: what to run, most important first.
      output: JSON file, which is always whole; None for none.
      budget: seconds within which the set ends, whatever a case does: each runs in a process of its own, which is stopped when the
        time is used up, and what is left is reported as skipped. None for no limit, in this process.
      accelerator: refuse a machine that has none.

    A case that fails (does not fit the device, for example) is reported with its error, and the next one runs.

    Returns:
      What the file holds: "environment", "results" (see `run`) and "skipped" (cases that were not finished, each with its reason).

    Raises:
      UsageError: the output cannot be a file, or there is no accelerator.
      KeySyncError: the output cannot be written, or JAX finds no device within the budget.
    """
    deadline = None if budget is None else time.monotonic() + (1 - _RESERVE) * budget
    if output is not None and not Path(output).resolve().parent.is_dir():
        raise UsageError(f"-o {output}: name a JSON file in a folder that exists")
    target = None if output is None else check_target(output, "-o")
    try:
        (where,) = run_apart(_surroundings, deadline=deadline)
    except OutOfTimeError:
        raise KeySyncError("--budget: the time is used up before JAX has found its device; give more seconds") from None
    except FailedError as error:
        raise KeySyncError(f"JAX finds no device: {error}") from error
    if accelerator and where["platform"] == "cpu":
        raise UsageError("keysync bench gpu measures the full-size network on an accelerator; this machine has none")
    report: dict[str, Any] = {"environment": where, "results": [], "skipped": []}

    def add(kind: str, found: dict[str, Any]) -> None:
        report[kind].append(found)
        print(line(found), flush=True)
        if target is not None:
            write_text(target, json.dumps(report, indent=1) + "\n")

    for case in cases:
        try:
            for found in run_apart(run, case, deadline=deadline):
                add("results", found)
        except OutOfTimeError as error:
            add("skipped", _about(case) | {"reason": str(error)})
        except FailedError as error:
            add("results", _about(case) | {"error": str(error)})
    return report


def _surroundings() -> Iterator[dict[str, Any]]:
    yield environment()


def line(result: dict[str, Any]) -> str:
    """A result, or a case that was skipped, in one line."""
    if "error" in result:
        return f"{result['title']}: failed: {result['error']}"
    if "reason" in result:
        return f"{result['title']}: {result['reason']}"
    s, again = result["seconds"], result["flops"]["recompute"] + result["flops"]["pixels_recompute"]
    parts = [
        f"{_time(s['median'])} (p10 {_time(s['p10'])}, p90 {_time(s['p90'])}, {s['repeats']} runs)",
        f"{result['flops']['model'] / 1e12:.3g} TFLOP" + (f" and {again / 1e12:.3g} again" if again else ""),
        f"{result['tflops_per_s']:.3g} TFLOP/s",
    ]
    parts += [f"MFU {share:.1%} of {peak}" for peak, share in result["mfu"].items()]
    if "temp" in result["memory"]:
        parts.append(f"{result['memory']['planned'] / 2**30:.2f} GiB, of it {result['memory']['temp'] / 2**30:.2f} temporary")
    parts.append(f"compiled in {result['compile_seconds']:.0f} s")
    return f"{result['title']}: " + ", ".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
