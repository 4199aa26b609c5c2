"""A voice longer or shorter than its video: pictures, times and what is refused, at the source and through a whole dub."""

from fractions import Fraction

import av
import clips
import numpy as np
import pytest
import tiny_talker_model

from keysync_jax import KeySyncPipeline
from keysync_jax.core.errors import UsageError
from keysync_jax.data_pipeline.synthetic import make_clip, write_clip
from keysync_jax.inference.clip_io import FrameArray, open_video
from keysync_jax.inference.lengths import fitted
from keysync_jax.inference.options import DubOptions
from keysync_jax.media import audio, video

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


def test_a_dub_is_as_long_as_the_mismatch_says(tmp_path):
    pipe = KeySyncPipeline.from_pretrained(tiny_talker_model.make(tmp_path / "model"))
    write_clip(make_clip(3, frames=8, size=128), tmp_path / "clip.mp4")
    for name, frames in (("long", 13), ("short", 5)):
        audio.save_wav(tmp_path / f"{name}.wav", make_clip(10, frames=frames, size=48).samples, 16000)
    wanted = {("long", "bounce"): (13, 13), ("short", "cut_off"): (5, 5), ("short", "silence"): (8, 8), ("long", "remap"): (8, 8)}
    for (name, how), (pictures, painted) in wanted.items():
        result = pipe(tmp_path / "clip.mp4", tmp_path / f"{name}.wav", tmp_path / f"{how}.mp4", options=DubOptions(mismatch=how))
        assert (result.report["source"]["frames"], result.report["frames_dubbed"]) == (pictures, painted), how
        found = list(video.read(tmp_path / f"{how}.mp4"))
        end = found[-1].time + found[-1].av_frame.duration * found[-1].info.time_base
        assert len(found) == pictures and float(end) == pytest.approx((13 if how == "remap" else pictures) / 25, abs=2e-3)
        assert any("--mismatch" in note for note in result.report["notes"]) == (how != "silence")
