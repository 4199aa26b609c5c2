"""Decoding of audio: alignment, rates and channels, damage, and errors. All files are made here."""

import subprocess
import sys
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import audio

CLICK_S = 1.0
MS = 16  # samples of the result


def tone(rate: int, channels: int = 2, seconds: float = 2.0) -> np.ndarray:
    """A quiet tone with a click at 1 s, `[channels, samples]`; the channels differ in level."""
    t = np.arange(round(rate * seconds)) / rate
    x = 0.05 * np.sin(2 * np.pi * 440 * t)
    x[round(CLICK_S * rate)] = 0.9
    return np.stack([x * (1 - 0.1 * c) for c in range(channels)]).astype(np.float32)


def encode(path, codec="aac", rate=44100, channels=2, video=False, audio_delay=0.0, video_delay=0.0, samples=None, gap=None):
    """Writes a media file; `gap` = (from, length) in seconds leaves that stretch's packets' samples out of the stream."""
    x = tone(rate, channels) if samples is None else samples
    integer = codec.startswith("pcm_s16") or codec == "flac"
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(x)]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        pictures = None
        if video:
            pictures = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
            pictures.width = pictures.height = 64
            pictures.pix_fmt = "yuv420p"
        for i in range(0, x.shape[1], 1024):
            if gap and gap[0] <= i / rate < gap[0] + gap[1]:
                continue
            block = x[:, i : i + 1024]
            if integer:
                packed = np.ascontiguousarray(np.round(block * 32767).astype(np.int16).T.reshape(1, -1))
                frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
            else:
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, i + round(audio_delay * rate), Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if pictures:
            for i in range(round(25 * x.shape[1] / rate)):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i, np.uint8), format="rgb24")
                frame.pts, frame.time_base = i + round(25 * video_delay), Fraction(1, 25)
                out.mux(pictures.encode(frame))
            out.mux(pictures.encode(None))
    return path


def click_at(clip: audio.AudioClip) -> int:
    return int(np.abs(clip.samples).argmax())


@pytest.mark.parametrize(
    ("name", "codec", "rate", "channels", "video"),
    [
        ("a.wav", "pcm_s16le", 44100, 2, False),
        ("a.wav", "pcm_s16le", 16000, 1, False),
        ("a.m4a", "aac", 44100, 2, False),
        ("a.mp3", "libmp3lame", 44100, 2, False),
        ("a.ogg", "libopus", 48000, 2, False),
        ("a.flac", "flac", 22050, 1, False),
        ("a.mkv", "aac", 48000, 6, False),
        ("a.mp4", "aac", 48000, 2, True),
        ("a.mov", "pcm_s16le", 8000, 1, True),
        ("a.webm", "libopus", 48000, 1, False),
    ],
)
def test_any_container_rate_and_channel_count(tmp_path, name, codec, rate, channels, video):
    path = encode(tmp_path / name, codec, rate, channels, video)
    clip = audio.load_audio(path)
    assert clip.samples.dtype == np.float32 and clip.samples.ndim == 1
    assert (clip.source_rate, clip.source_channels) == (rate, channels)
    assert abs(click_at(clip) - CLICK_S * 16000) <= 1  # encoder delay is gone to the sample
    assert abs(len(clip.samples) - 32000) <= (1024 * 16000 / rate if name.endswith(("mkv", "webm")) else 1)
    assert clip.duration_s == len(clip.samples) / 16000
    assert clip.notes == ()
    info = audio.probe_audio(path)
    assert (info.sample_rate, info.channels) == (rate, channels)
    assert info.duration_s == pytest.approx(2.0, abs=0.05)
    assert codec.removeprefix("lib").removesuffix("lame") in info.codec


@pytest.mark.parametrize(
    ("subtype", "tolerance"), [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-22), ("DOUBLE", 2**-23)]
)  # a step of the file's scale, or of float32
def test_sample_formats_and_channel_mean(tmp_path, subtype, tolerance):
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.9, 0.9, (4000, 3))
    soundfile.write(tmp_path / "a.wav", x, 16000, subtype=subtype)
    np.testing.assert_allclose(audio.load_audio(tmp_path / "a.wav").samples, x.mean(axis=1), rtol=0, atol=tolerance)


def test_resampling_is_band_limited(tmp_path):
    t = np.arange(48000 * 2) / 48000
    low, high = np.sin(2 * np.pi * 3000 * t), np.sin(2 * np.pi * 11000 * t)
    soundfile.write(tmp_path / "low.wav", 0.5 * low, 48000, subtype="FLOAT")
    soundfile.write(tmp_path / "high.wav", 0.5 * high, 48000, subtype="FLOAT")
    inner = slice(1600, 30400)
    expected = 0.5 * np.sin(2 * np.pi * 3000 * np.arange(32000) / 16000)
    # soxr's high quality lets through, and in, a hundred-thousandth; without a filter the next line's tone would come at half volume.
    np.testing.assert_allclose(audio.load_audio(tmp_path / "low.wav").samples[inner], expected[inner], rtol=0, atol=1e-4)
    assert np.abs(audio.load_audio(tmp_path / "high.wav").samples[inner]).max() < 1e-4  # would alias to 5 kHz
    assert len(audio.load_audio(tmp_path / "low.wav", sample_rate=24000).samples) == 48000


def test_sound_that_starts_late_keeps_its_place(tmp_path):
    clip = audio.load_audio(encode(tmp_path / "a.mp4", video=True, audio_delay=0.5))
    assert abs(click_at(clip) - 1.5 * 16000) <= MS  # MP4 rounds the delay to a millisecond
    assert np.abs(clip.samples[:7000]).max() < 1e-3


def test_a_late_start_is_not_taken_for_missing_sound(tmp_path):
    clip = audio.load_audio(encode(tmp_path / "a.mka", "pcm_s16le", 48000, 1, audio_delay=0.5))
    assert clip.notes == () and click_at(clip) == CLICK_S * 16000 and clip.duration_s == 2.0


def test_pictures_that_start_late_do_not_move_the_sound(tmp_path):
    clip = audio.load_audio(encode(tmp_path / "a.mp4", video=True, video_delay=0.4))
    assert abs(click_at(clip) - 16000) <= 1


def test_a_hole_in_the_stream_becomes_silence(tmp_path):
    path = encode(tmp_path / "a.mkv", "pcm_s16le", 48000, 1, gap=(0.3, 0.4))
    clip = audio.load_audio(path)
    assert abs(click_at(clip) - 16000) <= MS
    assert np.abs(clip.samples[6000:10000]).max() < 0.01 < np.abs(clip.samples[12000:15000]).max()
    assert len(clip.notes) == 1 and "at 0.320 s 0.384 s of sound is missing" in clip.notes[0]  # in blocks of 1024


def test_cut_off_files_give_what_is_there(tmp_path):
    for name, codec in (("a.wav", "pcm_s16le"), ("a.mp3", "libmp3lame"), ("a.mkv", "aac")):
        whole = encode(tmp_path / name, codec)
        data = whole.read_bytes()
        cut = tmp_path / f"cut_{name}"
        cut.write_bytes(data[: int(len(data) * 0.7)])
        clip = audio.load_audio(cut)
        n = len(clip.samples)
        assert 16000 < n < 28000, name
        # The same packets, decoded and resampled the same way; three steps of 16 bits for a decoder that looks ahead.
        np.testing.assert_allclose(clip.samples[:15000], audio.load_audio(whole).samples[:15000], rtol=0, atol=3 / 32768)
        assert clip.notes, name


def test_damage_inside_is_noted_and_what_follows_stays_in_place(tmp_path):
    path = encode(tmp_path / "a.flac", "flac", 16000, 1, samples=tone(16000, 1, 3.0)[:, ::-1].copy())  # click at 2 s
    data = bytearray(path.read_bytes())
    at = len(data) * 2 // 5  # behind the padding that FLAC puts first
    data[at : at + 500] = np.random.default_rng(0).bytes(500)
    path.write_bytes(data)
    clip = audio.load_audio(path)
    assert abs(click_at(clip) - 32000) <= 2
    assert clip.notes and "missing" in clip.notes[0]


def bad_files(folder):
    def write(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    nan = np.zeros(16000, np.float32)
    nan[4000] = np.nan
    soundfile.write(folder / "nan.wav", nan, 16000, subtype="FLOAT")
    soundfile.write(folder / "zero.wav", np.zeros(0, np.float32), 16000)
    unknown = bytearray((folder / "nan.wav").read_bytes())
    unknown[20:22] = b"\x99\x99"  # the format tag
    mp4 = encode(folder / "whole.mp4").read_bytes()
    silent = folder / "silent.mp4"
    with av.open(str(silent), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    return {
        folder / "none.wav": "no such file",
        folder: "not a file",
        write("text.wav", b"this is not sound\n" * 100): "not a media file",
        write("empty.wav", b""): "not a media file",
        write("half.mp4", mp4[: len(mp4) // 2]): "header is missing",
        write("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nwhole.mp4\n"): "not a media file|playlist",
        silent: "no audio stream",
        write("codec.wav", unknown): "codec is not known",
        folder / "zero.wav": "has no samples",
        folder / "nan.wav": r"non-finite samples .* 0\.250 s",
    }


def test_bad_files_are_one_clear_line(tmp_path):
    for path, message in bad_files(tmp_path).items():
        with pytest.raises(KeySyncError, match=message) as caught:
            audio.load_audio(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(KeySyncError, match="no audio stream"):
        audio.probe_audio(tmp_path / "silent.mp4")
    with pytest.raises(KeySyncError, match="codec is not known"):
        audio.probe_audio(tmp_path / "codec.wav")


def test_long_files_need_little_more_than_the_result(tmp_path):
    """Three minutes of 8-channel 48 kHz would be 276 MB decoded; the result is 11.5 MB."""
    path = tmp_path / "long.flac"
    block = np.zeros((48000, 8), np.int16)
    with soundfile.SoundFile(path, "w", 48000, 8, "PCM_16") as file:
        for _ in range(180):
            file.write(block)
    code = (
        "import resource, sys\n"
        "from keysync_jax.media import audio\n"
        "audio.load_audio(sys.argv[2])\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "clip = audio.load_audio(sys.argv[1])\n"
        "assert 'jax' not in sys.modules\n"
        "print(len(clip.samples), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    short = tmp_path / "short.wav"
    audio.save_wav(short, np.zeros(1600), 16000)
    done = subprocess.run([sys.executable, "-c", code, path, short], capture_output=True, text=True, check=True)
    samples, growth_kb = map(int, done.stdout.split())
    assert samples == 180 * 16000
    assert growth_kb < 60_000


class TestSaveWav:
    def test_round_trip(self, tmp_path):
        x = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
        audio.save_wav(tmp_path / "a.wav", x, 16000, subtype="FLOAT")
        np.testing.assert_array_equal(audio.load_audio(tmp_path / "a.wav").samples, x)
        audio.save_wav(tmp_path / "a.wav", np.stack([x, x], axis=1), 8000)
        with wave.open(str(tmp_path / "a.wav")) as file:
            assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, 8000, 2)
        assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]

    def test_refuses_what_cannot_be_written(self, tmp_path):
        with pytest.raises(KeySyncError, match="not all finite"):
            audio.save_wav(tmp_path / "a.wav", np.array([0.0, np.inf]), 16000)
        with pytest.raises(KeySyncError, match="does not exist"):
            audio.save_wav(tmp_path / "no" / "a.wav", np.zeros(10), 16000)
        with pytest.raises(KeySyncError, match="cannot be written"):
            audio.save_wav(tmp_path / "a.wav", np.zeros((10, 2000)), 16000)
        assert not list(tmp_path.iterdir())
