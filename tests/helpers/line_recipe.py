"""A recipe that brings its own kind of model, as one outside the library would: a line through noisy points.

keysync train --config line_recipe.py --workdir DIR
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from keysync_jax.config import to_dict
from keysync_jax.training.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig
from keysync_jax.training.trainable import Trainable
from keysync_jax.training.trainables import TRAINABLES


class Points:
    """Points of y = 2 x + 1, moved a little; the other split has others."""

    fingerprint = "points"

    def __init__(self, seed):
        self._seed = seed

    def sample(self, step, row, batch_size, shift=0):
        return step * batch_size + row + shift

    def read(self, samples):
        drawn = np.stack([np.random.default_rng([self._seed, i]).standard_normal(2, np.float32) for i in samples])
        return {"x": drawn[:, 0], "y": 2 * drawn[:, 0] + 1 + 0.01 * drawn[:, 1]}


class SquaredError:
    def draw(self, key, batch):
        return {"noise": 0.01 * jax.random.normal(key, batch["y"].shape)}

    def loss(self, params, frozen, batch, drawn):
        found = params["line"]["slope"] * batch["x"] + params["line"]["height"] + frozen["line"]["zero"] + drawn["noise"]
        return jnp.mean(jnp.square(found - batch["y"])), {"worst": jnp.max(jnp.abs(found - batch["y"]))}


class Line(Trainable):
    unit = item = "points"
    defining = ("model", "resolution")
    unread = ("vae.",)

    @property
    def part(self):
        return "line"

    def trained_for(self):
        return {"model": "line"}

    def abstract_model(self):
        return jax.eval_shape(lambda: self.model_weights()[0])

    def model_weights(self):
        return {"line": {name: np.zeros((), np.float32) for name in ("slope", "height", "zero")}}, ["all zero"]

    def split(self, params):
        own = dict(params["line"])
        return {"line": own}, {"line": {"zero": own.pop("zero")}}

    def reader(self, split=None):
        return Points(1 if split == self.config.data.validation_split else 0)

    def batch_shapes(self, batch_size):
        return {name: jax.ShapeDtypeStruct((batch_size,), jnp.float32) for name in ("x", "y")}

    def objective(self, vae, lpips):
        return SquaredError()


TRAINABLES["line"] = Line


def get_config():
    return ConfigDict(
        to_dict(
            TrainConfig(
                model="line",
                num_steps=4,
                dtype="float32",
                optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0, ema_decay=0.9),
                data=DataConfig(batch_size=8, threads=0, prefetch=1),
                checkpoint=CheckpointConfig(every=2, keep_last=5, keep_every=0),
                log=LogConfig(every=1, validate_every=2, samples_every=2, tensorboard=False),
            )
        )
    )
