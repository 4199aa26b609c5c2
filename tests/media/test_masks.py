"""Masks: the stored reference tensors, the rasteriser they stand for, and what must hold for any face."""

import pathlib

import cv2
import numpy as np
import pytest

from keysync_jax.config import MaskConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import masks
from keysync_jax.verify import harness as parity

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "masks"


def face_points(rng, width, height, count=2, dtype=np.float32):
    """Scattered points, often partly outside the picture: masks read extremes and single indices, not shapes."""
    center = rng.uniform(-0.4, 1.4, (count, 1, 2))
    points = (center + rng.normal(0, rng.uniform(0.05, 0.4), (count, 68, 2))) * [width, height]
    return points.astype(dtype)


def filled(height, width, corners):
    canvas = np.zeros((height, width), np.uint8)
    cv2.drawContours(canvas, [np.array(corners, np.float64).astype(np.int32)], -1, 1, cv2.FILLED)
    return canvas


def test_stored_reference_masks():
    case = parity.load_case(GOLDEN)
    result = parity.run_case(case)
    assert result.ok, [c for c in result.comparisons if not c.ok][:3]
    assert len(result.comparisons) == len(case.expected) == 136
    assert result.ratio == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_closed_forms_equal_the_rasteriser(dtype):
    rng = np.random.default_rng(7)
    for _ in range(60):
        height, width = (int(v) for v in rng.integers(20, 240, 2))
        points = face_points(rng, width, height, dtype=dtype)
        expand = float(rng.choice([0, 0.05, 0.3]))
        box = masks.make_mask(points, height, width, MaskConfig(box_expand=expand))
        mouth = masks.make_mask(points, height, width, MaskConfig("mouth"))
        for frame, p in enumerate(points):
            left, right, top = p[:, 0].min(), p[:, 0].max(), p[28, 1] - int(expand * width)
            np.testing.assert_array_equal(box[frame], filled(height, width, [(left, top), (left, height), (right, height), (right, top)]))
            margin = int(0.01 * width)
            top, low = p[28, 1] - margin, min(height, p[:, 1].max() + margin)
            np.testing.assert_array_equal(mouth[frame], filled(height, width, [(left, top), (left, low), (right, low), (right, top)]))


def test_box_covers_border_columns_and_reaches_the_bottom():
    points = np.full((1, 68, 2), 40.0, np.float32)
    points[0, 0], points[0, 16], points[0, 28] = (10.9, 30), (53.2, 30), (32, 20.7)
    mask = masks.make_mask(points, 64, 64, MaskConfig())[0]
    rows, cols = np.nonzero(mask)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (20, 63, 10, 53)
    assert mask.sum() == 44 * 44 and mask.dtype == np.float32


def test_target_equals_sampling_the_full_mask():
    rng = np.random.default_rng(3)
    for kind in ("box", "full", "mouth", "heart", "face"):
        points = face_points(rng, 200, 152, count=3)
        full = masks.make_mask(points, 152, 200, MaskConfig(kind))
        assert full.shape == (3, 152, 200) and set(np.unique(full)) <= {0.0, 1.0}
        for target in ((64, 64), (16, 16), (19, 25)):
            np.testing.assert_array_equal(masks.make_mask(points, 152, 200, MaskConfig(kind), target), masks.downsample(full, target))


def test_latent_cells_of_a_512_box():
    points = np.full((1, 68, 2), 256.0)
    points[0, 0], points[0, 16], points[0, 28] = (120, 300), (391, 300), (256, 201)
    mask = masks.make_mask(points, 512, 512, MaskConfig(), (64, 64))[0]
    expected = np.zeros((64, 64))
    expected[26:, 15:49] = 1  # cell i is sampled at pixel 8 i: 208 is the first row below 201, 120 and 384 lie inside
    np.testing.assert_array_equal(mask, expected)


def test_nearest_indices_round_as_torch():
    np.testing.assert_array_equal(masks.nearest_indices(512, 64), np.arange(64) * 8)
    np.testing.assert_array_equal(masks.nearest_indices(300, 64), np.arange(64) * 300 // 64)
    # torch multiplies in float32: 14 * 62 / 28 = 31 comes out just below and samples pixel 30 (seen with torch 2.13).
    assert masks.nearest_indices(62, 28)[14] == 30
    assert masks.nearest_indices(126, 60)[30] == 62
    assert masks.nearest_indices(30, 64)[-1] == 29 and masks.nearest_indices(7, 7).tolist() == list(range(7))


def test_landmarks_are_scaled_once_and_truncated():
    points = np.array([[[340.0, 280.0], [-3.9, 0.5]]])
    np.testing.assert_array_equal(masks.scale_landmarks(points, (1920, 1080), (512, 512)), [[[161, 74], [-1, 0]]])
    twice = masks.scale_landmarks(points, (1920, 1080), (512, 512), reference_double_scaling=True)
    np.testing.assert_array_equal(twice, [[[76, 19], [0, 0]]])
    assert twice.dtype == np.int64


def test_heart_leaves_the_nose_and_wraps_only_on_request():
    points = np.full((1, 68, 2), 50.0, np.float32)
    points[0, 0], points[0, 2], points[0, 16] = (20, 40), (22, 60), (80, 40)
    points[0, 29], points[0, 33], points[0, 31], points[0, 35] = (50, 40), (50, 55), (45, 54), (55, 54)
    mask = masks.make_mask(points, 100, 100, MaskConfig("heart"))[0]
    assert mask[60, 50] == 1 and mask[50, 50] == 0 and mask[39, 50] == 0 and mask[50, 30] == 1
    # The nose rectangle grows sideways by a tenth of the distance from jaw to nose, here 3, and leaves the box (20 to 80) on the right.
    points[0, 2, 0], points[0, 35] = 20, (79, 54)
    wrapped = masks.make_mask(points, 100, 100, MaskConfig("heart"), reference_heart=True)[0]
    plain = masks.make_mask(points, 100, 100, MaskConfig("heart"))[0]
    assert wrapped[50, 81] == 255 and plain[50, 81] == 0
    np.testing.assert_array_equal(wrapped == 1, plain == 1)


def test_face_kind_is_inside_the_grown_jaw():
    angle = np.linspace(np.pi, 0, 17)
    points = np.zeros((1, 68, 2), np.float32)
    points[0, :17] = np.stack([100 + 50 * np.cos(angle), 80 + 60 * np.sin(angle)], axis=1)
    mask = masks.make_mask(points, 200, 200, MaskConfig("face"))[0]
    rows, cols = np.nonzero(mask)
    assert 140 < rows.max() < 155 and rows.min() > 80  # chin at 140, grown by five percent of 200; jaw points 2 and 14 are on top
    assert 40 < cols.min() < 60 and 140 < cols.max() < 160


def test_occluder_is_taken_out():
    mask = np.ones((2, 4, 4), np.float32)
    occluder = np.zeros((2, 4, 4))
    occluder[1, :2] = 0.5
    out = masks.remove_occluder(mask, occluder)
    assert out.dtype == np.float32 and out[0].all() and not out[1, :2].any() and out[1, 2:].all()
    with pytest.raises(KeySyncError, match="occluder mask has shape"):
        masks.remove_occluder(mask, occluder[:1])


def test_bad_landmarks_are_named():
    points = np.zeros((3, 68, 2), np.float32)
    points[2, 5, 0] = np.nan
    with pytest.raises(KeySyncError, match="frame 2"):
        masks.make_mask(points, 64, 64, MaskConfig())
    with pytest.raises(KeySyncError, match=r"\(F, 68, 2\)"):
        masks.make_mask(points[:, :5], 64, 64, MaskConfig())
    with pytest.raises(KeySyncError, match="nose_index is 68"):
        masks.make_mask(points[:2], 64, 64, MaskConfig(nose_index=68))
    assert masks.make_mask(points[:0], 64, 64, MaskConfig("face")).shape == (0, 64, 64)
