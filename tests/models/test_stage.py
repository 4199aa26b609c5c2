"""A stage as a whole, and its random parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from keysync_jax.config import VAEConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.models.initializers import random_params
from keysync_jax.models.stage import StageModel, abstract_params, init_params, init_vae_params

UNET, KEYFRAME, INTERPOLATION = tiny.UNET, tiny.KEYFRAME, tiny.INTERPOLATION
T, N, D, C = tiny.FRAMES, tiny.LATENT, tiny.MELS, tiny.UNET.context_dim


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, C_NOISE, AUDIO = draw(1, T, N, N, 4), draw(1, seed=1), draw(1, T, 2, D, seed=2)
CONCAT = {"keyframe": draw(1, N, N, 4, seed=3), "interpolation": draw(1, N, N, 8, seed=3)}


@functools.cache
def jitted(config):
    model = StageModel(config)

    def run(params, audio, concat):
        tokens = model.apply({"params": params}, audio, method="embed_audio")
        return tokens, model.apply({"params": params}, X, C_NOISE, Conditions(concat, tokens))

    return jax.jit(run)


@pytest.mark.parametrize("config", [KEYFRAME, INTERPOLATION], ids=lambda c: c.stage)
def test_untrained_network_is_silent_and_a_demo_network_is_not(config):
    concat = CONCAT[config.stage]
    tokens, f = jitted(config)(init_params(config, 0), AUDIO, concat)
    assert tokens.shape == (1, T, C) and f.shape == (1, T, N, N, 4) and f.dtype == jnp.float32
    head = init_params(config, 0)["model"]["diffusion_model"]["out_2"]
    assert not np.any(head["kernel"]) and not np.any(head["bias"]) and not np.any(f)
    params = init_params(config, 0, zero_init=False, gain=3**0.5)
    _, f = jitted(config)(params, AUDIO, concat)
    assert 0.1 < float(f.std()) < 10
    for changed in (jitted(config)(params, AUDIO + 1, concat), jitted(config)(params, AUDIO, concat + 1)):
        assert np.abs(changed[1] - f).max() > 1e-2


def test_random_parameters_have_torch_ranges_and_are_keyed_by_path():
    first, second, other = (init_params(INTERPOLATION, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    linear = first["conditioner"]["embedders_2"]["linear"]
    bound = 1 / np.sqrt(D)
    for leaf in linear.values():
        assert leaf.dtype == np.float32 and np.abs(leaf).max() <= bound and np.abs(leaf).max() > 0.8 * bound
    assert np.abs(linear["kernel"] - other["conditioner"]["embedders_2"]["linear"]["kernel"]).max() > 0
    unet = first["model"]["diffusion_model"]
    assert abs(np.abs(unet["input_blocks_0_0"]["kernel"]).max() * np.sqrt(9 * 9) - 1) < 0.01  # fan-in of a 3x3 convolution, 9 channels
    assert (unet["input_blocks_1_0"]["in_layers_0"]["scale"] == 1).all()
    assert unet["input_blocks_1_0"]["time_mixer"]["mix_factor"] == 0.5
    assert not first["model"]["learned_mask"].any()
    for path in (("input_blocks_1_0", "out_layers_3"), ("middle_block_1", "proj_out"), ("input_blocks_1_0", "time_stack")):
        node = unet[path[0]][path[1]]
        node = node.get("out_layers_3", node)
        assert not np.any(node["kernel"]) and not np.any(node["bias"])
    with pytest.raises(ValueError, match="model/strange"):
        random_params({"model": {"strange": np.zeros(1)}}, 0)


def test_autoencoder_starts_random_throughout():
    tree = init_vae_params(VAEConfig(base_channels=32, channel_mult=(1, 1), num_res_blocks=1), 0)["first_stage_model"]
    assert np.any(tree["decoder"]["mid"]["attn_1"]["proj_out"]["kernel"]) and np.any(tree["decoder"]["conv_out"]["time_mix_conv"]["kernel"])
    assert tree["decoder"]["mid"]["block_1"]["mix_factor"] == 0


@pytest.mark.parametrize(("filler", "value"), [("zeros", 0), ("ones", 1), ("random", None), ("fixed_ones", None), ("none", None)])
def test_fillers(filler, value):
    config = dataclasses.replace(INTERPOLATION, filler=filler)
    model = abstract_params(config)["model"]
    assert ("learned_mask" in model) == (filler in ("zeros", "ones", "random"))
    if "learned_mask" in model:
        assert model["learned_mask"].shape == (N, N, 4)
        mask = init_params(config, 0)["model"]["learned_mask"]
        assert (mask == value).all() if value is not None else 0.5 < mask.std() < 1.5


def test_filler_of_latents_that_are_not_square():
    assert abstract_params(INTERPOLATION, (6, 4))["model"]["learned_mask"].shape == (6, 4, 4)


def test_channels_must_fit_the_stage():
    with pytest.raises(KeySyncError, match="reads 9 channels, but unet.in_channels is 8"):
        abstract_params(dataclasses.replace(INTERPOLATION, unet=UNET))
    without = dataclasses.replace(INTERPOLATION, unet=UNET, add_indicator=False)
    assert abstract_params(without)["model"]["diffusion_model"]["input_blocks_0_0"]["kernel"].shape == (3, 3, 8, 32)
