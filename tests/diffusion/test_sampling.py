"""Denoiser, guidance and sampler on closed-form networks whose results are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import close, eps

from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import guidance, inpainting, sampler, schedules
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.verify import reference_sampling

B, T, H, W, D = 3, 4, 5, 6, 7


def make_conditions(seed=0, batch=B):
    rng = np.random.default_rng(seed)
    return Conditions(
        concat=rng.normal(size=(batch, H, W, 4)).astype(np.float32),
        crossattn=rng.normal(size=(batch, T, D)).astype(np.float32),
        gt=rng.normal(size=(batch, T, H, W, 4)).astype(np.float32),
        masks=rng.integers(0, 2, size=(batch, T, H, W, 1)).astype(np.float32),
    )


def everything(conditions):
    return conditions._replace(masks=np.ones_like(conditions.masks))


def noise_like(conditions, seed=1):
    return np.random.default_rng(seed).normal(size=conditions.gt.shape).astype(np.float32)


def zero_network(x, c_noise, conditions):
    return jnp.zeros_like(x)


def network(x, c_noise, conditions):
    """Depends on every input, per video."""
    label = c_noise.reshape(c_noise.shape + (1,) * (x.ndim - c_noise.ndim))
    audio = conditions.crossattn.mean(-1)[:, :, None, None, None]
    return jnp.tanh(x) + 0.1 * conditions.concat[:, None] + 0.3 * audio + 0.05 * jnp.cos(label) * x


def test_known_region_is_exactly_the_source():
    conditions = make_conditions()
    result = sampler.sample(network, noise_like(conditions), schedules.ays_sigmas(10), conditions, guidance.AudioIdentityGuidance())
    known = np.broadcast_to(conditions.masks == 0, result.shape)
    np.testing.assert_array_equal(np.asarray(result)[known], conditions.gt[known])
    assert np.abs(np.asarray(result)[~known] - conditions.gt[~known]).min() > 0


def test_network_sees_the_clean_known_region():
    conditions = make_conditions()
    seen = {}

    def spy(x, c_noise, conditions):
        seen["x"] = x
        return jnp.zeros_like(x)

    x = noise_like(conditions)
    sigma = np.float32([0.1, 1, 10])
    inpainting.denoise(spy, x, sigma, conditions)
    c_in = (1 / np.sqrt(sigma**2 + 1))[:, None, None, None, None]
    close(seen["x"], np.where(conditions.masks == 1, x, conditions.gt) * c_in, 4, scale="each", wrong=x * c_in)
    inpainting.denoise(spy, x, sigma, conditions._replace(gt=None, masks=None))
    close(seen["x"], x * c_in, 4, scale="each")


def test_sigma_per_frame_equals_sigma_per_video():
    conditions = make_conditions()
    sigma = np.float32([0.1, 1, 10])
    x = noise_like(conditions)
    per_video = inpainting.denoise(network, x, sigma, conditions)
    per_frame = inpainting.denoise(network, x, np.repeat(sigma[:, None], T, 1), conditions)
    close(per_frame, per_video, 8, wrong=inpainting.denoise(network, x, sigma[::-1], conditions))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_chunked_network_calls_change_nothing(size):
    conditions = make_conditions(batch=5)
    sigma = np.geomspace(0.1, 10, 5).astype(np.float32)
    sizes = []

    def spy(x, c_noise, conditions):
        sizes.append(x.shape[0])
        assert x.shape[0] == c_noise.shape[0] == conditions.crossattn.shape[0] == conditions.masks.shape[0]
        return network(x, c_noise, conditions)

    x = noise_like(conditions)
    chunked = inpainting.denoise(reference_sampling.in_chunks(spy, size), x, sigma, conditions)
    assert max(sizes) == min(size, 5)
    whole = inpainting.denoise(network, x, sigma, conditions)
    close(chunked, whole, 8, wrong=np.roll(whole, 1, axis=0))


def test_low_precision_network_leaves_the_state_in_float32():
    conditions = everything(make_conditions())
    result, trajectory = reference_sampling.sample(
        lambda *inputs: network(*inputs).astype(jnp.bfloat16),
        noise_like(conditions),
        schedules.ays_sigmas(10),
        conditions,
        guidance.AudioIdentityGuidance(),
    )
    assert result.dtype == trajectory.x.dtype == trajectory.denoised.dtype == jnp.float32


def test_standard_normal_data_is_reached_at_first_order():
    """For unit normal data the optimal velocity network is zero and the flow ends at the noise it began with."""
    conditions = everything(make_conditions())
    noise = noise_like(conditions)
    errors = []
    for n in (200, 400, 800):
        result = sampler.sample(zero_network, noise, schedules.ays_sigmas(n), conditions, guidance.NoGuidance())
        errors.append(np.abs(np.asarray(result) - noise).max())
    # Twice the steps, half the error, but for the next order: a share of the error's own size. Second order would give 4.
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.2)


def test_constant_data_is_reached_exactly():
    """A denoiser that always answers g ends at g after the last level, whatever the schedule."""
    conditions = everything(make_conditions())

    def answers_gt(x, c_noise, conditions):
        sigma = jnp.exp(4 * c_noise).reshape(-1, 1, 1, 1, 1)
        noisy = x * jnp.sqrt(sigma**2 + 1)
        return (conditions.gt - noisy / (sigma**2 + 1)) * -jnp.sqrt(sigma**2 + 1) / sigma

    for n in (10, 17):
        result = sampler.sample(answers_gt, noise_like(conditions), schedules.ays_sigmas(n), conditions, guidance.NoGuidance())
        close(result, conditions.gt, 16)


@pytest.mark.parametrize(("num_steps", "evaluations"), [(10, 11), (11, 11), (25, 25)])
def test_trajectory_counts_every_evaluation(num_steps, evaluations):
    conditions = make_conditions()
    noise = noise_like(conditions)
    run = jax.jit(
        lambda noise, conditions: reference_sampling.sample(
            network, noise, schedules.ays_sigmas(num_steps), conditions, guidance.AudioIdentityGuidance()
        )
    )
    result, trajectory = run(noise, conditions)
    assert trajectory.x.shape == (evaluations + 1, *noise.shape)
    assert trajectory.denoised.shape == (evaluations, *noise.shape)
    np.testing.assert_array_equal(trajectory.x[-1], result)
    close(trajectory.x[0], noise * np.sqrt(1 + 700.0**2), 4, scale="each")
    # The last step ends at the prediction itself, x - (x - D), as far as rounding allows.
    close(result, trajectory.denoised[-1], 4, scale=np.abs(trajectory.x[-2]).max(), wrong=trajectory.denoised[-2])
    alone = sampler.sample(network, noise, schedules.ays_sigmas(num_steps), conditions, guidance.AudioIdentityGuidance())
    close(alone, result, 4 * evaluations)


def test_guidance_branches_are_what_the_paper_names():
    conditions = make_conditions()
    seen = {}

    def spy(x, c_noise, stacked):
        seen["conditions"] = stacked
        return network(x, c_noise, stacked)

    rule = guidance.AudioIdentityGuidance()
    x, sigma = noise_like(conditions), np.ones(B, np.float32)
    inpainting.denoise(spy, *guidance.prepare(rule.branches, x, sigma, conditions))
    concat, audio = (np.asarray(a) for a in seen["conditions"][:2])
    np.testing.assert_array_equal(concat, np.concatenate([np.zeros_like(conditions.concat), conditions.concat, conditions.concat]))
    silent = np.zeros_like(conditions.crossattn)
    np.testing.assert_array_equal(audio, np.concatenate([silent, silent, conditions.crossattn]))
    np.testing.assert_array_equal(seen["conditions"].gt, np.concatenate([conditions.gt] * 3))


def test_guidance_combinations():
    neither, identity, both = np.random.default_rng(2).normal(size=(3, B, T, H, W, 4)).astype(np.float32)
    stacked = jnp.concatenate([neither, identity, both])
    size = np.abs(stacked).max()

    def combine(rule, stacked=stacked):
        return np.asarray(rule.combine(stacked, rule.initial_state(neither))[0])

    # Paper Eq. 8, from the branch without conditions outwards.
    expected = neither + 2 * (identity - neither) + 5 * (both - identity)
    close(combine(guidance.AudioIdentityGuidance(5, 2)), expected, 4, scale=10 * size)
    close(combine(guidance.AudioIdentityGuidance(1, 1)), both, 4, scale=2 * size)
    close(combine(guidance.AudioIdentityGuidance(0, 1)), identity, 4, scale=2 * size)
    pair = jnp.concatenate([neither, both])
    close(combine(guidance.ClassifierFreeGuidance(3), pair), neither + 3 * (both - neither), 4, scale=6 * size)
    np.testing.assert_array_equal(combine(guidance.NoGuidance(), both), both)


def test_projected_guidance_without_its_changes_is_plain():
    neither, identity, both = np.random.default_rng(3).normal(size=(3, B, T, H, W, 4)).astype(np.float32)
    rule = guidance.AdaptiveProjectedGuidance(5, 2, momentum=0, eta=1, norm_threshold=0)
    guided, _ = rule.combine(jnp.concatenate([neither, identity, both]), rule.initial_state(neither))
    # Split into two parts by a projection (a sum of 120 products) and put together again.
    close(guided, neither + 4 * (both - neither) + (identity - neither), 4, terms=120)


def test_projected_guidance_bounds_and_projects_each_frame():
    neither, identity, both = 10 * np.random.default_rng(4).normal(size=(3, B, T, H, W, 4)).astype(np.float32)
    rule = guidance.AdaptiveProjectedGuidance(2, 1, norm_threshold=2.5)  # identity scale 1: only the audio direction remains
    update = np.asarray(rule.combine(jnp.concatenate([neither, identity, both]), rule.initial_state(neither))[0]) - neither
    norms = np.sqrt((update**2).sum((-3, -2, -1)))
    # The update is what is left after `neither` is taken away again: its 120 values are rounded at that size.
    assert (norms <= 2.5 + 4 * eps() * np.abs(neither).max() * np.sqrt(120)).all()
    assert (norms > 1).all()
    dots = (update * both).sum((-3, -2, -1))
    size = np.abs(neither).max() * np.abs(both).max()
    close(dots, np.zeros_like(dots), 4, scale=size, terms=120, wrong=(neither * both).sum((-3, -2, -1)))


def test_projected_guidance_carries_momentum_through_the_scan():
    conditions = make_conditions()
    runs = [
        sampler.sample(
            network, noise_like(conditions), schedules.ays_sigmas(10), conditions, guidance.AdaptiveProjectedGuidance(momentum=m)
        )
        for m in (-0.75, 0.0)
    ]
    assert np.abs(runs[0] - runs[1]).max() > 1e-3


def test_videos_of_a_batch_do_not_mix():
    conditions = make_conditions()
    noise = noise_like(conditions)
    arguments = schedules.ays_sigmas(10), guidance.AudioIdentityGuidance()
    together = sampler.sample(network, noise, arguments[0], conditions, arguments[1])
    alone = sampler.sample(network, noise[1:2], arguments[0], jax.tree.map(lambda a: a[1:2], conditions), arguments[1])
    close(together[1:2], alone, 4 * 11, wrong=together[:1])  # eleven evaluations


def test_non_finite_values_stop_loudly():
    sampler.require_finite(np.ones(3), "latents")
    with pytest.raises(KeySyncError, match="latents of window 3: 2 of 4 values"):
        sampler.require_finite(np.float32([1, np.nan, np.inf, 2]), "latents of window 3")
