"""What is written of unusual pictures, and of everything else that a file holds."""

import dataclasses
import struct
from fractions import Fraction

import av
import clips
import numpy as np
import pytest
import soundfile

from keysync_jax.core.errors import UsageError
from keysync_jax.inference.clip_io import VideoFile
from keysync_jax.media import color, encoding, extras, video, writer

MS = Fraction(1, 1000)


def rewrite(source, target, **options):
    file = VideoFile(source)
    frames = list(file.read())
    with writer.VideoWriter(target, file.info, **options) as out:
        for frame in frames:
            out.write(frame)
    return video.probe(target), out


def coloured(path, codec, pix_fmt, size=(64, 48), count=4, alpha=False, rate=25, **options):
    """Four patches of colour, with a transparent right half if asked."""
    picture = np.zeros((size[1], size[0], 4), np.uint8)
    for number, colour in enumerate([(220, 60, 40), (40, 200, 80), (50, 60, 220), (180, 130, 100)]):
        part = np.s_[size[1] // 2 * (number // 2) :, size[0] // 2 * (number % 2) :]
        picture[part] = (*colour, 255)
    if alpha:
        picture[:, size[0] // 2 :, 3] = 64
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if alpha and str(path).endswith(".webm"):
            stream.metadata["alpha_mode"] = "1"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pix_fmt)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path, picture


@pytest.mark.parametrize(
    "name, codec, pix_fmt, size",
    [
        ("a.gif", "gif", "rgb8", (64, 48)),
        ("a.mkv", "ffv1", "bgr0", (64, 48)),
        ("a.avi", "png", "rgb24", (64, 48)),
        ("a.mkv", "ffv1", "gray", (64, 48)),
        ("a.mkv", "ffv1", "gray10le", (64, 48)),
        ("a.mkv", "ffv1", "gbrp10le", (64, 48)),
        ("a.mkv", "ffv1", "yuv444p", (64, 48)),
        ("a.mov", "qtrle", "argb", (64, 48)),
        ("a.avi", "mjpeg", "yuvj422p", (64, 48)),
    ],
)
@pytest.mark.parametrize("extension", [".mp4", ".mkv"])
def test_unusual_pictures_become_what_players_play(tmp_path, name, codec, pix_fmt, size, extension):
    source, _ = coloured(tmp_path / name, codec, pix_fmt, size)
    info, out = rewrite(source, tmp_path / f"b{extension}")
    if not video.probe(source).has_alpha or extension == ".mp4":
        assert (info.codec, info.source_pix_fmt) in (("h264", "yuv420p"), ("h264", "yuvj420p"))
    assert any("is written as" in note for note in out.notes)
    a, b = next(video.read(source)).rgb().astype(int), next(video.read(info.path)).rgb().astype(int)
    for y, x in ((4, 4), (4, 36), (28, 4), (28, 36)):  # palettes are dithered
        part = np.s_[y : y + 16, x : x + 24]
        assert np.abs(a[part].mean((0, 1)) - b[part].mean((0, 1))).max() <= 4


def test_more_can_be_asked_for(tmp_path):
    source, _ = coloured(tmp_path / "a.mkv", "ffv1", "bgr0")
    cases = {
        (".mp4", None, "yuv444p"): ("h264", "yuv444p"),
        (".mp4", "hevc", None): ("hevc", "yuv420p"),
        (".mp4", "av1", None): ("libdav1d", "yuv420p"),
        (".mov", "prores", None): ("prores", "yuv444p10le"),
        (".mkv", "ffv1", "yuv444p"): ("ffv1", "yuv444p"),
        (".webm", None, None): ("vp9", "yuv420p"),
    }
    for (extension, codec, pix_fmt), expected in cases.items():
        info, _ = rewrite(source, tmp_path / f"b{extension}", codec=codec, pix_fmt=pix_fmt)
        assert (info.codec, info.source_pix_fmt.replace("12le", "10le")) == expected
    info = video.probe(source)
    for extension, options, words in (
        (".webm", {"codec": "h264"}, "does not hold it; choose vp9, av1"),
        (".mp4", {"codec": "h264", "pix_fmt": "rgb24"}, "h264 has .*yuv420p"),
        (".mp4", {"pix_fmt": "bayer"}, "no codec that .mp4 holds has it"),
        (".mkv", {"lossless": True, "codec": "h264"}, "--lossless"),
    ):
        with pytest.raises(UsageError, match=words):
            encoding.choose_encoding(info, extension, **options)
    with pytest.raises(UsageError, match="odd"):
        encoding.choose_encoding(dataclasses.replace(info, width=65), ".mp4", codec="h264")


@pytest.mark.parametrize(
    "name, codec, pix_fmt", [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "prores_ks", "yuva444p10le"), ("b.mov", "qtrle", "argb")]
)
def test_transparency_is_kept_where_it_can_be(tmp_path, name, codec, pix_fmt):
    options = {"auto-alt-ref": "0", "crf": "10", "b": "0"} if codec.startswith("libvpx") else {}
    source, picture = coloured(tmp_path / name, codec, pix_fmt, size=(128, 96), alpha=True, **options)
    assert video.probe(source).has_alpha
    for extension in (".webm", ".mov", ".mkv"):
        info, out = rewrite(source, tmp_path / f"out{extension}")
        assert info.has_alpha and (info.codec == "prores") == (extension == ".mov")
        frames = list(video.read(info.path, info))
        assert len(frames) == 4
        for frame in frames:
            assert np.abs(frame.alpha[:, 4:60].astype(float) / color.OPAQUE - 1).max() < 0.03
            assert np.abs(frame.alpha[:, 68:].astype(float) / color.OPAQUE - 64 / 255).max() < 0.03
    info, out = rewrite(source, tmp_path / "out.mp4")
    assert not info.has_alpha and any("transparency is not written" in note for note in out.notes)


def test_transparency_that_is_everywhere_opaque_is_none(tmp_path):
    source, _ = coloured(tmp_path / "a.gif", "gif", "rgb8")
    assert video.probe(source).source_pix_fmt == "bgra" and not video.probe(source).has_alpha


@pytest.mark.parametrize(
    "codec, pix_fmt, options, profile",
    [
        ("prores_ks", "yuv422p10le", {"profile": "1"}, "LT"),
        ("prores_ks", "yuv422p10le", {"profile": "3"}, "HQ"),
        ("prores_ks", "yuv444p10le", {"profile": "4"}, "4444"),
        ("dnxhd", "yuv422p", {"profile": "dnxhr_sq"}, "DNXHR SQ"),
        ("dnxhd", "yuv422p10le", {"profile": "dnxhr_hqx"}, "DNXHR HQX"),
    ],
)
def test_prores_and_dnxhr_stay_what_they_are_in_quicktime(tmp_path, codec, pix_fmt, options, profile):
    source, _ = coloured(tmp_path / "a.mov", codec, pix_fmt, size=(256, 128), count=2, **options)
    before = video.probe(source)
    info, _ = rewrite(source, tmp_path / "b.mov")
    assert (info.codec, info.profile, info.source_pix_fmt) == (before.codec, before.profile, before.source_pix_fmt)
    assert info.profile == profile
    info, out = rewrite(source, tmp_path / "b.mp4")
    assert info.codec in ("h264", "hevc") and any("is not written: .mov keeps it" in note for note in out.notes)


@pytest.mark.parametrize("bottom", [False, True])
@pytest.mark.parametrize("extension", [".mp4", ".mov", ".mkv"])
def test_field_order_stays_as_it_was(tmp_path, bottom, extension):
    options = {"preset": "ultrafast", "flags": "+ildct+ilme", "x264-params": "bff=1" if bottom else "tff=1"}
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(6)], options=options)
    before = video.probe(tmp_path / "a.mp4")
    assert (before.interlaced, before.bottom_first) == (True, bottom)
    for options in ({}, {"codec": "prores"} if extension == ".mov" else {"lossless": True}):
        info, _ = rewrite(tmp_path / "a.mp4", tmp_path / f"b{extension}", **options)
        if info.codec != "ffv1":
            assert (info.interlaced, info.bottom_first) == (True, bottom), options


MASTERING = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1)"


def test_hdr_mastering_metadata_is_kept(tmp_path):
    params = "log-level=none:hdr10=1:repeat-headers=1:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    params += f":max-cll=1000,400:master-display={MASTERING}"
    tags = {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 16}
    clips.make_clip(tmp_path / "a.mp4", [0, 512, 1024], pix_fmt="yuv420p10le", codec="libx265", options={"x265-params": params}, tags=tags)
    before = video.probe(tmp_path / "a.mp4").mastering
    assert before.display == MASTERING and before.light_level == "1000,400"
    for extension, options in ((".mp4", {}), (".mkv", {}), (".mp4", {"lossless": True}), (".mp4", {"pix_fmt": "yuv422p10le"})):
        info, out = rewrite(tmp_path / "a.mp4", tmp_path / f"b{extension}", **options)
        assert info.mastering == before and not any("HDR" in note for note in out.notes)
    _, out = rewrite(tmp_path / "a.mp4", tmp_path / "b.webm")
    assert any("HDR mastering metadata is not written" in note for note in out.notes)


def test_the_rate_is_limited_by_the_sources(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(10)])
    info = dataclasses.replace(video.probe(tmp_path / "a.mp4"), bit_rate=1_000_000)
    cap = encoding.rate_cap(info)
    assert 700_000 <= cap <= 1_500_000
    chosen = encoding.choose_encoding(info, ".mp4").options
    assert (chosen["crf"], chosen["maxrate"]) == ("16", str(cap))
    assert f"bitrate={cap // 1000}" in encoding.choose_encoding(info, ".mp4", codec="hevc").options["x265-params"]
    for same in ({"crf": 20}, {"lossless": True}):
        assert "maxrate" not in encoding.choose_encoding(info, ".mp4", **same).options
    # What an intra codec spends says nothing about what the pictures need.
    assert "maxrate" not in encoding.choose_encoding(dataclasses.replace(info, codec="mjpeg"), ".mp4").options


# What else a file holds ------------------------------------------------------------------------------------------------------------


def everything(path, start=Fraction(0)):
    """Pictures, sound in French, subtitles, a title, a date, chapters and a timecode; all begin at `start`."""
    with av.open(str(path), "w") as out:
        out.metadata.update({"title": "A talk", "date": "2024-05-06", "artist": "Somebody"})
        picture = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "bf": "0"})
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        tick = Fraction(1, 12800) if path.suffix == ".mp4" else MS
        picture.time_base = picture.codec_context.time_base = tick
        picture.metadata["timecode"] = "01:00:00:00"
        sound = out.add_stream("aac", rate=48000, layout="mono")
        sound.metadata["language"] = "fra"
        text = out.add_mux_stream("mov_text" if path.suffix == ".mp4" else "subrip")
        text.metadata["language"] = "eng"
        out.set_chapters(
            [
                {
                    "id": n,
                    "start": int(1000 * (start + n)),
                    "end": int(1000 * (start + n + 1)),
                    "time_base": MS,
                    "metadata": {"title": f"Part {n}"},
                }
                for n in range(2)
            ]
        )
        for index in range(50):
            frame = av.VideoFrame(64, 48, "yuv420p")
            clips.draw(frame, index)
            frame.pts, frame.time_base = round((start + Fraction(index, 25)) / tick), tick
            out.mux(picture.encode(frame))
        out.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 96000), np.float32), "fltp", "mono")
        frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), round(start * 48000)
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
        words = b"Hello <i>there</i>" if path.suffix != ".mp4" else struct.pack(">H", 11) + b"Hello there"
        packet = av.Packet(words)
        packet.pts = packet.dts = int(1000 * (start + Fraction(1, 2)))
        packet.duration, packet.time_base, packet.stream = 700, MS, text
        out.mux(packet)
    return path


@pytest.mark.parametrize("extension", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("name, start", [("a.mkv", Fraction(7, 5)), ("a.mkv", Fraction(0)), ("a.mp4", Fraction(0))])
def test_titles_chapters_timecode_and_subtitles_are_kept_and_moved(tmp_path, extension, name, start):
    everything(tmp_path / name, start)
    soundfile.write(str(tmp_path / "v.wav"), clips.click_track(48000, 1, 1.9), 48000, subtype="PCM_16")
    rewrite(tmp_path / name, tmp_path / f"b{extension}", extras=True, audio=tmp_path / "v.wav")
    with av.open(str(tmp_path / f"b{extension}")) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
        assert (tags["title"], tags["date"], tags["artist"]) == ("A talk", "2024-05-06", "Somebody")
        chapters = container.chapters()
        assert [float(c["start"] * c["time_base"]) for c in chapters] == pytest.approx([0, 1]) and chapters[1]["metadata"][
            "title"
        ] == "Part 1"
        codes = {value for stream in container.streams for key, value in stream.metadata.items() if key.lower() == "timecode"}
        assert codes == {"01:00:00:00"}
        assert len(container.streams.audio) == 1  # the source's own sound is not kept
        (text,) = container.streams.subtitles
        assert text.metadata["language"] == "eng"
        packet = next(packet for packet in container.demux(text) if packet.size > 2)
        assert float(packet.pts * packet.time_base) == pytest.approx(0.5, abs=0.002) and b"Hello" in bytes(packet)


def test_what_the_container_cannot_hold_is_named(tmp_path):
    clips.make_clip(tmp_path / "a.mkv", [40 * i for i in range(5)], MS)
    with av.open(str(tmp_path / "a.mkv")) as source, av.open(str(tmp_path / "ass.mkv"), "w") as target:
        made, styled = target.add_stream_from_template(source.streams.video[0]), target.add_mux_stream("ass")
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = made
                target.mux(packet)
        words = av.Packet(b"0,0,Default,,0,0,0,,Hello")
        words.pts = words.dts = 40
        words.duration, words.time_base, words.stream = 80, MS, styled
        target.mux(words)
    _, out = rewrite(tmp_path / "ass.mkv", tmp_path / "b.mp4", extras=True)
    assert any("not kept" in note and "ass" in note for note in out.notes)


def test_own_sound_is_kept_when_asked_for_and_the_voice_has_its_language(tmp_path):
    everything(tmp_path / "a.mp4")
    soundfile.write(str(tmp_path / "v.wav"), clips.click_track(48000, 1, 1.5), 48000, subtype="PCM_16")
    for extension in (".mp4", ".mkv", ".webm"):
        _, out = rewrite(
            tmp_path / "a.mp4", tmp_path / f"b{extension}", audio=tmp_path / "v.wav", language="deu", extras=True, keep_audio=True
        )
        with av.open(str(tmp_path / f"b{extension}")) as container:
            voice, own = container.streams.audio
            assert [each.metadata.get("language") for each in (voice, own)] == ["deu", "fra"]
            assert voice.disposition & av.stream.Disposition.default and not own.disposition & av.stream.Disposition.default
    clips_in = {"language": "eng"}
    with av.open(str(tmp_path / "v.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        stream.metadata.update(clips_in)
        frame = av.AudioFrame.from_ndarray(clips.click_track(48000, 1, 1.5).T.copy(), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for extension in (".mp4", ".mkv", ".mov", ".webm"):
        rewrite(tmp_path / "a.mp4", tmp_path / f"c{extension}", audio=tmp_path / "v.m4a", language="deu")
        with av.open(str(tmp_path / f"c{extension}")) as container:
            assert container.streams.audio[0].metadata.get("language") == "eng"


def test_timecodes_are_moved_with_the_clock():
    moved = extras.moved_timecode
    assert moved("01:00:00:00", Fraction(7, 5), Fraction(25)) == "01:00:01:10"
    assert moved("00:00:00:10", Fraction(-1), Fraction(25)) == "23:59:59:10"
    ntsc = Fraction(30000, 1001)
    assert moved("00:00:59;29", 1 / ntsc, ntsc) == "00:01:00;02"  # numbers 0 and 1 of a minute are dropped
    assert moved("00:09:59;29", 1 / ntsc, ntsc) == "00:10:00;00"  # but for every tenth
    assert moved("01:00:00;00", Fraction(0), ntsc) == "01:00:00;00"


def test_a_link_stays_and_the_file_behind_it_is_written(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(5)])
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real.mp4").write_bytes(b"old")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "far" / "real.mp4")
    rewrite(tmp_path / "a.mp4", tmp_path / "link.mp4")
    assert (tmp_path / "link.mp4").is_symlink() and len(list(video.read(tmp_path / "far" / "real.mp4"))) == 5
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["real.mp4"]
