"""Compositing through a view: turned, stretched and moving crops; nothing outside changes, and what was cut out goes back where it was."""

import numpy as np
import pytest
from test_compositing import BOX, FORMATS, ORIENTATIONS, assert_untouched_outside, box_mask, make_frame, make_info, planes_of, rgb_of, scene

from keysync_jax.media.compositing import BlendSettings, Compositor, blend_region, seam_step
from keysync_jax.media.crop import View, extract

PLAIN = BlendSettings(max_correction=0)
VIEWS = {
    "between pixels": View.around((121.37, 99.81), 118.6),
    "60 degrees": View.around((120, 100), 120, np.radians(60)),
    "upside down": View.around((120, 100), 120, np.pi),
    "stretched": View.around((120 * 16 / 11, 100), 120, 0.0, 16 / 11),
    "stretched and turned": View.around((120 * 16 / 11, 100), 110, np.radians(-100), 16 / 11),
    "beyond the edge": View.around((20.3, 180.2), 120, np.radians(35)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_is_cut_out_goes_back_where_it_was(name):
    view, info, mask = VIEWS[name], make_info(pix_fmt="yuv444p"), box_mask()
    frame = make_frame(info, scene(240, 200))
    before, rgb = planes_of(frame), rgb_of(info, frame)
    patch = extract(rgb, view, 240)
    marked = patch.copy()
    marked[120:140, 100:120] = (0.9, 0.1, 0.1)  # a mouth to the left of the middle, so that a wrong turn or a mirror shows
    Compositor(info, PLAIN).composite(frame, patch, view, mask)
    change = np.abs(rgb_of(info, frame) - rgb)
    assert change.max() < 0.06 and change.mean() < 0.002  # grain and edges, resampled there and back
    again = make_frame(info, scene(240, 200))
    Compositor(info, PLAIN).composite(again, marked, view, mask)
    assert_untouched_outside(info, before, planes_of(again), blend_region(info, view, mask))
    seen = extract(rgb_of(info, again), view, 240)
    assert np.abs(seen[126:134, 106:114] - (0.9, 0.1, 0.1)).max() < 0.2


@pytest.mark.parametrize("pix_fmt", FORMATS)
def test_only_masked_samples_change_in_every_format(pix_fmt):
    info, view = make_info(pix_fmt=pix_fmt, color_range=2 if pix_fmt == "gray" else 1), VIEWS["stretched and turned"]
    frame = make_frame(info, scene(240, 200))
    before = planes_of(frame)
    noise = np.random.default_rng(1).random((64, 64, 3)).astype(np.float32)
    Compositor(info).composite(frame, noise, view, box_mask())
    region = blend_region(info, view, box_mask())
    assert_untouched_outside(info, before, planes_of(frame), region)
    # The region lies inside the mask, whose cells are squares of the view.
    y, x = np.nonzero(region)
    u, v = view.unit(np.stack([x + 0.5, y + 0.5], axis=-1)).T
    assert (v >= 6 / 16).all() and (v < 1 - BlendSettings().bottom_gap).all() and (u >= 3 / 16).all() and (u < 13 / 16).all()


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_a_view_lies_in_the_upright_picture(orientation):
    size = (200, 240) if orientation.transpose else (240, 200)
    info, plain, view = make_info(orientation=orientation), make_info(*size), View.around((101.3, 96.1), 117.7, np.radians(40))
    patch = extract(scene(*size), view, 96)
    patch[50:70, 40:60] = (0.9, 0.1, 0.1)
    results = []
    for each in (info, plain):
        frame = make_frame(each, scene(*size))
        Compositor(each).composite(frame, patch, view, box_mask())
        results.append(rgb_of(each, frame))
    assert np.array_equal(blend_region(info, view, box_mask()), blend_region(plain, view, box_mask()))
    assert np.abs(results[0] - results[1])[2:-2, 2:-2].max() < 6 / 255


def test_a_view_of_whole_pixels_is_the_crop():
    info, mask = make_info(), box_mask()
    patch = np.random.default_rng(2).random((120, 120, 3)).astype(np.float32)
    pictures = []
    for square in (BOX, View.of(BOX)):
        pictures.append(planes_of(Compositor(info).composite(make_frame(info, scene(240, 200)), patch, square, mask)))
    for a, b in zip(*pictures, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


def test_a_crop_that_moves_by_parts_of_pixels_leaves_no_seam():
    """The same scene under a crop that walks: the change just inside the border is below a code value in every frame."""
    info, mask = make_info(pix_fmt="yuv444p"), box_mask()
    steps = []
    for i in range(12):
        view = View.around((100 + 3.37 * i, 100 + 0.4 * np.sin(i)), 118.6 + 0.21 * i)
        frame = make_frame(info, scene(240, 200))
        before = planes_of(frame)[0]
        patch = extract(rgb_of(info, frame), view, 240)
        Compositor(info).composite(frame, patch, view, mask)
        steps.append(seam_step(before, planes_of(frame)[0], info.orientation.stored(blend_region(info, view, mask))))
    assert max(steps) < 0.5
