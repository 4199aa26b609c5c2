"""Photos, slides and sequences of pictures become films; videos stay what they are."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from keysync_jax.core.errors import KeySyncError
from keysync_jax.inference.clip_io import VideoFile, open_video
from keysync_jax.inference.sequences import is_sequence
from keysync_jax.inference.stills import Film, as_film


def picture(shade):
    return np.full((48, 64, 3), shade, np.uint8)


def write(path, shades, stamps, tick=Fraction(1, 1000)):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.time_base = 64, 48, tick
        stream.codec_context.time_base = tick
        for shade, stamp in zip(shades, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(picture(shade), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = stamp, tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def seen(film):
    frames = list(film.read())
    assert [frame.index for frame in frames] == [frame.pts for frame in frames] == list(range(len(frames)))
    assert all(frame.time == Fraction(frame.index, 25) for frame in frames)
    assert len({id(frame.av_frame) for frame in frames}) == len(frames)  # each may be painted on
    return [int(frame.rgb().mean().round()) for frame in frames]


def test_a_photo_is_shown_as_long_as_the_voice(tmp_path):
    Image.fromarray(picture(90)).save(tmp_path / "photo.png")
    film = as_film(open_video(tmp_path / "photo.png"), 2.4)
    assert seen(film) == [90] * 60
    assert (film.info.frames, film.info.average_rate, film.info.duration_s) == (60, 25, 2.4)
    reader = film.read()
    first, second = next(reader), next(reader)
    first.av_frame.make_writable()
    for plane in first.planes():
        plane[...] = 0
    assert second.rgb().mean() == 90
    assert any("still picture" in note for note in reader.notes)


def test_slides_change_when_they_did(tmp_path):
    slides = VideoFile(write(tmp_path / "slides.mkv", [50, 100, 150], [0, 1000, 2000]))
    film = as_film(slides, 4.0)
    shades = np.array(seen(film))
    assert len(shades) == 100
    assert np.abs(shades - np.repeat([50, 100, 150], [25, 25, 50])).max() <= 1
    short = as_film(slides, 1.6)
    reader = short.read()
    assert len(list(reader)) == 40 and any("left out" in note for note in reader.notes)


def test_cameras_screen_recordings_and_short_videos_are_no_slides(tmp_path):
    for name, stamps in (
        ("slow", range(0, 5000, 500)),
        ("usual", range(0, 400, 40)),
        ("recording", [0, 40, 80, 120, 160, 200, 1200, 1240, 1280, 3200, 3240, 4000]),
    ):
        source = VideoFile(write(tmp_path / f"{name}.mkv", [90] * len(stamps), stamps))
        assert as_film(source, 3.0) is source, name


def test_a_folder_is_a_clip_in_the_order_of_its_numbers(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(1, 13):
        Image.fromarray(picture(10 * number)).save(folder / f"f_{number}.png")
    (folder / "notes.txt").write_text("not a picture")
    for name in (folder, folder / "f_%d.png", folder / "f_*.png"):
        assert is_sequence(name)
        sequence = open_video(name)
        assert seen(sequence) == [10 * number for number in range(1, 13)]
        assert as_film(sequence, 0.4) is sequence
        held = as_film(sequence, 1.0)
        assert isinstance(held, Film) and seen(held)[11:] == [120] * 14
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeySyncError, match="no pictures there"):
        open_video(tmp_path / "empty")
    (folder / "f_5.png").write_bytes(b"no picture")
    with pytest.raises(KeySyncError, match="f_5.png"):
        list(open_video(folder).read())
