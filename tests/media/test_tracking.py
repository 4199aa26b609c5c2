"""One face per shot: no swaps, gaps, runs, choice, smoothing."""

import numpy as np
import pytest
from bounds import close, eps

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.media import tracking
from keysync_jax.media.faces import Face
from keysync_jax.media.tracking import FaceTable, Selection, fill_gaps, jitter, smooth_run

SHAPE = np.random.default_rng(1).uniform(-0.5, 0.5, (68, 2))
SIZE = (1280, 720)


def face(x, y, size=100.0):
    return Face.from_landmarks(SHAPE * size + [x, y], 1.0)


def table_of(frames):
    table = FaceTable(SIZE)
    for faces in frames:
        table.add(faces)
    assert len(table) == len(frames)
    return table


# Landmarks are float32 at up to 1,280 pixels, and each is a mean, an interpolation or a polynomial of five of them.
ROUNDING = dict(ulps=8, scale=1280)


def x_of(shot):
    return shot.landmarks[:, :, 0].mean(axis=1) - SHAPE[:, 0].mean() * 100


def test_second_person_never_swaps_in():
    # The main face goes missing twice while another, larger one is there; the order of faces in a frame changes at random.
    rng = np.random.default_rng(0)
    frames = []
    for i in range(40):
        faces = [] if i in (10, 11, 12) or 25 <= i < 35 else [face(300 + 2 * i, 300)]
        if 8 <= i < 36:
            faces.append(face(700, 300, 120))
        frames.append([faces[k] for k in rng.permutation(len(faces))])
    shot = table_of(frames).finish("left", smooth=False)
    assert shot.tracks == 2
    assert shot.runs == [(0, 25), (35, 40)]
    missing = np.array([i in (10, 11, 12) or 25 <= i < 35 for i in range(40)])
    np.testing.assert_array_equal(shot.detected, ~missing)
    np.testing.assert_array_equal(shot.usable, [not 25 <= i < 35 for i in range(40)])
    close(x_of(shot)[shot.usable], 300 + 2 * np.flatnonzero(shot.usable), **ROUNDING)
    assert np.isnan(shot.landmarks[25:35]).all()


def test_selections():
    frames = [[face(200, 200, 80), face(620, 380, 100), face(1000, 200, 150)] for _ in range(10)]
    frames[4].append(face(40, 40, 20))  # seen once: not a choice
    table = table_of(frames)
    for text, x, size in (
        ("largest", 1000, 150),
        ("left", 200, 80),
        ("right", 1000, 150),
        ("center", 620, 100),
        ("590,300", 620, 100),
        ("1,1", 200, 80),
    ):
        shot = table.finish(text, smooth=False)
        close(shot.landmarks[5].mean(axis=0)[0], x + SHAPE[:, 0].mean() * size, **ROUNDING, err_msg=text)
        assert shot.tracks == 4


def test_largest_weighs_size_and_time():
    frames = [[face(300, 300, 100)] + ([face(900, 300, 140)] if i < 5 else []) for i in range(30)]
    assert table_of(frames).finish("largest").detected.all()


@pytest.mark.parametrize("text", ["biggest", "1,2,3", "a,b", "", "nan,3"])
def test_unknown_selection(text):
    with pytest.raises(UsageError, match="face choice"):
        Selection.parse(text)


def test_no_face_anywhere():
    shot = table_of([[], [], []]).finish()
    assert not shot.usable.any() and not shot.detected.any() and shot.runs == [] and shot.tracks == 0
    assert shot.landmarks.shape == (3, 68, 2) and np.isnan(shot.landmarks).all()
    assert FaceTable(SIZE).finish().landmarks.shape == (0, 68, 2)


@pytest.mark.parametrize("gap", [1, 5, 6, 10])
def test_gap_of_up_to_five_is_filled(gap):
    frames = [[face(300 + 3 * i, 300)] if not 8 <= i < 8 + gap else [] for i in range(8 + gap + 8)]
    shot = table_of(frames).finish(smooth=False)
    assert shot.detected.sum() == 16
    if gap <= 5:
        assert shot.runs == [(0, len(frames))] and shot.usable.all()
        close(x_of(shot), 300 + 3 * np.arange(len(frames)), **ROUNDING)
    else:
        assert shot.runs == [(0, 8), (8 + gap, len(frames))]


def test_edges_of_a_shot_are_not_invented():
    frames = [[], [], [face(300, 300)], [face(300, 300)], []]
    shot = table_of(frames).finish()
    assert shot.runs == [(2, 4)]
    np.testing.assert_array_equal(shot.usable, shot.detected)


def test_a_jump_or_another_size_starts_another_track():
    far = table_of([[face(300, 300)], [face(800, 300)]])
    assert far.finish().tracks == 2
    grown = table_of([[face(300, 300, 60)], [face(300, 300, 200)]])
    assert grown.finish().tracks == 2
    back = table_of([[face(300, 300)]] + [[]] * 12 + [[face(380, 300)]])  # a longer absence may move further
    assert back.finish().tracks == 1


def test_fill_gaps_interpolates_linearly():
    points = np.zeros((5, 68, 2), np.float32)
    points[0], points[4] = 10, 20
    points[1:4] = 99  # not detected: must not be read
    filled, runs = fill_gaps(points, np.array([True, False, False, False, True]))
    close(filled[:, 0, 0], [10, 12.5, 15, 17.5, 20], 2)
    assert runs == [(0, 5)] and filled.dtype == np.float32


def test_smoothing_takes_jitter_and_leaves_motion():
    rng = np.random.default_rng(0)
    time = np.arange(60)[:, None, None]
    motion = SHAPE * 100 + 300 + 4.0 * time + 0.05 * time**2  # accelerating, 4 to 10 pixels per frame
    noisy = motion + rng.normal(0, 0.7, motion.shape)
    smooth = smooth_run(noisy)
    assert jitter(noisy) == pytest.approx(0.7, rel=0.1)  # of 8,160 numbers; the accelerated motion adds a little
    assert jitter(smooth) < 0.3 * jitter(noisy)
    assert np.abs(smooth - motion)[4:-4].mean() < 0.6 * np.abs(noisy - motion).mean()
    # No lag: without noise nothing moves, not even at the ends.
    close(smooth_run(motion), motion, 8)


def test_smoothing_is_symmetric_in_time_and_keeps_a_blink():
    blink = np.zeros((41, 68, 2))
    blink[18:23] = np.array([0.5, 0.9, 1.0, 0.9, 0.5])[:, None, None]
    out = smooth_run(blink)
    close(out, smooth_run(blink[::-1])[::-1], 8)
    assert out[20].min() > 0.85 and int(out[:, 0, 0].argmax()) == 20


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7])
def test_short_runs(length):
    points = np.random.default_rng(length).normal(0, 1, (length, 68, 2))
    out = smooth_run(points)
    assert out.shape == points.shape and np.isfinite(out).all()
    assert (np.abs(out - points).max() <= 8 * eps() * np.abs(points).max()) == (length < 5)


def test_smoothing_refuses_holes():
    points = np.zeros((9, 68, 2))
    points[3] = np.nan
    with pytest.raises(KeySyncError, match="finite"):
        smooth_run(points)


def test_smoothing_does_not_cross_a_gap():
    frames = [[face(300, 300)]] * 10 + [[]] * 8 + [[face(340, 300)]] * 10
    shot = table_of(frames).finish()
    assert shot.runs == [(0, 10), (18, 28)]
    close(x_of(shot)[:10], 300, **ROUNDING)
    close(x_of(shot)[18:], 340, **ROUNDING)
    assert tracking.MAX_GAP == 5


def look_of(person):
    """What somebody looks like, uint8 `[16, 16, 3]`."""
    return np.random.default_rng(100 + person).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def seen(x, y, person, size=100.0, shape=0.0):
    points = SHAPE + shape * np.random.default_rng(int(1000 * x + y)).normal(0, 1, SHAPE.shape)
    return Face.from_landmarks(points * size + [x, y], 1.0)._replace(look=look_of(person))


def test_a_face_that_comes_back_elsewhere_is_taken_up_again():
    frames = [[seen(200, 300, 0)]] * 20 + [[]] * 12 + [[seen(900, 250, 0, 130)]] * 20
    shot = table_of(frames).finish(smooth=False)
    assert shot.tracks == 1 and shot.runs == [(0, 20), (32, 52)] and shot.others == ()
    # Somebody else who takes the empty place is somebody else.
    shot = table_of(frames[:32] + [[seen(900, 250, 1)]] * 15).finish(smooth=False)
    assert shot.tracks == 2 and shot.runs == [(0, 20)]
    assert [other.frames for other in shot.others] == [15] and shot.seen[32:].all() and not shot.detected[32:].any()


def test_two_people_who_look_alike_are_two_where_both_are_seen():
    frames = [[seen(200, 300, 0), seen(900, 300, 0, 90)]] * 30
    shot = table_of(frames).finish(smooth=False)
    assert shot.tracks == 2 and shot.center == pytest.approx(seen(200, 300, 0).center, abs=1e-3)
    assert shot.others[0].frames == 30 and shot.others[0].center == pytest.approx(seen(900, 300, 0, 90).center, abs=1e-3)


def test_a_still_portrait_is_not_the_talker():
    frames = [[seen(300, 300, 0, 200), seen(900 + i % 7, 300, 1, 100, shape=0.02)] for i in range(30)]
    shot = table_of(frames).finish(smooth=False)
    assert shot.center[0] > 800 and [other.still for other in shot.others] == [True]
    # Where nothing else is there, a photo is what is wanted; and a choice is a choice.
    assert table_of([[faces[0]] for faces in frames]).finish().detected.all()
    assert table_of(frames).finish("left").center[0] < 400


@pytest.mark.parametrize("rate", [2, 5])
def test_a_slow_camera_follows_a_face_that_moves_by_its_own_width(rate):
    table = FaceTable(SIZE)
    places = [640 + (190 if rate == 2 else 95) * (i % 2) for i in range(20)]
    for i, x in enumerate(places):
        table.add([face(x, 300)], i / rate)
    shot = table.finish()
    assert shot.tracks == 1 and shot.detected.all()
    close(x_of(shot), places, **ROUNDING)  # and nothing is smoothed away
