"""What KeyFace's stages are conditioned on, where a slip would be quiet: orders, branches, dropout and weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_keyface
from bounds import close

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.diffusion.guidance import FULL, WEAK, AudioIdentityGuidance, AutoGuidance, of_stage, prepare
from keysync_jax.diffusion.loss import LossConfig, PixelTargets, prediction_loss
from keysync_jax.diffusion.preconditioning import v_weighting
from keysync_jax.encoders.audio_features import side_by_side
from keysync_jax.models import conditioning
from keysync_jax.models.stage import StageModel, init_params


def test_the_vector_is_valence_then_arousal_each_cosines_then_sines():
    valence, arousal = np.array([[0.5, -1.0]], np.float32), np.array([[0.0, 0.25]], np.float32)
    got = np.asarray(conditioning.emotion_vector(jnp.asarray(valence), jnp.asarray(arousal), 256))
    frequency = 10000.0 ** (-np.arange(128) / 128)
    of = lambda v: np.concatenate([np.cos(v[..., None] * frequency), np.sin(v[..., None] * frequency)], axis=-1)  # noqa: E731
    close(got, np.concatenate([of(valence), of(arousal)], axis=-1), ulps=8, wrong=np.concatenate([of(arousal), of(valence)], axis=-1))
    close(got[0, 0, 256:384], np.ones(128), ulps=1)
    assert not got[0, 0, 384:].any()


def test_conditions_hold_the_emotion_and_nothing_known():
    config = tiny_keyface.KEYFRAME
    model, rng = StageModel(config), np.random.default_rng(0)
    batch = {name: rng.standard_normal((2, *shape), np.float32) for name, shape in conditioning.batch_shapes(config).items()}
    assert set(batch) == {"known", "audio", "identity", "valence", "arousal"}
    variables = {"params": init_params(config, 0)}
    made = conditioning.conditions(model, variables, batch)
    assert made.gt is None and made.masks is None and made.vector.shape == (2, tiny.FRAMES, 2 * tiny_keyface.EMOTION)
    with pytest.raises(KeySyncError, match="reads valence and arousal, and there is no arousal"):
        conditioning.conditions(model, variables, {name: value for name, value in batch.items() if name != "arousal"})


def test_emotion_is_in_every_branch_and_is_never_dropped():
    vector = jnp.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    conditions = Conditions(jnp.ones((2, 4, 4, 4)), jnp.ones((2, 3, 5)), vector=vector)
    rule = AudioIdentityGuidance(5.0, 2.0)
    _, _, stacked = prepare(rule.branches, jnp.zeros((2, 3, 4, 4, 4)), jnp.ones(2), conditions)
    np.testing.assert_array_equal(stacked.vector, np.concatenate([vector] * 3))
    np.testing.assert_array_equal(np.asarray(stacked.crossattn).mean((1, 2)), [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(np.asarray(stacked.concat).mean((1, 2, 3)), [0, 0, 1, 1, 1, 1])


def test_autoguidance_asks_the_worse_network_first_and_not_at_scale_one():
    rule = of_stage(tiny_keyface.INTERPOLATION)
    assert isinstance(rule, AutoGuidance) and [branch.network for branch in rule.branches] == [WEAK, "main"]
    bad, good = np.full((1, 2, 3, 3, 4), 1.0, np.float32), np.full((1, 2, 3, 3, 4), 3.0, np.float32)
    combined, _ = rule.combine(jnp.concatenate([bad, good]), ())
    np.testing.assert_array_equal(combined, bad + 2 * (good - bad))
    assert dataclasses.replace(rule, scale=np.float32(1)).needed().branches == (FULL,)


def test_speech_stands_before_beats():
    tokens = {"wavlm": np.ones((3, 2, 4)), "beats": np.zeros((3, 2, 2))}
    np.testing.assert_array_equal(side_by_side("wavlm+beats", tokens)[0, 0], [1, 1, 1, 1, 0, 0])


def test_the_perceptual_term_weighs_each_video_and_the_lower_half_counts_more():
    """The mean of the products; the reference's code multiplies two means, which is the same for one video alone."""
    rng = np.random.default_rng(1)
    denoised, latents = (rng.standard_normal((2, 1, 6, 6, 4)).astype(np.float32) for _ in range(2))
    sigma = jnp.array([0.5, 20.0])
    weight, distance = np.asarray(v_weighting(sigma)), np.array([0.3, 2.0], np.float32)
    frames = np.zeros((2, 1, 6, 6, 3), np.float32)
    losses = prediction_loss(
        jnp.asarray(denoised), jnp.asarray(latents), sigma, None,
        LossConfig(lower_weight=3.0, pixel_weight=0.5, pixel_losses=("lpips",)), decode=lambda z: z[..., :3],
        pixels=PixelTargets(jnp.array([0]), jnp.asarray(frames)), lpips=lambda a, b: jnp.asarray(distance),
    )  # fmt: skip
    close(losses.pixels["lpips"], 0.5 * (weight * distance).mean(), ulps=8, wrong=0.5 * weight.mean() * distance.mean())
    error = np.square(denoised - latents)
    error[:, :, 3:] *= 3
    close(losses.latent, weight[:, None] * error.mean((2, 3, 4)), ulps=16, terms=144)
