"""`keysync prepare` and `keysync data`, as a user types them."""

import argparse
import dataclasses
import json
import sys

import pytest
import tiny_shards as tiny

from keysync_jax.cli import data_verbs, prepare_verbs
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.shards import write_group


def run(*words):
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(required=True)
    prepare_verbs.add_prepare(verbs)
    data_verbs.add_data(verbs)
    args = parser.parse_args([str(w) for w in words])
    return args.run(args)


def test_synth_prepare_inspect(tmp_path, tiny_model, capsys):
    assert run("data", "synth", "-n", 2, "--frames", 30, "-o", tmp_path / "talkers", "--quiet") == 0
    assert "manifest.csv" in capsys.readouterr().out
    words = ("prepare", tmp_path / "talkers" / "manifest.csv", "-o", tmp_path / "data", "--model", tiny_model, "--quiet")
    assert run(*words, "--columns", "log_mel,sound", "--splits", "train=1") == 0
    assert "2 clips" in capsys.readouterr().out
    assert run("data", "inspect", tmp_path / "data", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["splits"]["train"]["frames"] == 60 and values["crop"] == [128, 128]
    assert run("data", "inspect", tmp_path / "data", "--clip", "talker_000001", "-o", tmp_path / "clip.png") == 0
    assert (tmp_path / "clip.png").read_bytes().startswith(b"\x89PNG") and "synthetic-talkers" in capsys.readouterr().out
    # What cannot be drawn is said before anything is printed.
    for clip, picture, match in (("talker_000001", "clip.jpg", "must be a .png"), ("nobody", "clip.png", "no clip")):
        with pytest.raises(KeySyncError, match=match):
            run("data", "inspect", tmp_path / "data", "--clip", clip, "-o", tmp_path / picture)
        assert capsys.readouterr().out == ""
    assert run("data", "inspect", tmp_path / "data") == 0
    table = capsys.readouterr().out
    assert "audio_wavlm" in table and "int16[640]" in table
    # Other settings than the dataset was written with are refused, not mixed in.
    with pytest.raises(KeySyncError, match=r"data was made with crop size \[128, 128\] \(now \[64, 64\]\); use the same"):
        run(*words, "--columns", "log_mel", "--crop-size", 64)


@pytest.mark.parametrize(
    "words",
    [
        ("--workers", "0"),
        ("--columns", "jpg"),
        ("--splits", "train"),
        ("--column-weights", "whisper"),
        ("--scorer", "beauty=x"),
        ("--scorer", "quality=nothing@pyproject.toml"),
        ("--splits", "train=0.5"),
        ("--crop-size", "66"),
        ("--crop-size", "0"),
        ("--crop-size", "100000000"),
        ("--splits", "train=nan"),
        ("--splits", "a/b=1"),
        ("--splits", "=1"),
        ("--beam=--flag='x",),
        ("--column-weights", "whisper=folder"),
        ("--output", ""),
        ("--output", "pyproject.toml"),
    ],
)
def test_wrong_usage(tmp_path, tiny_model, words):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UsageError):
        run("prepare", tmp_path, "-o", tmp_path / "out", "--model", tiny_model, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--min-face", "--max-silence", "--shard-mb"])
@pytest.mark.parametrize("value", ["nan", "inf", "many"])
def test_numbers_that_are_none(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        run("prepare", tmp_path, "-o", tmp_path / "out", "--model", "demo", flag, value)
    assert stop.value.code == 2 and f"{flag}: {value} is no finite number" in capsys.readouterr().err


def test_a_remote_folder_whose_package_is_missing(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    (tmp_path / "a.mp4").touch()
    for words in (("data", "inspect", "gs://bucket/data"), ("prepare", tmp_path, "-o", "gs://bucket/data", "--model", tiny_model)):
        with pytest.raises(KeySyncError, match="cannot open gs://bucket/data: .*gcsfs"):
            run(*words)


@pytest.mark.parametrize(
    "words",
    [
        ("--scorer", "quality=absent.pt"),
        ("--columns", "occluder", "--column-weights", "occluder=absent_tiny.pt"),
        ("--columns", "whisper", "--column-weights", "whisper=absent"),
    ],
)
def test_missing_weights_are_said_before_any_work(tmp_path, tiny_model, words):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(KeySyncError, match="absent"):
        run("prepare", tmp_path, "-o", tmp_path / "out", "--model", tiny_model, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--work", "--output"])
def test_a_folder_that_cannot_be_made(tmp_path, tiny_model, option):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.landmarks.npy").touch()
    (tmp_path / "file").touch()
    words = ("prepare", tmp_path / "a.mp4", "-o", tmp_path / "out", "--model", tiny_model, "--quiet")
    with pytest.raises(KeySyncError, match=r"cannot write to .*file/x: .*; choose another folder"):
        run(*words, option, tmp_path / "file" / "x")


def test_a_runner_that_beam_does_not_know(tmp_path, tiny_model):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.landmarks.npy").touch()
    with pytest.raises(UsageError, match="no runner 'Foo'"):
        run("prepare", tmp_path, "-o", tmp_path / "out", "--model", tiny_model, "--runner", "Foo", "--quiet")


def test_without_beam_one_line_says_what_to_install(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "keysync_jax.data_pipeline.prepare.jobs", raising=False)
    import keysync_jax.data_pipeline.prepare as package

    monkeypatch.delattr(package, "jobs", raising=False)
    with pytest.raises(KeySyncError, match=r"keysync-jax\[data\]"):
        run("prepare", tmp_path, "-o", tmp_path / "out", "--model", tiny_model)


def test_inspect_prints_names_as_they_are(tmp_path, capsys):
    video, licence = "talk [dqw4w9]\udce9 :car: [/x].mp4", "CC-BY-4.0 [see the release form of the recording session]"
    clips = [dataclasses.replace(c, video=video, licence=licence, consent="signed, on file") for c in tiny.clips()]
    write_group(tmp_path, tiny.group(), tiny.load, clips)
    assert run("data", "inspect", tmp_path, "--clip", clips[0].id) == 0
    assert "video          talk [dqw4w9]\\udce9 :car: [/x].mp4" in capsys.readouterr().out.splitlines()
    assert run("data", "inspect", tmp_path) == 0
    assert f"licence {licence}, consent signed, on file" in capsys.readouterr().out


def test_inspect_needs_a_clip_to_draw(tmp_path):
    with pytest.raises(UsageError, match="--clip"):
        run("data", "inspect", tmp_path, "-o", "x.png")
    with pytest.raises(KeySyncError, match="holds no dataset"):
        run("data", "inspect", tmp_path)


def test_without_pyscenedetect_one_line_says_what_to_install(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.landmarks.npy").touch()
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(KeySyncError, match=r"pip install .keysync-jax\[data\]"):
        run("prepare", tmp_path, "-o", tmp_path / "out", "--model", tiny_model, "--quiet")
