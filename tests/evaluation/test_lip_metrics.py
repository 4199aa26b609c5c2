"""Figures of a mouth over time on series made by hand, whose answers are known."""

import math

import numpy as np
import pytest
from bounds import approx

from keysync_jax.core.errors import KeySyncError
from keysync_jax.evaluation import lip_metrics, marks
from keysync_jax.evaluation.lip_metrics import MouthTruth


def _wander(seed, count=150, width=3):
    """A smooth random series in 0..1 that no other seed's resembles."""
    x = np.convolve(np.random.default_rng(seed).normal(size=count + 4 * width), np.hanning(2 * width + 1), mode="valid")[:count]
    return (x - x.min()) / (x.max() - x.min())


TRUE = _wander(1)


@pytest.mark.parametrize("shift", [-4, -1, 0, 2, 5])
def test_a_shifted_mouth_has_that_lag(shift):
    late = _wander(1, 170)[10 : 10 + 150]
    shifted = _wander(1, 170)[10 - shift : 160 - shift]
    curve = lip_metrics.cross_correlation(shifted, late)
    assert lip_metrics.best_lag(curve) == shift
    assert curve[shift + 5] == approx(1.0)


def test_correlation_is_pearsons():
    a, b = _wander(2), _wander(3)
    assert lip_metrics.correlation(a, b) == approx(np.corrcoef(a, b)[0, 1])
    assert lip_metrics.correlation(a, 3 - 2 * a) == approx(-1)
    assert lip_metrics.correlation(a, np.full(150, 0.3)) == 0.0


def test_too_few_frames_correlate_with_nothing():
    few = lip_metrics.FEWEST - 1
    for count in (1, 2, few):  # two points would give ±1
        assert math.isnan(lip_metrics.correlation(TRUE[:count], _wander(2)[:count]))
    assert lip_metrics.correlation(TRUE[: few + 1], TRUE[: few + 1]) == approx(1)
    # A cubic in the loudness passes through any four points: the rest of a few more is no evidence.
    assert math.isnan(lip_metrics.partial_correlation(TRUE[: few + 3], TRUE[: few + 3], _wander(5)[: few + 3]))
    assert lip_metrics.partial_correlation(TRUE[: few + 4], TRUE[: few + 4], _wander(5)[: few + 4]) == approx(1)
    short = few + lip_metrics.MAX_LAG  # at the largest lag one frame too few is left
    with pytest.raises(KeySyncError, match="12 frames are too few to look for a lag of up to 5; it takes 13"):
        lip_metrics.cross_correlation(TRUE[:short], TRUE[:short])
    for count, lag in ((short, math.nan), (short + 1, 0.0)):
        truth = MouthTruth(TRUE[:count], TRUE[:count], TRUE[:count] < 0.1, _wander(5)[:count], 1.0, _wander(7)[:count])
        figures = lip_metrics.follow_figures(TRUE[:count], TRUE[:count], np.ones(count, bool), truth)
        assert figures["opening_r"] == approx(1)
        np.testing.assert_equal(figures["lag"], lag)  # a whole number of frames, or none


def test_a_mouth_that_does_not_move_has_no_lag_and_no_correlation():
    still = np.full(150, 0.4)
    truth = MouthTruth(TRUE, TRUE, TRUE < 0.1, _wander(5), 1.0, _wander(7))
    figures = lip_metrics.follow_figures(still, still, np.ones(150, bool), truth)
    assert figures["opening_r"] == figures["width_r"] == figures["partial_r"] == 0
    assert math.isnan(figures["lag"]) and figures["closed"] == 0 and figures["roughness"] == 0
    assert not any(mark.passed(figures[mark.key]) for mark in marks.FOLLOW)


def _loud_clips():
    """Per clip an opening and a loudness that are correlated but not the same."""
    for seed in range(8):
        opening = _wander(seed)
        yield opening, -50 + 30 * (0.6 * opening + 0.4 * _wander(100 + seed))


@pytest.mark.parametrize(
    "meter",
    [
        lambda db: db,
        lambda db: 10 ** (db / 20),
        lambda db: np.clip(db, -40, -28),
        lambda db: 1 / (1 + np.exp(-(db + 35) / 3)),
    ],
    ids=["decibels", "amplitude", "clipped", "soft gate"],
)
def test_loudness_meters_fail_the_partial_correlation(meter):
    plain, partial = [], []
    for opening, db in _loud_clips():
        plain.append(lip_metrics.correlation(meter(db), opening))
        partial.append(lip_metrics.partial_correlation(meter(db), opening, db))
    assert np.mean(plain) > 0.6  # a meter looks good until loudness is taken out
    assert abs(np.mean(partial)) < 0.2


def test_loudness_of_few_levels_takes_out_no_more_than_it_explains():
    generator = np.random.default_rng(0)
    opening = generator.standard_normal(20)
    other = opening + generator.standard_normal(20)
    silence = np.full(20, -80.0)
    assert lip_metrics.partial_correlation(other, opening, silence) == approx(lip_metrics.correlation(other, opening))
    gated = np.where(np.arange(20) % 3 == 0, -80.0, -20.0)
    rests = [x - np.where(gated > -50, x[gated > -50].mean(), x[gated < -50].mean()) for x in (other, opening)]
    assert lip_metrics.partial_correlation(other, opening, gated) == approx(lip_metrics.correlation(*rests))


def test_partial_correlation_keeps_what_is_more_than_loudness():
    for opening, db in _loud_clips():
        noise = np.random.default_rng(7).normal(0, 0.5 * opening.std(), 150)
        assert lip_metrics.partial_correlation(opening, opening, db) == approx(1)
        assert lip_metrics.partial_correlation(opening + noise, opening, db) > 0.5


def test_loudness_is_the_level_of_each_frame():
    sine = np.sin(np.arange(640 * 3) * 2 * np.pi / 40).astype(np.float32)
    sine[640:1280] *= 0.1
    sine[1280:] = 0
    np.testing.assert_allclose(lip_metrics.loudness_db(sine, 3), [-3.01, -23.01, -80], rtol=0, atol=0.0051)  # given to two decimals
    with pytest.raises(KeySyncError, match="1280 samples.*3 frames.*1920"):
        lip_metrics.loudness_db(sine[:1280], 3)


def test_open_and_closed_shares():
    opening = np.array([0.0, 0.01, 0.07, 0.09, 0.4, 0.39])
    found = np.array([True, True, True, True, True, False])
    assert lip_metrics.open_share(opening, np.ones(6, bool), 0.4) == approx(3 / 6)  # .09, .4 and .39 are above .08
    assert lip_metrics.open_share(opening[:3], np.array([True, False, True]), 0.4) == approx(1 / 3)  # a smear is no shut mouth
    closed = np.array([True, True, False, True, False, True])
    assert lip_metrics.closed_share(opening, found, closed, 0.4) == approx(2 / 4)
    assert math.isnan(lip_metrics.closed_share(opening, found, np.zeros(6, bool), 0.4))


def test_leak_is_the_weight_of_the_inputs_mouth():
    source = 0.5 * TRUE + 0.5 * _wander(7)  # also where the two resemble each other
    for share in (0.0, 0.2, 1.0):
        mixed = (1 - share) * TRUE + share * source + 0.1
        assert lip_metrics.input_leak(mixed, TRUE, source) == approx(share, 64, scale=1)  # least squares over 150 frames
    assert lip_metrics.input_leak(0.3 * source, np.zeros(150), source) == approx(0.3)  # silence: the true mouth is shut
    assert math.isnan(lip_metrics.input_leak(TRUE, TRUE, np.full(150, 0.2)))
    assert math.isnan(lip_metrics.input_leak(TRUE[:7], TRUE[:7], source[:7]))


def test_roughness_is_relative_to_the_truth():
    jagged = TRUE + 0.2 * (-1.0) ** np.arange(150)
    assert lip_metrics.roughness(TRUE, TRUE) == approx(1)
    assert lip_metrics.roughness(jagged, TRUE) > 3
    # A mean of squares of differences of numbers up to 5.
    assert math.sqrt(lip_metrics.second_difference(np.linspace(0, 5, 40))) == approx(0, 4, scale=5)
    assert lip_metrics.second_difference(np.array([0.0, 0, 1, 0, 0])) == approx((1 + 4 + 1) / 3)


def test_roughness_of_some_frames_counts_what_happens_around_them():
    step = np.where(np.arange(10) < 5, 0.0, 1.0)  # a jump from frame 4 to frame 5
    assert lip_metrics.second_difference(step, [4, 5]) == 1 and lip_metrics.second_difference(step, [2, 7]) == 0
    assert lip_metrics.second_difference(step, [4, 7]) == 0.5 and lip_metrics.second_difference(step, []) == 0
    assert lip_metrics.roughness(2 * step, step, [4]) == approx(4)


def test_mean_leaves_out_clips_without_a_figure():
    mean, error = lip_metrics.mean_and_error([0.5, math.nan, 0.7])
    assert mean == approx(0.6) and error == approx(0.1)
    assert math.isnan(lip_metrics.mean_and_error([math.nan])[0])


def test_bad_series_are_refused():
    with pytest.raises(KeySyncError, match="150 and 149"):
        lip_metrics.correlation(TRUE, TRUE[1:])
    with pytest.raises(KeySyncError, match="1 values that are not finite"):
        lip_metrics.correlation(np.where(np.arange(150) == 3, np.nan, TRUE), TRUE)
    with pytest.raises(KeySyncError, match="too few to look for a lag"):
        lip_metrics.cross_correlation(TRUE[:6], TRUE[:6])


def test_marks_judge_both_ways():
    figures = {"opening_r": 0.8, "width_r": 0.59, "lag": -1, "closed": None}
    rows = {row["key"]: row["passed"] for row in marks.judge(marks.FOLLOW, figures)}
    assert rows == {"opening_r": True, "width_r": False, "lag": True, "closed": False, "partial_r": None}  # not measured: no verdict
    for missing, verdict in ((0, True), (1, False)):  # one clip without a lag is one too many
        assert marks.FOLLOW[2].met({"lag": 0.0, "lag_missing": missing}) is verdict
    assert not marks.FOLLOW[2].passed(-2)
    assert marks.clean({"a": [math.nan, 0.12345678], "b": 3}) == {"a": [None, 0.1235], "b": 3}
