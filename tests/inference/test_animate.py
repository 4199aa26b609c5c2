"""Animations end to end with a tiny random KeyFace model: pictures, lengths, emotion, seeds, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
import tiny_keyface
from PIL import Image

from keysync_jax import KeySyncPipeline
from keysync_jax.cli.main import main
from keysync_jax.converters import model_directory
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.inference import portrait
from keysync_jax.inference.animate_options import AnimateOptions
from keysync_jax.media import audio, video

SQUARE = AnimateOptions(crop="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_keyface.make(tmp_path_factory.mktemp("keyface") / "model")


@pytest.fixture(scope="module")
def pipe(model):
    return KeySyncPipeline.from_pretrained(model)


def drawn(side=64):
    return make_clip(5, frames=1, size=side).frames[0]


def voice(frames, seed=0):
    t = np.arange(640 * frames) / 16000
    return (0.3 * np.sin(2 * np.pi * (180 + 40 * seed) * t) * np.abs(np.sin(9 * t))).astype(np.float32)


def animated(pipe, frames=6, options=SQUARE, seed=0, image=None):
    return pipe.animate(drawn() if image is None else image, voice(frames, seed), rate=16000, options=options)


def test_every_started_frame_of_the_voice_is_made(pipe):
    for samples in (1, 640 * 4, 640 * 4 + 1, 640 * 7):
        result = pipe.animate(drawn(), voice(8)[:samples], rate=16000, options=SQUARE)
        assert result.frames.shape == (-(-samples // 640), tiny.SIZE, tiny.SIZE, 3) and result.frames.dtype == np.uint8
    small = pipe.animate(drawn(64)[:40, :40], voice(4), rate=16000, options=SQUARE)  # 40 pixels
    assert small.frames.shape == (4, tiny.SIZE, tiny.SIZE, 3)
    assert result.report["frames"] == 7 and result.report["emotion"]["keyframes"][1]["seconds"] == pytest.approx(3 / 25)


def test_a_seed_gives_the_same_bytes_and_the_conditions_matter(pipe):
    first = animated(pipe).frames
    np.testing.assert_array_equal(animated(pipe).frames, first)
    for other in (
        animated(pipe, options=AnimateOptions(crop="none", seed=24)),
        animated(pipe, options=AnimateOptions(crop="none", emotion="-0.9,0.9")),
        animated(pipe, options=AnimateOptions(crop="none", autoguidance=1.0)),
        animated(pipe, seed=1),
        animated(pipe, image=make_clip(6, frames=1, size=64).frames[0]),
    ):
        assert (other.frames != first).any()
    neutral = animated(pipe, options=AnimateOptions(crop="none", emotion="happy", emotion_strength=0.0))
    np.testing.assert_array_equal(neutral.frames, first)


def test_the_emotion_reaches_the_keyframes_at_their_own_times(pipe, monkeypatch):
    """Frame 3 k has a keyframe; an emotion that differs in later frames alone leaves the first window's as they were."""
    windows = {}
    sample = pipe.keyframe.__class__.__call__

    def spy(self, items, settings=()):
        kept = list(items)
        windows.setdefault(self.config.stage, []).extend(kept)
        return sample(self, iter(kept), settings)

    monkeypatch.setattr(pipe.keyframe.__class__, "__call__", spy)
    animated(pipe, frames=10, options=AnimateOptions(crop="none", emotion="neutral,happy"))
    felt = np.interp(np.arange(10), [0, 9], [0, 0.85])
    (first, second), between = windows["keyframe"], windows["interpolation"]
    np.testing.assert_allclose(first.emotion["valence"], felt[[0, 0, 3, 6]], atol=1e-6)  # the identity's place has frame 0's
    np.testing.assert_allclose(second.emotion["valence"], felt[[0, 9, 9, 9]], atol=1e-6)
    assert first.known is None and first.mask is None and not between[0].emotion and len(between) == 3


def test_without_the_worse_network_it_says_so_and_equals_scale_one(pipe, tmp_path):
    alone = KeySyncPipeline.from_pretrained(tiny_keyface.make(tmp_path / "alone", weak=False))
    result = animated(alone)
    assert any("no interpolation_bad" in note for note in result.report["notes"])
    np.testing.assert_array_equal(result.frames, animated(pipe, options=AnimateOptions(crop="none", autoguidance=1.0)).frames)


def test_files_report_and_paste(pipe, tmp_path, talker):
    image = Image.fromarray(np.pad(drawn(96), ((20, 20), (40, 40), (0, 0)), constant_values=90))
    image.save(tmp_path / "face.png")
    audio.save_wav(tmp_path / "voice.wav", voice(6), 16000)
    out, report = tmp_path / "out.mp4", tmp_path / "r.json"
    options = AnimateOptions(crop="none", paste=True, emotion="excited,bored")
    result = pipe.animate(tmp_path / "face.png", tmp_path / "voice.wav", out, options=options, report=report)
    with av.open(str(out)) as container:
        pictures, sound = container.streams.video[0], container.streams.audio[0]
        assert (pictures.width, pictures.height, pictures.frames) == (176, 136, 6) and sound.codec_context.name == "aac"
    found = json.loads(report.read_text())
    assert found["seam"]["mean"] > 0 and found["settings"]["paste"] and found["kind"] == "animate"
    assert any("seam shows" in note for note in found["notes"]) == (found["seam"]["mean"] > 8)
    assert found["source"]["square"] == [20, 0, 156, 136] and any("square in its middle" in note for note in found["notes"])
    assert (tmp_path / found["emotion"]["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "6 frames, emotion excited,bored; seam" in result.summary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["face.png", "out.mp4", "r.emotion.png", "r.json", "voice.wav"]
    assert not any("gbrp" in note for note in found["notes"])
    sized = animated(pipe, options=AnimateOptions(crop="none", size=30))
    assert sized.frames.shape == (6, 30, 30, 3)


def test_the_command_makes_the_same_bytes(pipe, model, tmp_path, capsys):
    Image.fromarray(drawn()).save(tmp_path / "face.png")
    audio.save_wav(tmp_path / "voice.wav", voice(6), 16000)
    words = ["animate", str(tmp_path / "face.png"), str(tmp_path / "voice.wav"), "-o", str(tmp_path / "a.mp4"), "--model", str(model)]
    assert main([*words, "--crop", "none", "--emotion", "-0.5,0.25", "--report", str(tmp_path / "a.json")]) == 0, capsys.readouterr()
    assert "6 frames, emotion -0.5,0.25" in capsys.readouterr().out
    options = AnimateOptions(crop="none", emotion="-0.5,0.25")
    pipe.animate(tmp_path / "face.png", tmp_path / "voice.wav", tmp_path / "b.mp4", options=options)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["emotion"]["keyframes"][0] == {"seconds": 0, "valence": -0.5, "arousal": 0.25}


def test_wrong_models_and_files_are_refused_by_name(pipe, tiny_model, tmp_path, talker):
    keysync = KeySyncPipeline.from_pretrained(tiny_model)
    with pytest.raises(KeySyncError, match="keyframe stage is KeySync's, which dubs a video: run it with keysync dub"):
        keysync.animate(drawn(), voice(6), rate=16000)
    with pytest.raises(KeySyncError, match="keyframe stage is KeyFace's, which animates a picture: run it with keysync animate"):
        pipe(np.zeros((2, 64, 64, 3), np.uint8), voice(6), fps=25, rate=16000)
    picture = tmp_path / "face.png"
    Image.fromarray(drawn()).save(picture)
    with pytest.raises(UsageError, match="would replace the picture"):
        pipe.animate(picture, voice(6), picture, rate=16000)
    with pytest.raises(UsageError, match="give RGB as uint8"):
        pipe.animate(np.zeros((4, 4)), voice(6), rate=16000)
    with pytest.raises(KeySyncError, match="no face found in the 64x64 picture.*--crop none"):
        pipe.animate(np.full((64, 64, 3), 90, np.uint8), voice(6), rate=16000)
    with pytest.raises(UsageError, match="the model's interpolation stage is guided by"):
        alone = KeySyncPipeline.from_pretrained(_guided(pipe, tmp_path / "guided"))
        alone.animate(drawn(), voice(6), rate=16000, options=AnimateOptions(crop="none", autoguidance=2.0))
    assert main(["animate", str(picture), "none.wav", "-o", str(tmp_path / "o.mp4"), "--emotion", "-2,0", "--model", "x"]) == 2
    assert not (tmp_path / "o.mp4").exists()


def _guided(pipe, path):
    """The same model with another guidance of its second stage."""
    directory = model_directory.load(pipe.describe()["path"])
    directory.save(path)
    config = path / "interpolation" / "config.json"
    values = json.loads(config.read_text())
    values["config"]["guidance"] = {"kind": "none", "scale": 2.0, "momentum": -0.75, "eta": 0.0, "norm_threshold": 2.5}
    config.write_text(json.dumps(values))
    return path


def test_several_faces_small_faces_and_profiles_are_said():
    from keysync_jax.media import still
    from keysync_jax.media.faces import Face

    def face(x, y, side, nose=0.5):
        points = np.zeros((68, 2), np.float32)
        points[:] = np.array([x, y]) + side * np.random.default_rng(0).uniform(0.1, 0.9, (68, 2))
        points[[0, 16]] = [[x, y], [x + side, y + side]]
        points[36], points[45], points[30] = [x + 0.2 * side, y], [x + 0.8 * side, y], [x + (0.2 + 0.6 * nose) * side, y + 0.5 * side]
        return Face.from_landmarks(points, 1.0)

    picture = still.Picture(np.zeros((600, 900, 3), np.uint8), ("first",))
    faces = [face(100, 100, 250), face(600, 200, 120, nose=0.95)]
    large = portrait._around(picture, "a.png", faces, "largest")
    assert large.face[0] == 100 and "2 faces; the one around" in large.notes[1] and large.notes[0] == "first" and len(large.notes) == 2
    right = portrait._around(picture, "a.png", faces, "right")
    assert right.face[0] == 600 and any("120 pixels large" in note for note in right.notes) and any("side" in note for note in right.notes)
    with pytest.raises(UsageError, match="outside the 900x600 picture"):
        portrait._around(picture, "a.png", faces, "1000,10")


def test_a_real_detector_finds_the_drawn_face():
    sitter = portrait.sit(make_clip(3, frames=1, size=512).frames[0], AnimateOptions())
    assert sitter.face is not None and sitter.square.side >= 1.5 * (sitter.face[2] - sitter.face[0])
    assert sitter.pixels(64).shape == (64, 64, 3) and np.abs(sitter.pixels(64)).max() <= 1


def test_a_batch_of_animations_keeps_the_same_bytes_and_refuses_other_models_and_columns(pipe, model, tmp_path, capsys):
    Image.fromarray(drawn()).save(tmp_path / "face.png")
    for number, frames in enumerate((6, 9)):
        audio.save_wav(tmp_path / f"v{number}.wav", voice(frames, number), 16000)
    rows = "id,kind,image,audio,crop,emotion,seed,consent,mask,output,lossless\n"
    rows += "a,animate,face.png,v0.wav,none,happy,3,yes,,a.mkv,true\nb,animate,face.png,v1.wav,none,,,,,,\n"
    (tmp_path / "jobs.csv").write_text(rows + "c,dub,face.png,v1.wav,,,,,,,\n")
    status = main(["batch", str(tmp_path / "jobs.csv"), "-o", str(tmp_path / "out"), "--model", str(model), "--quiet"])
    assert status == 1, capsys.readouterr()  # the dub, which a KeyFace model does not make
    lines = {line["id"]: line for line in map(json.loads, (tmp_path / "out" / "report.jsonl").read_text().splitlines())}
    assert {name: line["state"] for name, line in lines.items()} == {"a": "done", "b": "done", "c": "failed"}
    assert lines["a"]["consent"] == "yes" and "keysync animate" in lines["c"]["reason"]
    options = AnimateOptions(crop="none", emotion="happy", seed=3, lossless=True)
    pipe.animate(tmp_path / "face.png", tmp_path / "v0.wav", tmp_path / "alone.mkv", options=options)
    made, alone = (np.stack([frame.rgb() for frame in video.read(path)]) for path in (tmp_path / "out" / "a.mkv", tmp_path / "alone.mkv"))
    assert alone.shape == (6, 64, 64, 3)
    np.testing.assert_array_equal(made, alone)
    assert (tmp_path / "out" / "a.mkv").read_bytes() == (tmp_path / "alone.mkv").read_bytes()
    (tmp_path / "wrong.csv").write_text("kind,image,audio,mask\nanimate,face.png,v0.wav,box\n")
    assert main(["batch", str(tmp_path / "wrong.csv"), "-o", str(tmp_path / "o2"), "--model", str(model)]) == 2
    assert "keysync animate has no --mask" in capsys.readouterr().err


@pytest.mark.slow
def test_one_and_eight_devices_give_the_same_bytes(model, tmp_path):
    """In processes of their own, compiled as users compile."""
    program = (
        "import sys, hashlib, numpy as np\nfrom keysync_jax.core import cpu\ncpu.prepare()\nimport jax\n"
        "from keysync_jax import KeySyncPipeline\nfrom keysync_jax.inference.animate_options import AnimateOptions\n"
        "rng = np.random.default_rng(0)\nimage = rng.integers(0, 255, (64, 64, 3), np.uint8)\n"
        "sound = 0.1 * rng.standard_normal(640 * 10).astype(np.float32)\n"
        "made = [KeySyncPipeline.from_pretrained(sys.argv[1], devices=jax.devices()[:n]).animate(image, sound, rate=16000, "
        "options=AnimateOptions(crop='none', emotion='happy')).frames for n in (1, 8)]\n"
        "assert len(jax.devices()) == 8 and made[0].std() > 1\nassert np.array_equal(*made), np.abs(made[0].astype(int) - made[1]).max()\n"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    done = subprocess.run([sys.executable, "-c", program, str(model)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
