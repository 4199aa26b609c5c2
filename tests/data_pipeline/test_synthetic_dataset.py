"""Files of drawn talkers: complete, resumable, the same for any number of workers."""

import csv
import dataclasses
import functools
import hashlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from bounds import approx, spread

from keysync_jax.cli.main import main
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.locking import only_process
from keysync_jax.data_pipeline.synthetic import (
    SynthSettings,
    TalkerOptions,
    dataset,
    make_clip,
    synth_dataset,
    write_clip,
)
from keysync_jax.data_pipeline.synthetic.dataset import MANIFEST_FIELDS, SPLITS, plan_clip
from keysync_jax.data_pipeline.synthetic.talker_shards import write_shards

SMALL = SynthSettings(seed=3, frames=12, size=64, silent_share=0.3, occluder_share=0.5)


def _digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth")
    summary = synth_dataset(4, folder, SMALL, quiet=True)
    assert (summary.made, summary.kept) == (4, 0) and summary.seconds == approx(4 * 12 / 25)
    return folder


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_written_clip_reads_back(tmp_path, name):
    clip = make_clip(5, frames=20, options=TalkerOptions(occluder="microphone"))
    path = write_clip(clip, tmp_path / "new" / name)
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == 25 and stream.codec_context.colorspace == 1
        frames = np.stack([f.to_ndarray(format="rgb24") for f in video.decode(video=0)])
    with av.open(str(path)) as sound:
        assert sound.streams.audio[0].rate == 16000
        samples = np.concatenate([f.to_ndarray().reshape(-1) for f in sound.decode(audio=0)]).astype(np.float64)
    assert frames.shape == clip.frames.shape and np.abs(frames.astype(int) - clip.frames).mean() < 3
    samples = samples[: len(clip.samples)] / (32767 if name.endswith("mkv") else 1)
    assert np.corrcoef(samples, clip.samples)[0, 1] > 0.99
    np.testing.assert_array_equal(np.load(path.with_name("clip.landmarks.npy")), clip.landmarks)
    np.testing.assert_array_equal(np.load(path.with_name("clip.occluder.npz"))["mask"], clip.occluder_mask)
    record = json.loads(path.with_name("clip.truth.json").read_text())
    np.testing.assert_allclose(record["opening"], clip.opening, rtol=0, atol=0.501e-6)  # written with six decimals
    assert record["is_closure"] == clip.is_closure.tolist() and record["seeds"]["audio"] == 5
    assert record["phonemes"][0]["name"] == "sil" and record["identity"]["hair_style"] == clip.identity["hair_style"]


def test_other_suffix_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.mp4, \.mkv or \.npy"):
        write_clip(make_clip(5, frames=2, size=64), tmp_path / "clip.avi")


def test_manifest(made):
    with (made / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == MANIFEST_FIELDS and len(rows) == 4
    for i, row in enumerate(rows):
        assert (made / row["path"]).stat().st_size > 1000
        assert row["split"] in SPLITS and row["licence"] and row["consent"] and row["source"] == "synthetic-talkers"
        assert row["speaker"] == plan_clip(i, SMALL).speaker


def test_two_workers_make_the_same_bytes(made, tmp_path):
    synth_dataset(4, tmp_path, SMALL, workers=2, quiet=True)
    assert _digests(tmp_path) == _digests(made)


def test_interrupted_run_is_finished_and_extended(made, tmp_path):
    synth_dataset(2, tmp_path, SMALL, quiet=True)
    # As after a kill: a clip without its truth, and a half-written file.
    (tmp_path / "talker_000001.truth.json").unlink()
    (tmp_path / ".talker_000001.77.part.mp4").write_bytes(b"half")
    summary = synth_dataset(4, tmp_path, SMALL, quiet=True)
    assert (summary.made, summary.kept) == (3, 1)
    assert _digests(tmp_path) == _digests(made)


def test_settings_do_not_mix(made):
    with pytest.raises(KeySyncError, match="size 64 against 96"):
        synth_dataset(4, made, dataclasses.replace(SMALL, size=96), quiet=True)


def test_a_folder_that_cannot_be_used_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "set"):
        with pytest.raises(KeySyncError, match="file is a file; name a folder"):
            synth_dataset(1, path, SMALL, quiet=True)
    with pytest.raises(KeySyncError, match="cannot write to /proc/set: "):
        synth_dataset(1, "/proc/set", SMALL, quiet=True)
    monkeypatch.chdir(tmp_path)
    for path in ("", "gs://bucket/set"):
        with pytest.raises(UsageError, match="local folder"):
            synth_dataset(1, path, SMALL, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    else:
        path.write_bytes(how)


@pytest.mark.parametrize("how", [b"{", b"[]", b"3", b'{"seeds": 3}', b"\xff\xfe", "empty", "cut"])
def test_a_clip_with_a_damaged_truth_is_drawn_again(made, tmp_path, how):
    shutil.copytree(made, tmp_path / "set")
    _damage(tmp_path / "set" / "talker_000002.truth.json", how)
    summary = synth_dataset(4, tmp_path / "set", SMALL, quiet=True)
    assert (summary.made, summary.kept) == (1, 3) and _digests(tmp_path / "set") == _digests(made)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".npy"])
def test_a_damaged_file_of_a_finished_clip_is_drawn_again(tmp_path, suffix):
    settings = dataclasses.replace(SMALL, frames=4, occluder_share=1.0, suffix=suffix)
    synth_dataset(1, tmp_path, settings, quiet=True)
    before = _digests(tmp_path)
    assert synth_dataset(1, tmp_path, settings, quiet=True).kept == 1
    files = [p for p in tmp_path.glob("talker_*") if not p.name.endswith("truth.json")]
    assert len(files) == (4 if suffix == ".npy" else 3)
    for path in files:
        for how in ("missing", "empty", *(() if path.suffix == ".mkv" else ("cut",))):
            _damage(path, how)
            assert synth_dataset(1, tmp_path, settings, quiet=True).made == 1, (path, how)
            assert _digests(tmp_path) == before


def test_a_folder_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative, where it looks like a protocol
    assert synth_dataset(1, "run:1", dataclasses.replace(SMALL, frames=2), quiet=True).made == 1
    assert synth_dataset(1, "run:1", dataclasses.replace(SMALL, frames=2), quiet=True).kept == 1


def test_two_drawings_in_one_folder_do_not_disturb_each_other(tmp_path):
    with only_process(str(tmp_path), "busy"):
        with pytest.raises(KeySyncError, match="another process is drawing into"):
            synth_dataset(1, tmp_path, SMALL, quiet=True)
    assert not (tmp_path / "synth.json").exists()
    assert synth_dataset(1, tmp_path, SMALL, quiet=True).made == 1


def test_a_worker_that_is_killed_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_start_worker", functools.partial(os._exit, 9))
    with pytest.raises(KeySyncError, match="was killed .*fewer --workers"):
        synth_dataset(2, tmp_path, SMALL, workers=2, quiet=True)


def test_processes_of_a_killed_run_end(tmp_path):
    script = (
        "from keysync_jax.data_pipeline.synthetic import SynthSettings, synth_dataset\n"
        f"if __name__ == '__main__': synth_dataset(400, {str(tmp_path / 'set')!r}, SynthSettings(size=64), workers=2, quiet=True)\n"
    )
    (tmp_path / "draw.py").write_text(script)
    # The pipe's end is held by every process of the run: it closes when the last one has gone.
    with subprocess.Popen([sys.executable, str(tmp_path / "draw.py")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while not list((tmp_path / "set").glob("talker_*.truth.json")):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
        assert select.select([process.stdout], [], [], 20)[0] and process.stdout.read() == b""


def test_splits_go_by_speaker_and_reach_their_shares():
    settings = SynthSettings(speakers=200, validation_share=0.1, test_share=0.1)
    plans = [plan_clip(i, settings) for i in range(1000)]
    split_of = {}
    for plan in plans:
        assert split_of.setdefault(plan.speaker, plan.split) == plan.split
        assert plan.identity_seed == plans[int(plan.speaker[-5:])].identity_seed
    assert len({p.audio_seed for p in plans}) == len({p.motion_seed for p in plans}) == 1000
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert sum(p.split == split for p in plans) / 1000 == pytest.approx(share, abs=0.02)  # two hundred speakers: to four of them
    kinds = [plan_clip(i, SynthSettings(silent_share=0.2, emotion_share=0.5)).options for i in range(400)]
    assert sum(k.silent for k in kinds) / 400 == pytest.approx(0.2, abs=spread((0.2 * 0.8) ** 0.5, 400))
    assert sum(k.emotion for k in kinds) / 400 == pytest.approx(0.5, abs=spread(0.5, 400))


@pytest.mark.parametrize(
    "field, value",
    [("silent_share", 1.5), ("emotion_share", float("nan")), ("speakers", 0), ("seed", -1), ("size", 10**6), ("suffix", ".avi")],
)
def test_impossible_settings(field, value):
    with pytest.raises(UsageError, match=r"\.avi" if field == "suffix" else field):
        SynthSettings(**{field: value})


@pytest.mark.parametrize("frames, size, words", [(0, 64, "1 to 15000 frames"), (10**9, 64, "frames"), (10_000, 2048, "GB in memory")])
def test_lengths_that_no_memory_holds(frames, size, words):
    for refused in (lambda: SynthSettings(frames=frames, size=size), lambda: make_clip(0, frames, size)):
        with pytest.raises(UsageError, match=words):
            refused()


@pytest.mark.parametrize("wrong", [{"motion": float("nan")}, {"motion": -1.0}, {"room_db": float("nan")}, {"room_db": 3.0}])
def test_impossible_options(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        TalkerOptions(**wrong)


@pytest.mark.parametrize("flags, words", [
    (["-n", "0"], "number of clips"), (["-n", "1000000000000"], "number of clips"),
    (["-n", "1", "--workers", "-4"], "--workers is -4"), (["-n", "1", "--workers", "0"], "--workers is 0"),
])  # fmt: skip
def test_numbers_that_the_command_refuses(tmp_path, capsys, flags, words):
    assert main(["data", "synth", "-o", str(tmp_path / "set"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("words", [[], ["synth"], ["inspect"], ["shards"], ["figures"], ["benchmark"]])
def test_help_gives_an_example(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(["data", *words, "--help"])
    assert stop.value.code == 0 and "example:\n  " in capsys.readouterr().out


@pytest.mark.parametrize("count", ["0", "-2", "99999999"])
def test_figures_refuse_an_impossible_number(capsys, count):
    assert main(["data", "figures", "-n", count]) == 2
    assert f"-n is {count}; choose 1 to" in capsys.readouterr().err


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Two clips as arrays."""
    folder = tmp_path_factory.mktemp("arrays")
    synth_dataset(2, folder, SynthSettings(frames=4, size=64, suffix=".npy", validation_share=0, test_share=0), quiet=True)
    return folder


def test_shards_of_a_damaged_set_are_refused_before_encoding(arrays, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other.csv").write_text("name\nx\n")
    out = tmp_path / "out"
    manifest = (arrays / "manifest.csv").read_text()

    def error(path, output=out, status=1):
        assert main(["data", "shards", str(path), "-o", str(output), "--model", "demo"]) == status
        text = capsys.readouterr().err
        assert text.startswith("keysync: error: ") and len(text.splitlines()) == 1
        return text

    assert "cannot be read" in error(tmp_path / "nowhere.csv")
    assert "cannot be read" in error(tmp_path)
    assert "line 2: no 'path'" in error(tmp_path / "other.csv")
    assert "is a file" in error(arrays / "manifest.csv", tmp_path / "file")
    assert "cannot write to /proc/data" in error(arrays / "manifest.csv", "/proc/data")
    assert "cannot write gs://" in error(arrays / "manifest.csv", "gs://bucket/data")
    monkeypatch.chdir(tmp_path)
    assert "output is empty" in error(arrays / "manifest.csv", "", 2)
    for text, words in (
        (manifest.splitlines()[0] + "\n", "lists no clip"), (manifest + "talker_000009.npy\n", "line 4: no 'speaker'"),
        (manifest.replace("train", "banana"), "split 'banana'"), (manifest + manifest.splitlines()[1] + "\n", "occurs twice"),
        (manifest.replace(".npy", ".mp4"), "talker_000000.mp4; draw the clips as arrays"),
    ):  # fmt: skip
        shutil.copytree(arrays, tmp_path / "set", dirs_exist_ok=True)
        (tmp_path / "set" / "manifest.csv").write_text(text)
        assert words in error(tmp_path / "set" / "manifest.csv")
    assert not out.exists()
    assert main(["data", "shards", str(arrays / "manifest.csv"), "-o", str(out), "--model", "demo", "--microbatch", "0"]) == 2


@pytest.mark.parametrize("file, damage, words", [
    ("talker_000001.npy", "missing", "does not exist"),
    ("talker_000001.npy", "empty", "no whole array"),
    ("talker_000001.npy", "cut", "no whole array"),
    ("talker_000001.npy", b"junk", "no whole array"),
    ("talker_000001.npy", lambda a: a / 255, r"float64 \(4, 64, 64, 3\); frames are uint8"),
    ("talker_000001.npy", lambda a: a[0, 0, 0], r"\(3,\); frames are uint8"),
    ("talker_000001.npy", lambda a: a[:0], "frames are uint8"),
    ("talker_000001.npy", lambda a: a[:, ::2, ::2], "talker_000000 is 64 pixels wide, talker_000001 32"),
    ("talker_000000.landmarks.npy", "cut", "no whole array"),
    ("talker_000000.landmarks.npy", lambda a: a[:3], r"\(3, 68, 2\), not float \(4, 68, 2\)"),
    ("talker_000000.landmarks.npy", lambda a: a * np.nan, "not finite"),
    ("talker_000000.voice.npy", "missing", "does not exist"),
    ("talker_000000.voice.npy", lambda a: a[:99], r"\(99,\), not float \(2560,\)"),
])  # fmt: skip
def test_a_damaged_array_is_named_before_encoding(arrays, tmp_path, file, damage, words):
    shutil.copytree(arrays, tmp_path / "set")
    path = tmp_path / "set" / file
    if callable(damage):
        np.save(path, damage(np.load(path)))
    else:
        _damage(path, damage)
    with pytest.raises(KeySyncError, match=f"{re.escape(file) if 'wide' not in words else ''}.*{words}") as caught:
        write_shards(tmp_path / "set" / "manifest.csv", str(tmp_path / "out"), "nowhere", progress=False)
    assert "wide" in words or "repeat the keysync data synth" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refused_settings_leave_nothing_behind(tmp_path):
    for wrong in ({"frames": 0}, {"size": 129}):
        with pytest.raises(UsageError):
            synth_dataset(1, tmp_path / "set", SynthSettings(**wrong), quiet=True)
    assert not (tmp_path / "set").exists()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "synth.json").write_text("{")
    with pytest.raises(KeySyncError, match="synth.json cannot be read"):
        synth_dataset(1, tmp_path / "set", SynthSettings(frames=4, size=64), quiet=True)
