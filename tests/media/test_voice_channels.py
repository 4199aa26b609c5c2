"""What the model hears of several channels, and of sound that changes on the way."""

from fractions import Fraction

import av
import clips
import numpy as np
import pytest
import soundfile

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.media import audio, video, writer

RATE = 16000


def speech(seconds=1.0, seed=0):
    """Bursts of noise with pauses."""
    noise = 0.2 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return noise * (np.sin(2 * np.pi * 3 * np.arange(len(noise)) / RATE) > 0)


def write(path, channels, layout=None):
    """float `[C, S]` as a WAV file, or in Matroska where the layout counts."""
    if layout is None:
        soundfile.write(str(path), np.stack(channels, 1), RATE, subtype="PCM_16")
        return path
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=RATE, layout=layout)
        packed = np.ascontiguousarray(np.int16(np.round(32767 * np.stack(channels, 1))).reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(stream.encode(frame))
    return path


def heard(path, **options):
    clip = audio.load_audio(path, **options)
    return clip.samples, clip.heard


def near(a, b):
    return np.abs(a[: len(b)] - b).max() < 2e-4


def test_a_stereo_pair_is_averaged_as_ever(tmp_path):
    left, right = speech(seed=1), speech(seed=2)
    for pair in ((left, right), (left, left), (left, 0 * left), (left, 0.3 * left), (left, -0.2 * left)):
        samples, words = heard(write(tmp_path / "a.wav", pair))
        assert near(samples, (pair[0] + pair[1]) / 2) and words == "the mean of 2 channels"


@pytest.mark.parametrize("gain", [1.0, 0.9, 0.6])
def test_of_channels_out_of_phase_the_louder_one_is_heard(tmp_path, gain):
    x = speech()
    samples, words = heard(write(tmp_path / "a.wav", (gain * x, -x)))
    assert near(samples, -x if gain < 1 else x) and "out of phase" in words
    music = 0.02 * np.random.default_rng(5).standard_normal(len(x))
    samples, words = heard(write(tmp_path / "a.wav", (gain * x + music, -x + music)))
    assert (near(samples, -x + music) or gain == 1 and near(samples, x + music)) and "out of phase" in words


def test_of_surround_sound_the_centre_is_heard(tmp_path):
    x, music = speech(seed=1), 0.5 * speech(seed=3)
    nothing = 0 * x
    for layout, names in (("5.1", 6), ("7.1", 8)):
        channels = [music, music, x, *[music] * (names - 3)]
        samples, words = heard(write(tmp_path / "a.mkv", channels, layout))
        assert near(samples, x) and words == f"the centre of {names} channels"
    samples, words = heard(write(tmp_path / "a.mkv", [x, x, 0.05 * music, nothing, nothing, nothing], "5.1"))
    assert near(samples, x) and words == "the mean of the front pair"
    samples, words = heard(write(tmp_path / "a.mkv", [x, -x, nothing, nothing, nothing, nothing], "5.1"))
    assert near(samples, x) and "out of phase" in words
    samples, words = heard(write(tmp_path / "a.mkv", [nothing, nothing, nothing, nothing, x, nothing], "5.1"))
    assert near(samples, x) and "the only one with sound" in words


def test_the_channel_can_be_chosen(tmp_path):
    left, right = speech(seed=1), speech(seed=2)
    path = write(tmp_path / "a.wav", (left, right))
    for channel, expected in (("left", left), ("right", right), ("0", left), ("1", right), ("mix", (left + right) / 2)):
        assert near(heard(path, channel=channel)[0], expected)
    for channel, words in (("2", "2 channel"), ("center", "FL, FR"), ("middle", "choose auto, mix, left, right, center")):
        with pytest.raises(UsageError, match=words):
            audio.load_audio(path, channel=channel)


def test_silence_heard_of_a_file_that_is_not_silent_is_refused(tmp_path):
    x = speech()
    inverted = write(tmp_path / "a.wav", (x, -x))
    with pytest.raises(KeySyncError, match="the mean of all 2 channels, as asked is silent"):
        audio.load_audio(inverted, channel="mix")
    with pytest.raises(KeySyncError, match="the right channel, as asked is silent"):
        audio.load_audio(write(tmp_path / "b.wav", (x, 0 * x)), channel="right")
    assert not audio.load_audio(write(tmp_path / "c.wav", (0 * x, 0 * x))).samples.any()  # a silent file is one


def aac(path, samples, rate, layout, scale=1.0):
    """Stereo or mono AAC in a transport stream, from mono samples at `rate`."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=rate, layout=layout)
        count = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
        frame = av.AudioFrame.from_ndarray(np.repeat(scale * samples[None], count, 0).astype(np.float32), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("extension", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("second", [(48000, "stereo"), (44100, "mono"), (44100, "5.1")], ids=str)
def test_channels_and_rate_may_change_on_the_way(tmp_path, extension, second):
    """Joined AAC, as in a recorded broadcast: one layout and one rate all through, and every click in its place."""
    joined = tmp_path / "joined.ts"
    parts = [aac(tmp_path / "a.ts", clips.click_track(48000, 1, 1.0)[:, 0], 48000, "mono")]
    parts.append(aac(tmp_path / "b.ts", clips.click_track(second[0], 1, 1.0)[:, 0], *second))
    joined.write_bytes(b"".join(parts))
    clip = audio.load_audio(joined)
    clips.make_clip(tmp_path / "film.mp4", [512 * i for i in range(60)])
    info = video.probe(tmp_path / "film.mp4")
    with writer.VideoWriter(tmp_path / f"out{extension}", info, audio=joined) as out:
        for frame in video.read(info.path, info):
            out.write(frame)
    assert "from aac" in out.audio_note
    written = audio.load_audio(tmp_path / f"out{extension}").samples
    assert len(clip.samples) == pytest.approx(2 * RATE, abs=0.1 * RATE) and abs(len(written) - len(clip.samples)) < 0.05 * RATE
    for samples in (clip.samples, written):
        peaks = [np.abs(samples[int(a * RATE) : int((a + 0.4) * RATE)]).argmax() / RATE + a for a in (0.1, 0.6, 1.1, 1.6)]
        gaps = np.diff(peaks)
        assert gaps[0] == pytest.approx(0.55, abs=0.005) and gaps[2] == pytest.approx(0.55, abs=0.005)


def test_short_parts_that_were_joined_are_heard_whole(tmp_path):
    """The second part's clock begins where the first one's did, less than a second back."""
    parts = [aac(tmp_path / f"{n}.ts", 0.5 * np.sin(np.arange(int(0.8 * 48000)) * 0.05), 48000, "mono") for n in range(2)]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    clip = audio.load_audio(tmp_path / "joined.ts")
    assert len(clip.samples) == pytest.approx(1.6 * RATE, abs=0.1 * RATE) and any("clock restarts" in note for note in clip.notes)


def test_of_several_audio_streams_one_can_be_chosen(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        tracks = [out.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        for number, track in enumerate(tracks):
            frame = av.AudioFrame.from_ndarray(np.full((1, RATE), 1000 * (number + 1), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            out.mux(track.encode(frame))
    assert audio.load_audio(tmp_path / "a.mkv", number=1).samples[0] == pytest.approx(2000 / 32768)
    default = audio.load_audio(tmp_path / "a.mkv")
    assert default.samples[0] == pytest.approx(1000 / 32768) and "--audio-stream" in default.notes[0]
    with pytest.raises(UsageError, match="--audio-stream 2: the file has 2"):
        audio.load_audio(tmp_path / "a.mkv", number=2)
