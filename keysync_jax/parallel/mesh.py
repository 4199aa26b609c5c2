"""The device mesh, built in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

from keysync_jax.core.errors import KeySyncError, first_line

DATA_AXIS, FSDP_AXIS, TENSOR_AXIS = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)  # samples lie over these together


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices as `data x fsdp x tensor`; -1 takes what is left. `slices` > 1 lays `data` over the slices of a TPU pod."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if not all(n == -1 or n >= 1 for n in sizes) or sizes.count(-1) > 1:
            raise KeySyncError(f"mesh {sizes}: positive sizes, at most one of them -1")
        if self.slices < 1:
            raise KeySyncError(f"mesh.slices is {self.slices}; it must be at least 1")


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """One-axis mesh `data` over the given devices (all local ones by default).

    `Mesh` gives Auto axes on every supported JAX; `jax.make_mesh` would default to Explicit ones, under which linen
    convolutions fail.
    """
    devices = jax.local_devices() if devices is None else devices
    return Mesh(np.asarray(devices), (DATA_AXIS,))


def mesh_shape(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """`sizes` with -1 replaced by what is left of `count` devices.

    Raises:
      KeySyncError: the sizes do not make up the devices.
    """
    known = math.prod(n for n in sizes if n != -1)
    filled = tuple(count // known if n == -1 else n for n in sizes)
    if math.prod(filled) != count:
        named = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, sizes, strict=True))
        raise KeySyncError(f"mesh {named} does not make up the {count} devices; set config.mesh so that the product is {count}")
    return filled


def check_slices(sizes: Sequence[int], slices: int) -> None:
    """Refuses slices that `data`, the first of the sizes, cannot be laid over.

    Raises:
      KeySyncError: names both.
    """
    if sizes[0] % slices:
        named = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, sizes, strict=True))
        raise KeySyncError(f"mesh {named}: data {sizes[0]} is not a multiple of mesh.slices {slices}, over which it is laid")


def train_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh `data x fsdp x tensor` of a training run, with Auto axes (see `data_mesh`).

    On TPUs the devices are laid out so that neighbours on an axis are neighbours in the torus. With `config.slices` > 1 the outer part
    of `data` goes over the slices (on GPUs: over the hosts), whose links are slower, and the other axes stay within one.

    Args:
      config: sizes; -1 takes what is left.
      devices: all devices of all processes by default; those of a topology that is not here for ahead-of-time compilation.

    Raises:
      KeySyncError: the sizes do not make up the devices, or the slices do not.
    """
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(device_array(config, devices), AXES)


def device_array(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices of `train_mesh` as an array `[data, fsdp, tensor]`.

    Raises:
      KeySyncError: the mesh does not make up the devices, or `slices` is not how many there are.
    """
    shape = mesh_shape((config.data, config.fsdp, config.tensor), len(devices))
    named = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, shape, strict=True))
    try:
        if config.slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        data, fsdp, tensor = shape
        check_slices(shape, config.slices)
        # Slices are an attribute of TPU devices alone; elsewhere a host is the unit behind the slower link.
        by_host = devices[0].platform != "tpu"
        units = {device.process_index if by_host else device.slice_index for device in devices}
        if len(units) != config.slices:
            unit = "hosts" if by_host else "slices"
            raise KeySyncError(f"mesh.slices is {config.slices} but the {len(devices)} devices lie in {len(units)} {unit}; make them equal")
        return mesh_utils.create_hybrid_device_mesh(
            (data // config.slices, fsdp, tensor), (config.slices, 1, 1), devices,
            process_is_granule=by_host, allow_split_physical_axes=True,
        )  # fmt: skip
    except (ValueError, NotImplementedError, AssertionError) as error:  # what mesh_utils raises where a torus cannot be cut that way
        raise KeySyncError(f"mesh {named} does not fit the {len(devices)} {devices[0].device_kind} devices: {first_line(error)}") from error


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape)


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int = 1) -> None:
    """Makes sure that every device has the same number of samples in every microbatch.

    Raises:
      KeySyncError: names mesh, batch and what to change.
    """
    parts = batch_parts(mesh)
    if batch_size % (parts * accumulate) == 0:
        return
    size = f"data {mesh.shape[DATA_AXIS]} x fsdp {mesh.shape[FSDP_AXIS]}"
    if accumulate == 1:
        what = f"data.batch_size {batch_size} is not a multiple of the {parts} devices that share it"
    else:
        micro = f"{batch_size} / {accumulate} = {batch_size / accumulate:g}"
        what = f"the microbatch (data.batch_size / optimizer.accumulate = {micro}) is not a multiple of the {parts} devices that share it"
    raise KeySyncError(f"mesh {size}: {what}; take a multiple of {parts * accumulate} as data.batch_size or a smaller mesh")
