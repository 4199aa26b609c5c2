"""Hand detection: the pieces with known answers, and frames without a hand."""

import cv2
import numpy as np
import pytest
from bounds import approx, close

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import hands, ssd
from keysync_jax.media.hands import HandDetector


def test_anchors_stand_in_the_middle_of_cells():
    anchors = ssd.anchor_centres(((2, 1), (1, 2)))
    np.testing.assert_array_equal(anchors, [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75], [0.5, 0.5], [0.5, 0.5]])


def test_detections_are_decoded_relative_to_their_anchor_and_sorted():
    raw = np.array([[10.0, -10, 20, 40, 5, 5], [0, 0, 50, 50, 0, 0], [0, 0, -1, 5, 0, 0]], np.float32)
    found = ssd.decode(raw, np.array([0.1, 3.0, 9.0]), np.array([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]), 100, 0.5)
    assert [round(d.score, 4) for d in found] == [0.9526, 0.525]  # the third has no width
    close(found[1].box, [0.5, 0.2, 0.7, 0.6], 4, dtype=np.float64)
    close(found[1].points, [[0.55, 0.55]], 4, dtype=np.float64)


def test_boxes_of_one_object_are_averaged_by_score():
    points = np.zeros((1, 2))
    boxes = [
        ssd.Detection((0.0, 0.0, 1.0, 1.0), points, 0.9), ssd.Detection((0.1, 0.0, 1.1, 1.0), points + 1, 0.6),
        ssd.Detection((3.0, 3.0, 4.0, 4.0), points, 0.5),
    ]  # fmt: skip
    first, second = ssd.suppress(boxes, 0.3)
    close(first.box, [0.04, 0, 1.04, 1], 4, dtype=np.float64)
    close(first.points, [[0.4, 0.4]], 4, dtype=np.float64)
    assert first.score == 0.9 and (second.box, second.score) == (boxes[2].box, boxes[2].score)


def test_a_letterbox_keeps_shape_and_says_where_it_lies():
    picture = np.full((40, 80, 3), 200, np.uint8)
    square, (origin, extent) = ssd.letterboxed(picture, 16)
    assert square[:4].max() == 0 and square[12:].max() == 0 and (square[4:12] == 200).all()
    np.testing.assert_array_equal([origin, extent], [[0, -20], [80, 80]])


def test_the_square_of_a_hand_points_along_its_fingers():
    points = np.zeros((7, 2))
    points[0], points[2] = (100, 150), (100, 100)  # wrist below, middle finger above: upright
    square = hands._square_of(ssd.Detection((80, 90, 120, 130), points, 1.0))
    assert square.angle == approx(0, scale=1) and square.side == approx(2.6 * 40)
    assert (square.x, square.y) == approx((100, 110 - 20))
    points[2] = (150, 150)  # fingers to the right: a quarter turn clockwise, moved to the right
    square = hands._square_of(ssd.Detection((80, 90, 120, 130), points, 1.0))
    assert square.angle == approx(np.pi / 2) and (square.x, square.y) == approx((120, 110))


def test_no_hand_in_noise_or_in_a_plain_picture_and_a_bad_frame_is_refused():
    rng = np.random.default_rng(0)
    detector = HandDetector()
    assert detector.detect(np.full((240, 320, 3), 120, np.uint8)) == []
    noise = cv2.resize(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
    assert detector.detect(noise) == []
    with pytest.raises(KeySyncError, match="uint8 RGB frame"):
        detector.detect(np.zeros((4, 4), np.uint8))
