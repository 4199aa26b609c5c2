"""Pixel formats: RGB to code values against the published matrices and against libswscale."""

import av
import numpy as np
import pytest
from bounds import close

from keysync_jax.media import color


def test_matrices_give_the_published_code_values():
    # ITU-R BT.709, BT.601 and BT.2020 limited range: white, black, and pure red.
    for matrix, red in ((1, (63, 102, 240)), (6, (81, 90, 240)), (9, (74, 97, 240))):
        fmt = color.plane_format("yuv444p", matrix, 1, 64, 64)
        codes = color.to_codes(np.array([[[1, 1, 1], [0, 0, 0], [1, 0, 0]]], np.float32), fmt)
        assert np.rint(codes[0]).tolist() == [[235, 128, 128], [16, 128, 128], list(red)]
    full = color.plane_format("yuvj420p", 5, 0, 64, 64)
    close(color.to_codes(np.ones((1, 1, 3), np.float32), full), [[[255, 128, 128]]], 4)
    ten = color.plane_format("yuv420p10le", 1, 1, 64, 64)
    close(color.to_codes(np.ones((1, 1, 3), np.float32), ten), [[[940, 512, 512]]], 4)
    planar_rgb = color.plane_format("gbrp", 0, 2, 64, 64)
    close(color.to_codes(np.array([[[0.2, 0.4, 0.6]]], np.float32), planar_rgb) / 255, [[[0.4, 0.6, 0.2]]], 4)


def test_unspecified_matrix_is_guessed_by_size():
    for size, matrix in (((720, 576), 5), ((1280, 720), 1), ((1080, 1920), 1), ((640, 480), 5)):
        assert color.plane_format("yuv420p", 2, 1, *size) == color.plane_format("yuv420p", matrix, 1, *size)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p10le", "yuv444p12le", "yuvj444p", "gbrp10le", "gray", "gray12le"])
def test_code_values_turn_back_into_rgb(pix_fmt):
    fmt = color.plane_format(pix_fmt, 1, 1, 1920, 1080)
    rgb = np.random.default_rng(0).random((8, 6, 3)).astype(np.float32)
    back = color.to_rgb(color.to_codes(rgb, fmt), fmt)
    expected = rgb if fmt.family != "gray" else np.repeat((rgb @ np.array([0.2126, 0.7152, 0.0722], np.float32))[..., None], 3, -1)
    assert back.shape == rgb.shape
    close(back, expected, 8)  # two matrices; a wrong one would be off by per cent


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj422p", "yuv444p10le", "yuv420p12le", "gbrp", "gray", "gray10le"])
@pytest.mark.parametrize("matrix, color_range", [(1, 1), (5, 1), (9, 2)])
def test_frames_become_rgb_like_the_formulas_say(pix_fmt, matrix, color_range):
    y, x = np.mgrid[0:48, 0:64] / 64
    rgb = np.stack([x, 0.2 + 0.5 * y, 0.9 - 0.6 * x], -1).astype(np.float32)
    fmt = color.plane_format(pix_fmt, matrix, color_range, 64, 48)
    frame = av.VideoFrame(64, 48, pix_fmt)
    codes = color.to_codes(rgb, fmt)
    for number, plane in enumerate(color.plane_views(frame)):
        values = np.ascontiguousarray(codes[:, :, number])
        plane[...] = np.rint(color.subsample(values, fmt) if number and fmt.family == "yuv" else values)
    expected = 255 * (rgb if fmt.family != "gray" else color.to_rgb(codes, fmt))
    assert np.abs(color.frame_to_rgb(frame, fmt) - expected)[2:-2, 2:-2].max() < 3
    small = expected.reshape(24, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(color.frame_to_rgb(frame, fmt, 32, 24) - small)[1:-1, 1:-1].max() < 3


def test_subsampling_averages_cells_and_the_rest_of_odd_sizes():
    plane = np.arange(15, dtype=np.float32).reshape(3, 5)
    fmt420, fmt422, fmt444 = (color.plane_format(f"yuv{name}p", 1, 1, 64, 64) for name in ("420", "422", "444"))
    assert color.subsample(plane, fmt420).tolist() == [[3, 5, 6.5], [10.5, 12.5, 14]]
    assert color.subsample(plane, fmt422).tolist() == [[0.5, 2.5, 4], [5.5, 7.5, 9], [10.5, 12.5, 14]]
    assert color.subsample(plane, fmt444) is plane


def test_nearest_editable_format():
    nearest = {
        "yuv420p": "yuv420p",
        "yuvj422p": "yuvj422p",
        "nv12": "yuv420p",
        "p010le": "yuv420p10le",
        "yuyv422": "yuv422p",
        "yuv411p": "yuv422p",
        "yuv440p": "yuv444p",
        "yuva444p10le": "yuv444p10le",
        "yuv420p16le": "yuv420p12le",
        "rgb24": "gbrp",
        "bgra": "gbrp",
        "pal8": "gbrp",
        "gbrp9le": "gbrp10le",
        "gray16be": "gray12le",
        "ya8": "gray",
        "monow": "gray",
    }
    assert {name: color.working_format(name) for name in nearest} == nearest
    assert all(color.is_editable(name) for name in nearest.values())
    with pytest.raises(ValueError, match="convert it to yuv420p first"):
        color.plane_format("nv12", 1, 1, 64, 64)


def test_relabelled_frame_keeps_every_sample():
    frame = av.VideoFrame(33, 17, "yuvj420p")
    rng = np.random.default_rng(0)
    for plane in color.plane_views(frame):
        plane[...] = rng.integers(0, 256, plane.shape)
    frame.pts, frame.colorspace = 7, 1
    copy = color.relabel(frame, "yuv420p")
    assert (copy.format.name, copy.pts, copy.colorspace) == ("yuv420p", 7, 1)
    assert all(np.array_equal(a, b) for a, b in zip(color.plane_views(frame), color.plane_views(copy), strict=True))
