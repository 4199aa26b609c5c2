"""Occluder masks by following click points with SAM 2 (package sam2, weights from a local file)."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from keysync_jax.core.errors import KeySyncError, in_one_line
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.media import video

_CONFIGS = {"tiny": "hiera_t", "small": "hiera_s", "base_plus": "hiera_b+", "large": "hiera_l"}


class Sam2Masker:
    """Follows an object through a clip.

    Args:
      weights: a SAM 2.1 checkpoint, whose file name says its size (`sam2.1_hiera_tiny.pt`, ..., `sam2.1_hiera_large.pt`).

    Raises:
      KeySyncError: the package or the file is missing, the file is no such checkpoint, or its name does not tell the size.
    """

    def __init__(self, weights: str):
        size = next((config for name, config in _CONFIGS.items() if name in os.path.basename(weights)), None)
        if size is None:
            raise KeySyncError(f"{weights}: the file name must say the model's size ({', '.join(_CONFIGS)})")
        if not os.path.exists(weights):
            raise KeySyncError(f"{weights} does not exist; give a local SAM 2.1 checkpoint")
        os.environ.setdefault("TQDM_DISABLE", "1")  # it draws two progress bars per clip
        try:
            import torch
            from sam2.build_sam import build_sam2_video_predictor
        except ImportError as error:
            how = "pip install torch hydra-core iopath, then pip install --no-deps sam2==1.1.0"
            raise KeySyncError(f"occluder masks from clicks need the sam2 package ({error}); {how}") from error
        self._torch = torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._predictor = build_sam2_video_predictor(f"configs/sam2.1/sam2.1_{size}.yaml", weights, device=device)
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise KeySyncError(f"{weights} is not a SAM 2.1 checkpoint of size {size} ({in_one_line(error)})") from error
        # Filling holes needs a compiled extension that the wheel lacks: off, so that every machine gives the same mask.
        self._predictor.fill_hole_area = 0

    def __call__(self, item: Item, sources: np.ndarray, keyframes: Sequence[video.Keyframe] = ()) -> np.ndarray:
        """Mask of the object in each frame of a clip, bool `[n, H, W]`; `keyframes` as `video.read` takes them.

        The sidecar lists clicks: `{"points": [{"frame": 0, "x": 310, "y": 402, "inside": true}, ...]}`, frames of the video, pixels of
        the upright picture. Clicks outside the clip are passed over; a clip without clicks has no occluder.

        Raises:
          KeySyncError: the sidecar cannot be understood.
        """
        try:
            with open(item.occluder, encoding="utf-8") as file:
                clicks = [(int(p["frame"]), float(p["x"]), float(p["y"]), bool(p.get("inside", True))) for p in json.load(file)["points"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KeySyncError(f"{os.path.basename(item.occluder)} holds no click points ({error!r})") from error
        first, last = int(sources[0]), int(sources[-1])
        with tempfile.TemporaryDirectory() as folder, video.read(item.path, start=first, keyframes=keyframes) as reader:
            height = width = 0
            for frame in reader:
                if frame.index > last:
                    break
                rgb = frame.rgb()
                height, width = rgb.shape[:2]
                Image.fromarray(rgb).save(Path(folder) / f"{frame.index - first:05d}.jpg", quality=95)
            masks = np.zeros((last - first + 1, height, width), bool)
            clicks = [c for c in clicks if first <= c[0] <= last]
            if clicks:
                self._follow(folder, [(f - first, x, y, inside) for f, x, y, inside in clicks], masks)
        return masks[sources - first]

    def _follow(self, folder: str, clicks: list[tuple[int, float, float, bool]], masks: np.ndarray) -> None:
        with self._torch.inference_mode():
            state = self._predictor.init_state(folder, offload_video_to_cpu=True)
            for frame in sorted({c[0] for c in clicks}):
                own = [c for c in clicks if c[0] == frame]
                points = np.array([(x, y) for _, x, y, _ in own], np.float32)
                labels = np.array([inside for *_, inside in own], np.int32)
                self._predictor.add_new_points_or_box(state, frame, obj_id=1, points=points, labels=labels)
            for reverse in (False, True):
                for frame, _, logits in self._predictor.propagate_in_video(state, reverse=reverse):
                    masks[frame] |= (logits[0, 0] > 0).cpu().numpy()
