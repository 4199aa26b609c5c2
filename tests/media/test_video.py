"""Decoding: timestamps, orientation, colours, repairs and refusals."""

from fractions import Fraction

import av
import clips
import numpy as np
import pytest
from bounds import approx

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import color, video
from keysync_jax.media.orientation import Orientation

RATES = [Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(60)]
VFR = [0, 400, 1111, 1500, 3999, 4000, 4410, 9000]


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_constant_rates_keep_their_exact_times(tmp_path, rate):
    base = 1 / (rate * rate.denominator)  # one frame is `denominator` ticks
    pts = [rate.denominator * i for i in range(12)]
    clips.make_clip(tmp_path / "a.mp4", pts, base, rate=rate)
    info = video.probe(tmp_path / "a.mp4")
    frames = list(video.read(tmp_path / "a.mp4"))
    assert (info.average_rate, info.time_base, info.frames) == (rate, base, 12)
    assert [frame.time for frame in frames] == [i / rate for i in range(12)]
    assert [frame.index for frame in frames] == list(range(12))
    assert info.duration_s == approx(float(12 / rate))


def test_variable_rate_and_late_start(tmp_path):
    pts = [stamp + 777 for stamp in VFR]
    clips.make_clip(tmp_path / "a.mp4", pts, Fraction(1, 12800))
    with video.read(tmp_path / "a.mp4") as reader:
        frames = list(reader)
    assert [frame.pts for frame in frames] == pts
    assert reader.info.start_time == Fraction(777, 12800)
    assert reader.notes == []


def test_every_pass_gives_the_same_pictures(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(10)])
    first, second = ([(f.pts, [p.copy() for p in f.planes()]) for f in video.read(tmp_path / "a.mp4")] for _ in range(2))
    assert len(first) == 10
    for (pts_a, a), (pts_b, b) in zip(first, second, strict=True):
        assert pts_a == pts_b and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# Display matrices as cameras write them, with the NumPy operation that turns the picture upright.
ONE = 65536
MATRICES = {
    "none": (None, 0, lambda a: a),
    "90 clockwise": ((0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30), 270, lambda a: np.rot90(a, -1)),
    "180": ((-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30), 180, lambda a: np.rot90(a, 2)),
    "90 anticlockwise": ((0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30), 90, lambda a: np.rot90(a, 1)),
    "mirrored": ((-ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), 0, lambda a: a[:, ::-1]),
    "transposed": ((0, ONE, 0, ONE, 0, 0, 0, 0, 1 << 30), 90, lambda a: a.swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_rotation_tag_is_applied(tmp_path, name):
    matrix, rotation, turn = MATRICES[name]
    planes = clips.make_clip(tmp_path / "a.mp4", [0, 512], size=(64, 48), pix_fmt="yuv444p", options={"qp": "0"}, matrix=matrix)
    info = video.probe(tmp_path / "a.mp4")
    frame = next(video.read(tmp_path / "a.mp4"))
    upright = turn(planes[0][0])
    assert (info.display_height, info.display_width) == upright.shape
    assert (info.width, info.height, info.rotation) == (64, 48, rotation)
    assert np.array_equal(info.orientation.upright(frame.planes()[0]), upright)
    assert np.array_equal(info.orientation.stored(upright), planes[0][0])
    expected = turn(color.to_rgb(np.stack(planes[0], -1).astype(np.float32), info.planes))
    assert np.abs(frame.rgb() - np.clip(expected * 255, 0, 255)).max() < 2.5
    assert frame.thumbnail(32).shape[:2] == ((32, 24) if upright.shape[0] > upright.shape[1] else (24, 32))


@pytest.mark.parametrize("name", [name for name in MATRICES if name != "none"])
def test_boxes_turn_with_the_picture(name):
    matrix, _, turn = MATRICES[name]
    orientation = Orientation.from_matrix(matrix)
    stored = np.zeros((20, 30), bool)
    stored[4:9, 7:12] = True  # y0 4, x0 7, side 5
    upright = orientation.upright(stored)
    rows, cols = np.flatnonzero(upright.any(1)), np.flatnonzero(upright.any(0))
    box = (cols[0], rows[0], len(cols))
    assert orientation.stored_box(box, upright.shape[1], upright.shape[0]) == (7, 4, 5)


# (pixel format, codec, options, colour tags): matrix and range must be honoured, 8 to 12 bits.
COLOURED = [
    ("yuv420p", "libx264", {"qp": "0"}, {"colorspace": 1, "color_range": 1}),
    ("yuv420p", "libx264", {"qp": "0"}, {"colorspace": 6, "color_range": 1}),
    ("yuvj420p", "libx264", {"qp": "0"}, {"colorspace": 5, "color_range": 2}),
    ("yuv422p10le", "libx264", {"qp": "0"}, {"colorspace": 1, "color_range": 1}),
    ("yuv420p10le", "libx265", {"x265-params": "lossless=1:log-level=none"}, {"colorspace": 9, "color_range": 1}),
    ("yuv444p12le", "libx265", {"x265-params": "lossless=1:log-level=none"}, {"colorspace": 9, "color_range": 2}),
    ("gbrp", "libx265", {"x265-params": "lossless=1:log-level=none"}, {"colorspace": 0, "color_range": 2}),
]


@pytest.mark.parametrize("pix_fmt, codec, options, tags", COLOURED)
def test_rgb_follows_matrix_range_and_depth(tmp_path, pix_fmt, codec, options, tags):
    rgb = np.zeros((64, 64, 3), np.float32)
    for number, colour in enumerate([(0.9, 0.2, 0.1), (0.1, 0.8, 0.3), (0.15, 0.2, 0.9), (0.7, 0.5, 0.4)]):
        rgb[32 * (number // 2) :, 32 * (number % 2) :] = colour
    fmt = color.plane_format(pix_fmt, tags["colorspace"], tags["color_range"], 64, 64)

    def paint(frame, index):
        codes = color.to_codes(rgb, fmt)
        for number, plane in enumerate(color.plane_views(frame)):
            values = np.ascontiguousarray(codes[:, :, number])
            plane[...] = np.rint(color.subsample(values, fmt) if number and fmt.family == "yuv" else values)

    pts = [0, 512, 1024, 1536]
    clips.make_clip(tmp_path / "a.mp4", pts, size=(64, 64), pix_fmt=pix_fmt, codec=codec, options=options, tags=tags, paint=paint)
    info = video.probe(tmp_path / "a.mp4")
    frame = next(video.read(tmp_path / "a.mp4"))
    assert info.planes == fmt
    # Away from the edges between the patches, where chroma is shared.
    middle = np.ix_([8, 16, 24, 40, 48, 56], [8, 16, 24, 40, 48, 56])
    assert np.abs(frame.rgb()[middle] - 255 * rgb[middle]).max() <= 2.6
    assert np.abs(frame.thumbnail(16)[[4, 4, 12, 12], [4, 12, 4, 12]] - 255 * rgb[[16, 16, 48, 48], [16, 48, 16, 48]]).max() <= 3


def test_packed_format_is_read_as_planar_without_loss(tmp_path):
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (48, 64, 2), np.uint8)

    def paint(frame, index):
        plane = frame.planes[0]
        np.frombuffer(plane, np.uint8).reshape(48, plane.line_size)[:, :128] = packed.reshape(48, 128)

    clips.make_clip(tmp_path / "a.nut", [0, 1], Fraction(1, 25), pix_fmt="yuyv422", codec="rawvideo", options={}, paint=paint)
    reader = video.read(tmp_path / "a.nut")
    y, cb, cr = next(reader).planes()
    assert (reader.info.source_pix_fmt, reader.info.pix_fmt) == ("yuyv422", "yuv422p")
    assert "yuyv422" in reader.notes[0]
    assert np.array_equal(y, packed[:, :, 0])
    assert np.array_equal(cb, packed[:, 0::2, 1]) and np.array_equal(cr, packed[:, 1::2, 1])


def test_missing_timestamps_are_continued(tmp_path):
    clips.make_clip(tmp_path / "a.h264", [i for i in range(8)], Fraction(1, 25), options={"preset": "ultrafast"}, container_format="h264")
    reader = video.read(tmp_path / "a.h264")
    times = [frame.time for frame in reader]
    assert times == [i * Fraction(1, 25) for i in range(8)]
    assert "without a timestamp" in reader.notes[0] and reader.notes[0].startswith("8 x")


def test_repeated_timestamps_move_on_by_one_tick(tmp_path):
    clips.make_clip(tmp_path / "a.mkv", list(range(0, 12)), Fraction(1, 2000), codec="ffv1", options={}, rate=Fraction(2000))
    reader = video.read(tmp_path / "a.mkv")
    stamps = [frame.pts for frame in reader]
    assert len(stamps) == 12 and all(b > a for a, b in zip(stamps, stamps[1:], strict=False))
    assert any("repeated timestamp" in note for note in reader.notes)


def test_a_clock_that_restarts_is_continued(tmp_path):
    parts = []
    for name, start in (("a.ts", 900000), ("b.ts", 90000)):
        clips.make_clip(tmp_path / name, [start + 3600 * i for i in range(10)], Fraction(1, 90000), options={"bf": "0"})
        parts.append((tmp_path / name).read_bytes())
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    reader = video.read(tmp_path / "joined.ts")
    times = [frame.time for frame in reader]
    steps = {b - a for a, b in zip(times, times[1:], strict=False)}
    assert len(times) == 20 and steps == {Fraction(1, 25)}
    assert any("restart of the clock" in note for note in reader.notes)


def test_size_change_inside_the_file_is_scaled_back(tmp_path):
    parts = []
    for name, size, start in (("a.ts", (64, 48), 90000), ("b.ts", (96, 80), 126000)):
        clips.make_clip(tmp_path / name, [start + 3600 * i for i in range(10)], Fraction(1, 90000), size=size, options={"bf": "0"})
        parts.append((tmp_path / name).read_bytes())
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    reader = video.read(tmp_path / "joined.ts")
    shapes = {frame.planes()[0].shape for frame in reader}
    assert shapes == {(48, 64)} and any("another size" in note for note in reader.notes)


def test_damaged_file_is_read_the_same_way_every_time(tmp_path):
    path = tmp_path / "a.mkv"
    clips.make_clip(path, [40 * i for i in range(60)], Fraction(1, 1000), size=(160, 128), options={"preset": "ultrafast", "crf": "10"})
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(3)
    for at in rng.integers(len(data) // 3, len(data) - 200, 25):
        data[at : at + 8] = rng.integers(0, 256, 8, np.uint8).tobytes()
    path.write_bytes(data)
    info = video.probe(path)
    passes = []
    for _ in range(2):
        reader = video.read(path, info)
        passes.append([(frame.pts, b"".join(plane.tobytes() for plane in frame.planes())) for frame in reader])
        assert any("damaged" in note or "unreadable" in note for note in reader.notes)
    assert passes[0] == passes[1] and len(passes[0]) >= 20
    assert all(b[0] > a[0] for a, b in zip(passes[0], passes[0][1:], strict=False))


def test_truncated_file_gives_what_is_there(tmp_path):
    path = tmp_path / "a.mkv"
    clips.make_clip(path, [40 * i for i in range(50)], Fraction(1, 1000), options={"preset": "ultrafast", "bf": "0"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    frames = list(video.read(path))
    assert 10 < len(frames) < 50 and [f.pts for f in frames] == [40 * i for i in range(len(frames))]


def test_start_time_is_the_earliest_of_picture_and_sound(tmp_path):
    path = tmp_path / "a.ts"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=25, options={"bf": "0"})
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("mp2", rate=48000)
        sound.codec_context.layout = "mono"
        for index in range(10):
            frame = av.VideoFrame(64, 48, "yuv420p")
            clips.draw(frame, index)
            frame.pts, frame.time_base = index + 5, Fraction(1, 25)
            container.mux(picture.encode(frame))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1152 * 20), np.int16), format="s16", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = 48000, 0, Fraction(1, 48000)
        container.mux(sound.encode(samples))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))
    info = video.probe(path)
    first = next(video.read(path))
    assert info.has_audio and 0.15 < first.time - info.start_time < 0.25


def test_refusals_are_one_clear_line(tmp_path):
    (tmp_path / "text.mp4").write_text("this is no film\n" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://example.invalid/a.ts\n")
    clips.make_clip(tmp_path / "whole.mp4", [512 * i for i in range(10)])
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:700])
    (tmp_path / "codec.mp4").write_bytes(b"zzzz".join(whole.rsplit(b"avc1", 1)))  # the sample entry
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    cases = {
        "missing.mp4": "no such file",
        "text.mp4": "not a complete video file",
        "empty.mp4": "is empty",
        "list.mp4": "not a",
        "cut.mp4": "not a complete video file",
        "sound.mp4": "no video stream",
        "codec.mp4": "codec is not known",
        ".": "folder",
    }
    for name, words in cases.items():
        with pytest.raises(KeySyncError, match=words) as caught:
            video.probe(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_video_stream_without_a_picture_is_refused(tmp_path):
    path = tmp_path / "a.mkv"
    clips.make_clip(path, [0, 40, 80], Fraction(1, 1000))
    with av.open(str(path)) as source, av.open(str(tmp_path / "none.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                junk = av.Packet(bytes(len(bytes(packet))))
                junk.pts, junk.dts, junk.time_base, junk.stream = packet.pts, packet.dts, packet.time_base, stream
                target.mux(junk)
    with pytest.raises(KeySyncError, match="no picture"):
        video.probe(tmp_path / "none.mkv")
