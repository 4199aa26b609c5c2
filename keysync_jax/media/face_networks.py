"""The two networks that find faces: full-range detection, and the attention mesh of 478 points with its probability of a face.

Both are mediapipe's (`face_detection_full_range_sparse.tflite`, `face_landmark_with_attention.tflite`, Grishchenko et al. 2020). The mesh
looks at mouth and eyes more closely in squares cut out of its own features; the three operations that do this are mediapipe's own and
are computed here, in NumPy, between two parts of the network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keysync_jax.media import ssd
from keysync_jax.media.tflite import TfliteFile

DETECTOR_SIZE = 192  # input side of the full-range detector
MESH_SIZE = 192  # input side of the mesh network
MESH_POINTS = 478

_GRID = ((48, 1),)
_OVERLAP = 0.3  # boxes of one face

# Tensors of the mesh network, at the cuts.
_MESH, _PRESENCE, _FEATURES = "output_mesh_identity", "conv_faceflag", "p_re_lu_3"
_REGIONS = ("", "_1", "_2")  # mouth, left eye, right eye: suffixes of the tensors below
_MATRIX, _CROP = "landmarks_to_transform_matrix_v2", "transform_tensor_bilinear_v2"
# Refined points, and the matrix that places them: mouth, left eye, left iris, right eye, right iris.
_REFINED = tuple("transform_landmarks_v2" + suffix for suffix in ("", "_1", "_2", "_3", "_4"))
_IRISES = {"transform_landmarks_v2_2": range(468, 473), "transform_landmarks_v2_4": range(473, 478)}
_SUBSET = {"transform_landmarks_v2": "", "transform_landmarks_v2_1": "_1", "transform_landmarks_v2_3": "_2"}


class FaceDetector:
    """Boxes and six points (eyes, nose, mouth, ears) of every face of a picture.

    Args:
      path: `face_detection_full_range_sparse.tflite`.
      least: lowest score.
    """

    def __init__(self, path: Path, least: float):
        self._network = TfliteFile(path).network()
        self._anchors = ssd.anchor_centres(_GRID)
        self._least = least

    def __call__(self, rgb: np.ndarray) -> list[ssd.Detection]:
        """Faces of uint8 `[H, W, 3]`, the surest first, in pixels of the picture."""
        square, place = ssd.letterboxed(rgb, DETECTOR_SIZE)
        raw, logits = self._network(square[None] / np.float32(127.5) - 1)
        found = ssd.decode(raw[0], logits[0, :, 0], self._anchors, DETECTOR_SIZE, self._least)
        return [detection.placed(*place) for detection in ssd.suppress(found, _OVERLAP)]


class FaceMesh:
    """478 points of the face that fills a square picture.

    Args:
      path: `face_landmark_with_attention.tflite`.
    """

    def __init__(self, path: Path):
        file = TfliteFile(path)
        matrices = [_MATRIX + suffix for suffix in _REGIONS]
        self._crops = [file.options_of(name) for name in matrices]
        sources = [file.inputs_of(name)[0] for name in matrices]
        self._first = file.network(outputs=[_MESH, _PRESENCE, _FEATURES, *sources])
        crops = [_CROP + suffix for suffix in _REGIONS]
        pairs = [file.inputs_of(name) for name in _REFINED]
        # Several refined sets share a matrix; a tensor is asked for once.
        self._asked = list(dict.fromkeys(name for pair in pairs for name in pair))
        self._pairs = [tuple(self._asked.index(name) for name in pair) for pair in pairs]
        self._second = file.network(inputs=[*matrices, *crops], outputs=self._asked)
        self._places = [
            list(_IRISES[name]) if name in _IRISES else self._crops[_REGIONS.index(_SUBSET[name])]["subset_idxs"] for name in _REFINED
        ]

    def __call__(self, rgb: np.ndarray) -> tuple[np.ndarray, float]:
        """Points and presence.

        Args:
          rgb: uint8 `[192, 192, 3]`.

        Returns:
          float32 `[478, 2]`, (x, y) in pixels of the picture, and the probability that it shows a face.
        """
        mesh, presence, features, *sources = self._first(rgb[None] / np.float32(255))
        matrices = [crop_matrix(points[0], options) for points, options in zip(sources, self._crops, strict=True)]
        squares = [
            sampled(features[0], matrix, (options["output_height"], options["output_width"]))[None]
            for matrix, options in zip(matrices, self._crops, strict=True)
        ]
        found = self._second(*(matrix[None] for matrix in matrices), *squares)
        out = np.zeros((MESH_POINTS, 2), np.float32)
        out[:468] = mesh.reshape(-1, 3)[:, :2]
        for (points, matrix), place in zip(self._pairs, self._places, strict=True):
            out[place] = placed_points(found[points][0], found[matrix][0])
        return out, float(1 / (1 + np.exp(-presence.item())))


def crop_matrix(points: np.ndarray, options: dict) -> np.ndarray:
    """The map from pixels of a crop around some points to pixels of the features.

    Args:
      points: `[468, 3]` in pixels of the features.
      options: of the operation: the points that the crop must hold, the two that its horizontal follows, its size, and its margin.

    Returns:
      float32 `[4, 4]`.
    """
    left, right = points[options["left_rotation_idx"], :2], points[options["right_rotation_idx"], :2]
    angle = np.arctan2(right[1] - left[1], right[0] - left[0]) - np.float32(options["target_rotation_radians"])
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]], np.float32)  # of the crop's axes in the features
    upright = points[options["subset_idxs"], :2] @ turn
    low, high = upright.min(axis=0), upright.max(axis=0)
    size = np.array([options["output_width"], options["output_height"]], np.float32)
    scale = np.array([options["scale_x"], options["scale_y"]], np.float32) * (high - low) / size
    matrix = np.eye(4, dtype=np.float32)
    matrix[:2, :2] = turn * scale
    matrix[:2, 3] = turn @ ((low + high) / 2) - matrix[:2, :2] @ (size / 2)
    return matrix


def sampled(features: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A crop of a feature map, bilinear between the centres of its pixels, zero outside.

    Args:
      features: `[H, W, C]`.
      matrix: `[4, 4]` from the crop's pixels to the features'.
      size: (h, w) of the crop.

    Returns:
      float32 `[h, w, C]`.
    """
    height, width = features.shape[:2]
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) + np.float32(0.5)
    at = np.stack([x, y], -1) @ matrix[:2, :2].T + matrix[:2, 3] - np.float32(0.5)
    inside = ((at >= 0) & (at <= np.array([width - 1, height - 1]))).all(axis=-1, keepdims=True)
    at = np.where(inside, at, 0)
    low = np.floor(at).astype(int)
    part = at - low
    high = np.minimum(low + 1, [width - 1, height - 1])  # its weight is zero where it would lie outside
    rows = [features[r, low[..., 0]] * (1 - part[..., :1]) + features[r, high[..., 0]] * part[..., :1] for r in (low[..., 1], high[..., 1])]
    out = rows[0] * (1 - part[..., 1:]) + rows[1] * part[..., 1:]
    return np.where(inside, out, 0).astype(np.float32)


def placed_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points `[K, 2]` of a crop where the matrix `[4, 4]` puts them."""
    return points @ matrix[:2, :2].T + matrix[:2, 3]
