"""Face landmarks from FAN (the face-alignment package), with which the released KeySync weights were trained. Needs torch.

The S3FD detector looks at a reduced frame, because it is slow and needs much memory on large ones; the 2-D FAN network then reads
each face from the full frame. Weights are two files, taken from a folder of yours or from torch's normal cache.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pathlib
import pickle
import tempfile
import warnings
from collections.abc import Iterator

import cv2
import numpy as np

from keysync_jax.core.errors import KeySyncError, first_line
from keysync_jax.media.faces import Face, FaceBackend, check_frame

INSTALL = "install it with: pip install 'keysync-jax[torch]' && pip install --no-deps face-alignment==1.5.0"
FAN_WEIGHTS = "2DFAN4-11f355bf06.pth.tar"
DETECTOR_WEIGHTS = "s3fd-619a316812.pth"
DETECTION_SIZE = 640  # long side of the frame that the detector sees; it was made for pictures of about this size


class FanBackend(FaceBackend):
    """2-D FAN with the S3FD detector. It keeps no state: every frame is searched on its own.

    Args:
      weights: folder that holds `2DFAN4-11f355bf06.pth.tar` and `s3fd-619a316812.pth`; None uses torch's cache, where the package
        downloads them once.
      device: "cpu", "cuda", "cuda:1" ...; "auto" takes the GPU if torch sees one.
      flip: average with the mirrored picture (twice the time, a little steadier).
      min_score: detections below are dropped.

    Raises:
      KeySyncError: the package or its weights are missing or unreadable.
    """

    OPTIONS = ("weights", "device", "flip", "min_score")
    name = "fan"

    def __init__(self, weights: str | os.PathLike | None = None, device: str = "auto", flip: bool = False, min_score: float = 0.5):
        try:
            import face_alignment
            import torch
        except ImportError as error:
            raise KeySyncError(f"the FAN face backend needs the face-alignment package ({first_line(error)}); {INSTALL}") from error
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = None if weights is None else _check_weights(weights)
        options = {"device": device, "flip_input": flip, "face_detector": "sfd"}
        detector_options: dict[str, float | str] = {"filter_threshold": min_score}
        if folder is not None:
            detector_options["path_to_detector"] = str(folder / DETECTOR_WEIGHTS)
        # Compiling costs minutes on a CPU and a GPU gains little at batch 1; older releases do not have the option.
        if "compile" in inspect.signature(face_alignment.FaceAlignment.__init__).parameters:
            options["compile"] = False
        try:
            with _weights_from(torch.hub, folder):
                self._net = face_alignment.FaceAlignment(
                    face_alignment.LandmarksType.TWO_D, face_detector_kwargs=detector_options, **options
                )
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            where = f"in {folder}" if folder is not None else "in torch's cache, and downloading them failed"
            # Torch answers a file that is no pickle with advice to load it unsafely: not to be passed on.
            reason = "not a file of torch weights" if isinstance(error, pickle.UnpicklingError) else first_line(error)
            raise KeySyncError(
                f"FAN's weights {FAN_WEIGHTS} and {DETECTOR_WEIGHTS} could not be loaded {where}: {reason}; "
                "put both files into a folder and name it with --face-weights"
            ) from error

    def detect(self, rgb: np.ndarray) -> list[Face]:
        rgb = check_frame(rgb)
        if self._net is None:
            raise KeySyncError("this FAN backend is closed; open another one with open_backend")
        scale = min(1.0, DETECTION_SIZE / max(rgb.shape[:2]))
        small = rgb if scale == 1.0 else cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        try:
            found = self._net.face_detector.detect_from_image(small.copy())
            boxes = [np.asarray(box, np.float64) for box in found]
            if not boxes:
                return []
            full = [np.concatenate([box[:4] / scale, box[4:]]) for box in boxes]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                points = self._net.get_landmarks_from_image(rgb, detected_faces=full)
        except RuntimeError as error:
            raise KeySyncError(f"FAN failed on a {rgb.shape[1]}x{rgb.shape[0]} frame: {first_line(error)}") from error
        # The package counts pixels from their centres, this one from the corner of the first.
        faces = [
            Face.from_landmarks(np.asarray(p)[:, :2] + 0.5, min(1.0, float(box[4]) if len(box) > 4 else 1.0))
            for p, box in zip(points or [], full, strict=True)
        ]
        return sorted(faces, key=lambda face: -face.area)

    def close(self) -> None:
        self._net = None


def _check_weights(weights: str | os.PathLike) -> pathlib.Path:
    folder = pathlib.Path(weights)
    missing = [name for name in (FAN_WEIGHTS, DETECTOR_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise KeySyncError(f"face weights folder {folder} lacks {' and '.join(missing)}")
    return folder.resolve()


@contextlib.contextmanager
def _weights_from(hub, folder: pathlib.Path | None) -> Iterator[None]:
    """Let torch.hub find FAN's weights in `folder` for a while: the package has no argument for their path."""
    if folder is None:
        yield
        return
    before = hub.get_dir()
    with tempfile.TemporaryDirectory() as scratch:
        os.symlink(folder, os.path.join(scratch, "checkpoints"), target_is_directory=True)
        hub.set_dir(scratch)
        try:
            yield
        finally:
            hub.set_dir(before)
