"""One fixed square where that does; else one that is turned, stretched or follows, without a jump."""

import numpy as np
import pytest

from keysync_jax.media import placing
from keysync_jax.media.crop import Crop, View, extract, fixed_crop, from_crop_space, to_crop_space
from keysync_jax.media.placing import place, tilt

SIZE = (1280, 480)
# A frontal face of unit size around its middle: jaw, brows, nose, eyes and lips where iBUG's points lie.
_JAW = [(-0.5 * np.cos(t), -0.15 + 0.65 * np.sin(t)) for t in np.linspace(0, np.pi, 17)]
_REST = {27: (0, -0.2), 36: (-0.33, -0.2), 45: (0.33, -0.2), 17: (-0.42, -0.5), 26: (0.42, -0.5)}
SHAPE = np.array([*_JAW, *[_REST.get(i, (0.01 * (i % 7), 0.02 * (i % 11))) for i in range(17, 68)]])


def head(x, y, size=100.0, angle=0.0):
    """Landmarks `[68, 2]` of a face of `size` around (x, y), turned clockwise by `angle` degrees."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return SHAPE @ np.array([[cos, sin], [-sin, cos]]) * size + [x, y]


def shares(track, placements, aspect=1.0):
    """Of each frame, the larger of the face's width and height in its square, and whether all of it lies inside."""
    unit = np.stack([to_crop_space(points, placements.at(i), 1) for i, points in enumerate(track)])
    return np.ptp(unit, axis=1).max(axis=1), bool((unit > 0).all() and (unit < 1).all())


def run_of(track, **options):
    return place(track, [(0, len(track))], SIZE, **options)


def test_a_still_upright_head_keeps_the_square_it_had():
    rng = np.random.default_rng(0)
    track = np.stack([head(600 + rng.normal(0, 4), 250 + rng.normal(0, 4), 120 + rng.normal(0, 2), rng.normal(0, 5)) for _ in range(60)])
    (part,) = run_of(track).parts
    assert part == (0, 60, fixed_crop(track, SIZE)) and isinstance(part.view, Crop)


def test_a_walk_is_followed_evenly():
    track = np.stack([head(100 + 20 * i, 240 + 3 * np.sin(i), 143) for i in range(50)])
    placed = run_of(track)
    share, inside = shares(track, placed)
    assert inside and share.min() > 0.45 and share.max() < 0.65
    x = np.array([placed.at(i).middle[0] for i in range(5, 45)])
    assert np.abs(np.diff(x) - 20).max() < 0.5  # as steadily as the walk, with parts of pixels


def test_somebody_comes_near():
    track = np.stack([head(600, 240, 80 + 2 * i) for i in range(60)])
    share, inside = shares(track, run_of(track))
    assert inside and share.min() > 0.45 and share.max() < 0.65


def test_a_head_that_turns_back_within_a_few_pictures_stays_inside():
    track = np.stack([head(500 + 140 * np.sin(6 * i / 5), 240, 143) for i in range(24)])
    share, inside = shares(track, run_of(track, rate=5.0))
    assert inside and share.min() > 0.45 and share.max() < 0.65


@pytest.mark.parametrize("angle", [45, 60, 90, 120, 180, -90, -135])
def test_a_head_to_one_side_stands_upright_in_a_turned_square(angle):
    track = np.stack([head(600, 240, 120, angle + np.sin(i)) for i in range(20)])
    (part,) = run_of(track).parts
    assert isinstance(part.view, View) and abs(placing._between(np.radians(part.view.angle), np.radians(angle))) < np.radians(2)
    upright = to_crop_space(track, part.view, 512)
    assert np.abs(tilt(upright)).max() < np.radians(3)
    share, inside = shares(track, run_of(track))
    assert inside and share.min() > 0.45 and share.max() < 0.65
    np.testing.assert_allclose(from_crop_space(upright, part.view, 512), track, atol=1e-9)


def test_a_head_that_tips_over_is_followed_in_its_tilt():
    track = np.stack([head(600, 240, 120, 2 * i) for i in range(60)])
    placed = run_of(track)
    upright = np.stack([to_crop_space(points, placed.at(i), 1) for i, points in enumerate(track)])
    assert np.abs(tilt(upright)).max() < np.radians(20)
    assert np.abs(np.diff([placed.at(i).angle for i in range(60)])).max() < 4


def test_a_quarter_turn_cuts_out_the_pixels_of_the_upright_head():
    picture = np.random.default_rng(0).integers(0, 256, (480, 480, 3), dtype=np.uint8)
    track = np.stack([head(243.3, 231.7, 121.3)] * 3)
    upright = place(track, [(0, 3)], (480, 480)).at(0)
    for turns, angle in ((1, 90), (2, 180), (3, -90)):
        turned = track
        for _ in range(turns):  # clockwise
            turned = np.stack([480 - turned[..., 1], turned[..., 0]], axis=-1)
        view = place(turned, [(0, 3)], (480, 480)).at(0)
        assert view.angle % 360 == pytest.approx(angle % 360)
        lying = np.ascontiguousarray(np.rot90(picture, -turns))
        np.testing.assert_array_equal(extract(lying, view, upright.side), extract(picture, upright, upright.side))


def test_pixels_that_are_not_square_are_seen_as_they_are_shown():
    aspect = 16 / 11
    track = np.stack([head(480, 240, 140)] * 5)
    stored = track / [aspect, 1]
    view = place(stored, [(0, 5)], (660, 480), aspect=aspect).at(0)
    x0, y0, x1, y1 = view.box
    assert (x1 - x0) * aspect == pytest.approx(y1 - y0)
    np.testing.assert_allclose(
        to_crop_space(stored, view, 512), to_crop_space(track, place(track, [(0, 5)], (960, 480)).at(0), 512), atol=1e-6
    )


def test_every_run_has_a_place_of_its_own_where_one_square_does_not_do():
    track = np.full((60, 68, 2), np.nan)
    track[:20], track[40:] = head(150, 240, 120), head(1100, 240, 120)
    placed = place(track, [(0, 20), (40, 60)], SIZE)
    assert [(part.start, part.stop) for part in placed.parts] == [(0, 20), (40, 60)]
    assert placed.at(0) == fixed_crop(track[:20], SIZE) and placed.at(59) == fixed_crop(track[40:], SIZE)
    assert place(track, [], SIZE).parts == ()
