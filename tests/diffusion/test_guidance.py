"""Guidance as callers use it: the rule a config names, scales without new programs, branches left out, a second network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import close

from keysync_jax.config import GUIDANCES, GuidanceConfig, StageConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import guidance, sampler, schedules
from keysync_jax.diffusion.conditions import FIELDS, Conditions, drop, without
from keysync_jax.diffusion.guidance import FULL, IDENTITY, NEITHER, WEAK, Branch

B, T, H, W = 2, 3, 4, 4
SIGMAS = schedules.ays_sigmas(10)
_RNG = np.random.default_rng(0)
NOISE = _RNG.standard_normal((B, T, H, W, 4), np.float32)
CONDITIONS = Conditions(
    concat=_RNG.standard_normal((B, H, W, 4), np.float32),
    crossattn=_RNG.standard_normal((B, T, 5), np.float32),
    gt=_RNG.standard_normal((B, T, H, W, 4), np.float32),
    masks=_RNG.integers(0, 2, (B, T, H, W, 1)).astype(np.float32),
)


def network(x, c_noise, conditions, gain=1.0):
    """Depends on every condition, not linearly."""
    audio = conditions.crossattn.mean(-1)[:, :, None, None, None]
    vector = 0.0 if conditions.vector is None else conditions.vector.mean(-1).reshape(-1, 1, 1, 1, 1)
    return gain * jnp.tanh(x + 0.3 * conditions.concat[:, None] + audio * jnp.cos(x) + vector)


def weak(*inputs):
    return network(*inputs, gain=0.8)


def ask(rule, conditions, sigmas=SIGMAS, networks=None):
    return sampler.sample(networks or {guidance.MAIN: network, WEAK: weak}, NOISE, sigmas, conditions, rule)


_ask = jax.jit(ask)


def run(rule, conditions=CONDITIONS):
    """One program for each set of branches."""
    return np.asarray(_ask(rule, conditions))


@pytest.mark.parametrize(
    ("rule", "branches"),
    [
        (guidance.AudioIdentityGuidance(5, 2), (NEITHER, IDENTITY, FULL)),
        (guidance.AudioIdentityGuidance(2.5, 1.5), (NEITHER, IDENTITY, FULL)),
        (guidance.AudioIdentityGuidance(1, 2), (NEITHER, IDENTITY, FULL)),
        (guidance.AudioIdentityGuidance(2, 2), (NEITHER, FULL)),
        (guidance.AudioIdentityGuidance(5, 1), (IDENTITY, FULL)),
        (guidance.AudioIdentityGuidance(0, 2), (NEITHER, IDENTITY)),
        (guidance.AudioIdentityGuidance(1, 1), (FULL,)),
        (guidance.AudioIdentityGuidance(0, 1), (IDENTITY,)),
        (guidance.AudioIdentityGuidance(0, 0), (NEITHER,)),
        (guidance.ClassifierFreeGuidance(2), (NEITHER, FULL)),
        (guidance.ClassifierFreeGuidance(1), (FULL,)),
        (guidance.AutoGuidance(2), (Branch(network=WEAK), FULL)),
        (guidance.AutoGuidance(1), (FULL,)),
        (guidance.NoGuidance(), (FULL,)),
        (guidance.AdaptiveProjectedGuidance(5, 2), (NEITHER, IDENTITY, FULL)),
        (guidance.AdaptiveProjectedGuidance(5, 1), (NEITHER, FULL)),
        (guidance.AdaptiveProjectedGuidance(1, 1), (NEITHER,)),
    ],
)
def test_branches_follow_from_the_scales_and_the_others_cost_rounding_alone(rule, branches):
    """A branch of weight zero is left out. In latents (of size 1) what is left differs from the whole by rounding: a network of a few
    operations, eleven steps, each of which amplifies by the scales. One code value of a picture is 1 / 127.5 of its range; a decoder
    would have to amplify by hundreds to show this."""
    needed = rule.needed()
    assert needed.branches == branches
    assert needed.needed() == needed  # nothing more to leave out
    whole, less = run(rule), run(needed)
    close(less, whole, 200, scale=max(1.0, np.abs(whole).max()), wrong=run(guidance.AudioIdentityGuidance(3, 2.9)))
    assert np.abs(less - whole).max() < 1e-4
    if branches == rule.branches:
        np.testing.assert_array_equal(less, whole)


def test_new_scales_are_no_new_program():
    """One program for each set of branches, whatever the scales."""
    traces = []

    def spy(*inputs):
        traces.append(inputs[0].shape[0] // B)
        return network(*inputs)

    call = jax.jit(lambda rule: sampler.sample(spy, NOISE, SIGMAS, CONDITIONS, rule))
    results = []
    for audio, identity in ((5, 2), (2.5, 1.5), (3, 1.7), (2, 2), (4, 4), (5, 1), (1, 1), (7, 3)):
        stage = StageConfig(audio_scale=float(audio), identity_scale=float(identity))
        results.append(np.asarray(call(guidance.of_stage(stage).needed())))
    assert traces == [3, 2, 2, 1]  # neither + full and identity + full are two sets
    assert len({result.tobytes() for result in results}) == len(results)
    assert call._cache_size() == len(traces)


def test_every_video_has_scales_of_its_own():
    """Scales `[B]`: each row equals a run with its scales alone."""
    rows = guidance.AudioIdentityGuidance(np.float32([5, 2.5]), np.float32([2, 1.5]))
    both = run(rows)
    for row, scales in enumerate(((5, 2), (2.5, 1.5))):
        close(both[row], run(guidance.AudioIdentityGuidance(*scales))[row], 50, wrong=both[1 - row])
    assert guidance.AudioIdentityGuidance(np.float32([1, 5]), np.float32([1, 1])).needed().branches == (IDENTITY, FULL)


@pytest.mark.parametrize("kind", GUIDANCES)
def test_a_config_names_every_rule(kind):
    stage = StageConfig(audio_scale=4.0, identity_scale=3.0, guidance=GuidanceConfig(kind, scale=1.5, eta=0.25))
    rule = guidance.of_stage(stage)
    assert type(rule) is guidance.RULES[kind] and guidance.RULES.keys() == GUIDANCES.keys()
    numbers = {"audio": 4.0, "identity": 3.0, "scale": 1.5, "eta": 0.25, "momentum": -0.75, "norm_threshold": 2.5}
    for name in GUIDANCES[kind]:
        assert getattr(rule, name) == numbers[name]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(rule))
    assert len(jax.tree.leaves(rule)) == len([name for name in GUIDANCES[kind] if name in ("audio", "identity", "scale")])


def test_autoguidance_asks_a_second_network():
    """`D_weak + w (D - D_weak)` at every step, here one step from noise to the end."""
    sigmas = np.array([3.0, 0.0])
    good, bad = (ask(guidance.NoGuidance(), CONDITIONS, sigmas, one) for one in (network, weak))
    guided = ask(guidance.AutoGuidance(2.0), CONDITIONS, sigmas)
    close(guided, bad + 2 * (good - bad), 8, wrong=[good, bad])
    np.testing.assert_array_equal(run(guidance.AutoGuidance(1.0).needed()), run(guidance.NoGuidance()))
    with pytest.raises(KeySyncError, match="AutoGuidance asks a second network, 'weak', which is not there"):
        ask(guidance.AutoGuidance(2.0), CONDITIONS, sigmas, network)


def test_a_rule_from_outside_needs_no_registration():
    """A rule of one's own: the audio's direction alone, away from a second network that hears nothing."""
    deaf = Branch(("audio",), network="deaf")

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Louder:
        scale: float
        branches = (deaf, FULL)

        def needed(self):
            return self

        def initial_state(self, x):
            return ()

        def combine(self, denoised, state):
            quiet, full = jnp.split(denoised, 2)
            return quiet + self.scale * (full - quiet), state

    sigmas = np.array([3.0, 0.0])
    quiet = ask(guidance.NoGuidance(), without(CONDITIONS, "audio"), sigmas, weak)
    full = ask(guidance.NoGuidance(), CONDITIONS, sigmas)
    guided = ask(Louder(3.0), CONDITIONS, sigmas, {"deaf": weak, guidance.MAIN: network})
    close(guided, quiet + 3 * (full - quiet), 8, wrong=[quiet, full])


def test_without_a_mask_everything_is_generated():
    nothing = CONDITIONS._replace(gt=None, masks=None)
    whole = CONDITIONS._replace(masks=np.ones_like(CONDITIONS.masks))
    free = run(guidance.AudioIdentityGuidance(), nothing)
    close(free, run(guidance.AudioIdentityGuidance(), whole), 100, wrong=run(guidance.AudioIdentityGuidance()))
    for half in (CONDITIONS._replace(gt=None), CONDITIONS._replace(masks=None)):
        with pytest.raises(KeySyncError, match="conditions have no .*; give both"):
            run(guidance.NoGuidance(), half)


def test_a_vector_is_in_every_branch():
    given = CONDITIONS._replace(vector=np.full((B, 6), 0.5, np.float32))
    *_, stacked = guidance.prepare(guidance.AudioIdentityGuidance().branches, NOISE, np.ones(B, np.float32), given)
    np.testing.assert_array_equal(stacked.vector, np.full((3 * B, 6), 0.5))
    assert np.abs(run(guidance.NoGuidance(), given) - run(guidance.NoGuidance())).max() > 1e-3


@pytest.mark.parametrize("name", FIELDS)
def test_a_condition_left_out_is_the_condition_dropped_in_every_row(name):
    """Guidance and training mean the same by "without"."""
    left_out = without(CONDITIONS, name)
    for ours, dropped, given, field in zip(
        left_out, drop(CONDITIONS, {name: np.zeros(B, bool)}), CONDITIONS, Conditions._fields, strict=True
    ):
        if given is not None:
            np.testing.assert_array_equal(ours, dropped)
            np.testing.assert_array_equal(ours, 0 * given if field == FIELDS[name] else given)


def test_an_identity_dropped_by_frame_is_repeated_first():
    keep = np.array([[True, False, True], [False, False, True]])
    dropped = drop(CONDITIONS, {"identity": keep, "audio": np.array([True, False])})
    np.testing.assert_array_equal(dropped.concat, CONDITIONS.concat[:, None] * keep[..., None, None, None])
    np.testing.assert_array_equal(dropped.crossattn, CONDITIONS.crossattn * np.float32([1, 0])[:, None, None])
