"""The ablation runner: two tiny runs from drawn clips to tables through the real trainer, and its arithmetic by hand."""

import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny_talker_model

from data_pipeline.synthetic.dataset import SynthSettings, synth_dataset
from data_pipeline.synthetic.shards import write_shards
from keysync_jax.errors import KeySyncError
from keysync_jax.evaluation import ablations
from keysync_jax.evaluation.ablations import Judged, Run
from keysync_jax.locking import only_process
from keysync_jax.training import runs

TINY = f"stage.audio_feature_dim={tiny_talker_model.BANDS}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model and shards of drawn clips that its VAE encoded."""
    folder = tmp_path_factory.mktemp("ablations")
    model = tiny_talker_model.make(folder / "model")
    synth_dataset(3, folder / "clips", SynthSettings(frames=40, size=64, suffix=".npy", validation_share=0, test_share=0), quiet=True)
    write_shards(folder / "clips" / "manifest.csv", str(folder / "data"), str(model), progress=False)
    return folder


def test_from_shards_to_tables_and_not_twice(world, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "RUNS", {"box": Run("tiny_test", (TINY, "stage.mask.kind=mouth"))})
    monkeypatch.setattr(ablations, "JUDGED", {"box": Judged("ours", ("box", "interpolation"), "keyframes", ("1/1",), silent=True)})
    out, model = world / "out", str(world / "model")
    command = ["--data", str(world / "data"), "-o", str(out), "--only", "box", "--interpolation", model, "--clips", "1", "--quiet"]
    command += ["--config.num_steps=2", "--config.data.batch_size=2", "--config.log.every=1"]
    assert ablations.main(command) == 0
    table = capsys.readouterr().out
    assert "| ours | 1/1 |" in table and "closed at m, b, p" in table
    report = json.loads((out / "ablations.json").read_text())
    assert report["settings"] == command[-3:]
    parts = report["judged"]["box"][0]["model"]["parts"]
    assert parts["keyframe"]["config"]["mask"]["kind"] == "mouth" and "interpolation" in parts  # the run's keyframes, the model's rest
    assert (out / "ablations.md").read_text().strip() == table.strip() and (out / "curves.png").stat().st_size > 5000

    trained = (out / "box.log").stat().st_mtime_ns
    monkeypatch.setattr(ablations.talkers, "evaluate", None)  # a second command reads what the first one found
    assert ablations.main(command) == 0 and (out / "box.log").stat().st_mtime_ns == trained
    assert capsys.readouterr().out == table


def test_a_run_that_fails_is_named_with_its_log(tmp_path, capsys):
    data, out = str(tmp_path / "none"), str(tmp_path / "out")
    assert ablations.main(["--data", data, "-o", out, "--only", "mouth", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("keysync: error: keysync train --config demo_keyframe") and "mouth.log" in error and data in error
    assert not (tmp_path / "out" / "mouth_model").exists()
    assert ablations.main(["--data", "x", "-o", out, "--only", "box,lips"]) == 2
    assert "no run 'lips'; choose among box, mouth, one_stage, interpolation" in capsys.readouterr().err


def test_stopped_by_a_scheduler_the_run_is_saved_and_the_rest_not_begun(world):
    out = world / "stopped"
    script = (
        "import sys; from keysync_jax.evaluation import ablations; from keysync_jax.evaluation.ablations import Run;"
        f"ablations.RUNS.update(box=Run('tiny_test', ('{TINY}',)), mouth=Run('tiny_test', ('{TINY}',))); sys.exit(ablations.main())"
    )
    command = ["--data", str(world / "data"), "-o", str(out), "--only", "box,mouth", "--config.num_steps=100000", "--config.log.every=1"]
    command += ["--config.data.batch_size=2", "--config.checkpoint.every=100000"]
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
    got = ablations.difference(a, b, "opening_r")
    values = np.array([0.3, -0.1, 0.0])
    assert (got.higher, got.lower, got.clips) == (1, 1, 3)
    assert math.isclose(got.mean, values.mean()) and math.isclose(got.error, values.std(ddof=1) / math.sqrt(3))
    assert math.isclose(ablations.difference(a, b, "silence_open").mean, 0.1)
    with pytest.raises(KeySyncError, match="no clip has the figure"):
        ablations.difference(a, {"per_clip": [], "silence": {"per_clip": []}}, "opening_r")


def test_tables_set_mouth_against_box_and_one_stage_against_two():
    def judged(name, guidance, values):
        keys = {"opening_r", "width_r", "closed", "partial_r", "input_leak", "flicker", "roughness"}
        rows = [{"clip": c, **dict.fromkeys(keys, v)} for c, v in enumerate(values)]
        silence = {"per_clip": [{"clip": c, "open": v, "leak": v} for c, v in enumerate(values)]}
        output = {key: float(np.mean(values)) for key in (*keys, "silence_open", "silence_leak")}
        output |= {f"{key}_error": 0.01 for key in output}
        return {"guidance": guidance, "test": {"clips": len(values)}, "columns": {"output": output}, "per_clip": rows, "silence": silence}

    found = {
        "box": [judged("box", g, (0.1, 0.2)) for g in ("5/2", "2.5/1.5", "1/1")],
        "mouth": [judged("mouth", "1/1", (0.3, 0.3)), judged("mouth", "2.5/1.5", (0.1, 0.1))],
        "one_stage": [judged("one_stage", "2.5/1.5", (0.5, 0.4))],
        "two_stages": [judged("two_stages", "2.5/1.5", (0.2, 0.2))],
    }
    text = ablations.tables(found)
    assert "| box | 5/2 |" in text.split("keyframes, box")[1] and "5/2" not in text.split("whole dubs")[0]
    assert "| mouth alone minus box, clip by clip | 1/1 | +0.150 ± 0.050 (2 higher, 0 lower) |" in text
    assert "| mouth alone minus box, clip by clip | 2.5/1.5 | -0.050 ± 0.050 (0 higher, 1 lower) |" in text
    assert "| one stage minus two, clip by clip | 2.5/1.5 | +0.250 ± 0.050 (2 higher, 0 lower) |" in text
    del found["mouth"], found["one_stage"]
    assert "minus" not in ablations.tables(found)


def test_a_model_of_other_settings_is_not_taken_for_one_of_these(tmp_path):
    (tmp_path / "box_model").mkdir()
    asked = [ablations.RUNS["box"].recipe, "--config.data.datasets=data", f"--config.num_steps={ablations.QUARTER}"]
    asked += [f"--config.{setting}" for setting in ablations.RUNS["box"].settings]
    (tmp_path / "box.settings.json").write_text(json.dumps([*asked, "--config.num_steps=9"]))
    assert ablations.train("box", tmp_path, "data", ["--config.num_steps=9"]) == tmp_path / "box_model"
    for data, overrides in (("data", ["--config.num_steps=500"]), ("other", ["--config.num_steps=9"])):
        with pytest.raises(KeySyncError, match="box_model was trained with other settings"):
            ablations.train("box", tmp_path, data, overrides)
    (tmp_path / "box.settings.json").unlink()
    with pytest.raises(KeySyncError, match="other settings"):
        ablations.train("box", tmp_path, "data", ["--config.num_steps=9"])
