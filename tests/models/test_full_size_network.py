"""The full-size keyframe network really runs: one call on a small latent, on a CPU, within 24 GiB.

pytest -m slow -n 0 -s tests/models/test_full_size_network.py      about five minutes, 15 GiB of memory
"""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.config import StageConfig
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.models.stage import StageModel, init_params


@pytest.mark.slow
def test_one_call_of_the_full_size_network():
    config = StageConfig()
    params = init_params(config, 0, zero_init=False)
    unet = params["model"]["diffusion_model"]
    assert sum(leaf.size for leaf in jax.tree.leaves(unet)) == 1_524_950_762
    model = StageModel(config)
    rng = np.random.default_rng(0)
    x, tokens = rng.standard_normal((1, 2, 8, 8, 4), np.float32), rng.standard_normal((1, 2, 1024), np.float32)
    call = jax.jit(lambda p, x, tokens: model.apply({"params": p}, x, jnp.zeros(1), Conditions(x[:, 0], tokens)))
    out = np.asarray(call(params, x, tokens))
    assert out.shape == x.shape and np.isfinite(out).all() and out.std() > 1e-3
    other = np.asarray(call(params, x, tokens[:, ::-1]))
    assert np.abs(out - other).max() > 1e-4  # the audio reaches the output
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB, output std {out.std():.3f}")
    assert peak < 24
