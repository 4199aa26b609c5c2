"""Where everything is: the outline, the mouth, the lids, the jaw's deformation and the camera, as exact maps.

Three spaces. *Material* coordinates belong to the resting face. The jaw and the brows displace material into *face* coordinates
(mouth and eyes are defined there). The pose takes face coordinates to pixels, with parallax for yaw and pitch. Drawing needs the
maps backwards (pixel to material) and evaluates them in closed form; landmarks need them forwards and solve the same formulas by
fixed-point iteration, so they lie on the drawn features exactly.

Pixel coordinates are continuous: (0, 0) is the top left corner of the first pixel, whose centre is (0.5, 0.5).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline

from keysync_jax.data_pipeline.synthetic.identity import Identity
from keysync_jax.data_pipeline.synthetic.motion import Motion

OUTLINE_CENTRE_Y = 0.25
PIVOT = (0.0, 1.1)  # the head rolls about the neck
MAX_OPENING, NARROWEST, WIDEST = 0.36, 0.42, 0.70  # face units, before the identity's factors
JAW_TOP, JAW_BOTTOM = 0.62, 1.15  # skin between these heights stretches; everything above stays
UPPER_SHARE, LOWER_SHARE, CORNER_SHARE = 0.22, 0.78, 0.16  # where the gap opens: lips and corners relative to the closed line
INNER_INSET = 0.03  # the inner corner lies this far inside the outer one
INNER_LANDMARK, OUTER_LANDMARKS = 0.5, (0.62, 0.24)  # abscissas of mouth landmarks as shares of the half width
_JAW = np.array(
    [[0.0, 1.315], [0.185, 1.285], [0.36, 1.19], [0.515, 1.04], [0.635, 0.86], [0.715, 0.65], [0.763, 0.42], [0.787, 0.20], [0.797, -0.02]]
)
_FOREHEAD = np.array([[0.785, -0.24], [0.735, -0.47], [0.62, -0.69], [0.40, -0.86], [0.0, -0.94]])


class Mouth(NamedTuple):
    """Mouth per frame in face units [T]: gap between the inner lips, distance of the outer corners, heights of the parts."""

    opening: np.ndarray
    width: np.ndarray
    corner_y: np.ndarray
    inner_top: np.ndarray
    inner_bottom: np.ndarray
    upper_lip: np.ndarray
    lower_lip: np.ndarray


class Camera(NamedTuple):
    """Frame size in pixels, face units per frame width and the resting centre (fractions of the frame)."""

    size: int
    scale: float
    centre: tuple[float, float]


def camera_of(identity: Identity, size: int) -> Camera:
    return Camera(size, identity.scale, identity.centre)


def mouth_of(identity: Identity, opening: np.ndarray, width: np.ndarray, valence: np.ndarray) -> Mouth:
    """Relative articulation (0..1) to this face's mouth. Valence lifts or drops the corners and changes neither measure."""
    gap = (opening * MAX_OPENING * identity.mouth_opening).astype(np.float32)
    wide = ((NARROWEST + (WIDEST - NARROWEST) * width) * identity.mouth_width).astype(np.float32)
    line = identity.mouth_y
    thin = 1 - 0.25 * opening - 0.12 * (width - 0.5)
    return Mouth(
        gap,
        wide,
        (line - identity.lip_corner - 0.04 * valence + CORNER_SHARE * gap).astype(np.float32),
        (line - UPPER_SHARE * gap).astype(np.float32),
        (line + LOWER_SHARE * gap).astype(np.float32),
        (identity.upper_lip * thin).astype(np.float32),
        (identity.lower_lip * thin).astype(np.float32),
    )


# ---- outline -------------------------------------------------------------------------------------------------------------------


def outline_points(identity: Identity) -> np.ndarray:
    """Right half of the resting outline from chin to crown, [14, 2]; the first nine are landmarks 8..16."""
    points = np.concatenate([_JAW, _FOREHEAD]).copy()
    y = points[:, 1]
    below = np.clip((y - 0.1) / 0.7, 0, 1)
    points[:, 0] *= identity.face_width * (1 + (identity.jaw_width - 1) * below)
    points[1:4, 0] *= 1 + (identity.chin_width - 1) * np.array([1.0, 0.75, 0.35])
    points[:, 1] = np.where(y > 0.5, 0.5 + (y - 0.5) * identity.chin_length, np.where(y < -0.1, y * identity.forehead, y))
    return points


def outline_radius(identity: Identity) -> CubicSpline:
    """Distance of the outline from (0, OUTLINE_CENTRE_Y) over the angle from the chin, periodic in 2π."""
    right = outline_points(identity)
    points = np.concatenate([right, right[-2:0:-1] * [-1, 1], right[:1]])
    offset = points - [0, OUTLINE_CENTRE_Y]
    angle = np.unwrap(np.arctan2(offset[:, 0], offset[:, 1]))
    radius = np.hypot(offset[:, 0], offset[:, 1])
    radius[-1] = radius[0]
    return CubicSpline(angle, radius, bc_type="periodic")


# ---- eyes ----------------------------------------------------------------------------------------------------------------------


class Lids(NamedTuple):
    """Lid geometry of both eyes: inner and outer abscissa, corner heights, upper and lower lid amplitude [T]."""

    inner_x: float
    outer_x: float
    inner_y: float
    outer_y: float
    upper: np.ndarray
    lower: np.ndarray
    resting_upper: float


def lids_of(identity: Identity, motion: Motion) -> Lids:
    high = 0.074 * identity.eye_height * identity.eye_size
    low = 0.040 * identity.eye_height * identity.eye_size
    upper = high * (1 + 0.16 * motion.arousal) * (1 - motion.blink) - 0.8 * low * motion.blink
    lower = low * (1 - 0.2 * motion.blink - 0.15 * np.maximum(motion.valence, 0))
    return Lids(
        0.5 - 0.305 * identity.eye_size,
        0.5,
        identity.eye_tilt,
        -identity.eye_tilt,
        upper.astype(np.float32),
        lower.astype(np.float32),
        high,
    )


def brow_shift(motion: Motion) -> np.ndarray:
    """Upward displacement of the brows [T]: arousal raises them, a low valence lowers them."""
    return (0.035 * motion.arousal + 0.015 * np.minimum(motion.valence, 0)).astype(np.float32)


def _bump(x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radius: tuple[float, float]) -> np.ndarray:
    """Smooth bump of height 1 that is exactly zero outside its radii, so that it cannot leak beyond them."""
    r2 = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2
    inside = np.maximum(1 - r2, 0)
    return inside * inside


# ---- deformation and pose ------------------------------------------------------------------------------------------------------


def jaw_displacement(x: np.ndarray, y: np.ndarray, mouth: Mouth, breadth: float | np.float32) -> tuple[np.ndarray, np.ndarray]:
    """How far the skin now at face coordinates (x, y) has come from its resting place, [..., n] against mouth arrays [n].

    Zero above JAW_TOP - 0.06 and beyond 0.72·breadth from the middle: the mask's edges and all above them stay still.
    """
    side = np.abs(x) / breadth
    t = np.clip((y - JAW_TOP) / (JAW_BOTTOM - JAW_TOP), 0, 1)
    ramp = 0.5 * (t + t * t * (3 - 2 * t))
    # Narrower towards the chin: when the head leans, the lower jaw swings out past the upper jaw, whose sides must not move.
    s = np.clip((side - 0.28) / (0.44 - 0.26 * np.clip(y - 0.85, 0, 1)), 0, 1)
    down = LOWER_SHARE * mouth.opening * ramp * (1 - s * s * (3 - 2 * s))
    cheek = _bump(side, y, (0.46, 0.82), (0.26, 0.26))
    out = 0.24 * (mouth.width - 0.56) - 0.14 * mouth.opening
    return np.sign(x) * out * cheek, down


def depth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Depth of the face towards the camera in face units: a dome with a nose. Only parallax uses it."""
    dome = np.maximum(1 - (x * (1 / 0.95)) ** 2 - ((y - 0.3) * (1 / 1.45)) ** 2, 0)
    return 0.5 * dome + 0.14 * _bump(x, y, (0.0, 0.40), (0.24, 0.40))


def pixels_to_face(px: np.ndarray, py: np.ndarray, camera: Camera, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates to face coordinates; px, py broadcast against motion arrays [n, 1, 1] or [n, 1]."""
    scale = 1 / (camera.scale * motion.zoom)
    x = (px * (1 / camera.size) - camera.centre[0] - motion.shift[..., 0]) * scale - PIVOT[0]
    y = (py * (1 / camera.size) - camera.centre[1] - motion.shift[..., 1]) * scale - PIVOT[1]
    cos, sin = np.cos(motion.roll), np.sin(motion.roll)
    x, y = cos * x + sin * y + PIVOT[0], cos * y - sin * x + PIVOT[1]
    z = depth(x, y)
    return x - z * np.sin(motion.yaw), y - z * np.sin(motion.pitch)


def face_to_pixels(x: np.ndarray, y: np.ndarray, camera: Camera, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `pixels_to_face`; [T, P] against motion arrays [T, 1]."""
    qx, qy = x, y
    for _ in range(12):  # contraction by less than 0.2 each round
        z = depth(qx, qy)
        qx, qy = x + z * np.sin(motion.yaw), y + z * np.sin(motion.pitch)
    qx, qy = qx - PIVOT[0], qy - PIVOT[1]
    cos, sin = np.cos(motion.roll), np.sin(motion.roll)
    scale = camera.scale * motion.zoom
    px = (camera.centre[0] + motion.shift[..., 0] + scale * (cos * qx - sin * qy + PIVOT[0])) * camera.size
    py = (camera.centre[1] + motion.shift[..., 1] + scale * (cos * qy + sin * qx + PIVOT[1])) * camera.size
    return px, py


def expand(motion: Motion, axes: int) -> Motion:
    """Motion arrays [n] -> [n, 1, ..] for broadcasting over `axes` further axes (shift keeps its last axis of 2)."""
    ones = (1,) * axes
    return Motion(*(a.reshape(a.shape[:1] + ones + a.shape[1:]) for a in motion))


# ---- landmarks -----------------------------------------------------------------------------------------------------------------


def mouth_curve(t2: np.ndarray | np.float32, corner: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Height of a lip edge; t2 is the squared share of the half width (0 middle, 1 corner)."""
    return corner + (middle - corner) * (1 - t2)


def upper_edge(t2: np.ndarray | np.float32, corner: np.ndarray, middle: np.ndarray, lip: np.ndarray) -> np.ndarray:
    """Upper edge of the upper lip with a cupid's bow: a dip in the middle, peaks at a fifth of the half width."""
    return mouth_curve(t2, corner, middle) + 0.22 * lip * np.maximum(1 - 12 * t2, 0)


def _mouth_landmarks(mouth: Mouth) -> np.ndarray:
    """Landmarks 48..67 in face coordinates, [T, 20, 2]."""
    half, inner = mouth.width / 2, mouth.width / 2 - INNER_INSET
    top, bottom = mouth.inner_top - mouth.upper_lip, mouth.inner_bottom + mouth.lower_lip
    a, b = OUTER_LANDMARKS
    points = []
    for share in (-1.0, -a, -b, 0.0, b, a, 1.0):
        points.append((share * half, upper_edge(np.float32(share**2), mouth.corner_y, top, mouth.upper_lip)))
    for share in (a, b, 0.0, -b, -a):
        points.append((share * half, mouth_curve(np.float32(share**2), mouth.corner_y, bottom)))
    i = INNER_LANDMARK
    for share in (-1.0, -i, 0.0, i, 1.0):
        points.append((share * inner, mouth_curve(np.float32(share**2), mouth.corner_y, mouth.inner_top)))
    for share in (i, 0.0, -i):
        points.append((share * inner, mouth_curve(np.float32(share**2), mouth.corner_y, mouth.inner_bottom)))
    return np.stack([np.stack(p, axis=-1) for p in points], axis=1)


def brow_points(identity: Identity) -> np.ndarray:
    """Resting upper brow line of the viewer's right brow from inner to outer end, [5, 2] (landmarks 22..26)."""
    x = np.array([0.125, 0.24, 0.36, 0.48, 0.60])
    arch = identity.brow_arch * np.array([0.0, 0.75, 1.0, 0.75, -0.55])
    return np.stack([x * identity.face_width, -identity.brow_height + 0.02 - arch], axis=1)


def nose_points(identity: Identity) -> np.ndarray:
    """Landmarks 27..35, [9, 2]."""
    long, wide = identity.nose_length, identity.nose_width
    ridge = [(0.0, 0.0), (0.0, 0.14 * long), (0.0, 0.28 * long), (0.0, 0.41 * long)]
    base = [(-0.165, 0.505), (-0.083, 0.54), (0.0, 0.56), (0.083, 0.54), (0.165, 0.505)]
    return np.array(ridge + [(x * wide, y * long) for x, y in base])


def _eye_landmarks(lids: Lids) -> np.ndarray:
    """Landmarks 36..47 in face coordinates, [T, 12, 2]."""
    frames = len(lids.upper)
    middle, half = (lids.inner_x + lids.outer_x) / 2, (lids.outer_x - lids.inner_x) / 2
    slope = (lids.outer_y - lids.inner_y) / 2

    def at(share: float, amplitude: np.ndarray | float, side: int) -> np.ndarray:
        """share -1 inner .. 1 outer corner of the eye on `side` (-1 viewer's left)."""
        y = (lids.inner_y + lids.outer_y) / 2 + slope * share - amplitude * (1 - share * share)
        return np.stack([np.full(frames, side * (middle + half * share)), np.broadcast_to(y, frames)], axis=1)

    third = 0.36
    left = [
        at(1, 0.0, -1),
        at(third, lids.upper, -1),
        at(-third, lids.upper, -1),
        at(-1, 0.0, -1),
        at(-third, -lids.lower, -1),
        at(third, -lids.lower, -1),
    ]
    right = [
        at(-1, 0.0, 1),
        at(-third, lids.upper, 1),
        at(third, lids.upper, 1),
        at(1, 0.0, 1),
        at(third, -lids.lower, 1),
        at(-third, -lids.lower, 1),
    ]
    return np.stack(left + right, axis=1)


def landmarks_of(identity: Identity, camera: Camera, motion: Motion, mouth: Mouth) -> np.ndarray:
    """The 68 iBUG landmarks of every frame in pixels, float32 [T, 68, 2]."""
    frames = len(mouth.opening)
    right = outline_points(identity)[:9]
    jaw = np.concatenate([right[:0:-1] * [-1, 1], right])
    breadth = identity.face_width * identity.jaw_width
    column = Mouth(*(a[:, None].astype(np.float64) for a in mouth))
    jx, jy = np.broadcast_to(jaw[:, 0], (frames, 17)), np.broadcast_to(jaw[:, 1], (frames, 17))
    ux, uy = jx, jy
    for _ in range(40):  # contraction by at most 0.75 each round
        dx, dy = jaw_displacement(ux, uy, column, breadth)
        ux, uy = jx + dx, jy + dy
    brow = brow_points(identity)
    brows = np.concatenate([brow[::-1] * [-1, 1], brow])[None] - np.stack([np.zeros(frames), brow_shift(motion)], axis=1)[:, None]
    nose = np.broadcast_to(nose_points(identity), (frames, 9, 2))
    points = np.concatenate(
        [np.stack([ux, uy], axis=-1), brows, nose, _eye_landmarks(lids_of(identity, motion)), _mouth_landmarks(mouth)], axis=1
    )
    px, py = face_to_pixels(points[..., 0], points[..., 1], camera, expand(motion, 1))
    return np.stack([px, py], axis=-1).astype(np.float32)
