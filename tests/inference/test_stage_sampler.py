"""A stage under guidance of several kinds: a second network from outside, and branches left out."""

import functools

import jax
import numpy as np
import pytest
import rounds_worker
from bounds import close

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import guidance, schedules
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.diffusion.noise import keyed_noise
from keysync_jax.inference.engine import StageSampler, Window
from keysync_jax.models.stage import StageModel, init_params
from keysync_jax.parallel.mesh import data_mesh

STAGE = rounds_worker.stage()
GOOD, BAD = (init_params(STAGE, seed, zero_init=False) for seed in (0, 1))


def window(rule, number=0):
    rng = np.random.default_rng(number)
    shape = (STAGE.num_frames, STAGE.latent_size, STAGE.latent_size, 4)
    return Window(
        seed=np.uint32(3), index=np.int32(number), guidance=jax.tree.map(np.float32, rule),
        latents=rng.standard_normal(shape[1:], np.float32),
        audio=rng.standard_normal((shape[0], 2, STAGE.audio_feature_dim), np.float32), known=rng.standard_normal(shape, np.float32),
        mask=(rng.random((*shape[:3], 1)) < 0.6).astype(np.float32), steps=10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sampler():
    """The stage with a second set of parameters, as one hands it over from outside."""
    return StageSampler(STAGE, GOOD, data_mesh(jax.devices()[:1]), others={guidance.WEAK: BAD})


@pytest.fixture(scope="module")
def plain(sampler):
    """Latents without guidance, and without any second network."""
    alone = StageSampler(STAGE, GOOD, data_mesh(jax.devices()[:1]))
    return next(alone([window(guidance.NoGuidance())]))


def by_hand(scale: float) -> np.ndarray:
    """Autoguidance as the paper writes it, step by step: both networks denoise the same state under the same conditions."""
    given, model = window(guidance.NoGuidance()), StageModel(STAGE)
    f = jax.jit(lambda params, x, c_noise, conditions: model.apply({"params": params}, x, c_noise, conditions))
    embed = functools.partial(model.apply, method="embed_audio")
    concat = given.latents[None] / np.float32(STAGE.latent_scale)

    def denoised(params, x, sigma):
        pasted = x * given.mask + given.known * (1 - given.mask)
        conditions = Conditions(concat, embed({"params": GOOD}, given.audio[None]))
        out = f(params, (pasted / np.sqrt(sigma**2 + 1))[None], np.float32([0.25 * np.log(sigma)]), conditions)[0]
        found = out * (-sigma / np.sqrt(sigma**2 + 1)) + pasted / (sigma**2 + 1)
        return found * given.mask + given.known * (1 - given.mask)

    sigmas = schedules.ays_sigmas(10).astype(np.float32)
    noise = keyed_noise(np.uint32([3]), STAGE.stage, np.int32([0]), given.known.shape)[0]
    x = np.asarray(noise) * np.sqrt(1 + sigmas[0] ** 2)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        bad = denoised(BAD, x, sigma)
        guided = bad + scale * (denoised(GOOD, x, sigma) - bad)
        x = np.asarray(guided + following / sigma * (x - guided), np.float32)
    return x


def test_autoguidance_with_a_second_parameter_set(sampler, plain):
    """Two networks, one stage: windows of other scales share the program, and at scale 1 the weak network is not asked."""
    rules = [guidance.AutoGuidance(scale).needed() for scale in (2.0, 1.5, 1.0)]
    strong, medium, one = sampler([window(rule) for rule in rules])
    # Eleven steps of a network of some ten layers, in float32; away from it lie the other scale and each network alone.
    close(strong, by_hand(2.0), 2000, wrong=[medium, plain])
    close(one, plain, 2000, wrong=medium)
    assert sampler.calls == 3  # the windows differ in scale; the last one also in its set of evaluations


def test_a_network_that_is_not_there_is_named(plain):
    alone = StageSampler(STAGE, GOOD, data_mesh(jax.devices()[:1]))
    with pytest.raises(KeySyncError, match="AutoGuidance asks a second network, 'weak', which is not there; hand over its parameters"):
        list(alone([window(guidance.AutoGuidance(2.0))]))


def test_branches_left_out_change_latents_by_rounding_alone(sampler, plain):
    """At audio 1 and identity 1 one evaluation gives what three give, to rounding: in latents of size 1 less than 1e-4. One code value of
    a picture is 1/127 of its range, so a decoder would have to amplify a hundredfold to show it in a bit."""
    rule = guidance.AudioIdentityGuidance(1.0, 1.0)
    three, guided = sampler([window(rule), window(guidance.AudioIdentityGuidance(5.0, 2.0))])
    (one,) = sampler([window(rule.needed())])
    assert len(rule.needed().branches) == 1 and len(rule.branches) == 3
    close(one, three, 2000, wrong=guided)
    assert np.abs(one - three).max() < 1e-4
    close(one, plain, 2000, wrong=guided)
