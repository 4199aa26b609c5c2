"""The pipeline as an object: parts to replace, arrays in and out, progress, stopping, and the picture of what would be dubbed."""

import threading
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import tiny_talker_model
from PIL import Image, ImageDraw, ImageFont

from keysync_jax import KeySyncPipeline
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.inference import two_stage
from keysync_jax.inference.clip_io import open_video, open_voice
from keysync_jax.inference.dub import DubJob
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.phases import CancelledError, PhaseProgress
from keysync_jax.media import audio, faces, video
from keysync_jax.media.faces import Face, FaceBackend

FRAMES, SIZE = 9, 96
PHASES = ["look", "listen", "encode", "keyframes", "interpolate", "compose"]
LOSSLESS = DubOptions(lossless=True)


@pytest.fixture(scope="module")
def clip():
    return make_clip(3, frames=FRAMES, size=SIZE)


@pytest.fixture(scope="module")
def voice():
    return make_clip(4, frames=12, size=64).samples


@pytest.fixture(autouse=True)
def drawn_faces(clip, monkeypatch):
    """The drawing's own landmarks, frame after frame, in place of a detector."""

    class Drawn(FaceBackend):
        def __init__(self):
            self._landmarks = iter(clip.landmarks)

        def detect(self, rgb):
            return [Face.from_landmarks(next(self._landmarks).astype(np.float32), 1.0)]

        def close(self):
            pass

    monkeypatch.setattr(faces, "open_backend", lambda *_, **__: Drawn())


class Blocks:
    """An autoencoder without weights: the mean colour of each cell is its latent."""

    def encode(self, frames, seed):
        for _, image in frames:
            means = image.reshape(8, 8, 8, 8, 3).mean((1, 3))
            yield np.concatenate([means, np.zeros((8, 8, 1))], -1).astype(np.float32)

    def decode(self, latents):
        for latent in latents:
            yield np.clip((latent[..., :3].repeat(8, 0).repeat(8, 1) + 1) / 2, 0, 1)


class Redder:
    """A stage without a network: what is regenerated is the known colour with more red."""

    def __init__(self, config):
        self.config = config

    def __call__(self, windows):
        for window in windows:
            yield window.known + window.mask * np.array([0.5, 0, 0, 0], np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_talker_model.make(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def pipe(model):
    """A pipeline whose networks are replaced."""
    pipe = KeySyncPipeline.from_pretrained(model)
    pipe.vae, pipe.keyframe, pipe.interpolation = Blocks(), Redder(pipe.keyframe.config), Redder(pipe.interpolation.config)
    return pipe


def write_rgb(path, frames):
    """A file that holds RGB frames without loss."""
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for frame in frames:
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        writer.mux(stream.encode())
    return path


def test_arrays_in_and_out(pipe, clip, voice):
    result = pipe(clip.frames, voice, fps=25, rate=16000)
    assert result.output is None and result.frames.shape == clip.frames.shape and result.frames.dtype == np.uint8
    assert result.report["frames_dubbed"] == FRAMES and result.summary.startswith(f"frames: {FRAMES} of {FRAMES} frames dubbed")
    x0, y0, x1, y1 = (max(0, v) for v in result.report["shots"][0]["face_box"])
    change = result.frames.astype(int) - clip.frames
    assert change[:, y0 + (y1 - y0) // 2 : y1 - 8, x0 + 12 : x1 - 12, 0].mean() > 10 and np.abs(change[:, : y0 + (y1 - y0) // 4]).max() == 0
    change[:, y0:y1, x0:x1] = 0
    assert np.abs(change).max() == 0  # what is not blended is what was given


def test_arrays_and_files_are_the_same_job(pipe, clip, voice, tmp_path):
    source = write_rgb(tmp_path / "clip.mov", clip.frames)
    audio.save_wav(tmp_path / "voice.wav", voice, 16000, "FLOAT")
    from_file = pipe(source, tmp_path / "voice.wav", tmp_path / "out.mkv", options=LOSSLESS)
    from_arrays = pipe(clip.frames, voice, fps=25, rate=16000)
    written = np.stack([frame.rgb() for frame in video.read(tmp_path / "out.mkv")])
    np.testing.assert_array_equal(written, from_arrays.frames)
    assert from_file.frames is None and from_file.report["shots"] == from_arrays.report["shots"]
    # Frames to a file, whose sound is the samples.
    mixed = pipe(clip.frames, voice, tmp_path / "mixed.mkv", fps=25, rate=16000, options=LOSSLESS)
    np.testing.assert_array_equal(np.stack([frame.rgb() for frame in video.read(mixed.output)]), written)
    heard = audio.load_audio(mixed.output).samples
    np.testing.assert_allclose(heard[:5000], voice[:5000], atol=2**-15)  # half a step of 16 bits, and soxr has nothing to do
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mov", "mixed.mkv", "out.mkv", "voice.wav"]


def test_subtitles_over_the_mouth_are_said(pipe, clip, voice):
    plain = pipe(clip.frames, voice, fps=25, rate=16000).report
    x0, y0, x1, y1 = plain["shots"][0]["face_box"]
    frames = []
    for frame in clip.frames:
        image = Image.fromarray(frame)
        font = ImageFont.load_default(0.1 * (y1 - y0))
        ImageDraw.Draw(image).text(((x0 + x1) / 2, y0 + 0.75 * (y1 - y0)), "and so it was", "white", font, anchor="mm")
        frames.append(np.asarray(image))
    said = pipe(np.stack(frames), voice, fps=25, rate=16000).report["notes"]
    assert any("text in the picture" in note for note in said) and not any("text" in note for note in plain["notes"])


def test_other_rates_of_frames_and_samples(pipe, clip, voice):
    result = pipe(clip.frames, voice.repeat(3), fps=30000 / 1001, rate=48000)
    assert result.report["source"]["rate"] == "30000/1001" and result.report["frames_dubbed"] == FRAMES
    assert result.report["audio"]["rate"] == 48000 and result.report["audio"]["seconds"] == pytest.approx(len(voice) / 16000, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fps": None}, "frames need fps"),
        ({"rate": None}, "samples need rate"),
        ({"fps": 0}, "fps is 0"),
        ({"rate": 0}, "rate is 0"),
        ({"video": np.zeros((3, 8, 8, 3), np.float32)}, r"frames are float32 \[3, 8, 8, 3\]; give RGB as uint8 \[N, H, W, 3\]"),
        ({"video": np.zeros((0, 8, 8, 3), np.uint8)}, r"frames are uint8 \[0, 8, 8, 3\]"),
        ({"audio": np.zeros((9, 2))}, r"samples are float64 \[9, 2\]; give mono floats \[S\]"),
        ({"audio": np.zeros(9, np.int16)}, r"samples are int16 \[9\]"),
        ({"video": "a.mp4"}, "a.mp4 has its own timestamps"),
        ({"audio": "a.wav"}, "a.wav has its own"),
    ],
)
def test_other_arrays_are_refused_in_words(pipe, clip, voice, change, words):
    given = {"video": clip.frames, "audio": voice, "fps": 25, "rate": 16000} | change
    with pytest.raises(UsageError, match=words):
        pipe(given.pop("video"), given.pop("audio"), **given)


def test_samples_that_are_not_finite_are_refused(pipe, clip, voice):
    with pytest.raises(KeySyncError, match="the samples: non-finite samples"):
        pipe(clip.frames, np.where(np.arange(len(voice)) == 7, np.nan, voice), fps=25, rate=16000)


def test_progress_counts_every_phase(pipe, clip, voice):
    seen = []
    pipe(clip.frames, voice, fps=25, rate=16000, on_progress=lambda *report: seen.append(report))
    assert list(dict.fromkeys(phase for phase, _, _ in seen)) == PHASES
    for phase in PHASES:
        reports = [(done, total) for name, done, total in seen if name == phase]
        assert reports == [(done, reports[0][1]) for done in range(reports[0][1] + 1)]
    assert {phase: total for phase, _, total in seen} == {
        "look": FRAMES, "listen": 1, "encode": FRAMES, "keyframes": 2, "interpolate": 3, "compose": FRAMES
    }  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_a_cancelled_job_leaves_nothing(pipe, clip, voice, tmp_path, phase):
    source = write_rgb(tmp_path / "clip.mov", clip.frames)
    audio.save_wav(tmp_path / "voice.wav", voice, 16000)
    before = sorted(path.name for path in tmp_path.iterdir())
    cancel = threading.Event()
    with pytest.raises(CancelledError, match=f"cancelled in phase {phase}, after 1 of"):
        pipe(
            source, tmp_path / "voice.wav", tmp_path / "out.mkv", report=tmp_path / "r.json", cancel=cancel,
            on_progress=lambda name, done, total: cancel.set() if name == phase and done == 0 else None,
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_a_callback_raises_ends_the_job(pipe, clip, voice, tmp_path):
    class Enough(Exception):
        pass

    def stop(phase, done, total):
        if (phase, done) == ("compose", FRAMES):  # every frame is written, the file is not yet in its place
            raise Enough

    with pytest.raises(Enough):
        pipe(clip.frames, voice, tmp_path / "out.mkv", fps=25, rate=16000, on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_window_that_is_not_finite_is_an_error_and_no_file(pipe, clip, voice, tmp_path):
    class Broken(Redder):
        def __call__(self, windows):
            for window in windows:
                yield window.known * np.float32("nan")

    pipe.interpolation = Broken(pipe.interpolation.config)
    with pytest.raises(KeySyncError, match="interpolation window 0: .* values are not finite"):
        pipe(clip.frames, voice, tmp_path / "out.mkv", fps=25, rate=16000)
    assert not list(tmp_path.iterdir())


def test_parts_read_their_weights_when_they_are_used(model, monkeypatch):
    pipe = KeySyncPipeline.from_pretrained(model)
    monkeypatch.setattr(type(pipe._directory), "params", lambda *_: pytest.fail("weights are read"))
    assert pipe.keyframe.config.stage == "keyframe" and pipe.interpolation.config.stage == "interpolation"
    assert pipe.vae.config.decoder == "image" and pipe.stages == {
        "keyframe": pipe.keyframe.config,
        "interpolation": pipe.interpolation.config,
    }
    assert pipe.keyframe is pipe.keyframe and not pipe.encoders


def test_an_encoder_can_be_replaced(pipe, clip, voice):
    heard = []

    def encoder(samples):
        heard.append(samples)
        return np.zeros((len(samples) // 640, 2, tiny_talker_model.BANDS), np.float32)

    pipe.encoders["log_mel"] = encoder
    pipe(clip.frames, voice, fps=25, rate=16000)
    assert len(heard) == 1 and heard[0].dtype == np.float32
    np.testing.assert_array_equal(heard[0], voice)


def test_a_preview_shows_the_crop_and_the_mask_and_runs_nothing(pipe, clip):
    pipe.vae = pipe.encoders = None
    pipe.keyframe, pipe.interpolation = (SimpleNamespace(config=config) for config in pipe.stages.values())
    seen = []
    picture = pipe.preview(clip.frames, fps=25, on_progress=lambda *report: seen.append(report))
    assert picture.shape == (20 + 480, 480, 3) and picture.dtype == np.uint8
    assert {phase for phase, _, _ in seen} == {"look"} and seen[-1][1:] == (FRAMES, FRAMES)
    mouth = clip.landmarks[FRAMES // 2, 48:68].mean(0) * 5
    eyes = clip.landmarks[FRAMES // 2, 36:48].mean(0) * 5
    shown = picture[20:].astype(int)
    original = clip.frames[FRAMES // 2].repeat(5, 0).repeat(5, 1).astype(int)
    redder = (shown - original)[..., 0] - (shown - original)[..., 1]
    assert redder[int(mouth[1]), int(mouth[0])] > 30 > 10 > abs(redder[int(eyes[1]), int(eyes[0])])
    assert (picture == (60, 200, 90)).all(-1).sum() > 400  # the crop's outline
    with pytest.raises(CancelledError):
        pipe.preview(clip.frames, fps=25, cancel=SimpleNamespace(is_set=lambda: True))


# A job, phase by phase. ---------------------------------------------------------------------------------------------------------


def job(pipe, clip, voice, output=None, **options):
    return DubJob(pipe, open_video(clip.frames, 25), open_voice(voice, 16000), output, DubOptions(**options), PhaseProgress())


def test_phases_in_any_order_that_makes_sense(pipe, clip, voice):
    expected = pipe(clip.frames, voice, fps=25, rate=16000).frames
    with job(pipe, clip, voice) as made:
        made.listen()
        for phase in (made.encode, made.compose):
            with pytest.raises(RuntimeError, match="has not been through look"):
                phase()
        made.look()
        with pytest.raises(RuntimeError, match="has not been through encode"):
            two_stage.generate(pipe.samplers, [made.clip], PhaseProgress())
        made.encode()
        with pytest.raises(RuntimeError, match="has not been through generate"):
            made.compose()
        two_stage.generate(pipe.samplers, [made.clip], PhaseProgress())
        np.testing.assert_array_equal(made.compose().frames, expected)


def test_scratch_files_are_the_job_s_own(pipe, clip, voice, tmp_path):
    made = job(pipe, clip, voice, str(tmp_path / "out.mkv"))
    made.look()
    made.listen()
    assert not list(tmp_path.iterdir())
    made.encode()
    assert [path.name[:9] for path in tmp_path.iterdir()] == [".keysync-"]
    made.close()
    assert not list(tmp_path.iterdir())


def test_jobs_share_the_rounds(pipe, clip, voice):
    alone = [pipe(clip.frames, own, fps=25, rate=16000, options=DubOptions(seed=seed)) for seed, own in ((1, voice), (2, voice[:3200]))]
    seen = []
    first, second = job(pipe, clip, voice, seed=1), job(pipe, clip, voice[:3200], seed=2)
    with first, second:
        for each in (first, second):
            each.look()
            each.listen()
            each.encode()
        two_stage.generate(pipe.samplers, [first.clip, second.clip], PhaseProgress(on_progress=lambda *report: seen.append(report)))
        for each, expected in zip((first, second), alone, strict=True):
            result = each.compose()
            np.testing.assert_array_equal(result.frames, expected.frames)
            assert result.report["frames_dubbed"] == expected.report["frames_dubbed"]
    assert {phase: total for phase, _, total in seen} == {"keyframes": 2 + 1, "interpolate": 3 + 2}


def test_the_clock_of_frames_is_exact():
    source = open_video(np.zeros((3, 8, 8, 3), np.uint8), Fraction(24000, 1001))
    assert [frame.time for frame in source.read()] == [Fraction(1001 * n, 24000) for n in range(3)]
    assert source.info.frames == 3 and source.info.average_rate == Fraction(24000, 1001)
