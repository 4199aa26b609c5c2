"""How the train state and batches lie on the mesh: one rule for every leaf, and the table that shows it.

1. Leaves that tensor parallelism splits, by name (`TENSOR_RULES`).
2. Every leaf of at least `MIN_SHARD_BYTES`: its largest dimension that |fsdp| divides lies over `fsdp` (beside 1, another dimension).
3. The rest is replicated.

The rule reads a leaf's name and shape only, so parameters, their average and their moments lie alike.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.trees import leaf_name
from keysync_jax.parallel.mesh import BATCH_AXES, FSDP_AXIS, TENSOR_AXIS

# Heads over `tensor`: the columns that make them, the rows that read them. Shapes do not tell how wide a head is, so a cut may go through
# one; the partitioner then moves what attention needs, and the result is the same. The feed-forward layers are not split: GEGLU's
# projection holds all values, then all gates, so that neither half of its columns is a feed-forward of its own, and with tens of
# thousands of tokens per video, exchanging hidden activations costs more than the halved product saves.
TENSOR_RULES = (
    (re.compile(r"/attn\d/to_[qkv]/kernel$"), 1, "columns"),
    (re.compile(r"/attn\d/to_out_0/kernel$"), 0, "rows"),
)
# Norms, biases and mixers: a gather of each would cost more than it saves. They are 0.1 % of the full-size network.
MIN_SHARD_BYTES = 2**16


class Placement(NamedTuple):
    """Where a leaf lies and why."""

    spec: PartitionSpec
    reason: str


def placement(name: str, shape: tuple[int, ...], itemsize: int, mesh: Mesh | AbstractMesh) -> Placement:
    """The rule: where the leaf of this name (joined by "/") and shape lies on the mesh."""
    axes: list[str | None] = [None] * len(shape)
    reasons = []
    tensor, fsdp = mesh.shape.get(TENSOR_AXIS, 1), mesh.shape.get(FSDP_AXIS, 1)
    if tensor > 1:
        for pattern, axis, kind in TENSOR_RULES:
            if pattern.search(name) and len(shape) > axis and shape[axis] % tensor == 0:
                axes[axis] = TENSOR_AXIS
                reasons.append(f"{TENSOR_AXIS} {kind}")
                break
    if fsdp > 1:
        if math.prod(shape) * itemsize < MIN_SHARD_BYTES:
            reasons.append("replicated: small")
        elif fitting := [i for i, n in enumerate(shape) if axes[i] is None and n % fsdp == 0]:
            axes[max(fitting, key=lambda i: (shape[i], i))] = FSDP_AXIS
            reasons.append(FSDP_AXIS)
        else:
            reasons.append(f"replicated: no dimension is a multiple of {fsdp}")
    return Placement(PartitionSpec(*axes), " + ".join(reasons) or "replicated")


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Sharding of every leaf of a train state (arrays or shapes)."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, placement(leaf_name(path), leaf.shape, leaf.dtype.itemsize, mesh).spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Samples over `data` and `fsdp` together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(share, shares): which of how many equal parts of every batch this process has to read.

    Processes whose devices differ in `tensor` alone hold the same samples and read the same share.

    Raises:
      KeySyncError: the mesh gives processes parts that overlap but are not equal.
    """
    devices = mesh.devices.reshape(-1, mesh.shape.get(TENSOR_AXIS, 1))
    rows: dict[int, set[int]] = {}
    for row, group in enumerate(devices):
        for device in group:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(len(share) for share in shares) != len(devices) or len({len(share) for share in shares}) != 1:
        raise KeySyncError(f"mesh {dict(mesh.shape)}: the hosts' shares of a batch overlap; let mesh.tensor divide the devices of a host")
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch (its `data_share`) as global arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


class Row(NamedTuple):
    """One line of the sharding table: the leaves of a part of the state that lie alike."""

    item: str
    reason: str
    leaves: int
    bytes: int
    bytes_per_device: int
    example: str


def sharding_rows(mesh: Mesh | AbstractMesh, state: Any) -> list[Row]:
    """What lies where, largest first within each part (`params`, `frozen`, `ema`, `opt_state`, ...)."""
    rows: dict[tuple[str, str], Row] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = leaf_name(path)
        where = placement(name, leaf.shape, leaf.dtype.itemsize, mesh)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        local = math.prod(NamedSharding(mesh, where.spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        item, _, rest = name.partition("/")
        row = rows.get((item, where.reason), Row(item, where.reason, 0, 0, 0, f"{rest} {tuple(leaf.shape)} {where.spec}"))
        rows[item, where.reason] = row._replace(
            leaves=row.leaves + 1, bytes=row.bytes + size, bytes_per_device=row.bytes_per_device + local
        )
    order = list(dict.fromkeys(row.item for row in rows.values()))
    return sorted(rows.values(), key=lambda row: (order.index(row.item), -row.bytes))


def sharding_table(mesh: Mesh, state: Any) -> Any:
    """`sharding_rows` as a `rich` table, with totals."""
    return rows_table(sharding_rows(mesh, state), "train state on " + " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items()))


def rows_table(rows: list[Row], title: str) -> Any:
    """Rows as a `rich` table."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("part", "placement", "leaves", "GiB", "GiB per device", "for example"):
        table.add_column(column, justify="right" if column in ("leaves", "GiB", "GiB per device") else "left", overflow="fold")
    for row in rows:
        table.add_row(row.item, row.reason, f"{row.leaves:,}", gib(row.bytes), gib(row.bytes_per_device), row.example)
    table.add_section()
    total = [sum(getattr(row, field) for row in rows) for field in ("leaves", "bytes", "bytes_per_device")]
    table.add_row("all", "", f"{total[0]:,}", gib(total[1]), gib(total[2]), "")
    return table


def gib(count: float) -> str:
    """Bytes as GiB with three decimals."""
    return f"{count / 2**30:.3f}"
