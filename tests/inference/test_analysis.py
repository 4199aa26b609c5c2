"""The first pass: shots, faces and times, with a stand-in for the detector so that every case is exact."""

from fractions import Fraction

import av
import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.analysis import analyse
from keysync_jax.media.faces import Face, FaceBackend


class Scripted(FaceBackend):
    """Answers with a prepared list of faces, frame after frame."""

    def __init__(self, frames):
        self._frames = iter(frames)

    def detect(self, rgb):
        return next(self._frames)

    def close(self):
        pass


def face(x=60.0, y=40.0, size=60.0, mouth=0.0):
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 17), np.linspace(0, 1, 4)), -1).reshape(68, 2)
    points = np.array([x, y]) + size * grid
    points[48:, 1] += mouth
    return Face.from_landmarks(points.astype(np.float32), 1.0)


def write(path, pictures):
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height = pictures[0].shape[1], pictures[0].shape[0]
        for picture in pictures:
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        writer.mux(stream.encode())
    return path


def view(shade, patch=0):
    """A textured picture; `patch` changes a mouth-sized block of it."""
    picture = np.tile(np.linspace(0, 120, 160).astype(np.uint8)[None, :, None], (120, 1, 3)) + np.uint8(shade)
    picture[60:110, 50:110] += np.uint8(patch)
    return picture


def test_a_mouth_that_snaps_shut_is_no_cut(tmp_path):
    path = write(tmp_path / "a.mp4", [view(20, 0)] * 12 + [view(20, 40)] * 12)
    seen = analyse(path, Scripted([[face()]] * 12 + [[face(mouth=12)]] * 12))
    assert [(s.start, s.stop) for s in seen.shots] == [(0, 24)]
    # The same pictures are a cut where the face itself jumps, or goes.
    seen = analyse(path, Scripted([[face()]] * 12 + [[face(x=75)]] * 12))
    assert [(s.start, s.stop) for s in seen.shots] == [(0, 12), (12, 24)]
    assert [seen.shot_of(frame).index for frame in (0, 11, 12, 23)] == [0, 0, 1, 1]
    seen = analyse(path, Scripted([[face()]] * 12 + [[]] * 12))
    assert [s.crop is None for s in seen.shots] == [False, True]


def test_a_different_view_is_a_cut_wherever_the_face_is(tmp_path):
    path = write(tmp_path / "b.mp4", [view(10)] * 12 + [view(120)[:, ::-1].copy()] * 12)
    seen = analyse(path, Scripted([[face()]] * 24))
    assert [(s.start, s.stop) for s in seen.shots] == [(0, 12), (12, 24)]


def test_times_gaps_and_runs(tmp_path):
    path = write(tmp_path / "c.mp4", [view(20)] * 30)
    found = [[face()]] * 8 + [[]] * 3 + [[face()]] * 5 + [[]] * 8 + [[face()]] * 6
    ticks = []
    seen = analyse(path, Scripted(found), on_frame=lambda: ticks.append(1))
    assert seen.times == [Fraction(i, 25) for i in range(30)] and len(ticks) == 30
    (shot,) = seen.shots
    assert shot.faces.runs == [(0, 16), (24, 30)]  # three missed frames are bridged, eight are not
    assert not shot.faces.detected[8:11].any() and shot.faces.usable[8:11].all()


def test_a_point_outside_the_picture_is_no_choice_of_a_face(tmp_path):
    path = write(tmp_path / "e.mp4", [view(20)] * 5)
    assert analyse(path, Scripted([[face()]] * 5), "160,120").shots[0].faces.detected.all()
    for point in ("640,60", "60,-1"):  # read off another version of the video
        with pytest.raises(UsageError, match=f"--face {point} lies outside the 160x120 picture of .*e.mp4"):
            analyse(path, Scripted([[face()]] * 5), point)


def test_no_face_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "d.mp4", [view(20)] * 5)
    with pytest.raises(KeySyncError, match="no face found in any of 5 frames"):
        analyse(path, Scripted([[]] * 5))


def test_a_video_without_a_face_may_pass(tmp_path):
    seen = analyse(write(tmp_path / "d.mp4", [view(20)] * 5), Scripted([[]] * 5), no_face="pass")
    assert not seen.has_face and seen.shots[0].crop is None and any("no face in any frame" in note for note in seen.notes)


class Recording(Scripted):
    """Says what it was shown."""

    def detect(self, rgb):
        self.shape = rgb.shape
        return super().detect(rgb)


@pytest.mark.parametrize("aspect, shown", [(Fraction(16, 11), (120, 233)), (Fraction(8, 9), (135, 160))])
def test_faces_are_looked_for_in_the_shape_that_is_shown(tmp_path, aspect, shown):
    path = tmp_path / "e.mp4"
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height = 160, 120
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(5):
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(view(20), format="rgb24")))
        writer.mux(stream.encode())
    backend = Recording([[face(x=90)]] * 5)
    (shot,) = analyse(path, backend).shots
    assert backend.shape[:2] == shown
    # Landmarks are the stored picture's; the square is one as it is shown.
    x = shot.faces.landmarks[2, :, 0]
    assert x.min() == pytest.approx(90 * 160 / shown[1], abs=0.1) and np.ptp(x) == pytest.approx(60 * 160 / shown[1], abs=0.1)
    x0, y0, x1, y1 = shot.crop.box
    assert (x1 - x0) * float(aspect) == pytest.approx(y1 - y0)


def test_a_dissolve_ends_a_run_and_is_left_alone(tmp_path):
    old, new = view(20).astype(float), view(130)[::-1, ::-1].astype(float)
    new[:60] *= 0.3
    weights = np.clip((np.arange(50) - 18) / 12, 0, 1)
    path = write(tmp_path / "f.mp4", [((1 - w) * old + w * new).astype(np.uint8) for w in weights])
    seen = analyse(path, Scripted([[face()]] * 50))
    assert len(seen.shots) == 2 and abs(seen.shots[1].start - 24) <= 2
    (first,), (second,) = (shot.faces.runs for shot in seen.shots)
    (blend,) = seen.dissolved
    assert first == (0, blend.start) and seen.shots[1].start + second[0] == blend.stop
    assert 18 <= blend.start < 22 and 27 < blend.stop <= 31


def test_several_faces_are_said_with_their_places(tmp_path):
    seen = analyse(write(tmp_path / "g.mp4", [view(20)] * 10), Scripted([[face(x=10), face(x=90, size=50)]] * 10))
    (note,) = seen.notes
    assert "2 faces" in note and "40,70" in note and "115,65" in note and "--face" in note
