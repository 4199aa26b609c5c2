"""What one update does: accumulation, bad numbers, averages, clipping, what is frozen, and what the backward pass keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from bounds import close, trees_close

from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.models.remat import Remat, rematerialised
from keysync_jax.models.resblock import VideoResBlock
from keysync_jax.models.stage import StageModel, abstract_params
from keysync_jax.models.transformer import SpatialVideoTransformer
from keysync_jax.training import state as states
from keysync_jax.training.config import OptimizerConfig, TrainConfig
from keysync_jax.training.objective import DiffusionObjective
from keysync_jax.training.optimizer import learning_rate, make_optimizer
from keysync_jax.training.step import make_train_step, step_key
from keysync_jax.training.trainables import trainable_of


class Regression:
    """Mean squared error of a linear map of noisy inputs: a batch loss like any other, that compiles at once."""

    def draw(self, key, batch):
        return {"noise": jax.random.normal(key, batch["x"].shape)}

    def loss(self, params, frozen, batch, drawn):
        out = (batch["x"] + frozen["level"] * drawn["noise"]) @ params["w"]
        return jnp.mean(jnp.square(out - batch["y"])), {"mean": jnp.mean(out)}


def start(config: OptimizerConfig, ema: bool = False):
    """(update, state before step 0, batch) of a regression."""
    rng = np.random.default_rng(0)
    batch = {"x": rng.standard_normal((12, 5), np.float32), "y": rng.standard_normal((12, 2), np.float32)}
    tx = make_optimizer(config)
    state = states.create({"w": jnp.asarray(rng.standard_normal((5, 2), np.float32))}, {"level": jnp.float32(0.1)}, tx, ema)
    return jax.jit(make_train_step(Regression(), tx, config, seed=3)), state, batch


FAST = OptimizerConfig(learning_rate=0.1, warmup_steps=0)


def test_accumulated_microbatches_are_one_batch():
    whole, parts = (start(dataclasses.replace(FAST, accumulate=n)) for n in (1, 3))
    for _ in range(3):
        (update, state, batch), (update_parts, state_parts, _) = whole, parts
        (state, metrics), (state_parts, metrics_parts) = update(state, batch), update_parts(state_parts, batch)
        # Means over 24 outputs. A microbatch left out would change them by tens of per cent.
        trees_close(metrics_parts, metrics, 8, terms=24)
        trees_close(state_parts.params, state.params, 8, terms=24)
        whole, parts = (update, state, batch), (update_parts, state_parts, batch)


def test_accumulation_is_exact_for_the_network():
    """Through the diffusion objective, whose random numbers are drawn for the whole batch at once."""
    batch, positions = tiny.batch(), 4 * tiny.FRAMES * tiny.LATENT**2
    found = []
    for accumulate in (1, 2):
        optimizer = OptimizerConfig(warmup_steps=0, accumulate=accumulate)
        config = TrainConfig(stage=tiny.KEYFRAME, dtype="float32", remat="none", optimizer=optimizer)
        params, frozen = trainable_of(config).split(tiny.params())
        tx = make_optimizer(optimizer)
        state = states.create(params, frozen, tx, ema=False)
        update = jax.jit(make_train_step(DiffusionObjective(config), tx, optimizer, seed=7), compiler_options=tiny.QUICK_COMPILE)
        after, metrics = update(state, batch)
        moments = next(s for s in jax.tree.leaves(after.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
        assert jax.tree.structure(moments.mu) == jax.tree.structure(params), "moments of leaves that are not trained"
        jax.tree.map(np.testing.assert_array_equal, after.frozen, frozen)
        found.append((metrics, moments.mu))
    (metrics, mean), (metrics_parts, mean_parts) = found
    # A gradient is a sum over all positions, and small where they cancel: the largest of all leaves is the size. Random numbers of another
    # microbatch would change every value by its own size.
    close(metrics_parts["loss"], metrics["loss"], 16)
    close(metrics_parts["grad_norm"], metrics["grad_norm"], 2, terms=positions)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(mean))
    trees_close(mean_parts, mean, 1, scale=scale, terms=positions)


def test_the_rate_that_is_told_is_the_one_that_was_applied():
    """An update that was left out does not move the warm-up on."""
    config = dataclasses.replace(FAST, warmup_steps=10)
    update, state, batch = start(config, ema=False)
    bad = batch | {"x": np.full_like(batch["x"], np.nan)}
    told = []
    for given in (batch, bad, bad, batch):
        state, metrics = update(state, given)
        told.append(float(metrics["learning_rate"]))
    rate = learning_rate(config)
    close(told, [rate(0), rate(1), rate(1), rate(1)], 4, scale="each", wrong=[rate(0), rate(1), rate(2), rate(3)])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_update_that_is_not_finite_is_left_out(accumulate):
    update, state, batch = start(dataclasses.replace(FAST, accumulate=accumulate), ema=True)
    state, _ = update(state, batch)
    bad = batch | {"x": np.where(np.arange(12)[:, None] == 7, np.nan, batch["x"]).astype(np.float32)}
    before = state
    for count in (1, 2):
        state, metrics = update(state, bad)
        assert (metrics["finite"], metrics["skipped"], int(state.skipped), int(state.step)) == (0, count, count, 1 + count)
        for name in ("params", "ema", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    state, metrics = update(state, batch)
    assert (metrics["finite"], int(state.skipped)) == (1, 0)
    assert np.abs(state.params["w"] - before.params["w"]).max() > 0.01


def test_a_gradient_alone_that_is_not_finite_is_left_out():
    """A square root at zero: the loss is 0, its gradient is not a number."""

    class Root(Regression):
        def loss(self, params, frozen, batch, drawn):
            return jnp.sqrt(jnp.sum(jnp.square(params["w"] * 0))), {}

    _, state, batch = start(FAST)
    after, metrics = make_train_step(Root(), make_optimizer(FAST), FAST, seed=0)(state, batch)
    assert metrics["loss"] == 0 and metrics["finite"] == 0 and after.skipped == 1
    np.testing.assert_array_equal(after.params["w"], state.params["w"])


def test_ema_follows_with_a_short_memory_at_first():
    decay = 0.2
    update, state, batch = start(dataclasses.replace(FAST, ema_decay=decay), ema=True)
    expected = np.asarray(state.params["w"])
    for step in range(4):
        state, _ = update(state, batch)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * np.asarray(state.params["w"])
        close(state.ema["w"], expected, 8, wrong=state.params["w"])
    assert start(FAST)[1].ema is None


def test_clipping_is_off_unless_asked_for():
    assert OptimizerConfig().clip_norm == 0
    _, state, batch = start(FAST)
    big = batch | {"y": 1e4 * batch["y"]}
    norms = {}
    for clip in (0.0, 0.5):
        config = dataclasses.replace(FAST, clip_norm=clip)
        update, state, _ = start(config)
        after, metrics = update(state, big)
        moments = next(s for s in jax.tree.leaves(after.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
        norms[clip] = optax.global_norm(moments.mu) / (1 - config.b1)
        assert metrics["grad_norm"] > 1000  # reported before clipping
    close(norms[0.0], metrics["grad_norm"], 16)
    close(norms[0.5], 0.5, 16)


def test_random_numbers_belong_to_the_step():
    """A resumed run draws what it would have drawn: state and batch decide, not how one came there."""
    update, state, batch = start(FAST)
    one, first = update(state, batch)
    _, second = update(one, batch)
    _, again = update(jax.tree.map(jnp.array, one), batch)
    assert second["mean"] == again["mean"]
    draws = [Regression().draw(step_key(3, n), batch)["noise"] for n in (0, 1)]
    assert np.abs(draws[0] - draws[1]).max() > 0.1
    np.testing.assert_array_equal(draws[1], Regression().draw(step_key(3, jnp.int32(1)), batch)["noise"])


# -- rematerialisation ---------------------------------------------------------------------------------------------------------------


def gradient_of_blocks(remat: str):
    """Value and gradients of a residual block with a transformer behind it, as the network rematerialises them."""
    block = rematerialised(VideoResBlock, remat)(32)
    transformer = rematerialised(SpatialVideoTransformer, remat)(2, 16)
    rng = np.random.default_rng(2)
    x, emb, context = (rng.standard_normal(shape, np.float32) for shape in ((1, 2, 6, 6, 32), (1, 2, 24), (1, 3, 8)))

    @functools.partial(jax.jit, compiler_options=tiny.QUICK_COMPILE)
    def run(params):
        def loss(params):
            h = block.apply({"params": params[0]}, x, emb)
            return jnp.mean(jnp.square(transformer.apply({"params": params[1]}, h, context)))

        return jax.value_and_grad(loss)(params)

    shapes = jax.eval_shape(
        lambda: (block.init(jax.random.key(0), x, emb)["params"], transformer.init(jax.random.key(0), x, context)["params"])
    )
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32) / np.sqrt(max(s.shape[0], 9)), shapes)
    return run(params)


@pytest.mark.slow
def test_policies_give_the_same_gradients():
    value, gradients = gradient_of_blocks("none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    scale = float(optax.global_norm(gradients))
    for remat in Remat:
        other, found = gradient_of_blocks(remat.value)
        close(other, value, 8)
        difference = optax.global_norm(jax.tree.map(jnp.subtract, found, gradients))
        close(difference, 0, 8, scale=scale, err_msg=remat.value)


@pytest.fixture(scope="module")
def traced():
    """For each policy: (bytes kept for the backward pass, convolutions in the gradient program) of a small network.

    With attention on the level and 32 x 32 positions, so that activations outweigh what is kept whatever the policy.
    """
    stage = dataclasses.replace(tiny.KEYFRAME, unet=dataclasses.replace(tiny.UNET, attention_resolutions=(1,)), latent_size=32)
    params, tokens = abstract_params(stage), (1, 4, tiny.UNET.context_dim)
    x, c_noise, *given = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 4, 32, 32, 4), (1,), (1, 32, 32, 4), tokens))
    inputs = (x, c_noise, Conditions(*given))
    found = {}
    for remat in Remat:
        model = StageModel(stage, attention="xla", remat=remat.value)

        def loss(params, *inputs, model=model):
            return jnp.sum(model.apply({"params": params}, *inputs))

        kept = jax.eval_shape(lambda p, *x, loss=loss: jax.vjp(lambda p: loss(p, *x), p)[1], params, *inputs)
        weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) - weights
        found[remat] = size, count(jax.make_jaxpr(jax.grad(loss))(params, *inputs).jaxpr, "conv_general_dilated")
    return found


def count(jaxpr, name: str) -> int:
    """Operations of that name, those in inner programs included."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += count(inner, name) if hasattr(inner, "eqns") else 0
    return total


def test_policies_keep_less_and_less(traced):
    sizes = [traced[remat][0] for remat in Remat]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes), {r.value: traced[r][0] for r in Remat}
    assert traced[Remat.CONV_AWARE][0] < 0.7 * traced[Remat.NONE][0] and traced[Remat.FULL][0] < 0.2 * traced[Remat.CONV_AWARE][0]


def test_only_some_policies_compute_convolutions_again(traced):
    once = traced[Remat.NONE][1]
    assert once > 40
    for remat in (Remat.DOTS, Remat.CONV_AWARE, Remat.NAMES):  # JAX's dots_saveable keeps convolutions too
        assert traced[remat][1] == once, remat
    assert traced[Remat.FULL][1] > 1.2 * once
