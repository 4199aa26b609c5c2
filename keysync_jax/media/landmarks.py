"""The 68-point iBUG order: what each index is, how a mediapipe mesh maps to it, and small measures on it.

"Left" and "right" mean the picture's side unless "person's" is said. Coordinates are continuous pixels: (0, 0) is the top left corner
of the first pixel.
"""

from __future__ import annotations

import cv2
import numpy as np

from keysync_jax.core.errors import KeySyncError

NUM_LANDMARKS = 68
GROUPS = {
    "jaw": range(0, 17),
    "left_brow": range(17, 22),
    "right_brow": range(22, 27),
    "nose_bridge": range(27, 31),
    "nose_base": range(31, 36),
    "left_eye": range(36, 42),
    "right_eye": range(42, 48),
    "outer_lip": range(48, 60),
    "inner_lip": range(60, 68),
}
CLOSED_GROUPS = ("left_eye", "right_eye", "outer_lip", "inner_lip")

# Index of the landmark that each one becomes when the picture is mirrored.
MIRROR = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, *range(35, 30, -1), 45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), 67, 66, 65]
)

# Where each iBUG point lies on mediapipe's mesh: (vertex a, vertex b, t) is the point a + t (b - a). The jaw divides the face oval from
# eye level to the chin into steps of equal length on mediapipe's neutral model, which is how the iBUG scheme spaces it; bridge points
# stand at the heights of the iBUG mean shape on the same model; the brows run between the mesh's two brow rows.
MESH_TO_68 = (
    # jaw 0-16: temple at eye level, ear, jaw angle, chin (8), and back up
    (127, 162, 0.13), (234, 93, 0.06), (93, 132, 0.20), (132, 58, 0.27), (58, 172, 0.35), (172, 136, 0.73), (150, 149, 0.36),
    (176, 148, 0.33), (152, 152, 0.0), (400, 377, 0.33), (379, 378, 0.36), (397, 365, 0.73), (288, 397, 0.35), (361, 288, 0.27),
    (323, 361, 0.20), (454, 323, 0.06), (356, 389, 0.13),
    # brows 17-21 and 22-26, left to right
    (70, 46, 0.5), (63, 53, 0.5), (105, 52, 0.5), (66, 65, 0.5), (107, 55, 0.5),
    (336, 285, 0.5), (296, 295, 0.5), (334, 282, 0.5), (293, 283, 0.5), (300, 276, 0.5),
    # nose bridge 27-30, between the eyes down to the tip
    (168, 6, 0.6), (197, 195, 0.36), (5, 4, 0.21), (1, 1, 0.0),
    # nose base 31-35, left to right; 33 is under the septum
    (98, 98, 0.0), (97, 97, 0.0), (2, 2, 0.0), (326, 326, 0.0), (327, 327, 0.0),
    # eyes 36-41 and 42-47, clockwise from the left corner
    (33, 33, 0.0), (160, 160, 0.0), (158, 158, 0.0), (133, 133, 0.0), (153, 153, 0.0), (144, 144, 0.0),
    (362, 362, 0.0), (385, 385, 0.0), (387, 387, 0.0), (263, 263, 0.0), (373, 373, 0.0), (380, 380, 0.0),
    # outer lip 48-59, clockwise from the left corner
    (61, 61, 0.0), (39, 40, 0.22), (37, 37, 0.0), (0, 0, 0.0), (267, 267, 0.0), (269, 270, 0.22), (291, 291, 0.0),
    (405, 321, 0.4), (314, 314, 0.0), (17, 17, 0.0), (84, 84, 0.0), (181, 91, 0.4),
    # inner lip 60-67, clockwise from the left corner
    (78, 78, 0.0), (82, 82, 0.0), (13, 13, 0.0), (312, 312, 0.0), (308, 308, 0.0), (317, 317, 0.0), (14, 14, 0.0), (87, 87, 0.0),
)  # fmt: skip

# Mesh vertices that can form the outline of a turned head: oval, temples and cheeks, without nose and mouth.
OUTLINE = np.array(
    [10, 109, 67, 103, 54, 21, 162, 127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 175, 199, 200]
    + [338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377]
    + [70, 46, 156, 143, 34, 227, 116, 111, 117, 50, 123, 137, 147, 187]
    + [177, 215, 213, 192, 138, 135, 214, 169, 210, 170, 211, 140, 171]
    + [300, 276, 383, 372, 264, 447, 345, 340, 346, 280, 352, 366, 376, 411]
    + [401, 435, 433, 416, 367, 364, 434, 394, 430, 395, 431, 369, 396]
)

_A, _B = (np.array([row[i] for row in MESH_TO_68]) for i in (0, 1))
_T = np.array([row[2] for row in MESH_TO_68])[:, None]


def from_mesh(mesh: np.ndarray) -> np.ndarray:
    """68 points of a mediapipe face mesh.

    On a turned head iBUG's jaw points lie on the outline that is seen, while mesh vertices stay on the skin and disappear behind the
    cheek; the points of each side are therefore moved sideways to the mesh's outline where that reaches further.

    Args:
      mesh: `[478, 2]` or `[468, 2]` points in pixels.

    Returns:
      float32 `[68, 2]`.
    """
    points = mesh[_A] + _T * (mesh[_B] - mesh[_A])
    across = points[45] - points[36]
    across = across / max(float(np.hypot(*across)), 1e-6)
    turn = np.array([across, (-across[1], across[0])])  # rows: along the eye line, down the face
    upright = points @ turn.T
    left, right = _outline(mesh[OUTLINE] @ turn.T, upright[:17, 1])
    # The chin (7-9) is the outline's lowest part, where "sideways" says nothing.
    upright[:7, 0] = np.minimum(upright[:7, 0], left[:7])
    upright[10:17, 0] = np.maximum(upright[10:17, 0], right[10:])
    return (upright @ turn).astype(np.float32)


def _outline(points: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leftmost and rightmost x of the convex hull of `points` `[N, 2]` at each of `heights` (held constant above and below)."""
    hull = cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)
    start, end = hull, np.roll(hull, -1, axis=0)
    y = np.clip(heights, hull[:, 1].min(), hull[:, 1].max())[:, None]
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    rise = np.where(start[:, 1] == end[:, 1], 1.0, end[:, 1] - start[:, 1])
    x = start[:, 0] + (y - start[:, 1]) / rise * (end[:, 0] - start[:, 0])
    crosses = (y >= low) & (y <= high)
    return np.where(crosses, x, np.inf).min(axis=1), np.where(crosses, x, -np.inf).max(axis=1)


def check_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """The array itself if it is `[..., 68, 2]`; `KeySyncError` otherwise."""
    if landmarks.ndim < 2 or landmarks.shape[-2:] != (NUM_LANDMARKS, 2):
        raise KeySyncError(f"landmarks must have shape (..., 68, 2), not {landmarks.shape}")
    return landmarks


def eye_distance(landmarks: np.ndarray) -> np.ndarray:
    """Distance between the outer eye corners in pixels, `[...]` for `[..., 68, 2]`. It measures a face whatever its mouth does."""
    return np.linalg.norm(landmarks[..., 45, :] - landmarks[..., 36, :], axis=-1)


def mouth_opening(landmarks: np.ndarray) -> np.ndarray:
    """Mean gap between the inner lips (61-67, 62-66, 63-65) over the distance between the outer eye corners, `[...]`."""
    gaps = np.linalg.norm(landmarks[..., [61, 62, 63], :] - landmarks[..., [67, 66, 65], :], axis=-1)
    return gaps.mean(axis=-1) / eye_distance(landmarks)


def mouth_aspect(landmarks: np.ndarray) -> np.ndarray:
    """Mouth aspect ratio: mean gap between the inner lips over the width between their corners (60, 64), `[...]`; 0 when closed."""
    gaps = np.linalg.norm(landmarks[..., [61, 62, 63], :] - landmarks[..., [67, 66, 65], :], axis=-1)
    return gaps.mean(axis=-1) / np.linalg.norm(landmarks[..., 64, :] - landmarks[..., 60, :], axis=-1)


def eye_aspect(landmarks: np.ndarray) -> np.ndarray:
    """Eye aspect ratio (height over width) averaged over both eyes, `[...]`: near 0 in a blink."""
    ratios = []
    for first in (36, 42):
        eye = landmarks[..., first : first + 6, :]
        heights = np.linalg.norm(eye[..., [1, 2], :] - eye[..., [5, 4], :], axis=-1).mean(axis=-1)
        ratios.append(heights / np.linalg.norm(eye[..., 3, :] - eye[..., 0, :], axis=-1))
    return np.mean(ratios, axis=0)


def turn(landmarks: np.ndarray) -> np.ndarray:
    """How far the head is turned, `[...]`, -1 to 1: (right part - left part) / width of the face, divided at the nose bridge.

    0 is frontal; positive when the face looks to the left of the picture; near -1 or 1 only one cheek is seen. For small angles it
    is a little over the tangent of the yaw (mediapipe's neutral model turned in space).
    """
    axis = landmarks[..., 45, :] - landmarks[..., 36, :]
    axis = axis / np.linalg.norm(axis, axis=-1, keepdims=True)
    left = ((landmarks[..., 28, :] - landmarks[..., 1, :]) * axis).sum(axis=-1)
    right = ((landmarks[..., 15, :] - landmarks[..., 28, :]) * axis).sum(axis=-1)
    return (right - left) / np.maximum(np.abs(right) + np.abs(left), 1e-6)


def draw(rgb: np.ndarray, landmarks: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Copy of a picture with landmarks drawn over it, for reports and for looking at.

    Args:
      rgb: uint8 `[H, W, 3]`.
      landmarks: `[68, 2]` in the picture's pixels; nothing is drawn where it is not finite.
      mask: `[H, W]`, tinted red where it is not 0.
    """
    canvas = rgb.copy()
    if mask is not None:
        if mask.shape != rgb.shape[:2]:
            raise KeySyncError(f"mask to draw has shape {mask.shape} but the picture has {rgb.shape[:2]}")
        tint = np.array([255, 60, 60])
        inside = mask != 0
        canvas[inside] = (0.65 * canvas[inside] + 0.35 * tint).astype(np.uint8)
    if not np.isfinite(check_landmarks(np.asarray(landmarks))).all():
        return canvas
    shift = 4  # cv2 takes sixteenths of a pixel
    fixed = np.round((np.asarray(landmarks, np.float64) - 0.5) * 2**shift).astype(np.int32)
    unit = max(1, round(float(eye_distance(landmarks)) / 120))
    for name, indices in GROUPS.items():
        group = fixed[list(indices)]
        cv2.polylines(canvas, [group], name in CLOSED_GROUPS, (0, 220, 255), unit, cv2.LINE_AA, shift)
    for point in fixed:
        cv2.circle(canvas, tuple(int(v) for v in point), (unit + 1) << shift, (60, 255, 60), -1, cv2.LINE_AA, shift)
    return canvas
