"""Compositing: nothing outside the mask changes, the seam is invisible, the mouth stays as generated."""

import dataclasses
from fractions import Fraction

import av
import clips
import cv2
import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import color, video, writer
from keysync_jax.media.compositing import BlendSettings, Compositor, blend_region, seam_step
from keysync_jax.media.orientation import Orientation
from keysync_jax.media.video import VideoInfo

ORIENTATIONS = [Orientation(t, x, y) for t in (False, True) for x in (False, True) for y in (False, True)]


def make_info(width=240, height=200, pix_fmt="yuv420p", orientation=Orientation(), color_range=1) -> VideoInfo:
    shown = (height, width) if orientation.transpose else (width, height)
    planes = color.plane_format(pix_fmt, 1, color_range, width, height)
    base = (Fraction(25), Fraction(1, 25), pix_fmt, pix_fmt, "h264", 1, color_range, 1, 1, None, None, False)
    return VideoInfo("clip", width, height, 0, orientation, (), *shown, *base, Fraction(0), Fraction(1), False, planes)


def scene(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Upright R'G'B' float `[h, w, 3]`: smooth colours, an ellipse like a face, and some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    image = np.stack([0.35 + 0.2 * x / width, 0.3 + 0.25 * y / height, 0.5 - 0.2 * x / width], -1)
    face = ((x - 0.5 * width) / (0.22 * width)) ** 2 + ((y - 0.5 * height) / (0.34 * height)) ** 2 < 1
    image[face] = (0.75, 0.55, 0.45)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    return np.clip(image + 0.01 * rng.standard_normal((height, width, 1)), 0, 1).astype(np.float32)


def make_frame(info: VideoInfo, upright: np.ndarray) -> av.VideoFrame:
    frame = av.VideoFrame(info.width, info.height, info.pix_fmt)
    codes = color.to_codes(np.ascontiguousarray(info.orientation.stored(upright)), info.planes)
    for number, plane in enumerate(color.plane_views(frame)):
        values = np.ascontiguousarray(codes[:, :, number])
        plane[...] = np.rint(color.subsample(values, info.planes) if number and info.planes.family == "yuv" else values)
    frame.pts = 0
    return frame


def planes_of(frame: av.VideoFrame) -> list[np.ndarray]:
    return [plane.copy() for plane in color.plane_views(frame)]


def cut(image: np.ndarray, box, size: int) -> np.ndarray:
    """Crop of an upright picture as the model sees it, edges repeated outside."""
    x0, y0, side = box
    rows = np.clip(np.arange(y0, y0 + side), 0, image.shape[0] - 1)
    cols = np.clip(np.arange(x0, x0 + side), 0, image.shape[1] - 1)
    method = cv2.INTER_AREA if size < side else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image[rows[:, None], cols]), (size, size), interpolation=method)


def rgb_of(info: VideoInfo, frame: av.VideoFrame) -> np.ndarray:
    return info.orientation.upright(color.frame_to_rgb(frame, info.planes)).astype(np.float32) / 255


def box_mask(size: int = 16, top: int = 6, left: int = 3, right: int = 12) -> np.ndarray:
    mask = np.zeros((size, size), np.float32)
    mask[top:, left : right + 1] = 1
    return mask


BOX = (60, 40, 120)
FORMATS = ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p12le", "gbrp", "gbrp10le", "gray", "gray10le"]


def assert_untouched_outside(info, before, after, region):
    """Every plane equals the decoded one outside the blend, chroma wherever not all of its luma pixels are blended."""
    fmt = info.planes
    stored = info.orientation.stored(region).astype(np.float32)
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        inside = stored if number == 0 or fmt.family == "rgb" else color.subsample(np.ascontiguousarray(stored), fmt)
        changed = a != b
        assert changed.any(), f"plane {number} was not edited at all"
        assert not changed[inside < 1].any(), f"plane {number} changed outside the blend"


@pytest.mark.parametrize("pix_fmt", FORMATS)
def test_only_masked_samples_change_in_every_format(pix_fmt):
    info = make_info(pix_fmt=pix_fmt, color_range=2 if pix_fmt == "gray" else 1)
    frame = make_frame(info, scene(240, 200))
    before = planes_of(frame)
    mask = box_mask()
    noise = np.random.default_rng(1).random((32, 32, 3)).astype(np.float32)
    assert Compositor(info).composite(frame, noise, BOX, mask) is frame
    region = blend_region(info, BOX, mask)
    assert_untouched_outside(info, before, planes_of(frame), region)
    # The region lies inside the mask (cells of 7.5 pixels) and leaves the gap above the bottom of the crop.
    rows, cols = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    assert (rows[0], cols[0], cols[-1]) == (40 + 45, 60 + 22, 60 + 96) and rows[-1] == 40 + 117
    assert frame.format.name == pix_fmt and frame.pts == 0


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_rotated_and_mirrored_video_is_edited_where_the_face_stands_upright(orientation):
    upright_size = (200, 240) if orientation.transpose else (240, 200)
    info, plain = make_info(orientation=orientation), make_info(*upright_size)
    image = scene(*upright_size)
    patch = cut(image, BOX, 48)
    patch[20:40, 15:35] = (0.9, 0.1, 0.1)  # a mouth off the middle, so that a wrong turn shows
    results = []
    for each in (info, plain):
        frame = make_frame(each, image)
        before = planes_of(frame)
        Compositor(each).composite(frame, patch, BOX, box_mask())
        assert_untouched_outside(each, before, planes_of(frame), blend_region(each, BOX, box_mask()))
        results.append(rgb_of(each, frame))
    assert np.array_equal(blend_region(info, BOX, box_mask()), blend_region(plain, BOX, box_mask()))
    # Chroma cells and interpolation lie the same way, so rotated and plain video give the same picture to within rounding.
    assert np.abs(results[0] - results[1])[2:-2, 2:-2].max() < 6 / 255


@pytest.mark.parametrize("size", [32, 120, 256])
def test_the_source_itself_comes_back(size):
    info = make_info(pix_fmt="yuv444p")
    image = scene(240, 200)
    image = cv2.GaussianBlur(image, (0, 0), 4)  # what a 32-pixel crop can hold
    frame = make_frame(info, image)
    source = rgb_of(info, frame)
    Compositor(info).composite(frame, cut(image, BOX, size), BOX, box_mask())
    assert np.abs(rgb_of(info, frame) - source).max() < 4 / 255


def test_fractional_box_places_the_patch_to_a_fraction_of_a_pixel():
    info = make_info(pix_fmt="yuv444p")
    y, x = np.mgrid[0:200, 0:240]
    image = np.repeat((0.3 + 0.3 * np.sin(x / 9.0) * np.cos(y / 11.0))[:, :, None], 3, -1).astype(np.float32)
    box = (60.4, 40.7, 118.3)
    centres = (np.arange(96) + 0.5) / 96 * box[2]
    py, px = np.meshgrid(box[1] + centres - 0.5, box[0] + centres - 0.5, indexing="ij")
    patch = np.repeat((0.3 + 0.3 * np.sin(px / 9.0) * np.cos(py / 11.0))[:, :, None], 3, -1).astype(np.float32)
    frame = make_frame(info, image)
    settings = BlendSettings(max_correction=0)
    Compositor(info, settings).composite(frame, patch, box, box_mask())
    assert np.abs(rgb_of(info, frame) - image).max() < 3 / 255
    shifted = make_frame(info, image)
    Compositor(info, settings).composite(shifted, patch, (box[0] + 1.5, box[1], box[2]), box_mask())
    assert np.abs(rgb_of(info, shifted) - image).max() > 6 / 255


TINTS = {
    "brighter": lambda p: p + 0.1,
    "redder": lambda p: p + np.array([0.08, 0, -0.06], np.float32),
    "darker by a factor": lambda p: 0.7 * p,
    "light from one side": lambda p: p + np.linspace(-0.08, 0.08, p.shape[1], dtype=np.float32)[None, :, None],
}


@pytest.mark.parametrize("tint", TINTS)
def test_a_tint_of_the_model_leaves_no_seam_and_no_tint(tint):
    info = make_info()
    image = scene(240, 200)
    mask, patch = box_mask(), np.clip(TINTS[tint](cut(image, BOX, 128)), 0, 1)
    frame, hard = make_frame(info, image), make_frame(info, image)
    source, luma = rgb_of(info, frame), planes_of(frame)[0]
    region = blend_region(info, BOX, mask)
    Compositor(info).composite(frame, patch, BOX, mask)
    Compositor(info, BlendSettings(feather=0, max_correction=0)).composite(hard, patch, BOX, mask)
    seam, hard_seam = (seam_step(luma, planes_of(f)[0], region) for f in (frame, hard))
    assert seam < 0.25 and seam < 0.05 * hard_seam
    middle = Compositor(info).alpha(BOX, mask) > 0.99
    change = np.abs(cv2.blur(rgb_of(info, frame) - source, (9, 9)))[middle].mean()
    hard_change = np.abs(cv2.blur(rgb_of(info, hard) - source, (9, 9)))[middle].mean()
    assert change < 0.012 and change < 0.45 * hard_change


def test_the_mouth_stays_as_generated():
    """Something new in the middle of the patch comes through at its own contrast, while the tint around it is taken away."""
    info = make_info()
    image = scene(240, 200)
    patch = cut(image, BOX, 120)
    mouth = np.zeros((120, 120), bool)
    mouth[75:91, 45:75] = True
    patch[mouth] = (0.15, 0.05, 0.05)
    frame = make_frame(info, image)
    Compositor(info).composite(frame, np.clip(patch + 0.1, 0, 1), BOX, box_mask())
    shown = rgb_of(info, frame)[40:160, 60:180]
    inner = cv2.erode(mouth.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert np.abs(shown[inner].mean(0) - np.array([0.15, 0.05, 0.05])).max() < 0.03


def test_noise_stays_noise_and_fades_in_from_the_border():
    info = make_info(pix_fmt="yuv444p")
    frame = make_frame(info, scene(240, 200))
    luma = planes_of(frame)[0]
    mask = box_mask()
    patch = np.random.default_rng(0).random((128, 128, 3)).astype(np.float32)
    hard = make_frame(info, scene(240, 200))
    Compositor(info, BlendSettings(feather=0, max_correction=0)).composite(hard, patch, BOX, mask)
    Compositor(info).composite(frame, patch, BOX, mask)
    after = planes_of(frame)[0]
    alpha = Compositor(info).alpha(BOX, mask)
    assert np.abs(after[alpha > 0.99].astype(float) - luma[alpha > 0.99]).mean() > 15
    assert seam_step(luma, after, alpha > 0) < min(2.0, 0.2 * seam_step(luma, planes_of(hard)[0], alpha > 0))
    assert 16 <= after.min() and after.max() <= 235


def test_opacity_rises_smoothly_from_zero():
    info = make_info()
    alpha = Compositor(info, BlendSettings(feather=0.1)).alpha(BOX, box_mask())
    row = alpha[130, 60:180]
    assert row.max() == 1 and np.abs(np.diff(row)).max() < 0.15
    ramp = row[22 : 22 + 14]
    assert row[21] == 0 and 0 < ramp[0] < 0.01 and np.all(np.diff(ramp) >= 0) and ramp[-1] > 0.99


@pytest.mark.parametrize("box", [(-50, -30, 120), (180, 130, 120), (-20, -40, 300), (300, 300, 50), (-200, 0, 100)])
def test_boxes_that_leave_the_picture(box):
    info = make_info()
    frame = make_frame(info, scene(240, 200))
    before = planes_of(frame)
    patch = np.full((64, 64, 3), 0.9, np.float32)
    Compositor(info).composite(frame, patch, box, np.ones((8, 8)))
    region = blend_region(info, box, np.ones((8, 8)))
    if box[0] >= 240 or box[0] + box[2] <= 0:
        assert not region.any() and all(np.array_equal(a, b) for a, b in zip(before, planes_of(frame), strict=True))
    else:
        assert_untouched_outside(info, before, planes_of(frame), region)
    # The ramp begins at the crop's edge, not at the picture's.
    if box == (-20, -40, 300):
        assert Compositor(info).alpha(box, np.ones((8, 8)))[100:150, :10].min() > 0.9


@pytest.mark.parametrize("size", [(239, 201), (65, 49)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p"])
def test_odd_sizes(size, pix_fmt):
    info = make_info(*size, pix_fmt=pix_fmt)
    frame = make_frame(info, scene(*size))
    before = planes_of(frame)
    box = (size[0] - 51, size[1] - 43, 61)
    mask = np.ones((16, 16))
    Compositor(info).composite(frame, np.random.default_rng(0).random((32, 32, 3)).astype(np.float32), box, mask)
    assert_untouched_outside(info, before, planes_of(frame), blend_region(info, box, mask))


def test_empty_mask_changes_nothing():
    info = make_info()
    frame = make_frame(info, scene(240, 200))
    before = planes_of(frame)
    Compositor(info).composite(frame, np.ones((16, 16, 3), np.float32), BOX, np.zeros((16, 16)))
    assert all(np.array_equal(a, b) for a, b in zip(before, planes_of(frame), strict=True))


def test_a_hole_in_the_mask_is_left_alone():
    info = make_info(pix_fmt="yuv444p")
    frame = make_frame(info, scene(240, 200))
    before = planes_of(frame)
    mask = box_mask()
    mask[9:12, 6:9] = 0  # a hand before the mouth
    Compositor(info).composite(frame, np.ones((16, 16, 3), np.float32), BOX, mask)
    rows, cols = slice(40 + 68, 40 + 90), slice(60 + 45, 60 + 67)
    assert all(np.array_equal(a[rows, cols], b[rows, cols]) for a, b in zip(before, planes_of(frame), strict=True))
    assert_untouched_outside(info, before, planes_of(frame), blend_region(info, BOX, mask))


def test_results_do_not_depend_on_the_cache():
    info = make_info()
    image = scene(240, 200)
    patch = np.random.default_rng(0).random((32, 32, 3)).astype(np.float32)
    warm = Compositor(info, cache_size=2)
    for top in (5, 6, 7, 8, 5):
        mask = box_mask(top=top)
        a, b = make_frame(info, image), make_frame(info, image)
        warm.composite(a, patch, BOX, mask)
        Compositor(info).composite(b, patch, BOX, mask)
        assert all(np.array_equal(x, y) for x, y in zip(planes_of(a), planes_of(b), strict=True))
    assert len(warm._plans) == 2


def test_broken_input_is_refused():
    info = make_info()
    frame = make_frame(info, scene(240, 200))
    patch = np.ones((16, 16, 3), np.float32)
    patch[3, 3, 1] = np.nan
    compositor = Compositor(info)
    with pytest.raises(KeySyncError, match="not finite"):
        compositor.composite(frame, patch, BOX, box_mask())
    with pytest.raises(ValueError, match="patch has shape"):
        compositor.composite(frame, np.ones((16, 12, 3), np.float32), BOX, box_mask())
    with pytest.raises(ValueError, match="expected 240x200"):
        compositor.composite(make_frame(make_info(64, 48), scene(64, 48)), np.ones((16, 16, 3)), BOX, box_mask())


def test_a_dub_written_without_loss_equals_the_source_outside_the_blend(tmp_path):
    """Decode, composite every other frame, write, decode: the whole way through files, with a rotation tag."""
    matrix = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(6)], size=(160, 128), matrix=matrix)
    info = video.probe(tmp_path / "a.mp4")
    compositor = Compositor(info)
    box, mask = (20, 40, 90), box_mask()
    region = blend_region(info, box, mask)
    patch = np.random.default_rng(0).random((32, 32, 3)).astype(np.float32)
    with writer.VideoWriter(tmp_path / "b.mp4", info, lossless=True) as out:
        for frame in video.read(tmp_path / "a.mp4", info):
            if frame.index % 2:
                compositor.composite(frame.av_frame, patch, box, mask)
            out.write(frame)
    for a, b in zip(video.read(tmp_path / "a.mp4"), video.read(tmp_path / "b.mp4"), strict=True):
        assert a.time == b.time
        if a.index % 2:
            assert_untouched_outside(info, a.planes(), b.planes(), region)
            assert np.abs(a.rgb().astype(int) - b.rgb())[Compositor(info).alpha(box, mask) > 0.99].mean() > 5
        else:
            assert all(np.array_equal(x, y) for x, y in zip(a.planes(), b.planes(), strict=True))


def test_editing_a_frame_leaves_the_decoder_alone(tmp_path):
    """Later frames are predicted from earlier ones inside the decoder; painting over an earlier one must not reach them."""
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(12)], size=(160, 128), options={"preset": "medium", "crf": "20"})
    info = video.probe(tmp_path / "a.mp4")
    clean = [planes_of(frame.av_frame) for frame in video.read(tmp_path / "a.mp4", info)]
    compositor = Compositor(dataclasses.replace(info), BlendSettings(max_correction=0))
    for frame in video.read(tmp_path / "a.mp4", info):
        assert all(np.array_equal(a, b) for a, b in zip(frame.planes(), clean[frame.index], strict=True))
        compositor.composite(frame.av_frame, np.ones((8, 8, 3), np.float32), (0, 0, 128), np.ones((4, 4)))
