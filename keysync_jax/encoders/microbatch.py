"""Independent items through one compiled function, in fixed-size microbatches per device.

XLA may pick other kernels for other batch sizes, so a result must not depend on how many items there are or how many devices
share them: each device always sees exactly `size` rows, item `i` always sits in row `i % size`, and the last group is filled up
by repeating its last item.

A program belongs to one structure of items (`jax.tree.structure`: what is array and what is not). So where the structure changes in the
stream a new group begins, and whoever mixes structures sorts by them first.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keysync_jax.parallel.mesh import DATA_AXIS

Pytree = Any


class Microbatcher:
    """`function(params, settings, items)` over a stream of items, sharded over the mesh's devices.

    Args:
      function: maps (params, settings, pytree with leading axis `size`) to a pytree with the same leading axis; rows independent.
      params: replicated on every device once; or a function that gives them, called when the first item comes.
      mesh: one-axis data mesh.
      size: rows a device sees per call.

    Attributes:
      group: items that all devices take at once.
      calls: how often the devices were called so far, all of them together.
    """

    def __init__(
        self, function: Callable[[Pytree, Pytree, Pytree], Pytree], params: Pytree | Callable[[], Pytree], mesh: Mesh, size: int = 1
    ):
        self.calls = 0
        self._rows = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._given = params
        self.group = size * mesh.devices.size
        # The per-device program is the same whatever the mesh, which is what makes results equal bit for bit.
        self._call = jax.jit(
            jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(DATA_AXIS)),
                out_specs=PartitionSpec(DATA_AXIS),
                check_vma=False,
            )
        )

    @functools.cached_property
    def _params(self) -> Pytree:
        params = self._given() if callable(self._given) else self._given
        self._given = None  # what lies on the devices is not kept on the host as well
        return jax.device_put(params, self._everywhere)

    def __call__(self, items: Iterable[Pytree], settings: Pytree = ()) -> Iterator[Pytree]:
        """One result (NumPy pytree without the batch axis) per item, in order; at most two groups are in memory.

        Args:
          items: pytrees of NumPy arrays of equal shapes; those of one structure side by side.
          settings: arrays shared by all rows (seed, scales); changing their values does not recompile.
        """
        settings = jax.device_put(settings, self._everywhere)
        pending: deque[tuple[Pytree, int]] = deque()
        for _, alike in itertools.groupby(items, jax.tree.structure):
            while group := list(itertools.islice(alike, self.group)):
                count = len(group)
                group += [group[-1]] * (self.group - count)
                batch = jax.tree.map(lambda *rows: np.stack(rows), *group)
                # Dispatch is asynchronous: the device works on this group while the host takes the previous one apart.
                pending.append((self._call(self._params, settings, jax.device_put(batch, self._rows)), count))
                self.calls += 1
                if len(pending) > 1:
                    yield from _rows(*pending.popleft())
        while pending:
            yield from _rows(*pending.popleft())


def _rows(result: Pytree, count: int) -> Iterator[Pytree]:
    result = jax.device_get(result)
    for row in range(count):
        yield jax.tree.map(lambda x, row=row: x[row], result)
