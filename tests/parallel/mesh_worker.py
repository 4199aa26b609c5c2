"""Runs in a process of its own with eight CPU devices: one training step on several meshes against one device. Prints JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python mesh_worker.py 1x8x1 2x2x2+2 ...      (+N: microbatches)
"""

import dataclasses
import json
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.models.stage import init_params, init_vae_params
from keysync_jax.parallel import sharding
from keysync_jax.parallel.mesh import check_batch, train_mesh
from keysync_jax.training import state as states
from keysync_jax.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from keysync_jax.training.objective import DiffusionObjective
from keysync_jax.training.optimizer import make_optimizer
from keysync_jax.training.step import make_train_step
from keysync_jax.training.trainables import trainable_of

# Heads of 8, so that two devices have two each and eight cut through them; small pictures, of which two cores decode thirty-two.
UNET = dataclasses.replace(tiny.UNET, num_head_channels=8, num_frames=2)
STAGE = dataclasses.replace(tiny.KEYFRAME, unet=UNET, resolution=8, latent_size=4, num_frames=2)
VAE = dataclasses.replace(tiny.VAE, channel_mult=(1, 1))
# The leaves of so small a network would all be replicated.
sharding.MIN_SHARD_BYTES = 512
# A large epsilon makes Adam's first update a smooth function of the gradient, so that it can be compared.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, eps=1e-3, warmup_steps=0, ema_decay=0.9)
BASE = TrainConfig(
    stage=STAGE, vae=VAE, dtype="float32", remat="none", attention="xla", optimizer=OPTIMIZER, data=DataConfig(batch_size=16),
    loss=LossConfig(pixel_weight=1.0),
)  # fmt: skip


def make_batch(config):
    rng = np.random.default_rng(0)
    batch = {}
    for name, shape in trainable_of(config).batch_shapes(config.data.batch_size).items():
        if name == "original_indices":
            batch[name] = np.ones(shape.shape, np.int32)
        elif name == "mask":
            batch[name] = (rng.random(shape.shape) < 0.5).astype(np.float32)
        else:
            batch[name] = rng.standard_normal(shape.shape, np.float32).clip(-1, 1)
    return batch


def make_weights(config):
    """Drawn so that no branch is silent."""
    params, frozen = trainable_of(config).split(init_params(config.stage, 0, zero_init=False))
    decoder = init_vae_params(config.vae, 0)["first_stage_model"]["decoder"]
    return params, frozen | {"first_stage_model": {"decoder": decoder}}


def run(text):
    sizes, _, accumulate = text.partition("+")
    mesh_config = MeshConfig(*map(int, sizes.split("x")))
    config = dataclasses.replace(BASE, mesh=mesh_config, optimizer=dataclasses.replace(OPTIMIZER, accumulate=int(accumulate or 1)))
    mesh = train_mesh(mesh_config, jax.devices()[: np.prod([*map(int, sizes.split("x"))])])
    check_batch(mesh, config.data.batch_size, config.optimizer.accumulate)
    tx = make_optimizer(config.optimizer)
    shapes = jax.eval_shape(lambda p, f: states.create(p, f, tx, True), *make_weights(config))
    shardings = sharding.state_shardings(mesh, shapes)
    state = jax.device_put(states.create(*make_weights(config), tx, True), shardings)
    step = make_train_step(DiffusionObjective(config, config.vae), tx, config.optimizer, config.seed)
    with jax.set_mesh(mesh):
        batch = sharding.global_batch(mesh, make_batch(config))
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch).compile()
        state, metrics = compiled(state, batch)
    rows = sharding.sharding_rows(mesh, shapes)
    expected = sum(row.bytes_per_device for row in rows) + sum(
        np.prod(sharding.batch_sharding(mesh).shard_shape(x.shape)) * x.dtype.itemsize for x in batch.values()
    )
    given = jax.tree.leaves(compiled.input_shardings[0][0])
    wanted, leaves = jax.tree.leaves(shardings), jax.tree.leaves(shapes)
    report = {
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "argument_bytes": int(compiled.memory_analysis().argument_size_in_bytes),
        "table_bytes": int(expected),
        "shardings_match": all(g.is_equivalent_to(w, x.ndim) for g, w, x in zip(given, wanted, leaves, strict=True)),
        "sharded_leaves": sum(not w.is_fully_replicated for w in wanted),
        "activations_exchanged": len(re.findall(r" all-to-all(?:-start)?\(", compiled.as_text())),
    }
    return report, jax.device_get({"params": state.params, "ema": state.ema, "mu": optax.tree_utils.tree_get(state.opt_state, "mu")})


def traps():
    """Constraints in the traced network under `jax.set_mesh` and under a bare `with mesh:`."""
    config = dataclasses.replace(BASE, loss=LossConfig())
    mesh = train_mesh(MeshConfig(1, 8, 1))
    params, frozen = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree) for tree in make_weights(config))
    frozen.pop("first_stage_model")
    batch = trainable_of(config).batch_shapes(config.data.batch_size)

    def count():
        objective = DiffusionObjective(config)
        loss = lambda p, f, b: objective.loss(p, f, b, objective.draw(jax.random.key(0), b))[0]  # noqa: E731
        return str(jax.make_jaxpr(loss)(params, frozen, batch)).count("sharding_constraint")

    with jax.set_mesh(mesh):
        good = count()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with mesh:
            bare = count()
    return {"set_mesh": good, "bare": bare}


def difference(tree, like):
    """Largest difference, and that relative to the largest value."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True))
    worst = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
    return {"absolute": worst, "relative": worst / max(float(jnp.max(jnp.abs(b))) for _, b in pairs)}


def main():
    reference, expected = run("1x1x1")
    out = {"1x1x1": reference, "traps": traps()}
    for text in sys.argv[1:]:
        report, found = run(text)
        out[text] = report | {name: difference(found[name], expected[name]) for name in expected}
        print(text, out[text], file=sys.stderr, flush=True)
    print("RESULT " + json.dumps(out))


if __name__ == "__main__":
    main()
