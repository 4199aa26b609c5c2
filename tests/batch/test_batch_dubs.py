"""A small batch of real dubs with the tiny model: every item comes back, or why not; what comes back is what `keysync dub` makes."""

import json
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import tiny
import tiny_talker_model

from keysync_jax.batch import dub_work
from keysync_jax.batch.dub_work import DubSettings, DubWork
from keysync_jax.batch.job_list import Job
from keysync_jax.batch.worker import Task
from keysync_jax.cli.main import main
from keysync_jax.data_pipeline.synthetic import make_clip, write_clip
from keysync_jax.encoders import latents
from keysync_jax.media import video
from keysync_jax.media.audio import save_wav

FRAMES = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tests' smallest network: what is tested here is what becomes of items, whatever paints them."""
    return tiny_talker_model.make(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two talkers `0.mp4` and `1.mp4`, three voices `a.wav` to `c.wav`, and files that cannot be dubbed."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        write_clip(make_clip(3 + number, frames=FRAMES, size=128), folder / f"{number}.mp4")
    for number, name in enumerate("abc"):
        save_wav(folder / f"{name}.wav", make_clip(10 + number, frames=FRAMES, size=48).samples, 16000)
    save_wav(folder / "empty.wav", np.zeros(0, np.float32), 16000)
    (folder / "text.mp4").write_text("minutes of a meeting\n" * 40)
    (folder / "none.mp4").touch()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "blank.mp4"), "w") as writer:
        stream = writer.add_stream("libx264", rate=25)
        stream.width = stream.height = 96
        for shade in range(5):
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((96, 96, 3), 60 + shade, np.uint8), format="rgb24")))
        writer.mux(stream.encode())
    return folder


def test_twelve_items_come_back_or_say_why_not(clips, model, tmp_path, capsys):
    good = [("0a", "0.mp4", "a.wav", 5), ("0a9", "0.mp4", "a.wav", 9), ("0b", "0.mp4", "b.wav", 5), ("1b9", "1.mp4", "b.wav", 9)]
    broken = {
        "text": ("text.mp4", "a.wav", 5, "text.mp4"), "gone": ("gone.mp4", "a.wav", 5, "does not exist"),
        "mute": ("0.mp4", "empty.wav", 5, "empty.wav"), "odd": ("0.mp4", "a.wav", -1, "--seed -1"),
        "pipe": ("pipe.mp4", "a.wav", 5, "no ordinary file"), "none": ("none.mp4", "a.wav", 5, "empty"),
        "blank": ("blank.mp4", "a.wav", 5, "face"), "folder": ("folder", "a.wav", 5, "no pictures"),
    }  # fmt: skip
    every = [*good, *((name, *row[:3]) for name, row in broken.items())]
    rows = "".join(f"{name},{video},{voice},{seed},{name}.mkv,signed by {name}\n" for name, video, voice, seed in every)
    (clips / "jobs.csv").write_text("id,video,audio,seed,output,consent\n" + rows)
    out = tmp_path / "out"
    words = ["batch", str(clips / "jobs.csv"), "-o", str(out), "--model", str(model), "--lossless", "--quiet"]
    assert main([*words, "--dry-run"]) == 1 and not out.exists()
    assert "0.40 s of video -> 0a.mkv" in capsys.readouterr().out
    assert main(words) == 1
    shown = capsys.readouterr().out
    rows = {row["id"]: row for row in map(json.loads, (out / "report.jsonl").read_text().splitlines())}
    assert len(rows) == 12 and {rows[name]["state"] for name, *_ in good} <= {"done", "review"}
    for name, (*_, reason) in broken.items():
        assert rows[name]["state"] == "failed" and reason in rows[name]["reason"] and f"failed  {name}" in shown
    assert ["look" in rows[name]["phases"] for name, *_ in good] == [True, False, False, True]  # a video that items share is looked at once
    assert rows["0a"]["frames_dubbed"] == FRAMES and rows["0a"]["consent"] == "signed by 0a" and rows["0a"]["figures"]["painted"] == 1
    assert len({row["key"] for row in rows.values() if "key" in row}) == 4
    assert len({(out / f"{name}.mkv").read_bytes() for name, *_ in good}) == 4
    alone = tmp_path / "alone.mkv"
    # In a process of its own, as a user's: this one may hold programs that another test has compiled.
    command = [sys.executable, "-m", "keysync_jax", "dub", clips / "1.mp4", clips / "b.wav", "-o", alone, "--model", model, "--seed", "9"]
    subprocess.run([*map(str, command), "--lossless"], check=True, capture_output=True, timeout=600)
    np.testing.assert_array_equal(*(np.stack([frame.rgb() for frame in video.read(path)]) for path in (alone, out / "1b9.mkv")))
    assert alone.read_bytes() == (out / "1b9.mkv").read_bytes()
    assert main(["batch", "--status", str(out)]) == 0
    assert "12 items: " in capsys.readouterr().out


def paint_gray(samplers, given, progress):
    """In place of the networks."""
    for clip in given:
        for stretch in clip.stretches:
            for frame in range(stretch.plan.num_frames_out):
                stretch.write(frame, np.zeros((tiny.LATENT, tiny.LATENT, 4), np.float32))
        clip.finished = True


def test_a_video_that_is_made_as_long_as_each_voice_is_looked_at_at_each_length(clips, model, tmp_path, monkeypatch):
    monkeypatch.setattr(dub_work.two_stage, "generate", paint_gray)
    save_wav(tmp_path / "long.wav", make_clip(10, frames=2 * FRAMES, size=48).samples, 16000)
    tasks = []
    for name, voice in (("a", clips / "a.wav"), ("long", tmp_path / "long.wav")):
        (tmp_path / name).mkdir()
        job = Job(name, str(clips / "0.mp4"), str(voice), f"{name}.mkv", {"mismatch": "loop"})
        tasks.append(Task(job, tmp_path / name / "output.mkv"))
    found = list(DubWork(DubSettings(str(model))).run(tasks))
    assert [each.values["frames_dubbed"] for each in found] == [FRAMES, 2 * FRAMES]
    assert found[1].values["figures"]["painted"] == 1  # compared with the pictures that were dubbed, not with the file's


def test_one_video_in_several_languages_is_encoded_once_with_the_same_latents(clips, model, tmp_path, monkeypatch):
    """A longer voice continues what a shorter one began; a part of the video lies elsewhere in the encoder and is encoded by itself."""
    save_wav(tmp_path / "short.wav", make_clip(10, frames=5, size=48).samples, 16000)
    rows = [
        ("short", tmp_path / "short.wav", {}),
        ("a", clips / "a.wav", {}),
        ("b", clips / "b.wav", {}),
        ("part", clips / "b.wav", {"range": "0.2:"}),
    ]
    read, encoded = {}, []
    encode = latents.LatentCoder.encode

    def counted(self, frames, seed=0):
        encoded.append(0)
        for latent in encode(self, frames, seed):
            encoded[-1] += 1
            yield latent

    monkeypatch.setattr(latents.LatentCoder, "encode", counted)

    def generate(samplers, given, progress):
        for clip, name in zip(given, names, strict=True):
            read[name] = [stretch.known(list(range(stretch.plan.num_frames_out))) for stretch in clip.stretches]
        paint_gray(samplers, given, progress)

    monkeypatch.setattr(dub_work.two_stage, "generate", generate)
    works = {"together": [rows], "alone": [[row] for row in rows[2:]]}
    found = {}
    for how, groups in works.items():
        work = DubWork(DubSettings(str(model), gated=False))
        encoded.clear()
        for group in groups:
            names = [name for name, *_ in group]
            tasks = []
            for name, voice, options in group:
                (tmp_path / how / name).mkdir(parents=True)
                tasks.append(
                    Task(Job(name, str(clips / "0.mp4"), str(voice), f"{name}.mkv", options), tmp_path / how / name / "output.mkv")
                )
            assert not [each for each in work.run(tasks) if isinstance(each, Exception)]
            if how == "alone":
                work = DubWork(DubSettings(str(model), gated=False))
        found[how] = dict(read)
        assert sum(encoded) == {"together": 5 + 6 + FRAMES - 5, "alone": FRAMES + FRAMES - 5}[how]  # two at once: one again
    for name, *_ in rows[2:]:
        for one, other in zip(found["together"][name], found["alone"][name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_out_of_device_memory_begins_again_at_half_the_microbatch(clips, model, tmp_path, monkeypatch):
    work = DubWork(DubSettings(str(model), microbatch=4, gated=False))
    calls = []

    def generate(samplers, given, progress):
        """Gray pictures, where there is room."""
        calls.append((len(given), samplers["keyframe"].microbatch))
        if calls[-1] in [(2, 4), (1, 4), (1, 2)] and len(calls) < 5:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")
        paint_gray(samplers, given, progress)

    monkeypatch.setattr(dub_work.two_stage, "generate", generate)
    tasks = []
    for name in "ab":
        (tmp_path / name).mkdir()
        job = Job(name, str(clips / "0.mp4"), str(clips / f"{name}.wav"), f"{name}.mkv", {"lossless": True})
        tasks.append(Task(job, tmp_path / name / "output.mkv"))
    first, second = work.run(tasks)
    assert calls == [(2, 4), (1, 4), (1, 2), (1, 1), (1, 4)]  # together, alone, half, half again; the second alone
    assert first.values["microbatch"] == 1 and "from a microbatch of 4" in first.values["halved"]
    assert second.values["microbatch"] == 4 and "halved" not in second.values
    assert tasks[0].target.exists() and tasks[1].target.exists() and first.values["frames_dubbed"] == FRAMES
