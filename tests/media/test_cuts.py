"""Cuts against held, frozen and dropped pictures, with the face to decide; dissolves and fades."""

import cv2
import numpy as np
import pytest

from keysync_jax.media.cuts import find_cuts
from keysync_jax.media.dissolves import DissolveDetector
from keysync_jax.media.faces import Face
from keysync_jax.media.shots import ShotDetector

SIZE = (120, 160)
_RNG = np.random.default_rng(0)
SHAPE = _RNG.uniform(-0.5, 0.5, (68, 2))
WAY = np.cumsum(_RNG.normal(0, 1, (400, 2)), axis=0)
WAY = 0.7 * (cv2.GaussianBlur(WAY, (1, 0), 0, sigmaY=4) - WAY.mean(axis=0))  # a head that wanders, slowly and then fast


def wall(seed):
    coarse = np.random.default_rng(seed).random((8, 10, 3)).astype(np.float32)
    return cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC) * 110 + 60


def talker(i, person=0, zoom=1.0, shift=0.0):
    """A picture of a head that moves and talks at moment `i`, and its face."""
    image = wall(person).astype(np.float32)
    x, y = 80 + WAY[i % 400, 0] + shift, 62 + WAY[i % 400, 1]
    skin = [(215, 165, 140), (130, 95, 75)][person % 2]
    cv2.ellipse(image, (round(x * 16), round(y * 16)), (24 * 16, 31 * 16), 0, 0, 360, skin, -1, cv2.LINE_AA, 4)
    for side in (-9, 9):
        cv2.circle(image, (round((x + side) * 16), round((y - 6) * 16)), 4 * 16, (40, 40, 60), -1, cv2.LINE_AA, 4)
    cv2.ellipse(
        image, (round(x * 16), round((y + 14) * 16)), (8 * 16, round((2 + 4 * abs(np.sin(i / 2))) * 16)), 0, 0, 360, (120, 40, 50), -1
    )
    if zoom != 1.0:
        matrix = np.array([[zoom, 0, 80 * (1 - zoom)], [0, zoom, 60 * (1 - zoom)]])
        image = cv2.warpAffine(image, matrix, SIZE[::-1], borderMode=cv2.BORDER_REPLICATE)
        x, y = zoom * x + 80 * (1 - zoom), zoom * y + 60 * (1 - zoom)
    grain = np.random.default_rng(i).normal(0, 2, (*SIZE, 3))
    return np.clip(image + grain, 0, 255).astype(np.uint8), Face.from_landmarks(SHAPE * 50 * zoom + [x, y], 1.0)


def cuts_of(pictures, times=None):
    detector = ShotDetector()
    for index, (rgb, _) in enumerate(pictures):
        detector.update(rgb, index, None if times is None else times[index])
    return find_cuts(detector, [[face] for _, face in pictures])


def held(pictures, each):
    return [pictures[i // each * each] for i in range(len(pictures))]


TAKE = [talker(i) for i in range(120)]


@pytest.mark.parametrize("each", [2, 3, 5])
def test_held_pictures_are_no_cuts(each):
    assert cuts_of(held(TAKE, each)) == []


def test_a_picture_that_freezes_while_the_world_goes_on_is_no_cut():
    for at, stay in ((20, 6), (40, 15), (70, 25)):
        frozen = list(TAKE)
        frozen[at : at + stay] = [TAKE[at]] * stay
        assert cuts_of(frozen) == []


def test_missing_and_dropped_pictures_are_no_cuts():
    assert cuts_of([p for i, p in enumerate(TAKE) if i % 5 != 4]) == []
    assert cuts_of([TAKE[i - 1] if i % 5 == 4 else p for i, p in enumerate(TAKE)]) == []
    for dropped in (2, 3, 4):
        assert cuts_of(TAKE[:50] + TAKE[50 + dropped :]) == []
    # The same with timestamps that say so.
    kept = [*range(30), *range(40, 90)]
    assert cuts_of([TAKE[i] for i in kept], [i / 25 for i in kept]) == []


@pytest.mark.parametrize("each", [1, 2, 3])
def test_cuts_are_found_on_the_frame_between_held_pictures_too(each):
    at = 54
    for after in (
        [talker(i, person=1) for i in range(120)],
        [talker(i, zoom=1.2) for i in range(120)],
        [talker(i, shift=30) for i in range(120)],
    ):
        assert cuts_of(held(TAKE, each)[:at] + held(after, each)[at:]) == [at]


def test_a_slow_camera_is_no_row_of_cuts_and_has_its_cuts():
    slow = [talker(5 * i) for i in range(40)]
    times = [i / 5 for i in range(40)]
    assert cuts_of(slow, times) == []
    assert cuts_of(slow[:20] + [talker(5 * i, person=1) for i in range(20, 40)], times) == [20]


def blended(a, b, weight):
    return (np.clip((1 - weight) * a[0] + weight * b[0].astype(np.float64), 0, 255).astype(np.uint8), a[1] if weight < 0.5 else b[1])


def transitions_of(pictures):
    detector = DissolveDetector()
    for rgb, _ in pictures:
        detector.update(rgb)
    return detector.transitions()


@pytest.mark.parametrize("length", [8, 12, 25, 40])
def test_a_dissolve_is_found_with_its_middle(length):
    other = [talker(i, person=1, zoom=1.3) for i in range(120)]
    mixed = [blended(a, b, np.clip((i - 40) / length, 0, 1)) for i, (a, b) in enumerate(zip(TAKE, other, strict=True))]
    (found,) = transitions_of(mixed)
    assert not found.fade
    assert abs(found.middle - (40 + length / 2)) <= 2
    assert 40 <= found.start < found.middle < found.stop <= 40 + length + 1


def test_a_fade_to_black_and_back_is_two_transitions():
    black = (np.zeros_like(TAKE[0][0]), TAKE[0][1])
    weights = np.interp(np.arange(120), [30, 45, 55, 70], [0, 1, 1, 0])
    found = transitions_of([blended(a, black, w) for a, w in zip(TAKE, weights, strict=True)])
    assert len(found) == 2 and all(transition.fade for transition in found)


def test_takes_dissolve_into_nothing():
    pan = [np.roll(TAKE[0][0], 2 * i, axis=1) for i in range(80)]
    zoom = [talker(0, zoom=1 + 0.01 * i)[0] for i in range(80)]
    dimmed = [(p[0] * (1 - 0.5 * min(1, i / 40))).astype(np.uint8) for i, p in enumerate(TAKE)]
    walk = [talker(0, shift=2.0 * i - 60)[0] for i in range(60)]
    for pictures in ([p for p, _ in TAKE], [p for p, _ in held(TAKE, 3)], pan, zoom, dimmed, walk):
        assert transitions_of([(p, None) for p in pictures]) == []
