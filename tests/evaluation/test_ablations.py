"""The ablation runner: two tiny runs from drawn clips to tables through the real trainer, and its arithmetic by hand."""

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_talker_model
from bounds import approx

from keysync_jax.cli.main import main
from keysync_jax.converters import model_directory
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.locking import only_process
from keysync_jax.data_pipeline.source.clips import FrameStore
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset
from keysync_jax.data_pipeline.synthetic.talker_shards import write_shards
from keysync_jax.evaluation import ablations, ablations_report
from keysync_jax.evaluation.ablations import Judged, Run
from keysync_jax.training.export.export_run import parts_of
from keysync_jax.training.start import runs

TINY = f"stage.audio_feature_dim={tiny_talker_model.BANDS}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model and shards of drawn clips that its VAE encoded."""
    folder = tmp_path_factory.mktemp("ablations")
    model = tiny_talker_model.make(folder / "model")
    synth_dataset(3, folder / "clips", SynthSettings(frames=40, size=64, suffix=".npy", validation_share=0, test_share=0), quiet=True)
    write_shards(folder / "clips" / "manifest.csv", str(folder / "data"), str(model), progress=False)
    return folder


def _one_tiny_run(patch):
    patch.setattr(ablations, "RUNS", {"box": Run("tiny_test", (TINY, "stage.mask.kind=mouth"))})
    patch.setattr(ablations, "JUDGED", {"box": Judged("ours", ("box", "interpolation"), "keyframes", ("1/1",), silent=True)})


@pytest.fixture(scope="module")
def finished(world):
    """The folder of one run that was trained and judged, the command that did it, and what that printed."""
    command = ["--data", str(world / "data"), "-o", str(world / "out"), "--only", "box", "--interpolation", str(world / "model")]
    command += ["--clips", "1", "--quiet", "--config.num_steps=2", "--config.data.batch_size=2", "--config.log.every=1"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        _one_tiny_run(patch)
        assert main(["ablate", *command]) == 0
    return world / "out", command, printed.getvalue()


def test_from_shards_to_tables_and_not_twice(finished, monkeypatch, capsys):
    _one_tiny_run(monkeypatch)
    out, command, table = finished
    assert "| ours | 1/1 |" in table and "closed at m, b, p" in table
    report = json.loads((out / "ablations.json").read_text())
    assert report["settings"] == command[-3:]
    parts = report["judged"]["box"][0]["model"]["parts"]
    assert parts["keyframe"]["config"]["mask"]["kind"] == "mouth" and "interpolation" in parts  # the run's keyframes, the model's rest
    assert (out / "ablations.md").read_text().strip() == table.strip() and (out / "curves.png").stat().st_size > 5000

    trained = (out / "box.log").stat().st_mtime_ns
    monkeypatch.setattr(ablations.talkers, "evaluate", None)  # a second command reads what the first one found
    assert main(["ablate", *command]) == 0 and (out / "box.log").stat().st_mtime_ns == trained
    assert capsys.readouterr().out == table


def _stop_in(name, monkeypatch):
    """Ctrl-C in the middle of writing the file of that name."""
    written = Path.write_text

    def write(path, text, **more):
        if Path(name).stem not in path.name or path.suffix != Path(name).suffix:
            return written(path, text, **more)
        written(path, text[: len(text) // 2], **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write)


@pytest.mark.parametrize("name", ["ablations.json", "ablations.md", "box.json"])
def test_results_are_whole_when_their_writing_is_stopped(finished, monkeypatch, name):
    _one_tiny_run(monkeypatch)
    out, command, _ = finished
    whole = (out / name).read_bytes()
    if name == "box.json":  # it is written where it is not there
        reports = json.loads(whole)["reports"]
        monkeypatch.setattr(ablations.talkers, "evaluate", lambda *_: reports)
        (out / name).unlink()
    with monkeypatch.context() as patch:
        _stop_in(name, patch)
        assert main(["ablate", *command]) == 1
    assert (not (out / name).exists()) if name == "box.json" else (out / name).read_bytes() == whole
    assert not list(out.glob(".*"))
    (out / name).write_bytes(whole)


def test_the_record_of_a_runs_settings_is_whole_when_its_writing_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "_keysync", None)
    _stop_in("box.settings.json", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ablations.train("box", tmp_path, "data", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, status, message", [
    (["--data", "nowhere"], 1, "--data 'nowhere' holds no shards; keysync data shards makes them"),
    (["--data", "empty"], 1, "--data 'empty' holds no shards"),
    (["--data", "file"], 1, "--data 'file' holds no shards"),
    (["--data", ""], 1, "--data '' holds no shards"),
    (["--config.stage.audio_encoder=wavlm"], 1, "--data cannot train box: data holds no tokens of audio encoder 'wavlm'; it has log_mel"),
    (["--config.data.split=other"], 1, "--data cannot train box: data has no split 'other'; it has train"),
    (["--config.data.validation=data", "--config.log.validate_every=1"], 1, "data has no split 'validation'"),
    (["--config.data.min_spacing=13"], 1, "--data cannot train box: data: no clip of split 'train' can be used"),
    (["--config.foo=1"], 2, "config has no key 'foo'"),
    (["--config.num_steps=many"], 2, "'many' is no int"),
    (["--config.num_steps=0"], 1, "num_steps is 0"),
    (["--config.init.vae=nowhere"], 1, "config.init.vae: nowhere does not exist"),
    (["--config.init.vae="], 2, "box cannot be judged without a VAE: name a model directory with one, --config.init.vae=DIR"),
    (["--only", "box,lips"], 2, "no run 'lips'; choose among box, mouth, one_stage, interpolation"),
    (["--interpolation", "stageless"], 1, "has no part interpolation"),
    (["--interpolation", "model", "--config.stage.mask.kind=mouth"], 2,
     "two stages cannot be judged: box and interpolation have different masks (mouth at landmark 28 and box at landmark 28)"),
    (["--seed", "-1"], 2, "seed must be a non-negative integer"),
    (["--clips", "0"], 2, "--clips is 0"),
    (["--jobs", "0"], 2, "--jobs is 0"),
    (["-o", "file"], 1, "file is a file; name a folder"),
    (["-o", "file/out"], 1, "file is a file; name a folder"),
    (["-o", ""], 2, "local folder"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_starts(world, monkeypatch, capsys, words, status, message):
    monkeypatch.chdir(world)
    monkeypatch.setitem(ablations.RUNS, "box", Run("tiny_test", (TINY,)))
    monkeypatch.setattr(ablations, "train_all", None)
    (world / "empty").mkdir(exist_ok=True)
    (world / "file").write_text("")
    if not (world / "stageless").exists():
        model = model_directory.load("model")
        model_directory.save("stageless", [part for part in parts_of(model) if part.name != "interpolation"])
    vae = [] if any(word.startswith("--config.init.vae") for word in words) else ["--config.init.vae=model"]
    command = ["--data", "data", "-o", "refused", "--only", "box", *vae, *words]
    assert main(["ablate", *command]) == status
    error = capsys.readouterr().err
    assert error.startswith("keysync: error: ") and message in error and len(error.splitlines()) == 1
    assert not (world / "refused").exists()


def test_damaged_shards_are_said_before_anything_starts(world, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(ablations.RUNS, "box", Run("tiny_test", (TINY,)))
    shutil.copytree(world / "data", tmp_path / "data")
    shard = next((tmp_path / "data").glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:100])
    command = ["--data", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--only", "box", f"--config.init.vae={world / 'model'}"]
    assert main(["ablate", *command]) == 1
    assert f"--data cannot train box: {shard} is missing, truncated" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named_with_its_log(world, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(ablations.RUNS, "mouth", Run("tiny_test", (TINY,)))
    out = tmp_path / "out"
    command = ["--data", str(world / "data"), "-o", str(out), "--only", "mouth", "--quiet", f"--config.init.vae={world / 'model'}"]
    assert main(["ablate", *command, "--config.mesh.data=7"]) == 1  # how many devices there are is for the run to find out
    error = capsys.readouterr().err
    assert error.startswith("keysync: error: keysync train --config tiny_test") and "mouth.log" in error and "mesh data 7" in error
    assert not (out / "mouth_model").exists()


def test_stopped_by_a_scheduler_the_run_is_saved_and_the_rest_not_begun(world):
    out = world / "stopped"
    script = (
        "import sys; from keysync_jax.cli.main import main; from keysync_jax.evaluation import ablations;"
        "from keysync_jax.evaluation.ablations import Run;"
        f"ablations.RUNS.update(box=Run('tiny_test', ('{TINY}',)), mouth=Run('tiny_test', ('{TINY}',))); sys.exit(main())"
    )
    command = [
        "ablate",
        "--data",
        str(world / "data"),
        "-o",
        str(out),
        "--only",
        "box,mouth",
        "--config.num_steps=100000",
        "--config.log.every=1",
    ]
    command += ["--config.data.batch_size=2", "--config.checkpoint.every=100000", f"--config.init.vae={world / 'model'}"]
    with subprocess.Popen([sys.executable, "-c", script, *command], stderr=subprocess.PIPE, text=True) as process:
        assert any("ETA" in line for line in process.stderr)  # it trains
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert runs.last_step(str(out / "box")) and not (out / "mouth").exists() and not (out / "box_model").exists()
    with only_process(str(out / "box"), "the run is still at work"):
        pass


def _report(opening, leak):
    return {"per_clip": [{"clip": c, "opening_r": v} for c, v in opening.items()],
            "silence": {"per_clip": [{"clip": c, "open": v} for c, v in leak.items()]}}  # fmt: skip


def test_differences_are_taken_clip_by_clip():
    a = _report({0: 0.9, 1: 0.7, 2: 0.8, 5: 0.1}, {0: 0.3, 1: 0.0})
    b = _report({0: 0.6, 1: 0.8, 2: 0.8, 4: 0.9}, {1: 0.0, 0: 0.1})
    got = ablations_report.difference(a, b, "opening_r")
    values = np.array([0.3, -0.1, 0.0])
    assert (got.higher, got.lower, got.clips) == (1, 1, 3)
    assert got.mean == approx(values.mean(), scale=1) and got.error == approx(values.std(ddof=1) / math.sqrt(3), scale=1)
    assert ablations_report.difference(a, b, "silence_open").mean == approx(0.1, scale=1)
    with pytest.raises(KeySyncError, match="no clip has the figure"):
        ablations_report.difference(a, {"per_clip": [], "silence": {"per_clip": []}}, "opening_r")


def test_tables_set_mouth_against_box_and_one_stage_against_two():
    def judged(name, guidance, values):
        keys = {"opening_r", "width_r", "closed", "partial_r", "input_leak", "flicker", "seam_flicker", "roughness"}
        rows = [{"clip": c, **dict.fromkeys(keys, v)} for c, v in enumerate(values)]
        silence = {"per_clip": [{"clip": c, "open": v, "leak": v} for c, v in enumerate(values)]}
        output = {key: float(np.mean(values)) for key in (*keys, "silence_open", "silence_leak")}
        output |= {f"{key}_error": 0.01 for key in output}
        return {"guidance": guidance, "test": {"clips": len(values)}, "columns": {"output": output}, "per_clip": rows, "silence": silence}

    found = {
        "box": [judged("box", "5/2", (0.3, 0.2)), *(judged("box", g, (0.1, 0.2)) for g in ("2.5/1.5", "1/1"))],
        "mouth": [judged("mouth", "1/1", (0.3, 0.3)), judged("mouth", "2.5/1.5", (0.1, 0.1))],
        "one_stage": [judged("one_stage", "2.5/1.5", (0.5, 0.4))],
        "two_stages": [judged("two_stages", "2.5/1.5", (0.2, 0.2))],
    }
    labels = {name: entry.label for name, entry in ablations.JUDGED.items()}
    text = ablations_report.tables(found, labels)
    assert "| box | 5/2 |" in text.split("keyframes, box")[1] and "5/2" not in text.split("whole dubs")[0]
    assert "| mouth alone minus box, clip by clip | 1/1 | +0.150 ± 0.050 (2 higher, 0 lower) |" in text
    assert "| mouth alone minus box, clip by clip | 2.5/1.5 | -0.050 ± 0.050 (0 higher, 1 lower) |" in text
    assert "| one stage minus two, clip by clip | 2.5/1.5 | +0.250 ± 0.050 (2 higher, 0 lower) |" in text
    assert "| clip by clip | 5/2 minus 1/1 | +0.100 ± 0.100 (1 higher, 0 lower) |" in text.split("keyframes, box")[1]
    assert "minus 2/2" not in text  # not judged
    del found["mouth"], found["one_stage"]
    assert "alone" not in ablations_report.tables(found, labels) and "stage" not in ablations_report.tables(found, labels)


def _begin(folder, overrides):
    (folder / "box.settings.json").write_text(json.dumps(ablations._asked("box", "data", overrides)))


def test_a_model_of_other_settings_is_not_taken_for_one_of_these(tmp_path):
    (tmp_path / "box_model").mkdir()
    _begin(tmp_path, ["--config.num_steps=9"])
    assert ablations.train("box", tmp_path, "data", ["--config.num_steps=9"]) == tmp_path / "box_model"
    for data, overrides in (("data", ["--config.num_steps=500"]), ("other", ["--config.num_steps=9"])):
        with pytest.raises(KeySyncError, match="box_model was trained with other settings"):
            ablations.train("box", tmp_path, data, overrides)
    (tmp_path / "box.settings.json").unlink()
    with pytest.raises(KeySyncError, match="other settings"):
        ablations.train("box", tmp_path, "data", ["--config.num_steps=9"])


def test_a_run_begun_with_other_settings_does_not_go_on_with_these(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "_keysync", lambda arguments, *_: asked.append(arguments[0]))
    asked, steps = [], {str(tmp_path / "box"): 7}
    monkeypatch.setattr(ablations.runs, "last_step", steps.get)
    _begin(tmp_path, ["--config.num_steps=9"])
    with pytest.raises(KeySyncError, match=r"box was trained with other settings than these; .* or remove \S+box$"):
        ablations.train("box", tmp_path, "data", ["--config.num_steps=500"])
    ablations.train("box", tmp_path, "data", ["--config.num_steps=9"])
    steps.clear()  # nothing was reached: there is nothing to protect
    ablations.train("box", tmp_path, "data", ["--config.num_steps=500"])
    assert asked == ["train", "export"] * 2


def test_shards_of_another_set_replace_those_of_the_first(world, tmp_path):
    """Clips of one name and length, but not the same ones."""
    settings = SynthSettings(seed=1, frames=40, size=64, suffix=".npy", validation_share=0, test_share=0)
    synth_dataset(3, tmp_path / "clips", settings, quiet=True)
    shutil.copytree(world / "data", tmp_path / "data")
    write_shards(tmp_path / "clips" / "manifest.csv", str(tmp_path / "data"), str(world / "model"), progress=False)
    store = FrameStore(tmp_path / "data")
    for clip in store.clips:
        exact = np.load(tmp_path / "clips" / f"{clip.id}.landmarks.npy")
        np.testing.assert_array_equal(store.read(clip, [5], ["landmarks"])["landmarks"][0], exact[5])


def test_clips_that_only_an_earlier_manifest_lists_are_named(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    synth_dataset(
        1, tmp_path / "clips", SynthSettings(seed=1, frames=40, size=64, suffix=".npy", validation_share=0, test_share=0), quiet=True
    )
    with pytest.raises(KeySyncError, match="holds clip 'talker_000001', which .*manifest.csv does not list"):
        write_shards(tmp_path / "clips" / "manifest.csv", str(tmp_path / "data"), str(world / "model"), progress=False)


@pytest.mark.filterwarnings("error")
def test_curves_of_runs_too_short_for_a_row(tmp_path):
    (tmp_path / "box").mkdir()
    assert ablations_report.draw_curves(tmp_path, ["box"]).stat().st_size > 5000
