"""Clicks and boxes: the file that holds them, and which go together."""

import json

import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.segmentation.click_prompts import Prompt, by_start, read_prompts


def written(folder, *entries):
    path = folder / "clicks.json"
    path.write_text(json.dumps({"points": list(entries)}))
    return path


def test_clicks_of_a_frame_go_together(tmp_path):
    path = written(
        tmp_path,
        {"frame": 3, "x": 10, "y": 20},
        {"frame": 0, "box": [1, 2, 30, 40], "object": 2},
        {"frame": 3, "x": 5, "y": 6, "inside": False},
        {"frame": 3, "x": 8, "y": 9, "box": [0, 0, 9, 9], "object": 2},
    )
    first, second, third = read_prompts(path, 64, 48, 10)
    assert first == Prompt(3, ((10.0, 20.0), (5.0, 6.0)), (True, False))
    assert second == Prompt(0, box=(1.0, 2.0, 30.0, 40.0), object=2)
    points, labels = third.coordinates()
    assert points.tolist() == [[0, 0], [9, 9], [8, 9]] and labels.tolist() == [2, 3, 1]
    assert by_start([first, second, third]) == [[second, third], [first]]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"frame": 3, "x": 65, "y": 20}, r"frame 3: \(65, 20\) lies outside the 64 x 48 picture"),
        ({"frame": 3, "box": [1, 1, 60, 49]}, r"\(60, 49\) lies outside"),
        ({"frame": 10, "x": 5, "y": 20}, "a click on frame 10, but the video has 10 frames"),
        ({"frame": 1, "x": float("nan"), "y": 20}, "no place in a picture"),
        ({"frame": 1, "x": 5, "y": 5, "inside": False}, "no click lies on the object"),
        ({"frame": 1, "x": 5}, r"clicks.json holds no click points \(KeyError\('y'\)\)"),
        ({"frame": 1, "box": [9, 1, 2, 5]}, "is not left, top, right, bottom"),
        ({"x": 5, "y": 5}, "holds no click points"),
    ],
)
def test_bad_clicks_are_refused_in_one_line(tmp_path, entry, says):
    with pytest.raises(KeySyncError, match=says) as raised:
        read_prompts(written(tmp_path, entry), 64, 48, 10)
    assert "\n" not in str(raised.value)


def test_a_prompt_moves_into_a_crop():
    moved = Prompt(7, ((10, 20),), (True,), (0, 10, 40, 30)).moved(2, lambda xy: np.stack([xy[:, 1], -xy[:, 0]], axis=1))
    assert moved == Prompt(2, ((20.0, -10.0),), (True,), (10.0, -40.0, 30.0, 0.0))
