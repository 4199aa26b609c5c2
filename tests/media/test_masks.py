"""Masks: the stored reference tensors, the rasteriser they stand for, and what must hold for any face."""

import argparse
import pathlib

import cv2
import numpy as np
import pytest
import tiny_shards

from keysync_jax.cli import dub_verbs
from keysync_jax.config import MASK_KINDS, MaskConfig, StageConfig, from_dict, to_dict
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.shards import write_group
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
from keysync_jax.data_pipeline.source.windows import KeyframeWindows
from keysync_jax.media import masks
from keysync_jax.verify import harness as parity
from keysync_jax.verify import reference_masks

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
    for kind in MASK_KINDS:
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
    np.testing.assert_array_equal(reference_masks.scale_landmarks(points, (1920, 1080), (512, 512)), [[[161, 74], [-1, 0]]])
    twice = reference_masks.scale_landmarks(points, (1920, 1080), (512, 512), times=2)
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
    wrapped = reference_masks.make_mask(points, 100, 100, MaskConfig("heart"))[0]
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


def _lips(landmarks, rows, cols, size, config):
    """The box around the lips, four pixels wider on either side."""
    points = landmarks[:, 48:]
    top, bottom, left, right = masks.below(points, points[..., 1].min(1), points[..., 1].max(1))
    return masks.inside((top, bottom, left - 4, right + 4), rows, cols)


@pytest.fixture
def lips(monkeypatch):
    """A kind of mask that another package adds."""
    monkeypatch.setattr(masks, "KINDS", dict(masks.KINDS))
    monkeypatch.setattr(masks, "MASK_KINDS", MASK_KINDS)
    masks.register("lips", _lips)
    yield "lips"
    MASK_KINDS.remove("lips")


def test_a_kind_from_outside_is_one_of_ours(lips, tmp_path):
    """It is drawn, a model's configuration can name it, and so can a dub's options and the reader of training data."""
    points = np.full((2, 68, 2), 20.0, np.float32)
    points[:, 48], points[:, 57] = (12, 24), (27, 29)
    mask = masks.make_mask(points, 32, 32, MaskConfig(lips))
    assert mask[:, 20:30, 8:32].all() and mask.sum() == 2 * 10 * 24
    np.testing.assert_array_equal(masks.make_mask(points, 32, 32, MaskConfig(lips), (8, 8)), masks.downsample(mask, (8, 8)))
    with pytest.raises(KeySyncError, match="there is a mask 'lips' already"):
        masks.register(lips, _lips)

    assert from_dict(StageConfig, to_dict(StageConfig(mask=MaskConfig(lips)))).mask.kind == lips
    parser = argparse.ArgumentParser()
    dub_verbs.add_dub(parser.add_subparsers())
    assert parser.parse_args(["dub", "a", "b", "-o", "c", "--mask", lips]).mask == lips

    write_group(tmp_path, tiny_shards.group(), tiny_shards.load, tiny_shards.clips())
    source = WindowReader(SourceConfig((DatasetChoice(str(tmp_path)),), KeyframeWindows(), mask=MaskConfig(lips)))
    read = source.read([source.sample(0, 0, 1)])["mask"][0, ..., 0]
    # The crops there have 32 pixels, the cells 8, and the lips lie between (18.7, 24.3) and (23, 30).
    np.testing.assert_array_equal(read[0], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]])


def test_a_kind_that_this_process_does_not_know_is_named(lips):
    config = MaskConfig(lips)
    del masks.KINDS[lips]
    with pytest.raises(KeySyncError, match="no mask 'lips' is registered in this process"):
        masks.make_mask(np.zeros((1, 68, 2)), 32, 32, config)
