"""Cuts in the preparation: PySceneDetect's verdict, but not against a face that stays where it is."""

import sys

import av
import numpy as np
import pytest
from broken_inputs import cut_up, encode

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare.face_track import FacesInFrame
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.shot_bounds import CutFinder, check_package
from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.media import video
from keysync_jax.media.faces import Face, FaceBackend


def lossless(path, pictures):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264rgb", rate=25, options={"qp": "0", "preset": "ultrafast"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "rgb24"
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        out.mux(stream.encode())
    return path


def no_faces(frame):
    return []


def cuts(path, faces_in=no_faces):
    finder = CutFinder(faces_in)
    with video.read(path) as reader:
        for frame in reader:
            finder.update(frame)
    return finder.finish()


@pytest.fixture(scope="module")
def talkers():
    """Frames `[60, 96, 96, 3]` of two drawn talkers."""
    return [make_clip(seed, 60, 96).frames for seed in (41, 52)]


def test_every_cut_at_its_frame_and_none_elsewhere(tmp_path):
    frames, samples = cut_up(180, 10)
    assert cuts(encode(tmp_path / "a.mp4", frames, samples)) == [180 * k // 11 for k in range(1, 11)]


@pytest.mark.parametrize("at", [1, 2, 3, 30, 57, 58, 59])
def test_cuts_next_to_either_end_are_seen(tmp_path, talkers, at):
    a, b = talkers
    assert cuts(lossless(tmp_path / "a.mkv", [*a[:at], *b[at:]])) == [at]


def test_a_cut_soon_after_another_is_not_left_inside_a_clip(tmp_path, talkers):
    a, b = talkers
    assert cuts(lossless(tmp_path / "a.mkv", [*a[:20], *b[20:24], *a[24:]])) == [20, 24]


def test_one_talker_has_none(tmp_path):
    for seed in (3, 15):  # the two of thirty whose mouths move fastest
        assert cuts(lossless(tmp_path / f"{seed}.mkv", make_clip(seed, 100, 128).frames)) == []


def face(x=30.0, mouth=0.0):
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 17), np.linspace(0, 1, 4)), -1).reshape(68, 2)
    points = np.array([x, 20]) + 50 * grid
    points[48:, 1] += mouth
    return Face.from_landmarks(points.astype(np.float32), 1.0)


def close_up(opened):
    """A rosy face that fills the picture; with its mouth open the chin is in shade and its hue passes through zero (178 to 2 of 180)."""
    picture = np.full((96, 96, 3), (180, 100, 104), np.uint8)
    picture[:, :, 2] += np.linspace(0, 6, 96).astype(np.uint8)[:, None]
    if opened:
        picture[55:] = (160, 96, 92)
        picture[66:78, 36:60] = (60, 20, 20)
    return picture


def test_a_mouth_that_pops_open_in_a_close_up_is_no_cut(tmp_path):
    path = lossless(tmp_path / "a.mkv", [close_up(False)] * 12 + [close_up(True)] * 12)
    asked = []

    def faces_in(second):
        def look(frame):
            asked.append(frame.index)
            return [face()] if frame.index < 12 else second

        return look

    assert cuts(path) == [12]  # what PySceneDetect says by itself
    assert cuts(path, faces_in([face(mouth=15)])) == []
    assert asked == [11, 12]
    assert cuts(path, faces_in([face(x=40)])) == [12]
    assert cuts(path, faces_in([])) == [12]
    assert cuts(path, faces_in([face(), face(x=60)])) == [12]
    # A change of the whole picture is a cut even where the faces are in the same place.
    path = lossless(tmp_path / "b.mkv", [close_up(False)] * 12 + [close_up(True) // 2] * 12)
    assert cuts(path, faces_in([face()])) == [12]


def test_faces_of_single_frames(tmp_path):
    pictures = [close_up(False)] * 4
    path = lossless(tmp_path / "a.mkv", pictures)
    points = np.stack([face(x=10.0 * i).landmarks for i in range(3)])
    points[1] = np.nan
    np.save(tmp_path / "a.npy", points)
    frames = list(video.read(path))
    from_file = FacesInFrame(Item(str(path), "a", landmarks=str(tmp_path / "a.npy")), None)
    assert [len(from_file(frame)) for frame in frames] == [1, 0, 1, 0]  # too short a sidecar is dealt with later
    np.testing.assert_array_equal(from_file(frames[2])[0].landmarks, points[2])

    class Backend(FaceBackend):
        resets = 0

        def detect(self, rgb):
            return [face(x=0), face(x=46)]

        def reset(self):
            self.resets += 1

        def close(self):
            pass

    backend = Backend()
    assert len(FacesInFrame(Item(str(path), "a"), backend)(frames[0])) == 2
    (right,) = FacesInFrame(Item(str(path), "a", box=(0.5, 0, 1, 1)), backend)(frames[0])
    assert right.box[0] == 46 and backend.resets == 2


def test_without_pyscenedetect_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(KeySyncError, match=r"pip install .keysync-jax\[data\]") as caught:
        check_package()
    assert "\n" not in str(caught.value)
