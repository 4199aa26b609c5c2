"""Burned-in text is noticed where the mouth is painted, and nothing else is taken for it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.media.burned_text import TextRange, TextWatch, around
from keysync_jax.media.crop import Crop, View

FRAMES, SIZE = 36, 320
BOX = (90, 150, 230, 280)  # left, top, right, bottom of what is painted
CORNERS = np.array([BOX[:2], (BOX[2], BOX[1]), BOX[2:], (BOX[0], BOX[3])], np.float64)


@pytest.fixture(scope="module")
def clip():
    return make_clip(5, frames=FRAMES, size=SIZE).frames


def burn(frame, text, height, middle, color=(255, 255, 255), outline=2):
    image = Image.fromarray(frame)
    font = ImageFont.load_default(height)
    ImageDraw.Draw(image).text(middle, text, color, font, anchor="mm", stroke_width=outline, stroke_fill=(0, 0, 0))
    return np.asarray(image)


def watched(frames, corners=CORNERS):
    watch = TextWatch()
    for index, frame in enumerate(frames):
        watch.update(index, frame, corners)
    return watch.ranges


@pytest.mark.parametrize(
    ("text", "height", "color", "outline"),
    [
        ("and then she told me", 22, (255, 255, 255), 2),
        ("NO WAY", 40, (255, 255, 255), 3),
        ("all of it in yellow", 26, (255, 255, 0), 2),
        ("not even an outline", 26, (250, 250, 250), 0),
    ],
)
def test_a_line_over_the_mouth_is_found_for_as_long_as_it_stands(clip, text, height, color, outline):
    frames = [burn(frame, text, height, (160, 240), color, outline) if 8 <= i < 28 else frame for i, frame in enumerate(clip)]
    ((start, stop),) = watched(frames)
    assert abs(start - 8) <= 5 and abs(stop - 28) <= 5


def test_text_elsewhere_and_pictures_without_text_are_not_said(clip):
    everything = np.array([(0, 0), (SIZE, 0), (SIZE, SIZE), (0, SIZE)], np.float64)
    assert watched(clip, everything) == []
    assert watched([clip[3]] * FRAMES, everything) == []  # a photo: all that is in it stands still
    assert watched([burn(frame, "and then she told me", 22, (160, 305)) for frame in clip]) == []


def test_text_that_moves_or_flashes_is_no_subtitle(clip):
    assert watched([burn(frame, "and then she told me", 22, (160 + 3 * i, 240)) for i, frame in enumerate(clip)]) == []
    assert watched([burn(frame, "and then she told me", 22, (160, 240)) if i % 6 < 4 else frame for i, frame in enumerate(clip)]) == []


def test_two_lines_one_after_the_other_are_two_ranges(clip):
    frames = [burn(frame, "one thing", 30, (160, 240)) if i < 14 else frame for i, frame in enumerate(clip[:20])]
    frames += [burn(frame, "another thing", 30, (160, 240)) for frame in clip[20:]]
    first, second = watched(frames)
    assert first.stop <= 18 and second.start >= 18 and second == TextRange(second.start, second.stop)


def test_the_region_s_place_in_the_picture():
    region = np.zeros((8, 8), bool)
    region[4:, 2:6] = True
    np.testing.assert_allclose(around(region, Crop(100, 50, 80)), [(120, 90), (160, 90), (160, 130), (120, 130)])
    turned = View((0.0, 80.0), (0.0, -80.0), (80.0, 0.0))  # a head on its side
    np.testing.assert_allclose(around(region, turned), [(40, 60), (40, 20), (80, 20), (80, 60)])
    assert watched([np.zeros((64, 64, 3), np.uint8)] * 9, around(np.zeros((8, 8), bool), Crop(0, 0, 64))) == []
