import io
import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from keysync_jax.config import StageConfig
from keysync_jax.models.stage import abstract_params
from keysync_jax.parallel import sharding
from keysync_jax.parallel.mesh import AXES
from keysync_jax.training import state as states
from keysync_jax.training.config import OptimizerConfig
from keysync_jax.training.optimizer import make_optimizer

BLOCK = "params/model/diffusion_model/input_blocks_1_1/transformer_blocks_0"


@pytest.fixture(scope="module")
def full_size():
    tx = make_optimizer(OptimizerConfig(ema_decay=0.9))
    return jax.eval_shape(lambda p: states.create(p, {}, tx, True), abstract_params(StageConfig()))


def mesh(*sizes):
    return AbstractMesh(sizes, AXES)


@pytest.mark.parametrize(
    "name, shape, sizes, spec",
    [
        ("x/in_layers_2/kernel", (3, 3, 320, 640), (1, 8, 1), P(None, None, None, "fsdp")),
        ("x/in_layers_2/kernel", (3, 3, 960, 640), (1, 8, 1), P(None, None, "fsdp", None)),
        ("x/in_layers_2/kernel", (3, 3, 320, 640), (8, 1, 1), P(None, None, None, None)),
        ("x/in_layers_2/kernel", (3, 3, 321, 641), (1, 8, 1), P(None, None, None, None)),
        ("x/in_layers_2/bias", (640,), (1, 8, 1), P(None)),
        (f"{BLOCK}/attn1/to_q/kernel", (320, 320), (1, 4, 2), P("fsdp", "tensor")),
        (f"{BLOCK}/attn2/to_k/kernel", (1024, 320), (1, 1, 2), P(None, "tensor")),  # 5 heads of 64: shapes do not tell
        (f"{BLOCK}/attn2/to_k/kernel", (1024, 320), (1, 1, 3), P(None, None)),
        (f"{BLOCK}/attn1/to_out_0/kernel", (320, 320), (1, 4, 2), P("tensor", "fsdp")),
        (f"{BLOCK}/attn1/to_q/kernel", (320, 320), (1, 4, 1), P(None, "fsdp")),
        (f"{BLOCK}/ff/net_0/proj/kernel", (320, 2560), (1, 4, 2), P(None, "fsdp")),
        (f"opt_state/0/mu/{BLOCK}/attn1/to_q/kernel", (320, 320), (1, 4, 2), P("fsdp", "tensor")),
    ],
)
def test_rule(name, shape, sizes, spec):
    assert sharding.placement(name, shape, 4, mesh(*sizes)).spec == spec


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 16, 1), (2, 4, 1), (1, 4, 2)])
def test_little_is_replicated_at_full_size(full_size, sizes):
    rows = sharding.sharding_rows(mesh(*sizes), full_size)
    for item in ("params", "ema", "opt_state"):
        of = [row for row in rows if row.item == item]
        whole = sum(row.bytes for row in of if "fsdp" not in row.reason)
        assert whole < 0.02 * sum(row.bytes for row in of)
    assert sum(row.leaves for row in rows) == len(jax.tree.leaves(full_size))


def test_moments_and_average_lie_as_their_parameters(full_size):
    shardings = sharding.state_shardings(mesh(1, 4, 2), full_size)
    moments = [optax.tree_utils.tree_get(shardings.opt_state, name) for name in ("mu", "nu")]
    for tree in (shardings.ema, *moments):
        assert jax.tree.all(jax.tree.map(lambda a, b: a.spec == b.spec, shardings.params, tree))


def test_rows_add_up_to_the_shards(full_size):
    over = mesh(2, 4, 1)
    shardings = sharding.state_shardings(over, full_size)
    shards = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, full_size, shardings)
    assert sum(jax.tree.leaves(shards)) == sum(row.bytes_per_device for row in sharding.sharding_rows(over, full_size))


def test_table_names_every_part(full_size):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sharding.sharding_table(mesh(1, 8, 1), full_size))
    text = console.export_text()
    for word in ("params", "ema", "opt_state", "replicated: small", "GiB per device", "fsdp 8"):
        assert word in text


def test_global_batch_on_one_device():
    from keysync_jax.parallel.mesh import MeshConfig, train_mesh

    batch = {"x": np.arange(8, dtype=np.float32).reshape(4, 2)}
    out = sharding.global_batch(train_mesh(MeshConfig(), jax.devices()[:1]), batch)
    assert out["x"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(out["x"], batch["x"])
