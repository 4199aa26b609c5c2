"""`keysync demo` end to end with a tiny random model, and the floors that a demo is held against."""

import argparse
import functools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keysync_jax import assets, evaluate_cli
from keysync_jax.errors import KeySyncError, UsageError
from keysync_jax.evaluation import marks, talkers_clips
from keysync_jax.inference import demo, demo_record
from keysync_jax.media import audio, video

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
import tiny_talker_model  # noqa: E402

FRAMES, SIZE = 14, 128


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_talker_model.make(tmp_path_factory.mktemp("demo_model") / "model")


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, demo.run_demo(folder, 3, model, frames=FRAMES, size=SIZE, quiet=True)


def test_files_of_a_demo(made):
    folder, result = made
    assert {p.name for p in folder.iterdir()} >= {"clip.mp4", "voice.wav", "demo.mp4", "strip.png", "figures.json", "report.json"}
    clip = talkers_clips.held_out("demo", 3, 0, FRAMES, SIZE)
    voice = audio.load_audio(folder / "voice.wav").samples
    np.testing.assert_allclose(voice, clip.target.samples, atol=1e-4)  # the voice is another one than the input's
    assert result.dub.report["frames_dubbed"] >= FRAMES - 2
    frames = np.stack([frame.rgb() for frame in video.read(folder / "demo.mp4")]).astype(int)
    source = clip.source.frames.astype(int)
    assert frames.shape == source.shape
    eyes = slice(0, int(clip.source.landmarks[:, 36:48, 1].max()) - 2)
    assert np.abs(frames - source)[:, eyes].mean() < 4 < 20 < np.abs(frames - source)[:, 84:110, 40:88].mean()


def test_strip_shows_four_rows_voice_and_curves(made):
    picture = np.asarray(Image.open(made[0] / "strip.png"))
    assert picture.shape[0] > 4 * 160 + 200 and picture.shape[1] > 6 * 160
    rows = [picture[22 + 164 * n : 22 + 164 * n + 160, 92:].astype(int) for n in range(4)]
    mask, output, target = (np.abs(rows[0] - row).mean() for row in rows[1:])
    assert mask > 1 and output > 1 and target > 0.05  # the target differs by its mouth only
    assert rows[1][120:, 60:100, 0].mean() > rows[0][120:, 60:100, 0].mean()  # the mask is tinted red
    assert (picture[-140:] == (205, 60, 45)).all(-1).any()  # the output's curve


def test_figures_stand_beside_their_marks(made):
    report = json.loads((made[0] / "figures.json").read_text())
    assert [row["key"] for row in report["marks"]] == [mark.key for mark in marks.FOLLOW]
    assert report["recorded"] is None and report["below_recorded"] == [] and made[1].passed
    assert report["model"]["random"] and set(report["model"]["weights"]) == {"keyframe", "interpolation", "vae"}
    assert {name: len(values) for name, values in report["opening"].items()} == dict.fromkeys(("true target", "output", "input"), FRAMES)
    assert report["opening"]["true target"] != report["opening"]["input"]


def test_recording_and_what_falls_below_it(model, tmp_path, monkeypatch):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    monkeypatch.setattr(demo_record, "FEWEST", 2)
    demo.record(tmp_path / "runs", own, 2, frames=FRAMES, size=SIZE, quiet=True)
    recorded = demo_record.read(own)
    assert recorded["clips"] == 2 and set(recorded["weights"]) == {"keyframe", "interpolation", "vae"}
    again = demo.run_demo(tmp_path / "again", 1, own, frames=FRAMES, size=SIZE, quiet=True)
    assert again.passed  # a recorded seed is never below its own floor
    recorded["floors"]["width_r"] = 0.95
    (own / demo_record.FILE).write_text(json.dumps(recorded))
    run = functools.partial(demo.run_demo, frames=FRAMES, size=SIZE)
    monkeypatch.setattr(demo, "run_demo", run)
    assert _command("-o", tmp_path / "worse", "--seed", 1, "--model", own, "--quiet") == 1
    assert json.loads((tmp_path / "worse" / "figures.json").read_text())["below_recorded"] == ["width_r"]
    recorded["weights"]["vae"] = "0" * 64
    (own / demo_record.FILE).write_text(json.dumps(recorded))
    with pytest.raises(KeySyncError, match="recorded for other weights of vae"):
        demo_record.read(own)


def _command(*words):
    parser = argparse.ArgumentParser()
    evaluate_cli.add_demo(parser.add_subparsers())
    args = parser.parse_args(["demo", *map(str, words)])
    return args.run(args)


def test_too_few_clips_to_record(model, tmp_path):
    with pytest.raises(UsageError, match="--record 3: at least 8"):
        _command("-o", tmp_path, "--record", 3, "--model", model)


def test_floor_lies_under_every_recorded_clip():
    values = [0.82, 0.74, 0.79, 0.85, 0.66, 0.80]
    for key in ("opening_r", "closed"):
        bound = demo_record.floor(key, values)
        assert bound <= min(values) - (0.15 if key == "closed" else 0.02) and bound < np.mean(values) - 2.9 * np.std(values, ddof=1) + 0.02
    steady = demo_record.floor("opening_r", [0.8, 0.801, 0.799, 0.8])
    assert steady == pytest.approx(0.779)  # the margin under the worst, where nothing scatters
    assert demo_record.floor("opening_r", [0.2, -0.3, 0.1]) >= -1 and demo_record.floor("closed", [0.1, 0.0]) == 0
    assert demo_record.floor("lag", [0, -1, 0]) == 1 and demo_record.floor("lag", [0, -3, 2]) == 3
    assert demo_record.floor("closed", [math.nan, math.nan]) is None


def test_below_names_what_missed():
    floors = {"opening_r": 0.5, "width_r": 0.2, "lag": 1.0, "closed": 0.6, "partial_r": None}
    good = {"opening_r": 0.5, "width_r": 0.3, "lag": -1, "closed": math.nan, "partial_r": -0.5}
    assert demo_record.below(good, floors) == []
    assert demo_record.below({**good, "lag": 2, "opening_r": math.nan, "closed": 0.5}, floors) == ["opening_r", "lag", "closed"]


def test_damaged_record_is_named(tmp_path):
    assert demo_record.read(tmp_path) is None
    (tmp_path / demo_record.FILE).write_text("{")
    with pytest.raises(KeySyncError, match="recorded.json is not valid JSON"):
        demo_record.read(tmp_path)
    (tmp_path / demo_record.FILE).write_text('{"clips": 3}')
    with pytest.raises(KeySyncError, match="lacks deviation, floors"):
        demo_record.read(tmp_path)


def test_name_of_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setattr(assets.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(KeySyncError, match="holds no demo model"):
        assets.resolve("demo")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model_index.json").write_text("{}")
    assert assets.resolve("demo") == str(tmp_path / "demo")
    assert assets.resolve("./demo") == "./demo" and assets.resolve(Path("other")) == "other"
