"""The full-size keyframe network really runs: one call on a small latent, on a CPU, within 24 GiB.

pytest -m slow -n 0 -s tests/models/test_full_size_network.py      about five minutes, 15 GiB of memory
"""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.config import StageConfig
from keysync_jax.converters.initialize import configurations
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.models.conditioning import emotion_vector
from keysync_jax.models.stage import StageModel, init_params


@pytest.mark.slow
@pytest.mark.parametrize(("system", "parameters"), [("keysync", 1_524_950_762), ("keyface", 1_525_606_122)])
def test_one_call_of_the_full_size_network(system, parameters):
    config = StageConfig() if system == "keysync" else configurations("full", system)[0]["keyframe"]
    params = init_params(config, 0, zero_init=False)
    unet = params["model"]["diffusion_model"]
    assert sum(leaf.size for leaf in jax.tree.leaves(unet)) == parameters
    model = StageModel(config)
    rng = np.random.default_rng(0)
    x, tokens = rng.standard_normal((1, 2, 8, 8, 4), np.float32), rng.standard_normal((1, 2, 1024), np.float32)
    felt = emotion_vector(jnp.full((1, 2), 0.8), jnp.full((1, 2), -0.3), config.emotion_dim) if config.emotion_dim else None
    call = jax.jit(lambda p, x, tokens, felt: model.apply({"params": p}, x, jnp.zeros(1), Conditions(x[:, 0], tokens, vector=felt)))
    out = np.asarray(call(params, x, tokens, felt))
    assert out.shape == x.shape and np.isfinite(out).all() and out.std() > 1e-3
    other = np.asarray(call(params, x, tokens[:, ::-1], felt))
    assert np.abs(out - other).max() > 1e-4  # the audio reaches the output
    if felt is not None:
        assert np.abs(out - np.asarray(call(params, x, tokens, felt[..., ::-1]))).max() > 1e-4  # and so does the emotion
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB, output std {out.std():.3f}")
    assert peak < 24
