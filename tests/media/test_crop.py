"""Fixed crop of a shot: where it lies, that landmarks follow it, and that pixels come back."""

import numpy as np
import pytest
from bounds import close

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import crop as cropping
from keysync_jax.media.crop import Crop, extract, fixed_crop, from_crop_space, to_crop_space


def face(cx, cy, size=150.0):
    """68 points whose bounding box is a square of `size` around (cx, cy)."""
    grid = np.stack(np.meshgrid(np.linspace(-0.5, 0.5, 17), np.linspace(-0.5, 0.5, 4)), axis=-1).reshape(68, 2)
    return (grid * size + [cx, cy]).astype(np.float32)


def test_still_face_takes_the_documented_share():
    crop = fixed_crop(np.stack([face(600, 730)] * 5), (1080, 1920))
    assert all(v % 2 == 0 for v in crop)
    assert abs(crop.side - cropping.MARGIN * 150) <= 2
    assert 0.55 < 150 / crop.side < 0.60
    assert abs(crop.x0 + crop.side / 2 - 600) <= 2
    # The head's middle is above the middle of brows and chin, so the crop is raised.
    assert 730 - (crop.y0 + crop.side / 2) == pytest.approx(cropping.RAISE * crop.side, abs=2)


def test_moving_face_stays_inside_with_a_border():
    track = np.stack([face(400 + 12 * i, 700 + 4 * i) for i in range(30)])
    crop = fixed_crop(track, (1920, 1080))
    inside = to_crop_space(track, crop, 512)
    assert inside.min() >= 0.05 * 512 and inside.max() <= 0.95 * 512
    assert crop.side > cropping.MARGIN * 150


def test_frames_without_landmarks_are_left_out():
    track = np.stack([face(600, 700)] * 4)
    track[2] = np.nan
    assert fixed_crop(track, (1080, 1920)) == fixed_crop(track[:2], (1080, 1920))
    with pytest.raises(KeySyncError, match="no frame of this shot"):
        fixed_crop(np.full((3, 68, 2), np.nan), (1080, 1920))
    with pytest.raises(KeySyncError, match="margin"):
        fixed_crop(track, (1080, 1920), margin=0.9)


def test_crop_near_the_edge_prefers_real_pixels():
    crop = fixed_crop(face(90, 500)[None], (1080, 1920))
    assert crop.x0 == 0  # the face is 15 px from the edge: the square would stick out, and there is room to move it in
    cut = fixed_crop(face(20, 500)[None], (1080, 1920))
    assert cut.x0 < 0  # the face itself leaves the frame: the square follows it
    low = to_crop_space(face(20, 500), cut, 512)[:, 0].min()
    assert low >= 0.04 * 512


def test_face_larger_than_the_frame():
    crop = fixed_crop(face(160, 120, 200)[None], (320, 240))
    assert crop.side > 240 and crop.y0 < 0
    picture = extract(np.full((240, 320, 3), 77, np.uint8), crop, 128)
    assert picture.shape == (128, 128, 3) and (picture == 77).all()


def test_landmarks_go_there_and_back():
    points = np.random.default_rng(0).uniform(0, 1000, (4, 68, 2))
    crop = Crop(-20, 114, 338)
    inside = to_crop_space(points, crop, 512)
    close(inside, (points - [-20, 114]) * 512 / 338, 4, dtype=np.float64)
    close(from_crop_space(inside, crop, 512), points, 4, dtype=np.float64)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_pixels_land_where_landmarks_say(size):
    # A smooth bump at a known place must stay under its landmark at any scale: no half-pixel drift.
    y, x = np.mgrid[0:400, 0:600] + 0.5
    bump = 255 * np.exp(-((x - 311.3) ** 2 + (y - 172.8) ** 2) / (2 * 15.0**2))
    crop = Crop(220, 60, 256)
    picture = extract(bump.astype(np.float32), crop, size)
    rows, cols = np.mgrid[0:size, 0:size] + 0.5
    found = np.array([(picture * cols).sum(), (picture * rows).sum()]) / picture.sum()
    # The crop cuts the bump's tail off: a twentieth of a pixel. Half a pixel of drift would be ten times that.
    np.testing.assert_allclose(found, to_crop_space(np.array([311.3, 172.8]), crop, size), rtol=0, atol=0.05)
    assert picture.dtype == np.float32 and picture.shape == (size, size)


def test_shrinking_averages_and_equal_size_copies():
    checker = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = extract(checker, Crop(0, 0, 256), 64)
    assert np.abs(small.astype(int) - 127.5).max() <= 1  # a sampled checkerboard would be black or white
    same = extract(checker, Crop(10, 20, 64), 64)
    np.testing.assert_array_equal(same, checker[20:84, 10:74])


def test_outside_repeats_the_edge():
    image = np.arange(100, dtype=np.uint8).reshape(10, 10)
    out = extract(image, Crop(-4, 6, 8), 8)
    np.testing.assert_array_equal(out[0], [60, 60, 60, 60, 60, 61, 62, 63])
    np.testing.assert_array_equal(out[4], out[3])
    with pytest.raises(KeySyncError, match="outside the 10x10 frame"):
        extract(image, Crop(40, 0, 8), 8)
