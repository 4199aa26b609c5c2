"""`--guidance`: what it says, what it refuses, and what becomes of a stage's config."""

import dataclasses

import numpy as np
import pytest

from keysync_jax.config import GUIDANCES, GuidanceConfig, StageConfig, from_dict, to_dict
from keysync_jax.converters.parts import describe, described
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.options import DubOptions, GuidanceOption
from keysync_jax.inference.pipeline import KeySyncPipeline

OWN = StageConfig(audio_scale=2.5, identity_scale=1.5)


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [
        ("audio=5,identity=2", "audio-identity", {"audio": 5, "identity": 2}),
        (" audio = 5 ", "audio-identity", {"audio": 5, "identity": 1.5}),
        ("apg:audio=5,identity=2", "apg", {"audio": 5, "identity": 2, "momentum": -0.75, "eta": 0, "norm_threshold": 2.5}),
        ("apg:momentum=-0.5", "apg", {"audio": 2.5, "identity": 1.5, "momentum": -0.5, "eta": 0, "norm_threshold": 2.5}),
        ("cfg:scale=3", "cfg", {"scale": 3}),
        ("cfg", "cfg", {"scale": 2}),
        ("auto:scale=1.5", "auto", {"scale": 1.5}),
        ("none", "none", {}),
    ],
)
def test_what_is_asked_for(text, kind, numbers):
    stage = DubOptions(guidance=text).guided(OWN)
    assert stage.guidance.kind == kind and stage.guidance_numbers == numbers
    assert dataclasses.replace(stage, guidance=OWN.guidance, audio_scale=2.5, identity_scale=1.5) == OWN  # and nothing else


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("louder", "there is no guidance 'louder'; choose one of audio-identity, cfg"),
        ("audio:5", "there is no guidance 'audio'"),
        ("audio=loud", "'audio=loud' is no NAME=NUMBER"),
        ("audio=5 identity=2", "is no NAME=NUMBER"),
        ("cfg:audio=5", "'audio' cannot be set; choose from scale"),
        ("none:scale=1", "'scale' cannot be set; choose from nothing"),
        ("volume=5", "'volume' cannot be set; choose from"),
        ("audio=-1", "audio -1 is out of range; choose 0 to 100"),
        ("audio=100", "out of range"),
        ("apg:eta=nan", "out of range"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        DubOptions(guidance=text)


def test_a_number_that_the_models_own_rule_does_not_read():
    plain = dataclasses.replace(OWN, guidance=GuidanceConfig("cfg"))
    with pytest.raises(UsageError, match="cfg guidance of the keyframe stage reads no 'audio'; write --guidance audio-identity:audio="):
        DubOptions(guidance="audio=5").guided(plain)
    with pytest.raises(UsageError, match="reads no 'identity'"):
        DubOptions(identity_scale=2.0).guided(plain)
    assert DubOptions(guidance="scale=4").guided(plain).guidance_numbers == {"scale": 4}


def test_the_scales_are_still_options_of_their_own():
    assert DubOptions().guided(OWN) == OWN
    assert DubOptions(audio_scale=4.0).guided(OWN).guidance_numbers == {"audio": 4.0, "identity": 1.5}
    with pytest.raises(UsageError, match="--audio-scale and --guidance contradict each other"):
        DubOptions(audio_scale=4.0, guidance="none")


def test_configs_from_before_mean_what_they_meant():
    """They have the two scales and no rule; and a config that asks for no other rule is written as before, for versions from before."""
    old = to_dict(OWN)
    for later in ("guidance", "system", "emotion_dim"):
        del old[later]
    assert from_dict(StageConfig, old) == OWN and OWN.guidance_numbers == {"audio": 2.5, "identity": 1.5}
    assert describe("keyframe", OWN, False)["config"] == old
    other = dataclasses.replace(OWN, guidance=GuidanceConfig("apg", eta=0.1))
    assert described(describe("keyframe", other, False), "file") == other
    with pytest.raises(KeySyncError, match=f"GuidanceConfig.kind is 'loud'; choose one of {', '.join(GUIDANCES)}"):
        from_dict(StageConfig, old | {"guidance": {"kind": "loud"}})
    assert GuidanceOption(None, {}).applied(other) == other


def test_autoguidance_of_a_model_with_one_network_is_refused_before_any_work(tiny_model):
    pipe = KeySyncPipeline.from_pretrained(tiny_model)
    frames, voice = np.zeros((2, 64, 64, 3), np.uint8), np.zeros(1280, np.float32)  # no face is looked for
    with pytest.raises(KeySyncError, match="AutoGuidance asks a second network, 'weak', which is not there"):
        pipe(frames, voice, fps=25, rate=16000, options=DubOptions(guidance="auto:scale=2"))
