"""What a recipe needs on given devices, computed without any: parameters, placement, FLOPs, memory and the fastest possible step."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from keysync_jax.config import VAEConfig
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.trees import leaf_name
from keysync_jax.costs import activations, flops
from keysync_jax.parallel import mesh as meshes
from keysync_jax.parallel import sharding
from keysync_jax.training import lpips
from keysync_jax.training import state as states
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.objective import Objective
from keysync_jax.training.optimizer import make_optimizer
from keysync_jax.training.step import make_train_step
from keysync_jax.training.trainable import Shapes
from keysync_jax.training.trainables import trainable_of

# Attention kernel of each platform, as `models.attention` chooses it there.
_ATTENTION = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
# What JAX calls them where it lowers for devices that are not here.
_LOWERED_FOR = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}
_VGG_WIDTHS = (64, 128, 256, 512, 512)  # channels of VGG-16's five groups


class Topology(NamedTuple):
    """Devices of one slice (of GPUs with `mesh.slices`: of one host) by kind and number, for example 16 of "v5e" (`v5e:4x4`)."""

    name: str
    kind: str
    devices: int

    @property
    def device(self) -> flops.Device:
        return flops.DEVICES[self.kind]


class Memory(NamedTuple):
    """Bytes per device.

    Attributes:
      state, batch: exact, from the shardings.
      gradients, gathered, activations: estimated. Gradients of all trained leaves, laid out as these are, with accumulation twice: the
        sum so far and a microbatch's own; the parameters of the two largest blocks in the compute type, gathered for use;
        `activations.estimate`.
      residuals: the part of `activations` that waits for the backward pass.
    """

    state: int
    batch: int
    gradients: int
    gathered: int
    activations: int
    residuals: int

    @property
    def total(self) -> int:
        return self.state + self.batch + self.gradients + self.gathered + self.activations


class RecipePlan(NamedTuple):
    """See `make_plan`. FLOPs are those of one step over all devices; seconds those of a step.

    Attributes:
      topology: one slice.
      devices: of all `mesh.slices` slices together.
      notes: what the plan takes for granted, a line each.
    """

    topology: Topology
    devices: int
    mesh: dict[str, int]
    batch_size: int
    parameters: dict[str, int]
    rows: list[sharding.Row]
    flops: flops.Flops
    memory: Memory
    peak: flops.Peak | None
    compute_seconds: float | None
    update_bytes: int
    update_seconds: float | None
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def steps_per_second(self) -> float | None:
        """No step can be faster: arithmetic at the peak, then the optimizer at full bandwidth."""
        if self.compute_seconds is None or self.update_seconds is None:
            return None
        return 1 / (self.compute_seconds + self.update_seconds)


def parse_topology(text: str) -> Topology:
    """`v5e:4x4`, `v5p:2x2x2` (chips of a TPU slice), `h200x8` (GPUs) or `cpu:8`.

    Raises:
      UsageError: something else.
    """
    match = re.fullmatch(r"([a-z0-9-]+?)(?::(\d+(?:x\d+)*)|x(\d+))?", text.strip().lower())
    if not match or match[1] not in flops.DEVICES:
        raise UsageError(f"topology {text!r} is unknown; write v5e:4x4, v5p:2x2x2, h200x8 or cpu:8 ({', '.join(flops.DEVICES)})")
    count = math.prod(int(n) for n in (match[2] or match[3] or "1").split("x"))
    if count < 1:
        raise UsageError(f"topology {text!r} has no devices")
    return Topology(text.strip().lower(), match[1], count)


class Program(NamedTuple):
    """A training step with the shapes it takes."""

    step: Any
    objective: Objective
    state: states.TrainState
    batch: Shapes


def make_program(config: TrainConfig, batch_size: int | None = None) -> Program:
    """The step of a recipe with abstract arguments; `batch_size` other than the recipe's for a share of it.

    Raises:
      KeySyncError: config.init.vae is there but holds no VAE.
    """
    tx = make_optimizer(config.optimizer)
    trainable = trainable_of(config)
    weights = trainable.abstract_weights()
    ema = config.optimizer.ema_decay > 0
    shapes = jax.eval_shape(lambda p, f: states.create(p, f, tx, ema), weights.params, weights.frozen)
    objective = trainable.objective(weights.vae, _stand_in_lpips() if trainable.uses_lpips else None)
    step = make_train_step(objective, tx, config.optimizer, config.seed)
    return Program(step, objective, shapes, trainable.batch_shapes(batch_size or config.data.batch_size))


@functools.cache
def _stand_in_lpips() -> lpips.Lpips:
    """The distance with weights of VGG-16's shapes, so that a plan needs no files.

    The step holds them as constants. The kernels are random, because a compiler would simplify convolutions with zeros away.
    """
    rng = np.random.default_rng(0)
    convolutions, channels = [], 3
    for group, width in zip(lpips.GROUPS, _VGG_WIDTHS, strict=True):
        inputs = (channels, *[width] * (len(group) - 1))
        convolutions.append(tuple((rng.standard_normal((3, 3, n, width), np.float32), np.zeros(width, np.float32)) for n in inputs))
        channels = width
    return lpips.Lpips(tuple(convolutions), tuple(np.ones(width, np.float32) for width in _VGG_WIDTHS))


def make_plan(config: TrainConfig, topology: Topology) -> RecipePlan:
    """Traces the recipe's step abstractly; seconds at full size.

    Args:
      config: the recipe.
      topology: one of its `mesh.slices` slices.

    Raises:
      KeySyncError: mesh, devices and batch do not fit each other.
    """
    begin = time.perf_counter()
    devices = topology.devices * config.mesh.slices
    sizes = _mesh_shape(config, topology, devices)
    meshes.check_slices(sizes, config.mesh.slices)
    mesh = AbstractMesh(sizes, meshes.AXES)
    meshes.check_batch(mesh, config.data.batch_size, config.optimizer.accumulate)
    parts = meshes.batch_parts(mesh)
    # One microbatch of one device, through the attention whose products the tracer sees; the rest is multiples of it.
    share = config.microbatch // parts
    small = dataclasses.replace(
        config, attention="xla", data=dataclasses.replace(config.data, batch_size=share),
        optimizer=dataclasses.replace(config.optimizer, accumulate=1),
    )  # fmt: skip
    program = make_program(small)
    params, frozen = program.state.params, program.state.frozen
    gradient = jax.make_jaxpr(_gradient(program.objective))(params, frozen, program.batch)
    counted = flops.count_step(gradient, decoder_is_network=trainable_of(config).decodes_in_network).scaled(
        parts * config.optimizer.accumulate
    )
    rows = sharding.sharding_rows(mesh, program.state)
    memory = _memory(config, mesh, program.state, rows, activations.estimate(gradient))
    peak = flops.peak(topology.device, config.dtype)
    trained = _count(params)
    # Read parameters, two moments, gradient and average; write all but the gradient.
    update = 4 * trained * (9 if program.state.ema is not None else 7)
    return RecipePlan(
        topology=topology,
        devices=devices,
        mesh=dict(zip(meshes.AXES, sizes, strict=True)),
        batch_size=config.data.batch_size,
        parameters={"trained": trained, "frozen": _count(frozen)},
        rows=rows,
        flops=counted,
        memory=memory,
        peak=peak,
        compute_seconds=counted.total / (peak.flops * devices) if peak else None,
        update_bytes=update,
        update_seconds=update / mesh.shape[meshes.FSDP_AXIS] / topology.device.bandwidth if topology.device.bandwidth else None,
        seconds=time.perf_counter() - begin,
        notes=_notes(config),
    )


def _mesh_shape(config: TrainConfig, topology: Topology, devices: int) -> tuple[int, ...]:
    try:
        return meshes.mesh_shape((config.mesh.data, config.mesh.fsdp, config.mesh.tensor), devices)
    except KeySyncError as error:
        if config.mesh.slices == 1:
            raise
        raise KeySyncError(f"{error} (the topology, {topology.name}, is one of mesh.slices={config.mesh.slices} slices)") from None


def _notes(config: TrainConfig) -> tuple[str, ...]:
    trainable = trainable_of(config)
    if not trainable.uses_pixels or trainable.vae_part(missing_ok=True) is not None:
        return ()
    decoder = "that of Stable Video Diffusion" if config.vae == VAEConfig() else "config.vae"
    key = "vae" if config.init.vae else "path"
    path = getattr(config.init, key) if key == "vae" or config.init.kind != "scratch" else ""
    why = f"no VAE is found at config.init.{key} {path}" if path else "config.init names none"
    return (f"decoder of the pixel loss: planned with {decoder}; {why}",)


def _gradient(objective: Objective) -> Any:
    def gradient(params: Any, frozen: Any, batch: Any) -> Any:
        drawn = objective.draw(jax.random.key(0), batch)
        return jax.grad(lambda p: objective.loss(p, frozen, batch, drawn)[0])(params)

    return gradient


def _memory(
    config: TrainConfig, mesh: AbstractMesh, state: states.TrainState, rows: list[sharding.Row], work: activations.Activations
) -> Memory:
    batch = trainable_of(config).batch_shapes(config.data.batch_size)
    over = sharding.batch_sharding(mesh)
    blocks: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.frozen)):
        block = "/".join(leaf_name(path).split("/")[1:4])
        blocks[block] = blocks.get(block, 0) + math.prod(leaf.shape) * jnp.dtype(config.dtype).itemsize
    gradients = sum(row.bytes_per_device for row in rows if row.item == "params")
    gathered = sum(sorted(blocks.values())[-2:]) if mesh.shape[meshes.FSDP_AXIS] > 1 else 0
    return Memory(
        state=sum(row.bytes_per_device for row in rows),
        batch=sum(math.prod(over.shard_shape(x.shape)) * x.dtype.itemsize for x in batch.values()),
        gradients=gradients * (1 if config.optimizer.accumulate == 1 else 2),  # the sum and the next summand
        gathered=gathered,
        activations=work.peak,
        residuals=work.residuals,
    )


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def lower_step(config: TrainConfig, mesh: Mesh, platform: str | None = None) -> jax.stages.Lowered:
    """The step as the training loop compiles it, with abstract arguments laid out on the mesh.

    Args:
      config: the recipe; attention "auto" becomes the kernel of `platform`.
      mesh: of `train_mesh`; its devices may be those of a topology.
      platform: "tpu", "gpu" or "cpu" to lower for another platform than JAX runs on.
    """
    if platform and config.attention == "auto":
        config = dataclasses.replace(config, attention=_ATTENTION[platform])
    meshes.check_batch(mesh, config.data.batch_size, config.optimizer.accumulate)
    program = make_program(config)
    shardings = sharding.state_shardings(mesh, program.state)
    over = sharding.batch_sharding(mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), program.state, shardings)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over) for name, x in program.batch.items()}
    with jax.set_mesh(mesh):
        traced = jax.jit(program.step, donate_argnums=0, out_shardings=(shardings, None)).trace(state, batch)
        return traced.lower(lowering_platforms=(_LOWERED_FOR[platform],)) if platform else traced.lower()


def as_json(plan: RecipePlan) -> dict[str, Any]:
    """Plain values, bytes and FLOPs in full."""
    return plan._asdict() | {
        "topology": plan.topology._asdict() | {"device": plan.topology.device.name, "memory": plan.topology.device.memory},
        "rows": [row._asdict() for row in plan.rows],
        "flops": plan.flops._asdict() | {"model": plan.flops.model, "total": plan.flops.total},
        "flops_per_sample": {name: value / plan.batch_size for name, value in plan.flops._asdict().items()},
        "memory": plan.memory._asdict() | {"total": plan.memory.total},
        "peak": None if plan.peak is None else plan.peak._asdict(),
        "steps_per_second": plan.steps_per_second,
    }
