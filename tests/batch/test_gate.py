"""The quality gate on drawn dubs: each spoil is caught by its own measure; how many of many, tests/scenarios/gate_drawn.py says."""

from fractions import Fraction

import gate_drawn
import numpy as np
import pytest

from keysync_jax.batch import gate
from keysync_jax.batch.gate_figures import follow_figures, open_in_silence


@pytest.fixture(scope="module")
def dubs():
    return [gate_drawn.draw(number, frames=125, size=96) for number in range(2)]


def test_good_drawn_dubs_pass(dubs):
    for dub in dubs:
        assert gate.missed(gate_drawn.figures(dub)) == {}


@pytest.mark.parametrize("how", gate_drawn.SPOILS)
def test_each_spoil_is_caught_by_its_own_measure(dubs, how):
    missed = gate.missed(gate_drawn.figures(gate_drawn.spoil(dubs[0], how, 0)))
    assert set(missed) & gate_drawn.SPOILS[how], f"{how}: {missed}"


def test_a_lag_is_told_with_its_sign():
    rng = np.random.default_rng(0)
    loud = np.convolve(rng.standard_normal(200), np.hanning(9), "same") * 10 - 30
    opening = np.roll((loud + 60) / 100, 4)
    found = follow_figures(opening, loud)
    assert found["voice_lag"] == 4 and found["voice_lag_gain"] > 0.1
    assert gate.missed(found)["voice_lag"] == "the mouth is 4 frames late"
    assert follow_figures(opening[:20], loud[:20]) == {}


def test_pauses_count_inside_only_and_gaps_are_not_pauses():
    loud = np.full(60, -20.0)
    loud[20:40] = -75
    opening = np.zeros(60)
    opening[20:22] = opening[38:40] = 0.5  # closing and opening again
    assert open_in_silence(opening, loud, 0.22) == 0
    opening[20:40] = 0.5
    assert open_in_silence(opening, loud, 0.22) == 1
    assert np.isnan(open_in_silence(opening, np.full(60, -20.0), 0.22))


def test_frames_that_were_left_alone_are_counted_against_what_the_voice_covers():
    skipped = [{"frames": [0, 30], "reason": "no face detected"}, {"frames": [60, 100], "reason": "the voice has ended"}]
    report = {"source": {"frames": 100}, "frames_dubbed": 30, "shots": [{"frames": [0, 100], "skipped": skipped}]}
    assert gate.painted_share(report) == 0.5
    assert "50%" in gate.missed({"painted": 0.5})["painted"]
    assert gate.voice_figures({}, [Fraction(0)], np.zeros(640, np.float32)) == {}
