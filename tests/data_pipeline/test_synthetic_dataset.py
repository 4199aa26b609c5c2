"""Files of drawn talkers: complete, resumable, the same for any number of workers."""

import csv
import dataclasses
import hashlib
import json

import av
import numpy as np
import pytest

from data_pipeline.synthetic import SynthSettings, TalkerOptions, make_clip, shards, synth_dataset, write_clip
from data_pipeline.synthetic.dataset import MANIFEST_FIELDS, SPLITS, plan_clip
from keysync_jax.errors import KeySyncError, UsageError

SMALL = SynthSettings(seed=3, frames=12, size=64, silent_share=0.3, occluder_share=0.5)


def _digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth")
    summary = synth_dataset(4, folder, SMALL, quiet=True)
    assert (summary.made, summary.kept) == (4, 0) and summary.seconds == pytest.approx(4 * 12 / 25)
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
    np.testing.assert_allclose(record["opening"], clip.opening, atol=1e-6)
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


def test_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeySyncError, match="cannot write"):
        synth_dataset(1, tmp_path / "file", SMALL, quiet=True)


def test_splits_go_by_speaker_and_reach_their_shares():
    settings = SynthSettings(speakers=200, validation_share=0.1, test_share=0.1)
    plans = [plan_clip(i, settings) for i in range(1000)]
    split_of = {}
    for plan in plans:
        assert split_of.setdefault(plan.speaker, plan.split) == plan.split
        assert plan.identity_seed == plans[int(plan.speaker[-5:])].identity_seed
    assert len({p.audio_seed for p in plans}) == len({p.motion_seed for p in plans}) == 1000
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert sum(p.split == split for p in plans) / 1000 == pytest.approx(share, abs=0.02)
    kinds = [plan_clip(i, SynthSettings(silent_share=0.2, emotion_share=0.5)).options for i in range(400)]
    assert sum(k.silent for k in kinds) / 400 == pytest.approx(0.2, abs=0.06)
    assert sum(k.emotion for k in kinds) / 400 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("field, value", [("silent_share", 1.5), ("speakers", 0), ("seed", -1)])
def test_impossible_settings(field, value):
    with pytest.raises(UsageError, match=field):
        SynthSettings(**{field: value})


def test_no_clips(tmp_path):
    with pytest.raises(UsageError, match="at least 1"):
        synth_dataset(0, tmp_path, quiet=True)


def test_shards_of_a_damaged_set_are_refused_before_encoding(tmp_path, capsys):
    synth_dataset(1, tmp_path / "set", SynthSettings(frames=4, size=64, suffix=".npy"), quiet=True)
    manifest = tmp_path / "set" / "manifest.csv"
    (tmp_path / "file").write_text("x")
    (tmp_path / "other.csv").write_text("name\nx\n")

    def error(*words):
        assert shards.main([*map(str, words), "--model", "demo"]) == 1
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "cannot be read" in error(tmp_path / "nowhere.csv", "-o", out)
    assert "cannot be read" in error(tmp_path, "-o", out)
    assert "has no column 'path'" in error(tmp_path / "other.csv", "-o", out)
    assert "is a file" in error(manifest, "-o", tmp_path / "file")
    next((tmp_path / "set").glob("*.voice.npy")).unlink()
    assert "does not exist, but" in error(manifest, "-o", out)
    assert not out.exists()
    with pytest.raises(SystemExit) as stop:
        shards.main([str(manifest), "-o", str(out), "--model", "demo", "--microbatch", "0"])
    assert stop.value.code == 2


def test_refused_settings_leave_nothing_behind(tmp_path):
    for wrong in ({"frames": 0}, {"size": 129}):
        with pytest.raises(UsageError):
            synth_dataset(1, tmp_path / "set", SynthSettings(**wrong), quiet=True)
    assert not (tmp_path / "set").exists()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "synth.json").write_text("{")
    with pytest.raises(KeySyncError, match="synth.json cannot be read"):
        synth_dataset(1, tmp_path / "set", SynthSettings(frames=4, size=64), quiet=True)
