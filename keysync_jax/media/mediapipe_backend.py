"""Face landmarks by the networks of mediapipe 0.10.21, run by LiteRT.

Detection and landmarks are two networks without memory: the full-range detector on a small copy of the frame, and the attention face
mesh (478 points and the probability that a face is there) on a 192-pixel, upright square cut around a face.
Which square to look at is decided here, from the previous frame's mesh where there is one, so results depend on the frames alone.

Which way is up is the detector's to say: it sees heads that are tilted by some 45 degrees at most, while the mesh sees a face in any
turn and is sure of it. So a face that is new is looked at in all four quarter turns, and where none is found the frame is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media import face_models
from keysync_jax.media import landmarks as lm
from keysync_jax.media.face_networks import DETECTOR_SIZE, MESH_SIZE, FaceDetector, FaceMesh
from keysync_jax.media.faces import Face, FaceBackend, box_iou, check_frame

MESH_SCALE = 1.5  # side of the square the mesh network was trained on, over the long side of the face's mesh
DETECTION_SCALE = 1.7  # side of that square over the side of the detector's box, which spans brows to chin
REFINE_SCALE = 2.5  # a candidate is detected again in a square this many boxes wide, because boxes of small faces are coarse
MESH_PASSES = 3  # a new face's square is re-centred on its own mesh this many times
CANDIDATE_SCORE = 0.6  # detector's threshold, mediapipe's own; above it, the mesh's presence score decides
PRESENCE = 0.5  # mesh's threshold: mediapipe's own default
DETECT_EVERY = 5  # frames between two searches for newcomers while a face is tracked, and between thorough ones while there is none
SAME_FACE_IOU = 0.3  # two meshes that overlap more are one face
TURNS = (1, 3, 2)  # further quarter turns in which faces are looked for
TURNED_SCORE = 0.65  # detector's threshold there: nobody stands behind a face that is upside down but the detector
FOLLOWED_IOU = 0.3  # a followed square must overlap the face found in it at least this much, else the face was lost
EYE_CORNERS = (33, 263)  # mesh points of the outer eye corners (person's right, left): they tell which way is up


class Region(NamedTuple):
    """Square to look at: centre and side in pixels, and the clockwise angle in radians by which its content is turned."""

    x: float
    y: float
    side: float
    angle: float
    score: float = 1.0  # how sure the detector is of it, where it comes from there

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.side / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


class MediaPipeBackend(FaceBackend):
    """Full-range detection and attention face mesh of mediapipe, mapped to 68 points.

    Args:
      max_faces: only this many faces of a frame are looked at, largest first.
      track: look for a face where it was in the previous frame (fast, steady) and search the frame every `DETECT_EVERY` frames or when
        a face is lost. False searches every frame, for frames that do not follow each other.

    Raises:
      KeySyncError: the models are not here, or a file is none of them.
    """

    OPTIONS = ("max_faces", "track")
    name = "mediapipe"

    def __init__(self, max_faces: int = 8, track: bool = True):
        self._max_faces = max_faces
        self._track = track
        self.reset()
        self._detector: FaceDetector | None = FaceDetector(face_models.locate(face_models.FACE_DETECTOR), CANDIDATE_SCORE)
        self._mesh: FaceMesh | None = FaceMesh(face_models.locate(face_models.FACE_MESH))

    def reset(self) -> None:
        self._regions: list[Region] = []
        self._frame = 0  # frames since the last reset
        self._empty = 0  # of these, how many in a row had no face

    def close(self) -> None:
        self._detector = self._mesh = None

    def detect(self, rgb: np.ndarray) -> list[Face]:
        rgb = check_frame(rgb)
        if self._mesh is None or self._detector is None:
            raise KeySyncError("this mediapipe backend is closed; open another one with open_backend")
        found: list[tuple[np.ndarray, float]] = []
        for region in self._regions:
            mesh, presence = self._run_mesh(rgb, region)
            if presence >= PRESENCE and box_iou(region_of(mesh).box, region.box) >= FOLLOWED_IOU:
                _add(found, mesh, presence)
        if not self._track or len(found) < max(1, len(self._regions)) or self._frame % DETECT_EVERY == 0:
            thorough = not found and (not self._track or self._empty % DETECT_EVERY == 0)
            for region in self._search(rgb, [region_of(mesh) for mesh, _ in found], thorough):
                mesh, presence = self._settle(rgb, region)
                if presence >= PRESENCE:
                    _add(found, mesh, presence)
            for region in self._search_turned(rgb) if thorough and not found else ():
                mesh, presence = self._settle(rgb, region)
                if presence >= PRESENCE:
                    _add(found, mesh, presence)
        self._frame += 1
        self._empty = 0 if found else self._empty + 1
        found.sort(key=lambda item: -region_of(item[0]).side)
        found = found[: self._max_faces]
        self._regions = [region_of(mesh) for mesh, _ in found] if self._track else []
        faces = [Face.from_landmarks(lm.from_mesh(mesh), presence) for mesh, presence in found]
        return sorted(faces, key=lambda face: -face.area)

    def _search(self, rgb: np.ndarray, known: list[Region], thorough: bool) -> list[Region]:
        """Squares around the faces of the frame that are not `known`, largest first."""
        height, width = rgb.shape[:2]
        candidates = self._run_detector(rgb, (0, 0, width, height))
        if not candidates and thorough:
            # A face may be too small in the whole frame: look again in overlapping squares as wide as the frame's short side.
            for tile in _tiles(width, height):
                candidates += self._run_detector(rgb, tile)
        candidates.sort(key=lambda region: -region.side)
        return [self._refine(rgb, region) for region in _apart(candidates, known)[: self._max_faces]]

    def _search_turned(self, rgb: np.ndarray) -> list[Region]:
        """Squares around the faces that are seen when the frame is turned, largest first."""
        whole = (0, 0, rgb.shape[1], rgb.shape[0])
        seen = [region for turns in TURNS for region in self._run_detector(rgb, whole, turns) if region.score >= TURNED_SCORE]
        # Of one face, that from the turn in which it is seen best.
        best = _apart(sorted(seen, key=lambda region: -region.score), [])
        return [self._refine(rgb, region) for region in sorted(best, key=lambda region: -region.side)[: self._max_faces]]

    def _refine(self, rgb: np.ndarray, region: Region) -> Region:
        """The square found again in its surroundings, in the quarter turn in which the detector is surest of it."""
        half = region.side / DETECTION_SCALE * REFINE_SCALE / 2
        square = (round(region.x - half), round(region.y - half), round(region.x + half), round(region.y + half))
        best = self._nearest(rgb, square, region, 0)
        for turns in TURNS:
            turned = self._nearest(rgb, square, region, turns)
            if turned is not None and turned.score >= TURNED_SCORE and (best is None or turned.score > best.score):
                best = turned
        return region if best is None else best

    def _nearest(self, rgb: np.ndarray, square: tuple[int, int, int, int], region: Region, turns: int) -> Region | None:
        again = self._run_detector(rgb, square, turns)
        near = [r for r in again if math.hypot(r.x - region.x, r.y - region.y) < region.side / 2]
        return min(near, key=lambda r: math.hypot(r.x - region.x, r.y - region.y), default=None)

    def _settle(self, rgb: np.ndarray, region: Region) -> tuple[np.ndarray, float]:
        """Mesh and presence of a new face, its square re-centred on the mesh."""
        mesh, presence = self._run_mesh(rgb, region)
        for _ in range(MESH_PASSES - 1):
            mesh, presence = self._run_mesh(rgb, region_of(mesh))
        return mesh, presence

    def _run_detector(self, rgb: np.ndarray, area: tuple[int, int, int, int], turns: int = 0) -> list[Region]:
        """Detections inside `area` (x0, y0, x1, y1), which may reach beyond the frame, after so many clockwise quarter turns of it."""
        image, scale = _shrunk(rgb, area, 2 * DETECTOR_SIZE)
        height, width = image.shape[:2]
        if turns:
            image = np.ascontiguousarray(np.rot90(image, -turns))
        assert self._detector is not None
        regions = []
        for detection in self._detector(image):
            x0, y0, x1, y1 = detection.box
            corners = _turned_back(np.array([[x0, y0], [x1, y1]], np.float64), turns, width, height) / scale
            eyes = detection.points[1] - detection.points[0]
            side = float(np.abs(corners[1] - corners[0]).max())
            # Turned by a whole number of quarters first, so that an upright head's angle is the eyes' own to the bit.
            angle = math.remainder(math.atan2(eyes[1], eyes[0]) - turns * math.pi / 2, 2 * math.pi)
            x, y = ((corners[0] + corners[1]) / 2 + area[:2]).tolist()
            regions.append(Region(x, y, DETECTION_SCALE * side, angle, detection.score))
        return regions

    def _run_mesh(self, rgb: np.ndarray, region: Region) -> tuple[np.ndarray, float]:
        """float64 `[478, 2]` mesh points in frame pixels of the face in `region`, and the probability that one is there."""
        image, back = _upright_square(rgb, region)
        assert self._mesh is not None
        points, presence = self._mesh(image)
        return points.astype(np.float64) @ back[:, :2].T + back[:, 2], presence


def region_of(mesh: np.ndarray) -> Region:
    """Upright square around a mesh `[478, 2]`, as large as the mesh network wants it."""
    eyes = mesh[EYE_CORNERS[1]] - mesh[EYE_CORNERS[0]]
    angle = math.atan2(eyes[1], eyes[0])
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    upright = mesh @ turn.T
    low, high = upright.min(axis=0), upright.max(axis=0)
    center = (low + high) / 2 @ turn
    return Region(float(center[0]), float(center[1]), float(MESH_SCALE * max(1.0, (high - low).max())), angle)


def _apart(candidates: list[Region], known: list[Region]) -> list[Region]:
    """Those, in order, that are none of the `known` faces and none of those before."""
    fresh: list[Region] = []
    for region in candidates:
        if all(box_iou(region.box, other.box) < SAME_FACE_IOU for other in [*known, *fresh]):
            fresh.append(region)
    return fresh


def _turned_back(points: np.ndarray, turns: int, width: int, height: int) -> np.ndarray:
    """Points `[N, 2]` of a picture that was turned clockwise by quarter turns as points of the `width` x `height` one it was."""
    x, y = points[:, 0], points[:, 1]
    turned = {0: (x, y), 1: (y, height - x), 2: (width - x, height - y), 3: (width - y, x)}[turns]
    return np.stack(turned, axis=1)


def _add(found: list[tuple[np.ndarray, float]], mesh: np.ndarray, presence: float) -> None:
    box = region_of(mesh).box
    if all(box_iou(box, region_of(other).box) < SAME_FACE_IOU for other, _ in found):
        found.append((mesh, presence))


def _tiles(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Squares as wide as the short side, each overlapping the next by at least half; none where the frame is (nearly) square."""
    short, long = min(width, height), max(width, height)
    if long < 1.2 * short:
        return []
    starts = np.linspace(0, long - short, math.ceil((long - short) / (short / 2)) + 1).round().astype(int)
    return [(s, 0, s + short, short) if width >= height else (0, s, short, s + short) for s in starts.tolist()]


def _shrunk(rgb: np.ndarray, area: tuple[int, int, int, int], long_side: int) -> tuple[np.ndarray, float]:
    """The part `area` of the frame (edges repeated outside), its long side at most `long_side`, and the factor applied."""
    x0, y0, x1, y1 = area
    height, width = rgb.shape[:2]
    part = rgb[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
    pad = (max(0, -y0), max(0, y1 - height), max(0, -x0), max(0, x1 - width))
    if any(pad) and part.size:
        part = cv2.copyMakeBorder(part, *pad, cv2.BORDER_REPLICATE)
    scale = min(1.0, long_side / max(part.shape[:2]))
    if scale < 1.0:
        part = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(part), scale


def _upright_square(rgb: np.ndarray, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """uint8 `[192, 192, 3]` picture of a region, and the `[2, 3]` affine map from its pixels back to the frame's."""
    scale = region.side / MESH_SIZE
    cos, sin = math.cos(region.angle) * scale, math.sin(region.angle) * scale
    half = MESH_SIZE / 2
    back = np.array([[cos, -sin, region.x - cos * half + sin * half], [sin, cos, region.y - sin * half - cos * half]])
    source, shift, shrink = rgb, np.zeros(2), 1.0
    if scale > 2:
        # Bilinear sampling would alias a large face: shrink its surroundings by area first.
        reach = region.side * math.sqrt(0.5) + 2
        x0, y0 = max(0, int(region.x - reach)), max(0, int(region.y - reach))
        x1, y1 = min(rgb.shape[1], int(region.x + reach) + 1), min(rgb.shape[0], int(region.y + reach) + 1)
        if x1 - x0 >= 2 and y1 - y0 >= 2:
            shrink = 1.0 / scale
            size = (max(1, round((x1 - x0) * shrink)), max(1, round((y1 - y0) * shrink)))
            source, shift = cv2.resize(rgb[y0:y1, x0:x1], size, interpolation=cv2.INTER_AREA), np.array([x0, y0])
            shrink = np.array([size[0] / (x1 - x0), size[1] / (y1 - y0)])
    # Pixel i covers [i, i + 1): coordinates of centres differ by half a pixel between the grids.
    to_source = np.concatenate([back[:, :2], (back[:, 2] - shift + back[:, :2] @ [0.5, 0.5])[:, None]], axis=1)
    to_source = to_source * np.broadcast_to(shrink, 2)[:, None]
    to_source[:, 2] -= 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(source, to_source, (MESH_SIZE, MESH_SIZE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return image, back
