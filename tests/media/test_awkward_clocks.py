"""Files whose clock, length or end is not what one would think: what is written begins with the film and is as long as it."""

import dataclasses
from fractions import Fraction

import av
import clips
import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.clip_io import VideoFile
from keysync_jax.media import completeness, video, writer

TICK = {"ts": Fraction(1, 90000), "mkv": Fraction(1, 1000), "mp4": Fraction(1, 12800), "avi": Fraction(1, 25)}
CONTAINERS = [".mp4", ".mov", ".mkv", ".webm", ".m4v"]


def film(path, times, sound=None, sound_start=Fraction(0), options=None, muxer=None, size=(64, 48)):
    """Drawn pictures at `times` seconds, and mono samples at 48 kHz."""
    with av.open(str(path), "w", options=muxer or {}) as out:
        tick = TICK[path.suffix[1:]]
        picture = out.add_stream("libx264", rate=25, options={"preset": "veryfast"} | (options or {}))
        picture.width, picture.height, picture.pix_fmt = *size, "yuv420p"
        picture.time_base = picture.codec_context.time_base = tick
        track = out.add_stream("mp2" if path.suffix != ".mp4" else "aac", rate=48000, layout="mono") if sound is not None else None
        for index, time in enumerate(times):
            frame = av.VideoFrame(*size, "yuv420p")
            clips.draw(frame, index)
            frame.pts, frame.time_base = round(Fraction(time) / tick), tick
            out.mux(picture.encode(frame))
        out.mux(picture.encode(None))
        if track is not None:
            kind = track.codec_context.format.name
            block = sound[None].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(block if kind == "fltp" else np.int16(block * 32767), kind.replace("s16p", "s16"), "mono")
            frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), round(sound_start * 48000)
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    return path


def rewrite(source, target, **options):
    file = VideoFile(source, allow_damaged=True)
    frames = list(file.read())
    with writer.VideoWriter(target, file.info, **options) as out:
        for frame in frames:
            out.write(frame)
    return [frame.time for frame in frames], out


def length(path):
    with av.open(str(path)) as container:
        return container.duration / av.time_base


@pytest.mark.parametrize("start", [Fraction(36000), Fraction(7, 5), Fraction(2, 3)], ids=["10 h", "1.4 s", "0.67 s"])
def test_time_zero_is_where_the_film_begins(tmp_path, start):
    """Of a film whose sound begins 0.2 s before its pictures; the voice begins there, too."""
    times = [start + Fraction(1, 5) + Fraction(i, 25) for i in range(20)]
    film(tmp_path / "a.ts", times, 0.1 * np.ones(48000), start, muxer={"mpegts_copyts": "1"})
    clips_voice(tmp_path / "voice.wav")
    info = video.probe(tmp_path / "a.ts")
    for extension in CONTAINERS:
        given, _ = rewrite(tmp_path / "a.ts", tmp_path / f"b{extension}", audio=tmp_path / "voice.wav")
        got = [frame.time for frame in video.read(tmp_path / f"b{extension}")]
        shifts = {time - info.start_time - new for time, new in zip(given, got, strict=True)}
        assert max(map(abs, shifts)) <= (Fraction(1, 2000) if extension in (".mkv", ".webm") else 0)
        assert abs(got[0] - Fraction(1, 5)) < 0.03 and length(tmp_path / f"b{extension}") == pytest.approx(1.0, abs=0.05)
        sound, rate, _ = clips.decode_sound(tmp_path / f"b{extension}")
        assert clips.click_times(sound, rate) == pytest.approx(clips.CLICKS, abs=0.002)


def clips_voice(path):
    import soundfile

    soundfile.write(str(path), clips.click_track(48000, 1, 0.95), 48000, subtype="PCM_16")


def test_a_zero_between_two_ticks_is_kept_exactly(tmp_path):
    """Sound begins 0.01 s before pictures that count in 25ths of a second."""
    film(tmp_path / "a.ts", [Fraction(1) + Fraction(i, 25) for i in range(6)])
    info = video.probe(tmp_path / "a.ts")
    odd = dataclasses.replace(info, start_time=info.start_time - Fraction(1, 77777))
    with writer.VideoWriter(tmp_path / "b.mp4", odd) as out:
        for frame in video.read(tmp_path / "a.ts", info):
            out.write(frame)
    times = [frame.time for frame in video.read(tmp_path / "b.mp4")]
    assert all(abs(time - Fraction(i, 25) - Fraction(1, 77777)) < Fraction(1, 90000) for i, time in enumerate(times))


HOLDS = [0, 0.04, 0.08, 0.12, 0.16, 0.2, 1.2, 1.24, 1.28, 3.2, 3.24, 4.0]


@pytest.mark.parametrize("extension", CONTAINERS)
def test_held_pictures_are_held_as_long_and_no_longer(tmp_path, extension):
    film(tmp_path / "a.mkv", [Fraction(str(time)) for time in HOLDS])
    rewrite(tmp_path / "a.mkv", tmp_path / f"b{extension}")
    got = [float(frame.time) for frame in video.read(tmp_path / f"b{extension}")]
    assert got == pytest.approx(HOLDS, abs=1e-3) and length(tmp_path / f"b{extension}") == pytest.approx(4.04, abs=0.005)


def test_the_last_picture_of_an_mp4_is_held_to_its_stated_end(tmp_path):
    stamps = [512 * i for i in range(10)] + [512 * 40]
    clips.make_clip(tmp_path / "a.mp4", stamps, last_duration=512 * 25, options={"bf": "0"})
    for extension in CONTAINERS:
        rewrite(tmp_path / "a.mp4", tmp_path / f"b{extension}")
        assert length(tmp_path / f"b{extension}") == pytest.approx(65 / 25, abs=0.005)


def test_avi_with_b_pictures_plays_evenly(tmp_path):
    clips.make_clip(tmp_path / "a.avi", list(range(20)), Fraction(1, 25), options={"preset": "veryfast"})
    with av.open(str(tmp_path / "a.avi")) as container:
        assert container.streams.video[0].codec_context.has_b_frames
    rewrite(tmp_path / "a.avi", tmp_path / "b.mp4")
    reader = video.read(tmp_path / "b.mp4")
    assert [frame.time for frame in reader] == [Fraction(i, 25) for i in range(20)] and reader.notes == []
    assert length(tmp_path / "b.mp4") == pytest.approx(0.8)


# A file that breaks off ------------------------------------------------------------------------------------------------------------


def broken_off(source, share):
    data = source.read_bytes()
    cut = source.with_name(f"cut{source.suffix}")
    cut.write_bytes(data[: int(len(data) * share)])
    return cut


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_file_that_breaks_off_is_refused_with_both_numbers(tmp_path, name):
    muxer = {"movflags": "+faststart"} if name.endswith("mp4") else {}
    film(tmp_path / name, [Fraction(i, 25) for i in range(50)], 0.1 * np.ones(96000), muxer=muxer, options={"crf": "5"})
    whole = VideoFile(tmp_path / name)
    assert len(list(whole.read())) == 50 and whole.shortfall is None
    cut = broken_off(tmp_path / name, 0.5)
    with pytest.raises(KeySyncError, match=r"breaks off: \d+ of (49|50|51|52) pictures.*--allow-damaged"):
        list(VideoFile(cut).read())
    allowed = VideoFile(cut, allow_damaged=True)
    reader = allowed.read()
    frames = list(reader)
    assert 5 < len(frames) < 45 and allowed.shortfall.pictures == len(frames) and 49 <= allowed.shortfall.promised <= 52
    assert any("breaks off" in note for note in reader.notes)
    assert frames[-1].av_frame.duration * allowed.info.time_base <= Fraction(1, 25)  # not held over what is missing


def test_where_the_container_cannot_know_the_own_sound_is_the_witness(tmp_path):
    film(tmp_path / "a.ts", [Fraction(i, 25) for i in range(20)], 0.1 * np.ones(96000))
    with pytest.raises(KeySyncError, match=r"breaks off: 20 of (49|50|51) pictures .*its own sound ends at"):
        list(VideoFile(tmp_path / "a.ts").read())
    film(tmp_path / "b.ts", [Fraction(i, 25) for i in range(20)], 0.1 * np.ones(int(0.8 * 48000)))
    film(tmp_path / "c.ts", [Fraction(i, 25) for i in range(20)])
    for name in ("b.ts", "c.ts"):
        assert len(list(VideoFile(tmp_path / name).read())) == 20
    # In a container that knows, sound may be longer than the pictures.
    film(tmp_path / "d.mkv", [Fraction(i, 25) for i in range(20)], 0.1 * np.ones(96000))
    assert len(list(VideoFile(tmp_path / "d.mkv").read())) == 20


def test_damage_inside_a_file_of_full_length_is_a_note(tmp_path):
    film(tmp_path / "a.mp4", [Fraction(i, 25) for i in range(60)], options={"crf": "5", "g": "12", "bf": "0"}, size=(160, 128))
    with av.open(str(tmp_path / "a.mp4")) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    for at, size in places[15:22]:
        data[at + 5 : at + size] = np.random.default_rng(at).integers(0, 256, size - 5, np.uint8).tobytes()
    (tmp_path / "a.mp4").write_bytes(data)
    file = VideoFile(tmp_path / "a.mp4")
    reader = file.read()
    assert len(list(reader)) >= 45 and file.shortfall is None and any("damaged" in note for note in reader.notes)


def test_structure_says_whether_bytes_are_missing(tmp_path):
    for name, container in (("a.mp4", "mov,mp4"), ("a.mkv", "matroska,webm"), ("a.avi", "avi")):
        path = film(tmp_path / name, [Fraction(i, 25) for i in range(10)])
        assert completeness.is_whole(path, container) is True
        assert completeness.is_whole(broken_off(path, 0.7), container) is False
    assert completeness.is_whole(film(tmp_path / "a.ts", [0]), "mpegts") is None


# Of several video streams ----------------------------------------------------------------------------------------------------------


def streams(path, *parts):
    """Several video streams, each (codec, size, pictures, disposition)."""
    with av.open(str(path), "w", options={"default_mode": "passthrough"}) as out:
        made = []
        for codec, size, _, disposition in parts:
            stream = out.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.time_base, stream.disposition = Fraction(1, 25), disposition
            made.append(stream)
        for stream, (_, size, count, _) in zip(made, parts, strict=True):
            for index in range(count):
                frame = av.VideoFrame(*size, stream.pix_fmt)
                clips.draw(frame, index)
                frame.pts, frame.time_base = index, Fraction(1, 25)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return path


def test_of_several_video_streams_the_one_that_players_show(tmp_path):
    d = av.stream.Disposition
    small, large = ("libx264", (64, 48)), ("libx264", (128, 96))
    cases = {
        "second default": ([(*small, 5, d(0)), (*large, 5, d.default)], (128, 96), "the default one"),
        "first default": ([(*small, 5, d.default), (*large, 5, d(0))], (64, 48), "the default one"),
        "none default": ([(*small, 5, d(0)), (*large, 5, d(0))], (128, 96), "the largest"),
        "preview": ([("mjpeg", (256, 192), 5, d(0)), (*small, 5, d(0))], (64, 48), "no preview"),
    }
    for name, (parts, size, words) in cases.items():
        info = video.probe(streams(tmp_path / "a.mkv", *parts))
        assert (info.width, info.height) == size, name
        assert (words in info.choice) if words else info.choice == ""
        assert (info.choice in video.read(info.path, info).notes) == bool(words)
    path = streams(tmp_path / "b.mkv", (*small, 5, d(0)), (*large, 7, d.default))
    chosen = VideoFile(path, video_stream=0)
    assert chosen.info.width == 64 and len(list(chosen.read())) == 5 and chosen.info.choice == ""
    with pytest.raises(UsageError, match="--video-stream 2: the file has 2"):
        video.probe(path, 2)
