"""A whole dub on a drawn talker with the tiny model: what every user relies on."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import types

import clips
import numpy as np
import pytest
import tiny_talker_model

from keysync_jax import KeySyncPipeline
from keysync_jax.cli.main import main
from keysync_jax.config import MaskConfig
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.inference import latent_store
from keysync_jax.inference import pipeline as door
from keysync_jax.inference.options import DubOptions
from keysync_jax.media import audio, video

FRAMES = 30  # of the drawn clip


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return KeySyncPipeline.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def dubbed(pipeline, talker, tmp_path_factory):
    """A lossless dub and its report."""
    folder = tmp_path_factory.mktemp("dubbed")
    result = pipeline(
        talker / "clip.mp4", talker / "voice.wav", folder / "out.mov", options=DubOptions(lossless=True), report=folder / "r.json"
    )
    return folder, result


def _frames(path):
    return [(frame.time, frame.rgb().astype(np.int16)) for frame in video.read(path)]


def test_same_length_size_and_timestamps(dubbed, talker):
    folder, result = dubbed
    before, after = _frames(talker / "clip.mp4"), _frames(folder / "out.mov")
    assert [t for t, _ in before] == [t for t, _ in after]
    assert before[0][1].shape == after[0][1].shape
    assert result.report["frames_dubbed"] == len(before) == FRAMES


def test_only_the_mouth_region_changes(dubbed, talker):
    folder, result = dubbed
    x0, y0, x1, y1 = (max(0, int(v)) for v in result.report["shots"][0]["face_box"])
    for (_, a), (_, b) in zip(_frames(talker / "clip.mp4"), _frames(folder / "out.mov"), strict=True):
        difference = np.abs(a - b)
        inside = difference[y0:y1, x0:x1].copy()
        difference[y0:y1, x0:x1] = 0
        assert difference.max() == 0
        assert inside[: (y1 - y0) // 4].max() == 0  # forehead
        assert inside[inside > 0].mean() > 5  # a random model's mouth is noise


def test_the_given_audio_is_what_is_heard(dubbed, talker):
    folder, result = dubbed
    given, got = audio.load_audio(talker / "voice.wav").samples, audio.load_audio(folder / "out.mov").samples
    n = min(len(given), len(got))
    assert n >= FRAMES * 640 - 640
    np.testing.assert_array_equal(got[:n], given[:n])  # the packets themselves, decoded by the same decoder
    assert any("longer than the video" in note for note in result.report["notes"]) == (len(given) / 16000 > FRAMES / 25 + 1)


def test_report_says_what_was_done(dubbed):
    folder, result = dubbed
    report = json.loads((folder / "r.json").read_text())
    assert report == result.report
    assert report["shots"][0]["frames"] == [0, FRAMES] and report["shots"][0]["skipped"] == []
    assert report["settings"]["steps"] == 10 and report["settings"]["evaluations"] == 11
    assert set(report["seconds"]) >= {"look", "listen", "encode", "keyframes", "interpolate", "compose"}


@pytest.mark.slow
def test_seed_and_voice_decide_the_bytes(pipeline, talker, tmp_path):
    def run(name, voice, seed):
        out = tmp_path / f"{name}.mp4"
        pipeline(talker / "clip.mp4", voice, out, options=DubOptions(seed=seed))
        return hashlib.sha256(out.read_bytes()).hexdigest()

    other = tmp_path / "other.wav"
    audio.save_wav(other, audio.load_audio(talker / "voice.wav").samples[::-1].copy(), 16000)
    first = run("a", talker / "voice.wav", 1)
    assert first == run("b", talker / "voice.wav", 1)
    assert first != run("c", talker / "voice.wav", 2)
    assert first != run("d", other, 1)
    assert not list(tmp_path.glob(".keysync*"))  # nothing of the scratch space stays


def test_short_voice_leaves_the_source_mouth(pipeline, talker, tmp_path):
    short = tmp_path / "short.wav"
    audio.save_wav(short, audio.load_audio(talker / "voice.wav").samples[: 640 * 15], 16000)
    result = pipeline(talker / "clip.mp4", short, tmp_path / "out.mov", options=DubOptions(lossless=True))
    assert result.report["frames_dubbed"] == 15
    assert result.report["shots"][0]["skipped"] == [{"frames": [15, FRAMES], "reason": "the voice has ended"}]
    for i, ((_, a), (_, b)) in enumerate(zip(_frames(talker / "clip.mp4"), _frames(tmp_path / "out.mov"), strict=True)):
        assert (np.abs(a - b).max() > 0) == (i < 15)


_ONE_OR_EIGHT = """
import sys
import jax
from keysync_jax import KeySyncPipeline
from keysync_jax.inference.options import DubOptions
assert len(jax.devices()) == 8
for name, devices in (("one", jax.devices()[:1]), ("eight", jax.devices())):
    pipe = KeySyncPipeline.from_pretrained(sys.argv[1], devices=devices)
    pipe(sys.argv[2] + "/clip.mp4", sys.argv[2] + "/voice.wav", f"{sys.argv[3]}/{name}.mov", options=DubOptions(lossless=True))
assert not {"torch", "tensorflow"} & set(sys.modules)
"""


def test_frames_are_bit_equal_on_one_and_eight_devices_without_torch(talker, tmp_path):
    # The tests' smallest model: every program of both stages is compiled here twice, and eight devices share two cores. Its windows of
    # four frames fill the devices, where windows of fourteen would leave most of them without work.
    model = tiny_talker_model.make(tmp_path / "model")
    # Compiled as users have it, for which it is promised.
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
    env.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    subprocess.run([sys.executable, "-c", _ONE_OR_EIGHT, model, talker, tmp_path], env=env, check=True)
    one, eight = (_frames(tmp_path / f"{name}.mov") for name in ("one", "eight"))
    assert len(one) == FRAMES
    for (_, a), (_, b) in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_written_over_what_the_job_reads(pipeline, talker, tmp_path):
    clip, voice = talker / "clip.mp4", talker / "voice.wav"
    before = clip.read_bytes(), voice.read_bytes()
    (tmp_path / "b").mkdir()
    for output, report, words in (
        (clip, None, "the output .* would replace the video"),
        (tmp_path / "a.mp4", voice, "the report .* would replace the voice"),
        (tmp_path / "a.mp4", tmp_path / "b" / ".." / "a.mp4", "the report .* would replace the output"),
    ):
        with pytest.raises(UsageError, match=words):
            pipeline(clip, voice, output, report=report)
    assert before == (clip.read_bytes(), voice.read_bytes()) and not (tmp_path / "a.mp4").exists()


def test_a_full_disk_is_one_clear_line_and_no_latent_is_cut_short(tmp_path):
    row = np.arange(4 * 4 * 4, dtype=np.float32).reshape(4, 4, 4)
    with pytest.raises(KeySyncError, match="cannot write /dev/full: No space left on device; free space"):
        latent_store.LatentStore("/dev/full", row.shape)[0] = row

    class Nearly:  # a disk that takes a few bytes at a time, as one does that is about to be full
        def __init__(self, file):
            self.write, self.seek, self.read = (lambda data: file.write(data[:7])), file.seek, file.read

    store = latent_store.LatentStore(tmp_path / "store", row.shape)
    store._file = Nearly(store._file)
    store[1] = row
    np.testing.assert_array_equal(store[1], row)


def test_a_time_limit_leaves_no_scratch_files(tiny_model, talker, tmp_path, monkeypatch, capsys):
    """SIGTERM, as `timeout` and schedulers send it."""

    def terminated(*args):
        assert list(tmp_path.glob(".keysync-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LatentCoder, "encode", terminated)
    monkeypatch.setattr(door, "AudioFeatures", lambda *_: lambda samples: np.zeros((len(samples) // 640, 2, 1)))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the signal would have ended the process at once"))
    try:
        words = ["dub", talker / "clip.mp4", talker / "voice.wav", "-o", tmp_path / "out.mp4", "--model", tiny_model]
        assert main([str(word) for word in words]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "keysync: error: stopped" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_pretrained_round_trip(pipeline, tiny_model, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    for part in ("keyframe", "interpolation", "vae"):
        original, copy = ((d / part / "model.safetensors").read_bytes() for d in (tiny_model, tmp_path / "copy"))
        assert hashlib.sha256(original).digest() == hashlib.sha256(copy).digest()
    assert KeySyncPipeline.from_pretrained(tmp_path / "copy").stages == pipeline.stages


def test_stages_trained_with_different_masks_are_refused(pipeline, talker, tmp_path, monkeypatch):
    other = dataclasses.replace(pipeline.stages["interpolation"], mask=MaskConfig(kind="mouth"))
    monkeypatch.setattr(pipeline, "interpolation", types.SimpleNamespace(config=other))
    with pytest.raises(KeySyncError, match=r"different masks \(box and mouth\).*--mask"):
        pipeline(talker / "clip.mp4", talker / "voice.wav", tmp_path / "out.mov")
    assert not (tmp_path / "out.mov").exists()


def test_a_video_without_a_face_is_written_with_the_new_voice_when_asked(pipeline, talker, tmp_path):
    clip = tmp_path / "wall.mp4"
    clips.make_clip(clip, range(0, 12 * 512, 512), size=(128, 96))
    with pytest.raises(KeySyncError, match="--no-face pass"):
        pipeline(clip, talker / "voice.wav", tmp_path / "out.mp4")
    result = pipeline(clip, talker / "voice.wav", tmp_path / "out.mp4", options=DubOptions(lossless=True, no_face="pass"))
    assert result.report["frames_dubbed"] == 0 and any("no face in any frame" in note for note in result.report["notes"])
    assert result.report["shots"][0]["face_box"] is None and result.report["shots"][0]["crops"] == []
    for (t, before), (u, after) in zip(_frames(clip), _frames(tmp_path / "out.mp4"), strict=True):
        assert t == u and np.array_equal(before, after)
    assert audio.load_audio(tmp_path / "out.mp4").samples.any()
    with pytest.raises(UsageError, match="--no-face maybe"):
        DubOptions(no_face="maybe")
