"""Landmark backends: mediapipe on drawn faces whose geometry is known, FAN's adapter on a stand-in package, the 68-point order."""

import pathlib
import subprocess
import sys
import textwrap
import types

import cv2
import numpy as np
import pytest
from bounds import close

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.media import face_models, faces, landmarks
from keysync_jax.media.faces import Face, open_backend

# Where things stand on the drawn face, in units of its size, from its middle (x to the right, y down).
EYES = [(-0.21, -0.03), (0.21, -0.03)]
NOSE_BASE = (0.0, 0.25)
MOUTH, MOUTH_HALF_WIDTH = (0.0, 0.42), 0.17
CHIN, HALF_WIDTH = (0.0, 0.71), 0.5


def draw_face(width, height, cx, cy, size, mouth=0.3, turn=0.0):
    """uint8 `[height, width, 3]`: a shaded portrait made of soft ellipses. `mouth` opens it, `turn` shifts the features sideways."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    u, v = (x + 0.5 - cx) / size, (y + 0.5 - cy) / size
    image = np.full((height, width, 3), (96, 110, 120), np.float32)
    skin, hair, shift = np.array((224, 172, 140), np.float32), (58, 40, 30), 0.12 * turn

    def soft(distance, edge):
        return np.clip(0.5 - distance / edge, 0, 1)[..., None]

    def ellipse(a, b, ra, rb):
        return (np.hypot((u - a) / ra, (v - b) / rb) - 1) * min(ra, rb)

    def paint(alpha, color):
        image[:] = image * (1 - alpha) + np.asarray(color, np.float32) * alpha

    paint(soft(np.maximum(np.abs(u) - 0.24, np.abs(v - 0.75) - 0.35), 0.06), skin * 0.78)
    paint(soft(ellipse(0, -0.18, 0.62, 0.72), 0.05), hair)
    narrowing = np.where(v < 0.1, HALF_WIDTH, HALF_WIDTH - 0.16 * np.clip((v - 0.1) / 0.6, 0, 1) ** 2)
    head = (np.hypot(u / narrowing, (v - 0.05) / 0.66) - 1) * 0.4
    paint(soft(head, 0.03), np.clip(skin * (1.06 - 1.68 * np.clip(u**2, 0, 0.25) - 0.1 * v - 0.1 * u)[..., None], 0, 255))
    paint(soft(np.maximum(head, v + 0.42 + 0.25 * u**2), 0.05), hair)
    for side, (ex, ey) in zip((-1, 1), EYES, strict=True):
        ex = ex + shift
        paint(0.45 * soft(ellipse(ex, ey + 0.01, 0.14, 0.09), 0.1), skin * 0.62)
        paint(soft(ellipse(ex, ey, 0.095, 0.05), 0.015), (240, 236, 232))
        paint(soft(ellipse(ex, ey, 0.042, 0.044), 0.015), (70, 50, 35))
        paint(soft(ellipse(ex, ey, 0.02, 0.021), 0.01), (12, 10, 10))
        paint(0.9 * soft(np.maximum(np.abs(ellipse(ex, ey, 0.1, 0.055)) - 0.006, v - ey), 0.012), (50, 32, 25))
        brow = np.abs(v + 0.155 + 1.4 * (u - ex) ** 2 - 0.08 * side * (u - ex)) - 0.018
        paint(0.85 * soft(np.maximum(brow, np.abs(u - ex) - 0.13), 0.02), (60, 42, 32))
        paint(0.85 * soft(ellipse(shift * 1.6 + side * 0.045, NOSE_BASE[1], 0.022, 0.013), 0.012), (70, 35, 30))
    paint(0.35 * soft(np.maximum(np.abs(u - shift * 1.2 - 0.045) - 0.02, np.abs(v - 0.12) - 0.14), 0.05), skin * 0.6)
    paint(0.35 * soft(ellipse(shift * 1.6, 0.235, 0.1, 0.06), 0.06), skin * 0.72)
    gap = 0.12 * mouth
    paint(soft(ellipse(shift, MOUTH[1], MOUTH_HALF_WIDTH, 0.045 + gap), 0.02), (176, 84, 84))
    paint(soft(ellipse(shift, MOUTH[1], 0.145, 0.006 + gap), 0.012), (60, 20, 22))
    return cv2.GaussianBlur(np.clip(image, 0, 255).astype(np.uint8), (0, 0), max(0.5, size / 260))


def at(point, cx, cy, size):
    return np.array([cx + point[0] * size, cy + point[1] * size])


@pytest.fixture(scope="module")
def backend():
    with open_backend("mediapipe") as opened:
        yield opened


@pytest.fixture
def fresh(backend):
    backend.reset()
    return backend


def test_landmarks_lie_on_the_drawn_face(fresh):
    cx, cy, size = 250.0, 215.0, 230.0
    found = fresh.detect(draw_face(480, 480, cx, cy, size))
    assert len(found) == 1
    face = found[0]
    points = face.landmarks
    assert points.shape == (68, 2) and points.dtype == np.float32 and face.score > 0.9
    near = 0.05 * size  # a detector of photographs, on a drawing: a twentieth of the face is half an eye
    for first, eye in zip((36, 42), EYES, strict=True):
        np.testing.assert_allclose(points[first : first + 6].mean(axis=0), at(eye, cx, cy, size), atol=near)
    np.testing.assert_allclose(points[33], at(NOSE_BASE, cx, cy, size), atol=near)
    np.testing.assert_allclose(points[48], at((-MOUTH_HALF_WIDTH, MOUTH[1]), cx, cy, size), atol=near)
    np.testing.assert_allclose(points[54], at((MOUTH_HALF_WIDTH, MOUTH[1]), cx, cy, size), atol=near)
    np.testing.assert_allclose(points[8], at(CHIN, cx, cy, size), atol=near)
    # The mask box's edges: the face's sides, and a top edge below the eye line and well above the nose's base.
    assert points[:, 0].min() == pytest.approx(cx - HALF_WIDTH * size, abs=near)
    assert points[:, 0].max() == pytest.approx(cx + HALF_WIDTH * size, abs=near)
    assert cy + EYES[0][1] * size < points[28, 1] < cy + 0.5 * (EYES[0][1] + NOSE_BASE[1]) * size
    assert points[0, 1] == pytest.approx(cy + EYES[0][1] * size, abs=near)
    low, high = points.min(axis=0), points.max(axis=0)
    assert face.box == tuple(float(v) for v in (*low, *high))


def test_point_order_is_ibug(fresh):
    points = fresh.detect(draw_face(480, 480, 240, 220, 240))[0].landmarks
    x, y = points.T
    assert (np.diff(x[:17]) > 0).all() and y[8] == y[:17].max()
    assert (np.diff(x[17:27]) > 0).all() and y[17:27].max() < y[36:48].min()
    assert (np.diff(y[27:31]) > 0).all() and (np.diff(x[31:36]) > 0).all() and y[31:36].min() > y[29]
    for first in (36, 42):  # clockwise from the left corner
        assert x[first] < x[first + 1] < x[first + 2] < x[first + 3] and x[first + 5] < x[first + 4]
        assert max(y[first + 1 : first + 3]) < min(y[first + 4 : first + 6])
    assert x[48] == x[48:68].min() and x[54] == x[48:68].max() and y[51] < y[62] < y[66] < y[57]
    assert (np.diff(x[48:55]) > 0).all() and (np.diff(x[54:60]) < 0).all() and (np.diff(x[60:65]) > 0).all()


def test_mouth_and_turn_are_measured(fresh):
    shut, half, wide = (fresh.detect(draw_face(480, 480, 240, 220, 240, mouth=m))[0].landmarks for m in (0.0, 0.5, 1.0))
    openings = [float(landmarks.mouth_opening(p)) for p in (shut, half, wide)]
    assert openings[0] < 0.05 < 0.12 < openings[1] < openings[2]
    assert landmarks.mouth_aspect(shut) < 0.15 < landmarks.mouth_aspect(half) < landmarks.mouth_aspect(wide)
    fresh.reset()
    left = fresh.detect(draw_face(480, 480, 240, 220, 240, turn=-1))[0].landmarks
    right = fresh.detect(draw_face(480, 480, 240, 220, 240, turn=1))[0].landmarks
    assert landmarks.turn(left) > 0.15 and landmarks.turn(right) < -0.15 and abs(landmarks.turn(shut)) < 0.1
    assert 0.1 < landmarks.eye_aspect(shut) < 0.8


@pytest.mark.parametrize(("width", "height", "size"), [(1080, 1920, 90), (1920, 1080, 100), (320, 240, 60), (640, 640, 500)])
def test_small_and_large_faces(fresh, width, height, size):
    cx, cy = 0.45 * width, 0.4 * height
    frame = np.full((height, width, 3), (96, 110, 120), np.uint8)
    side = min(3 * size, width, height)  # drawn only where the face is: faster
    x0, y0 = max(0, int(cx) - side // 2), max(0, int(cy) - side // 2)
    frame[y0 : y0 + side, x0 : x0 + side] = draw_face(side, side, cx - x0, cy - y0, size)
    found = fresh.detect(frame)
    assert len(found) == 1
    # Less than an eye of the smallest face, whose 60 pixels the detector sees through a shrunken frame.
    np.testing.assert_allclose(found[0].landmarks[36:48].mean(axis=0), at((0, EYES[0][1]), cx, cy, size), atol=0.08 * size)


def test_several_faces_largest_first(fresh):
    frame = np.hstack([draw_face(400, 480, 200, 200, 130), draw_face(480, 480, 240, 210, 220)])
    for _ in range(3):  # searched, then followed
        found = fresh.detect(frame)
        assert [f.center[0] > 400 for f in found] == [True, False]
        assert found[0].area > found[1].area


def test_tilted_head(fresh):
    turned = cv2.warpAffine(draw_face(480, 480, 240, 240, 200), cv2.getRotationMatrix2D((240, 240), -35, 1), (480, 480))
    points = fresh.detect(turned)[0].landmarks
    eyes = points[42:48].mean(axis=0) - points[36:42].mean(axis=0)
    assert np.degrees(np.arctan2(eyes[1], eyes[0])) == pytest.approx(35, abs=4)


def test_lost_found_and_repeatable(fresh):
    blank = np.full((480, 480, 3), 120, np.uint8)
    frames = [draw_face(480, 480, 180 + 12 * i, 220, 200) for i in range(4)] + [blank, blank]
    frames += [draw_face(480, 480, 300, 230, 200), draw_face(480, 480, 150, 230, 150)]  # back again, then a cut
    first = [fresh.detect(f) for f in frames]
    assert [len(f) for f in first] == [1, 1, 1, 1, 0, 0, 1, 1]
    centers = [f[0].center[0] for f in first if f]
    np.testing.assert_allclose(centers, [180, 192, 204, 216, 300, 150], atol=8)  # a twenty-fifth of the face, less than a step of 12
    with open_backend("mediapipe") as another:
        second = [another.detect(f) for f in frames]
    for a, b in zip(first, second, strict=True):
        assert len(a) == len(b) and all((x.landmarks == y.landmarks).all() for x, y in zip(a, b, strict=True))


def test_untracked_frames_are_independent():
    frames = [draw_face(480, 480, x, 220, 200) for x in (180, 300)]
    with open_backend("mediapipe", track=False) as single:
        alone = [single.detect(f)[0].landmarks for f in frames]
        again = [single.detect(f)[0].landmarks for f in reversed(frames)]
    np.testing.assert_array_equal(alone[0], again[1])
    np.testing.assert_array_equal(alone[1], again[0])


def test_no_face_in_noise(fresh):
    rng = np.random.default_rng(0)
    for cells in (8, 20, 60):
        noise = cv2.resize(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8), (480, 360), interpolation=cv2.INTER_CUBIC)
        assert fresh.detect(noise) == []


def test_bad_frames_and_closed_backend():
    opened = open_backend()
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8), [[1]]):
        with pytest.raises(KeySyncError, match="uint8 RGB frame"):
            opened.detect(bad)
    assert opened.detect(np.zeros((1, 1, 3), np.uint8)) == []
    opened.close()
    opened.close()
    with pytest.raises(KeySyncError, match="closed"):
        opened.detect(np.zeros((64, 64, 3), np.uint8))


def test_nothing_is_printed_and_nothing_heavy_imported():
    code = textwrap.dedent(
        """
        import sys
        import numpy as np
        from keysync_jax.media import crop, faces, fan_backend, landmarks, masks, mediapipe_backend, tracking
        assert not {"mediapipe", "torch", "face_alignment", "jax"} & set(sys.modules)
        for _ in range(2):
            with faces.open_backend() as backend:
                assert backend.detect(np.zeros((90, 160, 3), np.uint8)) == []
        assert not {"torch", "jax", "tensorflow"} & set(sys.modules)
        print("own output", file=sys.stderr)
        """
    )
    root = pathlib.Path(faces.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == "own output\n"


def test_unknown_backend_and_option():
    with pytest.raises(UsageError, match="mediapipe, fan"):
        open_backend("dlib")
    with pytest.raises(UsageError, match="no option weights"):
        open_backend("mediapipe", weights="x")


def test_missing_models_are_one_line_that_says_both_ways(monkeypatch, tmp_path):
    monkeypatch.setenv("KEYSYNC_FACE_MODELS", str(tmp_path / "empty"))
    monkeypatch.setattr(face_models, "_installed", lambda: None)
    with pytest.raises(KeySyncError, match=r"keysync fetch faces .*--from FILE") as caught:
        open_backend("mediapipe")
    assert "\n" not in str(caught.value)


# --- FAN ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fan_package(monkeypatch):
    """A stand-in for torch.hub and face_alignment 1.5.0 with the names and call signatures that the adapter uses."""
    hub = types.SimpleNamespace(folder="/original", get_dir=lambda: hub.folder, set_dir=lambda path: setattr(hub, "folder", path))
    torch = types.ModuleType("torch")
    torch.hub, torch.cuda = hub, types.SimpleNamespace(is_available=lambda: False)
    package = types.ModuleType("face_alignment")
    package.LandmarksType = types.SimpleNamespace(TWO_D=1)
    package.boxes = [np.array([10.0, 10, 30, 30, 0.6]), np.array([50.0, 10, 110, 90, 0.99])]
    package.made = []

    class Detector:
        def detect_from_image(self, image):
            package.seen = image.shape
            return package.boxes

    class FaceAlignment:
        def __init__(self, landmarks_type, device="cuda", flip_input=True, face_detector="sfd", face_detector_kwargs=None, compile=True):
            cached = pathlib.Path(hub.folder, "checkpoints", "2DFAN4-11f355bf06.pth.tar")
            text = cached.read_text() if cached.exists() else "cache"
            package.made.append((landmarks_type, device, flip_input, face_detector, face_detector_kwargs, compile, text))
            if text == "broken":
                raise RuntimeError("size mismatch for conv1.weight\nand more")
            self.face_detector = Detector()

        def get_landmarks_from_image(self, image, detected_faces=None):
            unit = np.stack(np.meshgrid(np.linspace(0, 1, 17), np.linspace(0, 1, 4)), axis=-1).reshape(68, 2)
            return [box[:2] + unit * (box[2:4] - box[:2]) for box in detected_faces]

    package.FaceAlignment = FaceAlignment
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "face_alignment", package)
    return package


def test_fan_conforms_to_the_interface(fan_package):
    with open_backend("fan") as fan:
        found = fan.detect(np.zeros((960, 1280, 3), np.uint8))
        assert fan_package.seen == (480, 640, 3)  # detection on the reduced frame ...
        assert [f.score for f in found] == [0.99, 0.6] and found[0].area > found[1].area
        close(found[0].box, (100.5, 20.5, 220.5, 180.5), 2)  # ... landmarks on the full one
        assert all(isinstance(f, Face) and f.landmarks.shape == (68, 2) and f.landmarks.dtype == np.float32 for f in found)
        fan_package.boxes = []
        assert fan.detect(np.zeros((100, 100, 3), np.uint8)) == []
    (made,) = fan_package.made
    assert made == (1, "cpu", False, "sfd", {"filter_threshold": 0.5}, False, "cache")
    with pytest.raises(KeySyncError, match="closed"):
        fan.detect(np.zeros((100, 100, 3), np.uint8))


def test_fan_takes_weights_from_a_folder(fan_package, tmp_path):
    with pytest.raises(KeySyncError, match="lacks 2DFAN4-11f355bf06.pth.tar and s3fd-619a316812.pth"):
        open_backend("fan", weights=tmp_path)
    (tmp_path / "2DFAN4-11f355bf06.pth.tar").write_text("mine")
    (tmp_path / "s3fd-619a316812.pth").write_text("mine")
    open_backend("fan", weights=str(tmp_path)).close()
    assert fan_package.made[-1][-1] == "mine"
    assert fan_package.made[-1][4]["path_to_detector"] == str(tmp_path.resolve() / "s3fd-619a316812.pth")
    (tmp_path / "2DFAN4-11f355bf06.pth.tar").write_text("broken")
    with pytest.raises(KeySyncError, match="size mismatch for conv1.weight; put both files") as caught:
        open_backend("fan", weights=tmp_path)
    assert "\n" not in str(caught.value)
    assert sys.modules["torch"].hub.folder == "/original"


def test_fan_missing_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(KeySyncError, match="pip install --no-deps face-alignment"):
        open_backend("fan")


# --- 68 points ------------------------------------------------------------------------------------------------------------------


def test_mesh_table_is_complete_and_symmetric():
    table = np.array(landmarks.MESH_TO_68)
    assert table.shape == (68, 3) and table[:, :2].max() < 468
    assert sorted(i for group in landmarks.GROUPS.values() for i in group) == list(range(68))
    np.testing.assert_array_equal(landmarks.MIRROR[landmarks.MIRROR], np.arange(68))
    np.testing.assert_array_equal(table[landmarks.MIRROR, 2], table[:, 2])  # numbers typed twice


def test_mirrored_picture_gives_mirrored_points(fresh):
    frame = draw_face(480, 480, 225, 220, 220, turn=0.5)
    points = fresh.detect(frame)[0].landmarks
    fresh.reset()
    mirrored = fresh.detect(np.ascontiguousarray(frame[:, ::-1]))[0].landmarks[landmarks.MIRROR]
    mirrored[:, 0] = 480 - mirrored[:, 0]
    # The network is not exactly symmetric; a swapped pair of points would be off by tens of pixels.
    assert np.abs(mirrored - points).max() < 9 and np.abs(mirrored - points).mean() < 3


def test_jaw_follows_the_outline_of_a_turned_head():
    # A head is a sphere-like mesh: turning it hides the far side's own points behind the cheek's outline.
    rng = np.random.default_rng(0)
    mesh = np.zeros((478, 2))
    mesh[:] = rng.uniform(-20, 20, (478, 2))
    mesh[33], mesh[263] = (-50, 0), (50, 0)
    jaw = [row[0] for row in landmarks.MESH_TO_68[:17]] + [row[1] for row in landmarks.MESH_TO_68[:17]]
    for vertex in jaw:
        mesh[vertex] = (60 if vertex in (356, 389, 454, 323, 361, 288, 397) else -60, 30)
    mesh[152] = (0, 140)
    plain = landmarks.from_mesh(mesh)
    mesh[50] = (-90, 40)  # a cheek vertex that sticks out on the left
    turned = landmarks.from_mesh(mesh)
    assert turned[2, 0] < plain[2, 0] - 10
    close(turned[10:], plain[10:], 4)


def test_measures_do_not_depend_on_place_and_size():
    points = np.random.default_rng(2).uniform(0, 100, (3, 68, 2))
    for measure in (landmarks.mouth_opening, landmarks.mouth_aspect, landmarks.eye_aspect, landmarks.turn):
        assert measure(points).shape == (3,)
        close(measure(points * 3 + [50, -20]), measure(points), 64, dtype=np.float64)  # ratios of differences of points
    close(landmarks.eye_distance(points * 3), 3 * landmarks.eye_distance(points), 8, dtype=np.float64)


def test_draw_marks_points_and_mask():
    rgb = np.zeros((120, 160, 3), np.uint8)
    points = np.random.default_rng(0).uniform(20, 100, (68, 2))
    mask = np.zeros((120, 160))
    mask[110:] = 1
    out = landmarks.draw(rgb, points, mask)
    assert not rgb.any() and out.shape == rgb.shape
    assert all(out[int(y), int(x)].any() for x, y in points)
    assert out[115, 5, 0] > out[115, 5, 1] and not out[105, 2].any()
    np.testing.assert_array_equal(landmarks.draw(rgb, np.full((68, 2), np.nan)), rgb)
    with pytest.raises(KeySyncError, match="shape"):
        landmarks.draw(rgb, points, mask[:50])
    with pytest.raises(KeySyncError, match="68"):
        landmarks.draw(rgb, points[:60])


# --- mediapipe's own results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [3, 11])
def test_landmarks_are_those_of_mediapipe(seed):
    """What mediapipe 0.10.21 itself found on ten drawn frames, stored with OpenCV 5.0 and NumPy 2.4.

    Within half a pixel on average and two at worst, on a face cut to 192 pixels. Squares follow from the frame before, so
    roundings add up over frames.
    """
    stored = np.load(pathlib.Path(__file__).parents[1] / "helpers" / "data" / "mediapipe_faces.npz")
    with open_backend("mediapipe") as opened:
        found = [opened.detect(frame) for frame in make_clip(seed, frames=10, size=256).frames]
    assert [len(each) for each in found] == stored[f"counts_{seed}"].tolist()
    seen = [i for i, each in enumerate(found) if each]
    assert seen, "no drawn face was found"
    ours, theirs = np.stack([found[i][0].landmarks for i in seen]), stored[f"landmarks_{seed}"][seen]
    side = 1.5 * np.ptp(theirs, axis=1).max(axis=-1)  # of the square that the mesh network looks at
    error = np.linalg.norm(ours - theirs, axis=-1) / side[:, None] * 192
    assert error.mean() < 0.5 and error.max() < 2
    # What half a pixel of the square moves a score by; a face that is not one scores a half less.
    np.testing.assert_allclose([found[i][0].score for i in seen], stored[f"scores_{seed}"][seen], rtol=0, atol=0.01)
