"""`keysync demo` end to end with a tiny random model, and the floors that a demo is held against."""

import argparse
import functools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_talker_model
from bounds import approx
from PIL import Image

from keysync_jax import KeySyncPipeline
from keysync_jax.cli import evaluate_verbs
from keysync_jax.cli.main import main
from keysync_jax.converters import model_directory
from keysync_jax.core import assets
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.demo import record as demo_record
from keysync_jax.demo import tour as demo
from keysync_jax.evaluation import marks, talkers_clips
from keysync_jax.media import audio, video

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
    # Sixteen bits: half a step, and one in 32,768 between their two scales. The voice is another one than the input's.
    np.testing.assert_allclose(voice, clip.target.samples, rtol=0, atol=1.51 / 32768)
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


def test_recording_and_what_falls_below_it(model, tmp_path, monkeypatch, capsys):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    monkeypatch.setattr(demo_record, "FEWEST", 2)
    demo.record(tmp_path / "runs", own, 2, frames=FRAMES, size=SIZE, quiet=True)
    recorded = demo_record.read(model_directory.load(own).describe())
    assert recorded["clips"] == 2 and set(recorded["weights"]) == {"keyframe", "interpolation", "vae"}
    again = demo.run_demo(tmp_path / "again", 1, own, frames=FRAMES, size=SIZE, quiet=True)
    assert again.passed  # a recorded seed is never below its own floor
    recorded["floors"]["width_r"] = 0.95
    (own / demo_record.FILE).write_text(json.dumps(recorded))
    run = functools.partial(demo.run_demo, frames=FRAMES, size=SIZE)
    monkeypatch.setattr(demo, "run_demo", run)
    capsys.readouterr()
    assert _command("-o", tmp_path / "worse", "--seed", 1, "--model", own, "--quiet") == 1
    report = json.loads((tmp_path / "worse" / "figures.json").read_text())
    assert report["below_recorded"] == ["width_r"]
    shown = capsys.readouterr()
    width = f"width_r {report['figures']['width_r']:.3f} (floor 0.95)"
    assert (shown.out, shown.err) == ("", f"below what this model is recorded to reach: {width}\n")
    recorded["weights"]["vae"] = "0" * 64
    (own / demo_record.FILE).write_text(json.dumps(recorded))
    with pytest.raises(KeySyncError, match="recorded for other weights of vae"):
        demo_record.read(model_directory.load(own).describe())


def _command(*words):
    parser = argparse.ArgumentParser()
    evaluate_verbs.add_demo(parser.add_subparsers())
    args = parser.parse_args(["demo", *map(str, words)])
    return args.run(args)


def test_too_few_clips_to_record(model, tmp_path):
    with pytest.raises(UsageError, match="--record 3: at least 8"):
        _command("-o", tmp_path, "--record", 3, "--model", model)


def test_a_record_never_goes_into_the_package(tmp_path, model, monkeypatch):
    for words in ((), ("--model", "demo")):
        with pytest.raises(UsageError, match="--record writes into the model directory; name yours with --model DIR"):
            _command("-o", tmp_path, "--record", 8, *words)
    with pytest.raises(UsageError, match="leave out --seed"):
        _command("-o", tmp_path, "--record", 8, "--model", model, "--seed", 0)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(KeySyncError, match="recorded.json cannot be written there"):
        _command("-o", tmp_path, "--record", 8, "--model", model)


def test_a_failed_rerun_leaves_no_results_of_the_run_before(model, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (*demo.FILES, "notes.txt"):
        (folder / name).write_text("of the run before")
    with pytest.raises(KeySyncError, match="no such model"):  # nothing is new yet, so everything may stay
        monkeypatch.setattr(demo, "_model", lambda *_: (_ for _ in ()).throw(KeySyncError("no such model")))
        demo.run_demo(folder, 3, model, frames=FRAMES, size=SIZE, quiet=True)
    assert len(list(folder.iterdir())) == len(demo.FILES) + 1
    monkeypatch.undo()

    def broken(*args, **kwargs):
        raise KeySyncError("the dub fails")

    monkeypatch.setattr(demo.KeySyncPipeline, "__call__", broken)
    with pytest.raises(KeySyncError, match="the dub fails"):
        demo.run_demo(folder, 3, model, frames=FRAMES, size=SIZE, quiet=True)
    left = {path.name for path in folder.iterdir()}
    assert left == {"clip.mp4", "clip.landmarks.npy", "clip.truth.json", "voice.wav", "notes.txt"}
    assert (folder / "notes.txt").read_text() == "of the run before" and (folder / "voice.wav").stat().st_size > 1000


def test_a_folder_that_cannot_be_one_is_refused_before_the_drawing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(demo.talkers_clips, "held_out", lambda *_: pytest.fail("already at work"))
    for folder, message in (("notes.txt", "notes.txt is a file"), ("gs://bucket/demo", "no local folder"), ("", "no local folder")):
        with pytest.raises(KeySyncError, match=message):
            demo.run_demo(folder, 3, model, quiet=True)
        with pytest.raises(KeySyncError, match=message):
            demo.record(folder, model, 8, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_voice_is_readable_as_the_umask_says(made):
    before = os.umask(0o022)
    os.umask(before)
    assert {name: (made[0] / name).stat().st_mode & 0o777 for name in ("voice.wav", "figures.json")} == dict.fromkeys(
        ("voice.wav", "figures.json"), 0o666 & ~before
    )


def test_a_report_that_cannot_be_written_is_refused_before_the_dub(model, tmp_path):
    with pytest.raises(UsageError, match="--report .* is a folder; name a file in it"):
        KeySyncPipeline.from_pretrained(model)("no_such_video.mp4", "no_such_voice.wav", tmp_path / "a.mp4", report=tmp_path)


def test_floor_lies_under_every_recorded_clip():
    values = [0.82, 0.74, 0.79, 0.85, 0.66, 0.80]
    for key in ("opening_r", "closed"):
        bound = demo_record.floor(key, values)
        assert bound <= min(values) - (0.15 if key == "closed" else 0.02) and bound < np.mean(values) - 2.9 * np.std(values, ddof=1) + 0.02
    steady = demo_record.floor("opening_r", [0.8, 0.801, 0.799, 0.8])
    assert steady == approx(0.779)  # the margin under the worst, where nothing scatters
    assert demo_record.floor("opening_r", [0.2, -0.3, 0.1]) >= -1 and demo_record.floor("closed", [0.1, 0.0]) == 0
    assert demo_record.floor("lag", [0, -1, 0]) == 1 and demo_record.floor("lag", [0, -3, 2]) == 3
    assert demo_record.floor("closed", [math.nan, math.nan]) is None


def test_below_names_what_missed():
    floors = {"opening_r": 0.5, "width_r": 0.2, "lag": 1.0, "closed": 0.6, "partial_r": None}
    good = {"opening_r": 0.5, "width_r": 0.3, "lag": -1, "closed": math.nan, "partial_r": -0.5}
    assert demo_record.below(good, floors) == []
    assert demo_record.below({**good, "lag": 2, "opening_r": math.nan, "closed": 0.5}, floors) == ["opening_r", "lag", "closed"]


def test_damaged_record_is_named(tmp_path):
    described = {"path": str(tmp_path), "parts": {"vae": {"sha256": "12"}, "audio/log_mel": {"sha256": None}}}
    assert demo_record.read(described) is None
    figures = dict.fromkeys(demo_record.KEYS, 0.5)
    good = {"clips": 8, "frames": 150, "size": 256, "mean": figures, "deviation": figures, "floors": figures, "weights": {"vae": "12"}}
    path = tmp_path / demo_record.FILE
    path.write_text(json.dumps(good))
    assert demo_record.read(described) == good
    for text, message in (
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"clips": 3}', "lacks deviation, floors"),
        (json.dumps(good | {"frames": "150"}), "frames must be int, not '150'"),
        (json.dumps(good | {"mean": 3}), "mean must be a mapping, not 3"),
        (json.dumps(good | {"floors": {}}), "floors must hold a number"),  # would let anything pass
        (json.dumps(good | {"floors": figures | {"lag": "1"}}), "floors: lag must be float, not '1'"),
        (json.dumps(good | {"floors": figures | {"lag": math.nan}}), "is not valid JSON .NaN is no number"),
        (json.dumps(good | {"floors": dict.fromkeys(figures)}), "holds no floor"),
        (json.dumps(good | {"weights": ["vae"]}), "weights must be a mapping, not \\['vae'\\]"),
        (json.dumps(good | {"weights": {}}), "other weights of vae"),
        (json.dumps(good | {"weights": {"vae": "12", "keyframe": "34"}}), "other weights of keyframe"),
    ):
        path.write_text(text)
        with pytest.raises(KeySyncError, match=message) as caught:
            demo_record.read(described)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "keysync demo --record" in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(KeySyncError, match="is not valid JSON"):
        demo_record.read(described)


@pytest.mark.parametrize("name", ["model_index.json", "keyframe/config.json", "vae/config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"{}", b'{"part": "keyframe", "config": {}, "weights": 3}'])
def test_a_damaged_model_is_one_line_that_names_the_file(model, tmp_path, capsys, name, content):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / demo_record.FILE).write_text("{")  # the model is looked at first
    (tmp_path / "model" / name).write_bytes(content)
    assert main(["demo", "-o", str(tmp_path / "out"), "--model", str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("keysync: error: ") and error.count("\n") == 1 and str(tmp_path / "model" / name) in error


def test_a_missing_stage_is_named_whatever_is_recorded(model, tmp_path, capsys):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    (own / demo_record.FILE).write_text('{"weights": {"interpolation": "12"}}')
    index = json.loads((own / "model_index.json").read_text())
    (own / "model_index.json").write_text(json.dumps(index | {"parts": [part for part in index["parts"] if part != "interpolation"]}))
    assert main(["demo", "-o", str(tmp_path / "out"), "--model", str(own)]) == 1
    assert "has no part interpolation" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_name_of_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setattr(assets.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(KeySyncError, match="holds no demo model"):
        assets.resolve("demo")
    (tmp_path / "assets" / "demo").mkdir(parents=True)
    (tmp_path / "assets" / "demo" / "model_index.json").write_text("{}")
    assert assets.resolve("demo") == str(tmp_path / "assets" / "demo")
    assert assets.resolve("./demo") == "./demo" and assets.resolve(Path("other")) == "other"


def test_the_bundled_model_is_small_and_whole():
    """Autoencoder, both stages and what is recorded of them, 12 MB together."""
    path = assets.bundled_model_path()
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) <= 12_000_000
    directory = model_directory.load(path, verify=True)
    assert {"vae", "keyframe", "interpolation", "audio/log_mel"} <= set(directory.parts) and not directory.parts["keyframe"].random
    assert demo_record.read(directory.describe())["floors"]


def test_a_time_limit_ends_it_like_ctrl_c(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the signal would have ended the process at once"))
    try:
        assert main(["demo", "-o", str(tmp_path / "out")]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "keysync: error: stopped" in capsys.readouterr().err
