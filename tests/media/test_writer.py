"""Writing: exact timestamps, unchanged planes without loss, tags, repeatable bytes, nothing half-written."""

from fractions import Fraction

import av
import clips
import numpy as np
import pytest
from bounds import approx

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.clip_io import array_info, picture_of
from keysync_jax.media import audio, video, writer

RATES = [Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(60)]
LOSSLESS_X265 = {"x265-params": "lossless=1:log-level=none"}


def rewrite(source, target, **options):
    """Decode `source` and write it to `target`; the writer and the decoded planes."""
    info = video.probe(source)
    planes = []
    with writer.VideoWriter(target, info, **options) as out:
        for frame in video.read(source, info):
            planes.append([plane.copy() for plane in frame.planes()])
            out.write(frame)
    return out, planes


def packets_of(path):
    """(time, duration) of every video packet in display order, as fractions of a second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
        return sorted((packet.pts * base, packet.duration * base) for packet in container.demux(stream) if packet.size)


@pytest.mark.parametrize("extension", [".mp4", ".mov"])
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_times_and_durations_survive_exactly(tmp_path, rate, extension):
    base = 1 / (rate * rate.denominator)
    clips.make_clip(tmp_path / "a.mp4", [rate.denominator * i for i in range(12)], base, rate=rate)
    out, _ = rewrite(tmp_path / "a.mp4", tmp_path / f"b{extension}")
    assert packets_of(tmp_path / f"b{extension}") == packets_of(tmp_path / "a.mp4")
    written = video.probe(tmp_path / f"b{extension}")
    assert (written.time_base, written.average_rate, written.duration_s) == (base, rate, approx(float(12 / rate)))
    assert out.notes == [] and out.frames_written == 12


def test_variable_rate_late_start_and_last_duration_survive(tmp_path):
    """The output begins with the first picture; between pictures nothing changes."""
    pts = [0, 400, 1111, 1500, 3999, 4000, 4410, 9000]
    late = [777 + stamp for stamp in pts]
    clips.make_clip(tmp_path / "a.mp4", late, Fraction(1, 12800), last_duration=2222, options={"bf": "0"})
    rewrite(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert [frame.pts for frame in video.read(tmp_path / "b.mp4")] == pts
    info = video.probe(tmp_path / "b.mp4")
    assert (info.start_time, info.duration_s) == (0, approx((9000 + 2222) / 12800))


def test_ticks_that_are_not_one_over_an_integer_keep_their_times(tmp_path):
    clips.make_clip(tmp_path / "a.avi", list(range(8)), Fraction(1001, 30000), codec="ffv1", options={}, rate=Fraction(30000, 1001))
    rewrite(tmp_path / "a.avi", tmp_path / "b.mp4")
    assert [frame.time for frame in video.read(tmp_path / "b.mp4")] == [i * Fraction(1001, 30000) for i in range(8)]


def test_matroska_keeps_milliseconds_and_says_so(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [1001 * i for i in range(9)], Fraction(1, 30000), rate=Fraction(30000, 1001))
    out, _ = rewrite(tmp_path / "a.mp4", tmp_path / "b.mkv")
    assert "milliseconds" in out.notes[0]
    times = [frame.time for frame in video.read(tmp_path / "b.mkv")]
    assert all(abs(time - Fraction(1001 * i, 30000)) <= Fraction(1, 2000) for i, time in enumerate(times)) and len(times) == 9
    # From Matroska to Matroska and to .mp4 nothing is lost.
    for name in ("c.mkv", "c.mp4"):
        again, _ = rewrite(tmp_path / "b.mkv", tmp_path / name)
        assert again.notes == [] and [frame.time for frame in video.read(tmp_path / name)] == times


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_very_short_clips(tmp_path, pix_fmt, count):
    clips.make_clip(tmp_path / "a.mkv", [40 * i for i in range(count)], Fraction(1, 1000), pix_fmt=pix_fmt, codec="ffv1", options={})
    rewrite(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert [frame.pts for frame in video.read(tmp_path / "b.mp4")] == [40 * i for i in range(count)]


# Every family, depth and subsampling that is edited in place; odd sizes where a codec can make them.
FORMATS = [
    ("yuv420p", "libx264", {"qp": "0"}, (64, 48)),
    ("yuvj420p", "libx264", {"qp": "0"}, (64, 48)),
    ("yuv422p", "libx264", {"qp": "0"}, (64, 48)),
    ("yuvj444p", "libx264", {"qp": "0"}, (64, 48)),
    ("yuv420p10le", "libx265", LOSSLESS_X265, (64, 64)),
    ("yuv422p10le", "libx264", {"qp": "0"}, (64, 48)),
    ("yuv444p12le", "libx265", LOSSLESS_X265, (64, 64)),
    ("gray", "ffv1", {}, (64, 64)),
    ("gbrp", "libx265", LOSSLESS_X265, (64, 64)),
    ("yuv420p", "ffv1", {}, (65, 49)),
    ("yuv444p10le", "ffv1", {}, (65, 49)),
    ("yuv422p", "ffv1", {}, (67, 50)),
]


@pytest.mark.parametrize("extension", [".mp4", ".mkv"])
@pytest.mark.parametrize("pix_fmt, codec, options, size", FORMATS, ids=[f"{f[0]}-{f[3][0]}" for f in FORMATS])
def test_lossless_planes_come_back_bit_exact(tmp_path, pix_fmt, codec, options, size, extension):
    written = clips.make_clip(tmp_path / "a.mkv", [40 * i for i in range(5)], Fraction(1, 1000), size, pix_fmt, codec, options)
    _, planes = rewrite(tmp_path / "a.mkv", tmp_path / f"b{extension}", lossless=True)
    info = video.probe(tmp_path / f"b{extension}")
    assert info.planes == video.probe(tmp_path / "a.mkv").planes
    back = [frame.planes() for frame in video.read(tmp_path / f"b{extension}")]
    assert len(back) == 5
    for expected, decoded, result in zip(written, planes, back, strict=True):
        for a, b, c in zip(expected, decoded, result, strict=True):
            assert np.array_equal(a, b) and np.array_equal(b, c)


@pytest.mark.parametrize("width, height", [(64, 64), (64, 130), (40, 66)])
def test_pictures_narrower_than_a_block_of_the_encoder_come_back_bit_exact(tmp_path, width, height):
    """libx265 spoils noise of this width where it predicts one picture from another, every time and each time otherwise."""
    shown = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), np.uint8)
    written = []
    for name in ("a.mp4", "b.mp4"):
        with writer.VideoWriter(tmp_path / name, array_info(width, height), lossless=True) as target:
            for number, rgb in enumerate(shown):
                picture = picture_of(rgb)
                picture.pts, picture.time_base = number, array_info(width, height).time_base
                target.write(picture)
        assert target.encoding.codec == "libx265"
        np.testing.assert_array_equal(np.stack([frame.rgb() for frame in video.read(tmp_path / name)]), shown)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("pix_fmt, codec", [("yuv420p", "h264"), ("yuv422p10le", "h264"), ("yuv420p10le", "hevc")])
def test_default_encoding_keeps_the_format_at_high_quality(tmp_path, pix_fmt, codec):
    clips.make_clip(tmp_path / "a.mkv", [40 * i for i in range(6)], Fraction(1, 1000), (96, 64), pix_fmt, "ffv1", {})
    _, planes = rewrite(tmp_path / "a.mkv", tmp_path / "b.mp4")
    info = video.probe(tmp_path / "b.mp4")
    assert (info.pix_fmt, info.codec) == (pix_fmt, codec)
    top = 2**info.planes.bits - 1
    for expected, frame in zip(planes, video.read(tmp_path / "b.mp4"), strict=True):
        error = (expected[0].astype(float) - frame.planes()[0]) / top
        assert -10 * np.log10((error**2).mean()) > 40


@pytest.mark.parametrize("pix_fmt, name, full", [("yuv420p", "b.mov", "yuv444p"), ("yuv420p10le", "b.mp4", "yuv444p10le")])
def test_odd_size_that_no_codec_holds_gets_full_chroma_and_a_note(tmp_path, pix_fmt, name, full):
    clips.make_clip(tmp_path / "a.mkv", [0, 40, 80], Fraction(1, 1000), (65, 49), pix_fmt, "ffv1", {})
    out, planes = rewrite(tmp_path / "a.mkv", tmp_path / name, lossless=True)
    info = video.probe(tmp_path / name)
    assert (info.width, info.height, info.pix_fmt) == (65, 49, full) and full in out.notes[0]
    # The conversion leaves luma alone.
    assert all(np.array_equal(a[0], frame.planes()[0]) for a, frame in zip(planes, video.read(tmp_path / name), strict=True))


@pytest.mark.parametrize("extension", [".mp4", ".mov", ".mkv"])
def test_rotation_pixel_shape_and_colour_tags_are_kept(tmp_path, extension):
    tags = {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 16}
    matrix = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    shape = Fraction(4, 3)
    clips.make_clip(tmp_path / "a.mp4", [0, 512, 1024], pix_fmt="yuv420p10le", tags=tags, matrix=matrix, sample_aspect_ratio=shape)
    rewrite(tmp_path / "a.mp4", tmp_path / f"b{extension}")
    before, after = video.probe(tmp_path / "a.mp4"), video.probe(tmp_path / f"b{extension}")
    kept = ("rotation", "orientation", "sample_aspect_ratio", "color_space", "color_range", "color_primaries", "color_transfer", "planes")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    assert (before.rotation, before.color_transfer, before.sample_aspect_ratio) == (270, 16, shape)


@pytest.mark.parametrize("extension", [".mp4", ".mkv"])
def test_same_input_gives_the_same_bytes(tmp_path, extension):
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(30)], size=(160, 96))
    sound = tmp_path / "a.wav"
    write_wav(sound, clips.click_track(16000, 1, 1.2), 16000)
    for name in ("b", "c"):
        rewrite(tmp_path / "a.mp4", tmp_path / f"{name}{extension}", audio=sound)
    assert (tmp_path / f"b{extension}").read_bytes() == (tmp_path / f"c{extension}").read_bytes()


def test_the_decoder_does_not_choose_key_frames(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(20)], options={"preset": "ultrafast", "g": "1"})
    rewrite(tmp_path / "a.mp4", tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size) == 1


def test_nothing_is_left_when_something_fails(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(20)])
    info = video.probe(tmp_path / "a.mp4")
    (tmp_path / "old.mp4").write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="model broke"):
        with writer.VideoWriter(tmp_path / "old.mp4", info) as out:
            for frame in video.read(tmp_path / "a.mp4", info):
                out.write(frame)
                if frame.index == 10:
                    raise RuntimeError("the model broke")
    with pytest.raises(KeySyncError, match="no frame"):
        with writer.VideoWriter(tmp_path / "b.mp4", info):
            pass
    with pytest.raises(KeySyncError, match="none.wav: no such file"):
        writer.VideoWriter(tmp_path / "b.mp4", info, audio=tmp_path / "none.wav")
    with pytest.raises(ValueError, match="comes after"):
        with writer.VideoWriter(tmp_path / "b.mp4", info) as out:
            frame = next(video.read(tmp_path / "a.mp4", info))
            out.write(frame)
            out.write(frame)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.mp4").read_bytes() == b"precious"


def test_output_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match=r"\.webp.*\.mp4, \.m4v, \.mov, \.mkv, \.webm"):
        writer.check_output(tmp_path / "a.webp")
    with pytest.raises(KeySyncError, match="does not exist"):
        writer.check_output(tmp_path / "nowhere" / "a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(KeySyncError, match="is a folder"):
        writer.check_output(tmp_path / "folder.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/null")
    with pytest.raises(UsageError, match="no ordinary file"):
        writer.check_output(tmp_path / "device.mp4")


@pytest.mark.parametrize("name", ["12:30 talk.mp4", "n" * 251 + ".mp4"], ids=["colon", "long"])
def test_any_name_that_a_file_may_have(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # FFmpeg takes what stands before a colon in a relative name for a protocol
    clips.make_clip(tmp_path / name, [512 * i for i in range(5)])
    write_wav(tmp_path / "voice: a.wav", clips.click_track(16000, 1, 0.2), 16000)
    (tmp_path / "out").mkdir()
    rewrite(name, f"out/{name}", audio="voice: a.wav")
    (tmp_path / f"out/{name}").rename(name)
    rewrite(name, name)
    assert len(packets_of(tmp_path / name)) == 5 and sorted(p.name for p in tmp_path.rglob("*")) == sorted([name, "out", "voice: a.wav"])


# Sound -----------------------------------------------------------------------------------------------------------------------------


def write_wav(path, samples, rate):
    import soundfile

    soundfile.write(str(path), samples, rate, subtype="PCM_16")


def encode_sound(path, samples, rate, codec):
    """Sound file in another codec, from float `[n, channels]`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        layout = "mono" if samples.shape[1] == 1 else "stereo"
        stream.codec_context.layout, stream.codec_context.bit_rate = layout, 192000
        converter = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in [*converter.resample(frame), *converter.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


@pytest.fixture
def clip(tmp_path):
    """One second, 25 fps."""
    clips.make_clip(tmp_path / "clip.mp4", [512 * i for i in range(25)])
    return tmp_path / "clip.mp4"


def assert_clicks(path, tolerance=1e-3, start=0.0):
    sound, rate, _ = clips.decode_sound(path)
    for found, at in zip(clips.click_times(sound, rate, start), clips.CLICKS, strict=True):
        assert abs(found - start - at) <= tolerance, f"click at {at} s came back at {found - start} s"
    return sound, rate


@pytest.mark.parametrize(
    "rate, channels, kept",
    [(16000, 1, 32000), (44100, 2, 44100), (48000, 2, 48000), (96000, 1, 48000), (88200, 2, 44100), (15000, 1, 32000), (48000, 6, 48000)],
)
def test_sound_that_mp4_cannot_hold_becomes_aac(clip, tmp_path, rate, channels, kept):
    write_wav(tmp_path / "a.wav", clips.click_track(rate, channels, 0.95), rate)
    out, _ = rewrite(clip, tmp_path / "b.mp4", audio=tmp_path / "a.wav")
    sound, found_rate = assert_clicks(tmp_path / "b.mp4")
    assert (found_rate, sound.shape[1]) == (kept, channels)
    asked = max(192_000, 64_000 * channels)
    assert 6 * kept * channels >= asked  # 6 bits per sample and channel is all that AAC holds
    assert out.audio_note.startswith(f"encoded aac {asked // 1000} kb/s, {kept} Hz") and "pcm_s16le" in out.audio_note
    assert ("resampled" in out.audio_note) == (rate != kept)
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"


def test_aac_spends_the_bits_it_was_given(clip, tmp_path):
    noise = np.random.default_rng(0).standard_normal((48000, 2)).astype(np.float32) * 0.1
    write_wav(tmp_path / "a.wav", noise, 48000)
    rewrite(clip, tmp_path / "b.mp4", audio=tmp_path / "a.wav")
    with av.open(str(tmp_path / "b.mp4")) as container:
        size = sum(packet.size for packet in container.demux(audio=0))
    assert 8 * size / 1.0 > 0.95 * 192_000


@pytest.mark.parametrize("extension", [".mkv", ".mov"])
@pytest.mark.parametrize("rate, channels", [(16000, 1), (44100, 2)])
def test_pcm_is_copied_and_cut_at_the_very_sample(clip, tmp_path, rate, channels, extension):
    given = clips.click_track(rate, channels, 3.0)
    write_wav(tmp_path / "a.wav", given, rate)
    out, _ = rewrite(clip, tmp_path / f"b{extension}", audio=tmp_path / "a.wav")
    assert out.audio_note.startswith("copied pcm_s16le; cut at the end of the video, 1.000 s of 3.000 s")
    assert_clicks(tmp_path / f"b{extension}")
    assert sound_bytes(tmp_path / f"b{extension}") == sound_bytes(tmp_path / "a.wav")[: rate * channels * 2]


def sound_bytes(path):
    with av.open(str(path)) as container:
        return b"".join(bytes(packet) for packet in container.demux(audio=0) if packet.size)


@pytest.mark.parametrize(
    "name, codec, rate, extensions",
    [
        ("a.m4a", "aac", 44100, (".mp4", ".mov", ".mkv")),
        ("a.mp3", "libmp3lame", 44100, (".mp4", ".mkv")),
        ("a.flac", "flac", 44100, (".mp4", ".mkv")),
        ("a.ogg", "libopus", 48000, (".mp4", ".mkv")),
    ],
)
def test_compressed_sound_is_copied_packet_by_packet(clip, tmp_path, name, codec, rate, extensions):
    encode_sound(tmp_path / name, clips.click_track(rate, 2, 0.95), rate, codec)
    pictures = [frame.time for frame in video.read(clip)]
    for extension in extensions:
        out, _ = rewrite(clip, tmp_path / f"b{extension}", audio=tmp_path / name)
        assert out.audio_note == f"copied {codec.removeprefix('lib').removesuffix('lame')}"
        assert sound_bytes(tmp_path / f"b{extension}") == sound_bytes(tmp_path / name)
        assert_clicks(tmp_path / f"b{extension}")
        # Priming before time zero must not push the pictures later.
        assert [frame.time for frame in video.read(tmp_path / f"b{extension}")] == pictures


def test_flac_becomes_aac_where_quicktime_cannot_hold_it(clip, tmp_path):
    encode_sound(tmp_path / "a.flac", clips.click_track(44100, 2, 0.95), 44100, "flac")
    out, _ = rewrite(clip, tmp_path / "b.mov", audio=tmp_path / "a.flac")
    assert out.audio_note.startswith("encoded aac 192 kb/s, 44100 Hz stereo, from flac")
    assert_clicks(tmp_path / "b.mov")


@pytest.mark.parametrize("extension", [".mp4", ".mkv"])
def test_sound_begins_with_the_pictures_of_a_late_start(tmp_path, extension):
    clips.make_clip(tmp_path / "late.mp4", [10240 + 512 * i for i in range(25)])  # 0.8 s
    write_wav(tmp_path / "a.wav", clips.click_track(16000, 1, 3.0), 16000)
    out, _ = rewrite(tmp_path / "late.mp4", tmp_path / f"b{extension}", audio=tmp_path / "a.wav")
    assert "1.000 s of 3.000 s" in out.audio_note
    sound, rate = assert_clicks(tmp_path / f"b{extension}")
    assert video.probe(tmp_path / f"b{extension}").start_time == 0 and abs(len(sound) / rate - 1.0) < 0.07


def test_sound_longer_than_the_video_is_cut_and_shorter_is_not(clip, tmp_path):
    for seconds, cut in ((5.0, True), (0.9, False), (1.0, False)):
        write_wav(tmp_path / "a.wav", clips.click_track(48000, 1, seconds), 48000)
        out, _ = rewrite(clip, tmp_path / "b.mp4", audio=tmp_path / "a.wav")
        sound, rate, _ = clips.decode_sound(tmp_path / "b.mp4")
        assert ("cut at the end" in out.audio_note) == cut
        assert min(seconds, 1.0) <= len(sound) / rate <= min(seconds, 1.0) + 1024 / rate
    rewrite(clip, tmp_path / "c.mkv", audio=tmp_path / "a.wav", duration_s=0.5)
    assert len(sound_bytes(tmp_path / "c.mkv")) == 24000 * 2


def test_sound_and_pictures_are_interleaved(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(250)])
    write_wav(tmp_path / "a.wav", clips.click_track(16000, 1, 10.0), 16000)
    rewrite(tmp_path / "a.mp4", tmp_path / "b.mp4", audio=tmp_path / "a.wav")
    with av.open(str(tmp_path / "b.mp4")) as container:
        positions = [(packet.pos, packet.stream.type, float(packet.dts * packet.time_base)) for packet in container.demux() if packet.size]
    latest = {"audio": 0.0, "video": 0.0}
    for _, kind, time in sorted(positions):
        latest[kind] = time
        assert abs(latest["audio"] - latest["video"]) < 1.5


def without(source, target, begin, end):
    """A copy whose packets between two times, in seconds, are missing."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as rest:
        stream = rest.add_stream_from_template(whole.streams.audio[0])
        for packet in whole.demux(audio=0):
            if packet.size and not begin < float(packet.pts * packet.time_base) < end:
                packet.stream = stream
                rest.mux(packet)


def test_a_hole_in_the_sound_stays_where_it_is(clip, tmp_path):
    """Timestamps of the source are followed, so what comes after missing packets is not early."""
    encode_sound(tmp_path / "a.mka", clips.click_track(48000, 1, 0.95), 48000, "libopus")
    without(tmp_path / "a.mka", tmp_path / "hole.mka", 0.45, 0.6)
    out, _ = rewrite(clip, tmp_path / "b.mov", audio=tmp_path / "hole.mka")
    assert "from opus" in out.audio_note
    sound, rate = assert_clicks(tmp_path / "b.mov")
    assert np.abs(sound[int(0.50 * rate) : int(0.55 * rate)]).max() < 2e-3  # silence where the packets are missing


def test_the_track_that_is_heard_is_the_one_that_the_model_hears(clip, tmp_path):
    """Of several tracks the default one, on its own clock; the first begins earlier and is something else."""
    path = tmp_path / "tracks.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(2)]
        streams[0].disposition, streams[1].disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for stream, sound, start in ((streams[0], np.zeros((16000, 1)), 0), (streams[1], clips.click_track(16000, 1, 0.95), 4800)):
            packed = np.ascontiguousarray(np.round(sound * 32767).astype(np.int16).reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(packed, "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            container.mux(stream.encode(frame))
    heard = audio.load_audio(path)
    for extension in (".mkv", ".mov", ".mp4"):  # copied, copied, encoded
        rewrite(clip, tmp_path / f"b{extension}", audio=path)
        sound, rate = assert_clicks(tmp_path / f"b{extension}")
        model = np.repeat(heard.samples[:, None], 2, axis=1)
        assert clips.click_times(sound, rate) == pytest.approx(clips.click_times(model, 16000), abs=1e-3)  # a tick of Matroska


@pytest.mark.parametrize("extension", [".mkv", ".mp4"])
def test_joined_files_are_heard_as_the_model_hears_them(clip, tmp_path, extension):
    """Packets whose clock restarts cannot be copied: muxers refuse stamps that go back."""
    for name, channels in (("a.ts", 1.05), ("b.ts", 0.1)):
        encode_sound(tmp_path / name, channels * clips.click_track(48000, 1, 2.0), 48000, "aac")
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "b.ts").read_bytes() + (tmp_path / "a.ts").read_bytes())
    heard = audio.load_audio(joined).samples
    assert len(heard) > 3.9 * 16000
    clips.make_clip(tmp_path / "long.mp4", [512 * i for i in range(100)])
    out, _ = rewrite(tmp_path / "long.mp4", tmp_path / f"out{extension}", audio=joined)
    assert "from aac, whose timestamps jump" in out.audio_note
    written = audio.load_audio(tmp_path / f"out{extension}").samples
    assert abs(int(np.abs(heard).argmax()) - int(np.abs(written).argmax())) <= 16
    assert np.abs(heard).argmax() > 2 * 16000  # the louder part came second


def test_a_hole_in_pcm_is_kept_in_quicktime_too(clip, tmp_path):
    write_wav(tmp_path / "a.wav", clips.click_track(16000, 1, 0.95), 16000)
    without(tmp_path / "a.wav", tmp_path / "hole.mkv", 0.4, 0.6)
    for extension in (".mov", ".mkv"):
        out, _ = rewrite(clip, tmp_path / f"b{extension}", audio=tmp_path / "hole.mkv")
        assert ("whose timestamps jump" in out.audio_note) == (extension == ".mov")
        assert_clicks(tmp_path / f"b{extension}")


def test_sound_that_cannot_be_used_is_refused(clip, tmp_path):
    (tmp_path / "text.wav").write_text("no sound at all " * 30)
    write_wav(tmp_path / "empty.wav", np.zeros((0, 1), np.float32), 16000)
    for name, words in (("text.wav", "not a media file"), ("empty.wav", "is empty|not a media"), ("clip.mp4", "no audio stream")):
        with pytest.raises(KeySyncError, match=words):
            rewrite(clip, tmp_path / "b.mp4", audio=tmp_path / name)
    assert not list(tmp_path.glob("*b.mp4*")) and not list(tmp_path.glob(".b*"))
