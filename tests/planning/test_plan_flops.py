"""FLOPs counted in programs against products done by hand, and against the known figure of the full-size network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import approx

from keysync_jax.config import StageConfig
from keysync_jax.costs import flops
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.models.stage import StageModel, abstract_params
from keysync_jax.training import lpips


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products():
    assert flops.count(lambda a, b: a @ b, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert flops.count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(4, 3, 5), shape(4, 5, 7)) == 2 * 4 * 3 * 5 * 7
    assert flops.count(lambda a: jnp.tanh(a) + a.sum(), shape(100)) == 0


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 4)])
def test_convolution_and_its_gradients(stride, groups):
    """Each gradient of a convolution costs what it costs, strided ones too: zeros between the strides are no work."""
    layer = nn.Conv(16, (3, 3), strides=stride, padding="SAME", feature_group_count=groups, use_bias=False)
    x, kernel = shape(2, 8, 8, 8), shape(3, 3, 8 // groups, 16)
    once = 2 * 2 * (8 // stride) ** 2 * 16 * 9 * (8 // groups)

    def apply(kernel, x):
        return layer.apply({"params": {"kernel": kernel}}, x)

    assert flops.count(apply, kernel, x) == once
    assert flops.count(jax.grad(lambda k, x: apply(k, x).sum()), kernel, x) == approx(2 * once)
    assert flops.count(jax.grad(lambda k, x: (apply(k, x) ** 2).sum(), argnums=(0, 1)), kernel, x) == approx(3 * once)


def test_loops_and_branches():
    def scanned(a, b):
        return jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=6)[0]

    def branched(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: a)

    once = 2 * 5 * 5 * 5
    assert flops.count(scanned, shape(5, 5), shape(5, 5)) == 6 * once
    assert flops.count(branched, shape(5, 5), shape(5, 5)) == once
    assert flops.count(lambda a, b: jax.lax.map(lambda row: row @ b, a), shape(5, 5), shape(5, 5)) == once


def test_recomputation_is_told_apart():
    def loss(w, x):
        layer = jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))
        return layer(w, x).sum()

    w, x = shape(8, 8), shape(4, 8)
    once = 2 * 4 * 8 * 8
    found = flops.count_step(jax.make_jaxpr(jax.grad(loss))(w, x))
    assert found.forward == 2 * once
    assert found.backward == 3 * once  # two weight gradients and the first layer's output's
    assert found.recompute == 2 * once
    assert found.pixels == 0
    assert found.total == 7 * once and found.model == 5 * once


def test_lpips_is_the_pixel_loss_s_work():
    rng = np.random.default_rng(0)
    groups, channels = [], 3
    for group in lpips.GROUPS:
        groups.append(
            tuple(
                (rng.standard_normal((3, 3, channels if i == 0 else 4, 4), np.float32), np.zeros(4, np.float32)) for i in range(len(group))
            )
        )
        channels = 4
    distance = lpips.Lpips(tuple(groups), tuple(np.ones(4, np.float32) for _ in groups))
    traced = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(distance(x, -x))))(jnp.ones((1, 32, 32, 3)))
    found, trained = flops.count_step(traced), flops.count_step(traced, decoder_is_network=True)
    assert found.pixels > 0 == found.forward == found.backward
    assert trained.pixels == 0 < trained.forward and trained.forward + trained.backward == found.pixels


def test_custom_kernel_counts_as_often_as_its_grid():
    from jax.experimental import pallas as pl

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def product(a, b):
        rows, whole = pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 32), lambda i: (0, 0))
        out = pl.BlockSpec((8, 32), lambda i: (i, 0))
        return pl.pallas_call(kernel, grid=(3,), in_specs=[rows, whole], out_specs=out, out_shape=shape(24, 32))(a, b)

    assert flops.count(product, shape(24, 16), shape(16, 32)) == 2 * 24 * 16 * 32


def test_full_size_forward():
    """17.74 TFLOP for one window of 14 frames at 64 x 64 latents."""
    config = StageConfig()
    model = StageModel(config, dtype=jnp.bfloat16, attention="xla")
    params = abstract_params(config)
    inputs = (shape(1, 14, 64, 64, 4), shape(1), Conditions(shape(1, 64, 64, 4), shape(1, 14, 1024)))
    count = flops.count(lambda p, *x: model.apply({"params": p}, *x), params, *inputs)
    assert count == pytest.approx(17.74e12, rel=0.01)  # by hand; ours counts the small products too: 17.85


def test_devices():
    assert flops.device("NVIDIA H200").name == "H200"
    assert flops.device("TPU v5 lite").name == "TPU v5e"
    assert flops.device("TPU v5").name == "TPU v5p"
    assert flops.device("something else") is None
    assert flops.peak(flops.device("NVIDIA H200"), "bfloat16").flops == 989e12
    assert flops.peak(flops.device("NVIDIA H200"), "bfloat16", measured=True) == flops.Peak(790e12, "H200 bfloat16 (measured)")
    assert flops.peak(flops.device("cpu"), "float32") is None
    assert flops.mfu(100e12, 0.5, 400e12) == 0.5
