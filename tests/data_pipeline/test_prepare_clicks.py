"""Clicks beside a video are followed on the clip's crop, and what lies outside of clip and crop is passed over."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare import occluder
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset
from keysync_jax.media.crop import Crop


class Recorder:
    """Follows nothing: what is asked of it comes back as masks that are on for the prompted frame only."""

    def __init__(self):
        self.calls = []

    def follow(self, frames, prompts, reverse=False, limit=None):
        self.calls.append((len(frames), frames[0].shape, tuple(prompts), reverse))
        for prompt in prompts:
            yield prompt.frame, np.ones((1, *frames[0].shape[:2]), np.float32)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talkers")
    synth_dataset(1, folder, SynthSettings(frames=12, size=96), quiet=True)
    return next(folder.glob("*.mp4"))


def test_clicks_are_followed_on_the_crop(clip, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(occluder, "open_segmenter", lambda weights, backend: recorder)
    points = [
        {"frame": 5, "x": 40, "y": 60},
        {"frame": 5, "x": 90, "y": 90, "inside": False},  # outside the crop
        {"frame": 1, "x": 40, "y": 60},  # before the clip
        {"frame": 6, "box": [0, 0, 30, 50], "object": 2},  # partly outside the crop
        {"frame": 7, "box": [0, 0, 10, 10], "object": 3},  # altogether
    ]
    sidecar = tmp_path / "x.occluder.json"
    sidecar.write_text(json.dumps({"points": points}))
    item = SimpleNamespace(occluder=str(sidecar), path=str(clip))
    masks = occluder.ClickMasker("w.pt", "sam2")(item, np.array([3, 5, 7]), Crop(20, 30, 40), 80)
    assert masks.shape == (3, 80, 80) and masks.any(axis=(1, 2)).tolist() == [False, True, False]
    (count, shape, first, _), *_, (_, _, second, _) = recorder.calls
    assert (count, shape) == (5, (80, 80, 3)) and len(recorder.calls) == 4
    assert (first[0].frame, first[0].points, first[0].inside, first[0].box) == (2, ((40.0, 60.0),), (True,), None)
    assert (second[0].frame, second[0].box, second[0].object) == (3, (0.0, 0.0, 20.0, 40.0), 2)


def test_a_clip_without_clicks_has_no_occluder_and_bad_files_are_named(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(occluder, "open_segmenter", lambda weights, backend: Recorder())
    masker = occluder.ClickMasker("w.pt")
    sidecar = tmp_path / "x.occluder.json"
    sidecar.write_text('{"points": []}')
    item = SimpleNamespace(occluder=str(sidecar), path=str(clip))
    assert not masker(item, np.arange(4), Crop(0, 0, 96), 32).any()
    sidecar.write_text('{"clicks": []}')
    with pytest.raises(KeySyncError, match="x.occluder.json holds no click points"):
        masker(item, np.arange(4), Crop(0, 0, 96), 32)
