"""Reading from the middle gives what reading from the start gives: the same indices, times and samples, whatever the container says."""

from fractions import Fraction

import av
import clips
import numpy as np
import pytest

from keysync_jax.media import video

COUNT = 130
GOP = {"preset": "ultrafast", "g": "24"}
B_FRAMES = {"g": "24", "bf": "3", "preset": "veryfast"}
RNG = np.random.default_rng(5)
UNEVEN = np.cumsum(RNG.integers(200, 1400, COUNT)).tolist()
EVEN = [512 * i for i in range(COUNT)]
MILLISECONDS = [40 * i for i in range(COUNT)]

# name: (file, time stamps, ticks per second, codec, encoder options, container format)
FILES = {
    "mp4 with B-frames": ("a.mp4", EVEN, 12800, "libx264", B_FRAMES, None),
    "mp4, variable rate, late start": ("a.mp4", [777 + t for t in UNEVEN], 12800, "libx264", B_FRAMES, None),
    "mov, every picture a keyframe": ("a.mov", EVEN, 12800, "mjpeg", {}, None),
    "mkv": ("a.mkv", MILLISECONDS, 1000, "libx264", B_FRAMES, None),
    "mkv, open groups": ("a.mkv", MILLISECONDS, 1000, "libx264", B_FRAMES | {"x264-params": "open-gop=1"}, None),
    "mkv, gradual refresh": ("a.mkv", MILLISECONDS, 1000, "libx264", GOP | {"x264-params": "intra-refresh=1"}, None),
    "mp4 hevc": ("a.mp4", EVEN, 12800, "libx265", {"preset": "ultrafast", "x265-params": "keyint=24:log-level=none"}, None),
    "webm": ("a.webm", MILLISECONDS, 1000, "libvpx-vp9", {"g": "24", "cpu-used": "8", "deadline": "realtime"}, None),
    "webm with hidden pictures": ("a.webm", MILLISECONDS, 1000, "libvpx", {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16"}, None),
    "avi": ("a.avi", list(range(COUNT)), 25, "mpeg4", {"g": "24"}, None),
    "transport stream": ("a.ts", [90000 + 3600 * i for i in range(COUNT)], 90000, "libx264", B_FRAMES, None),
    "raw stream without index or times": ("a.h264", list(range(COUNT)), 25, "libx264", GOP, "h264"),
}


def contents(frames):
    return [(f.index, f.pts, f.time, b"".join(np.ascontiguousarray(p).tobytes() for p in f.planes())) for f in frames]


def noted(path):
    """The frames of a pass from the start, and its keyframes."""
    with video.read(path, note_keyframes=True) as reader:
        return contents(reader), reader.keyframes


def check(path, whole, keyframes, starts=(1, 23, 60, 100, COUNT - 1)):
    info = video.probe(path)
    for start in starts:
        with video.read(path, info, start, keyframes) as reader:
            assert contents(reader) == whole[start:], start


def count_decoded(monkeypatch):
    """List that grows by one per picture that a reader takes from the decoder."""
    taken = []
    honest = video.VideoReader._checked

    def checked(self, *args):
        for picture in honest(self, *args):
            taken.append(picture.pts)
            yield picture

    monkeypatch.setattr(video.VideoReader, "_checked", checked)
    return taken


@pytest.mark.parametrize("name", FILES)
def test_from_the_middle_as_from_the_start(name, tmp_path, monkeypatch):
    file, pts, rate, codec, options, container_format = FILES[name]
    path = tmp_path / file
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    clips.make_clip(path, pts, Fraction(1, rate), pix_fmt=pix_fmt, codec=codec, options=options, container_format=container_format)
    whole, keyframes = noted(path)
    assert len(whole) == COUNT and [w[0] for w in whole] == list(range(COUNT))
    check(path, whole, keyframes)
    taken = count_decoded(monkeypatch)
    next(video.read(path, start=COUNT - 1, keyframes=keyframes))
    # A gradual refresh has no picture that stands alone: after a seek it comes out otherwise, and the whole is read.
    seekable = not name.startswith("raw") and "gradual" not in name
    assert (len(taken) < COUNT / 2) == seekable, len(taken)


def fragmented(source, target):
    """Copy a file into MP4 fragments, as streaming sites store it."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options={"movflags": "frag_keyframe+empty_moov"}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                writer.mux(packet)


def without_cues(source, target):
    """A Matroska file that breaks off before its index, as a recording that was not closed."""
    data = source.read_bytes()
    at = data.rindex(b"\x1c\x53\xbb\x6b")
    target.write_bytes(data[:at])


def cut_at_the_start(source, target):
    """Copy from the second group on but one: the edit list hides what was decoded only for reference."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - 10 * 512, packet.dts - 10 * 512
                packet.stream = stream
                writer.mux(packet)


@pytest.mark.parametrize("change", [fragmented, without_cues, cut_at_the_start])
def test_odd_containers(change, tmp_path):
    mkv = change is without_cues
    source, target = (tmp_path / f"{name}.{'mkv' if mkv else 'mp4'}" for name in ("source", "target"))
    clips.make_clip(source, MILLISECONDS if mkv else EVEN, Fraction(1, 1000 if mkv else 12800), options=B_FRAMES)
    change(source, target)
    whole, keyframes = noted(target)
    assert COUNT - 10 <= len(whole) <= COUNT
    check(target, whole, keyframes, (1, 23, 60, len(whole) - 1))


def test_a_clock_that_restarts_is_not_mistaken(tmp_path):
    """The second part holds the first one's times again: a seek may end up in the wrong one, which its picture gives away."""
    parts = []
    for name, paint_from in (("a.ts", 0), ("b.ts", 40)):
        options = {"bf": "0", "g": "10", "preset": "ultrafast"}
        stamps = [90000 + 3600 * i for i in range(60)]
        paint = lambda frame, index, first=paint_from: clips.draw(frame, index + first)  # noqa: E731
        clips.make_clip(tmp_path / name, stamps, Fraction(1, 90000), options=options, paint=paint)
        parts.append((tmp_path / name).read_bytes())
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    whole, keyframes = noted(tmp_path / "joined.ts")
    assert len(whole) == 120
    assert max(k.index for k in keyframes) < 60  # none whose stored time is not its time
    check(tmp_path / "joined.ts", whole, keyframes, (5, 35, 59, 60, 85, 119))


def test_damage_behind_the_start_is_repaired_as_ever(tmp_path):
    path = tmp_path / "a.mkv"
    clips.make_clip(path, MILLISECONDS, Fraction(1, 1000), size=(160, 128), options=GOP | {"crf": "10"})
    data = bytearray(path.read_bytes())
    for at in np.random.default_rng(3).integers(len(data) * 2 // 3, len(data) - 200, 25):
        data[at : at + 8] = RNG.integers(0, 256, 8, np.uint8).tobytes()
    path.write_bytes(data)
    whole, keyframes = noted(path)
    assert keyframes[1].index < 50
    check(path, whole, keyframes, (30, 50, len(whole) - 5))
    with video.read(path, start=50, keyframes=keyframes) as reader:
        list(reader)
    assert any("damaged" in note or "unreadable" in note for note in reader.notes)


def test_a_keyframe_of_another_file_is_not_believed(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", EVEN, options=GOP)
    clips.make_clip(tmp_path / "b.mp4", EVEN, options=GOP, paint=lambda frame, index: clips.draw(frame, index + 7))
    whole, _ = noted(tmp_path / "a.mp4")
    _, foreign = noted(tmp_path / "b.mp4")
    check(tmp_path / "a.mp4", whole, foreign)


def test_a_start_behind_the_end_gives_nothing(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", EVEN, options=GOP)
    _, keyframes = noted(tmp_path / "a.mp4")
    assert list(video.read(tmp_path / "a.mp4", start=COUNT, keyframes=keyframes)) == []
    assert list(video.read(tmp_path / "a.mp4", start=10 * COUNT)) == []


def test_keyframes_are_noted_only_on_request_and_not_each_of_many(tmp_path):
    clips.make_clip(tmp_path / "a.mov", EVEN, pix_fmt="yuvj420p", codec="mjpeg", options={})
    with video.read(tmp_path / "a.mov") as reader:
        assert len(list(reader)) == COUNT and reader.keyframes == []
    _, keyframes = noted(tmp_path / "a.mov")
    gaps = {b.index - a.index for a, b in zip(keyframes, keyframes[1:], strict=False)}
    assert gaps == {13}  # half a second
