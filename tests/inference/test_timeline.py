from fractions import Fraction

import pytest

from keysync_jax.core.clock import FRAME_RATE, model_frame
from keysync_jax.inference.timeline import make_run


def times(rate, count, start=Fraction(0)):
    return [start + Fraction(i) / Fraction(rate) for i in range(count)]


def test_25_fps_is_one_to_one():
    run = make_run(0, 0, 250, times(25, 250), 10_000)
    assert run.first == 0 and run.sources == tuple(range(250))
    assert [run.row(t) for t in times(25, 250)] == list(range(250))


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, 60])
def test_error_stays_below_half_a_frame_for_ten_minutes(rate):
    ts = times(rate, int(600 * rate))
    run = make_run(0, 0, len(ts), ts, 10**6)
    for frame, t in enumerate(ts):
        row = run.row(t)
        assert abs(Fraction(run.first + row, FRAME_RATE) - t) <= Fraction(1, 2 * FRAME_RATE)
        # The picture that conditioned that model frame is this frame or a neighbour no further than half a source interval.
        assert abs(ts[run.sources[row]] - Fraction(run.first + row, FRAME_RATE)) <= max(
            Fraction(1, 2 * FRAME_RATE), Fraction(1, 2) / rate
        ), frame


def test_variable_rate_and_offset_start():
    ts = [Fraction(2, 5), Fraction(41, 100), Fraction(1, 2), Fraction(4, 5), Fraction(21, 25)]
    run = make_run(3, 0, 5, ts, 1000)
    assert run.first == model_frame(Fraction(2, 5)) == 10
    assert run.num_frames == 12  # 0.40 s to 0.84 s
    assert run.sources[0] in (0, 1) and run.sources[-1] == 4
    assert list(run.sources) == sorted(run.sources)


def test_voice_end_cuts_the_run():
    ts = times(25, 100)
    assert make_run(0, 10, 60, ts, 30).sources == tuple(range(10, 30))
    assert make_run(0, 40, 60, ts, 30).num_frames == 0


def test_one_frame():
    assert make_run(0, 7, 8, times(30, 10), 1000).sources == (7,)
