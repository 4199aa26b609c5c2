"""Twenty updates equal those of torch.optim.AdamW with warm-up, stored by make_trajectory.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trajectory as setup
from bounds import close

from keysync_jax.converters import sgm
from keysync_jax.models import table
from keysync_jax.models.stage import init_params
from keysync_jax.training import state as states
from keysync_jax.training.objective import DiffusionObjective
from keysync_jax.training.optimizer import make_optimizer
from keysync_jax.training.step import make_train_step
from keysync_jax.training.trainables import trainable_of

QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(setup.FILE) as file:
        return dict(file)


class Given(DiffusionObjective):
    """Takes the random numbers of a step from the batch."""

    def draw(self, key, batch):
        return batch["drawn"]


def test_the_network_takes_the_same_twenty_steps(stored):
    config = setup.CONFIG
    initial = init_params(config.stage, setup.SEED, zero_init=False, gain=3**0.5)
    params, frozen = trainable_of(config).split(initial)
    tx = make_optimizer(config.optimizer)
    state = states.create(params, frozen, tx, ema=False)
    step = jax.jit(make_train_step(Given(config), tx, config.optimizer, seed=0), compiler_options=QUICK_COMPILE)
    for i in range(setup.STEPS):
        state, metrics = step(state, setup.batch(i) | {"drawn": setup.drawn(i)})
        close(metrics["loss"], stored["losses"][i], 32, err_msg=f"loss of step {i}")
        # The ramp begins at a millionth of the rate, eight units in the last place of what it ends at.
        close(metrics["learning_rate"], stored["rates"][i], 1, scale=setup.CONFIG.optimizer.learning_rate, wrong=0.0)
    entries = sgm.stage_table(config.stage)
    before = dict(table.to_torch(entries, initial))
    after = dict(table.to_torch(entries, states.merge(state.params, state.frozen)))
    for key, value in after.items():
        moved, norm = value.astype(np.float64) - before[key], stored[f"norm/{key}"]
        if f"update/{key}" not in stored:
            assert not moved.any() and norm == 0, f"{key} is frozen but moved"
            continue
        # Adam divides by the gradient's own size, so a rounding difference shows where the gradient is near zero: a thousandth of the
        # update. And each side rounds a parameter to float32 after every step, torch's decay the same way each time: 1 - 1e-7 is no
        # float32. At a norm's scale of 1, whose whole update is 1e-4, that is the larger part.
        stride = max(1, value.size // 64)
        some, wanted = moved.ravel()[::stride][:64], stored[f"update/{key}"]
        rounding = setup.STEPS * np.finfo(np.float32).epsneg
        error = np.linalg.norm(some - wanted)
        assert error <= 1e-3 * np.linalg.norm(wanted) + rounding * np.linalg.norm(value.ravel()[::stride][:64]), f"{key}: {error}"
        error = abs(np.linalg.norm(moved) - norm)
        assert error <= 1e-3 * norm + rounding * np.linalg.norm(value), f"{key}: the update's norm is off by {error / norm:.1e}"
        assert norm > 1e-5 * np.sqrt(value.size), f"{key} has not moved"
    assert sum(name.startswith("norm/") for name in stored) == len(after)


def test_every_term_of_the_update(stored):
    """The optimizer alone at a large rate and decay, where decay, warm-up and epsilon all show."""
    tx = make_optimizer(setup.ALONE)
    params = jnp.asarray(setup.given(0)[0])
    opt_state = tx.init(params)
    for step in range(setup.STEPS):
        updates, opt_state = tx.update(jnp.asarray(setup.given(step)[1]), opt_state, params)
        params = optax.apply_updates(params, updates)
        # One rounding of a parameter and some of its update per step; the smallest term, the decay, is 1e-3 of a parameter.
        close(params, stored["alone"][step], 4 + step, err_msg=f"step {step}")
    assert np.abs(params - setup.given(0)[0]).min() > 1e-4  # decay alone moves those without a gradient
