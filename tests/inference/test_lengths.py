"""A voice longer or shorter than its video, and a part of a video: pictures, times, sound and what is refused."""

from fractions import Fraction

import av
import certificates
import clips
import numpy as np
import pytest
import soundfile
import tiny_talker_model

from keysync_jax import KeySyncPipeline
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic import make_clip, write_clip
from keysync_jax.inference.clip_io import FrameArray, open_video
from keysync_jax.inference.lengths import fitted
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.timeline import Part
from keysync_jax.media import audio, provenance, video
from keysync_jax.media.inserted_sound import insert

FRAMES = 40  # more than are held at once where they run backwards


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """40 gray pictures at 25 a second whose shade says their number, with B pictures and a keyframe every 12."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=25, options={"g": "12", "bf": "2", "qp": "0"})
        stream.width, stream.height = 96, 64
        for number in range(FRAMES):
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 96, 3), 5 * number + 20, np.uint8), format="rgb24")))
        writer.mux(stream.encode())
    return path


def voice(seconds):
    return audio.from_samples(np.full(round(16000 * seconds), 0.1, np.float32), 16000)


def numbers(source):
    """Which picture is shown at which frame, and when (seconds on the programme's clock), and when the last one ends."""
    frames = list(source.read())
    shades = [round((float(frame.rgb().mean()) - 20) / 5) for frame in frames]
    info = source.info
    times = [frame.time - info.start_time for frame in frames]
    assert [frame.index for frame in frames] == list(range(len(frames)))
    assert all(frame.av_frame.pts * frame.av_frame.time_base == frame.time for frame in frames)
    return shades, times, times[-1] + frames[-1].av_frame.duration * info.time_base


def arrays():
    return FrameArray(np.stack([np.full((64, 96, 3), 5 * number + 20, np.uint8) for number in range(FRAMES)]), 25)


@pytest.mark.parametrize("form", ["file", "array"])
def test_pictures_run_as_the_mismatch_says(film, form):
    source = open_video(film) if form == "file" else arrays()
    forth = list(range(FRAMES))

    def made(seconds, how):
        return numbers(fitted(source, voice(seconds), how))

    shades, times, end = made(4.0, "loop")
    assert shades == (forth * 3)[:100] and times == [Fraction(k, 25) for k in range(100)] and end == 4
    shades, times, end = made(4.01, "bounce")
    assert shades == (forth + forth[-2:0:-1] + forth)[:101] and times == [Fraction(k, 25) for k in range(101)]
    assert float(end) == pytest.approx(4.01, abs=float(source.info.time_base))
    for seconds in (4.0, 0.8):
        shades, times, end = made(seconds, "remap")
        assert shades == forth and float(end) == pytest.approx(seconds, abs=1e-4)
        assert np.allclose([float(time) for time in times], np.arange(FRAMES) * seconds / FRAMES, atol=1e-4)
    for how in ("loop", "bounce", "cut_off"):
        shades, _, end = made(0.7, how)
        assert shades == forth[:18] and float(end) == pytest.approx(0.7, abs=0.04 if form == "array" else 1e-3)
    for how in ("source", "silence"):
        assert fitted(source, voice(4.0), how) is source
    assert made(4.0, "cut_off")[0] == forth


def test_a_variable_rate_keeps_its_pace_in_every_round(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [0, 512, 1536, 2048, 4096])  # 1/12800 s
    source = open_video(tmp_path / "a.mp4")
    once = [Fraction(ticks, 12800) for ticks in (0, 512, 1536, 2048, 4096)]
    length = once[-1] + next(frame.av_frame.duration for frame in source.read() if frame.index == 4) * Fraction(1, 12800)
    times = numbers(fitted(source, voice(0.9), "loop"))[1]
    assert times == [at for at in [*once, *(length + at for at in once), *(2 * length + at for at in once)] if at < Fraction(9, 10)]


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(UsageError, match="--mismatch twice is unknown; choose source, cut_off, loop"):
        DubOptions(mismatch="twice")
    with pytest.raises(UsageError, match="--keep-audio and --mismatch loop contradict"):
        DubOptions(mismatch="loop", keep_audio=True)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return KeySyncPipeline.from_pretrained(tiny_talker_model.make(tmp_path_factory.mktemp("model") / "model"))


def test_a_dub_is_as_long_as_the_mismatch_says(pipe, tmp_path):
    write_clip(make_clip(3, frames=8, size=128), tmp_path / "clip.mp4")
    for name, frames in (("long", 13), ("short", 5)):
        audio.save_wav(tmp_path / f"{name}.wav", make_clip(10, frames=frames, size=48).samples, 16000)
    certificate, key = map(str, certificates.make(tmp_path))
    wanted = {("long", "bounce"): (13, 13), ("short", "cut_off"): (5, 5), ("short", "silence"): (8, 8), ("long", "remap"): (8, 8)}
    for (name, how), (pictures, painted) in wanted.items():
        result = pipe(
            tmp_path / "clip.mp4",
            tmp_path / f"{name}.wav",
            tmp_path / f"{how}.mp4",
            options=DubOptions(mismatch=how, c2pa=certificate, key=key, consent="all agreed"),
        )
        found = provenance.find(tmp_path / f"{how}.mp4")
        assert (found.manifest, found.consent, found.line) == ("Valid", "all agreed", result.report["marks"]["line"])
        assert result.report["marks"]["c2pa"] == "signed C2PA manifest inside" and result.report["marks"]["consent"] == "all agreed"
        assert (result.report["source"]["frames"], result.report["frames_dubbed"]) == (pictures, painted), how
        found = list(video.read(tmp_path / f"{how}.mp4"))
        end = found[-1].time + found[-1].av_frame.duration * found[-1].info.time_base
        assert len(found) == pictures and float(end) == pytest.approx((13 if how == "remap" else pictures) / 25, abs=2e-3)
        assert any("--mismatch" in note for note in result.report["notes"]) == (how != "silence")


def test_parts_are_read_and_nonsense_is_refused():
    assert (
        DubOptions(range="0.2:0.52").part == Part(5, 13) and DubOptions(range=":1").part == Part(0, 25) == DubOptions(range="0:1.01").part
    )
    assert DubOptions(range="3.39:").part == Part(85, None) and DubOptions().part == Part() and Part(5, 13).covered(20) == range(5, 13)
    for text in ("5", "a:b", "1:2:3", "nan:3", "-1:3"):
        with pytest.raises(UsageError, match=f"--range {text}: "):
            DubOptions(range=text)
    for text in ("2:2", "3:2", "1:1.01"):
        with pytest.raises(UsageError, match="the part is empty"):
            DubOptions(range=text)
    with pytest.raises(UsageError, match="--range and --mismatch loop contradict"):
        DubOptions(range="1:2", mismatch="loop")


def planes(path):
    """The samples of each frame."""
    return [b"".join(plane.tobytes() for plane in frame.planes()) for frame in video.read(path)]


def test_a_part_is_dubbed_and_the_rest_stays_in_picture_and_sound(pipe, tmp_path):
    clip = make_clip(3, frames=20, size=128)
    write_clip(clip, tmp_path / "clip.mp4")
    spoken = make_clip(10, frames=6, size=48).samples
    audio.save_wav(tmp_path / "voice.wav", spoken, 16000)
    source = planes(tmp_path / "clip.mp4")
    own = audio.load_audio(tmp_path / "clip.mp4").samples
    for how, painted in (("source", range(7, 13)), ("silence", range(7, 16))):
        options = DubOptions(range="0.28:0.64", mismatch=how, lossless=True)
        result = pipe(tmp_path / "clip.mp4", tmp_path / "voice.wav", tmp_path / "out.mkv", options=options)
        assert [number for number, data in enumerate(planes(tmp_path / "out.mkv")) if data != source[number]] == list(painted)
        heard = audio.load_audio(tmp_path / "out.mkv").samples
        at, end, stop = 7 * 640, 13 * 640, painted.stop * 640
        fade = 200
        for part in (slice(0, at), slice(stop, None)):
            np.testing.assert_allclose(heard[part], own[: len(heard)][part], atol=2e-3)  # resampled to 16 kHz, where it borders on another
        inside = slice(at + fade, end - fade)
        assert np.corrcoef(heard[inside], spoken[fade : 6 * 640 - fade])[0, 1] > 0.999
        assert np.abs(heard[end + fade : stop - fade]).max(initial=0) < 1e-3
        reasons = {part["reason"] for shot in result.report["shots"] for part in shot["skipped"]}
        assert reasons == {"outside the part that is dubbed"} | ({"the voice has ended"} if how == "source" else set())
        assert "the video's own sound with the voice from 0.28 to" in result.report["audio"]["output"]
    with pytest.raises(KeySyncError, match="--range 5:: the part begins at 5.00 s, after the last picture of .*clip.mp4 at 0.76 s"):
        pipe(tmp_path / "clip.mp4", tmp_path / "voice.wav", tmp_path / "late.mp4", options=DubOptions(range="5:"))
    assert not (tmp_path / "late.mp4").exists()


def test_a_voice_is_set_into_stereo_and_into_nothing(tmp_path):
    t = np.arange(3 * 48000) / 48000
    own = np.stack([0.3 * np.sin(2 * np.pi * 440 * t), 0.2 * np.sin(2 * np.pi * 550 * t)], 1)
    audio.save_wav(tmp_path / "own.wav", own, 48000)
    audio.save_wav(tmp_path / "voice.wav", 0.5 * np.sin(2 * np.pi * 200 * np.arange(16000) / 16000), 16000)
    at = {"start": Fraction(1), "seconds": Fraction(3, 2)}
    words = insert(tmp_path / "own.wav", tmp_path / "voice.wav", tmp_path / "a.wav", **at)
    made, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 48000 and made.shape == own.shape and "1.00 to 2.50 s" in words
    for part in (slice(0, 48000), slice(120000, None)):
        np.testing.assert_allclose(made[part], own[part], atol=1e-4)
    said = 0.5 * np.sin(2 * np.pi * 200 * t[:48000])
    assert all(np.corrcoef(made[48500:95000, channel], said[500:47000])[0, 1] > 0.999 for channel in (0, 1))
    assert np.abs(made[97000:119000]).max() < 1e-3
    insert(None, tmp_path / "voice.wav", tmp_path / "b.wav", **at)
    made, rate = soundfile.read(tmp_path / "b.wav")
    assert rate == 16000 and len(made) == 40000 and not made[:16000].any() and made[16500:31500].std() > 0.3
