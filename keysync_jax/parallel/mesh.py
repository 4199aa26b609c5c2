"""The device mesh, built in one place."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

DATA_AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One-axis mesh `data` over the given devices (all local ones by default).

    `Mesh` gives Auto axes on every supported JAX; `jax.make_mesh` would default to Explicit ones, under which linen
    convolutions fail.
    """
    devices = jax.local_devices() if devices is None else devices
    return Mesh(np.asarray(devices), (DATA_AXIS,))
