"""The `sam2` package as a segmenter: the reference itself, where torch is installed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from keysync_jax.converters.containers import read_tensors
from keysync_jax.core.errors import KeySyncError, in_one_line
from keysync_jax.models.sam2.sam2_config import Sam2Config, config_from_shapes, size_name
from keysync_jax.segmentation.click_prompts import Prompt
from keysync_jax.segmentation.object_tracker import POINTERS, Frames, prepare

_CONFIGS = {"tiny": "hiera_t", "small": "hiera_s", "base_plus": "hiera_b+", "large": "hiera_l"}
_INSTALL = "pip install torch torchvision hydra-core iopath tqdm, then pip install --no-deps sam2==1.1.0"


class Sam2Package:
    """The package's video predictor behind the interface of `object_tracker.Segmenter`.

    Args:
      weights: a SAM 2.1 checkpoint (`.pt`); its size is read from the tensors' shapes.
      size: side of the square picture that it sees.

    Raises:
      KeySyncError: the package or the file is missing, or the file is no such checkpoint.
    """

    name = "sam2"

    def __init__(self, weights: str | os.PathLike, size: int = 512):
        if not os.path.exists(weights):
            raise KeySyncError(f"{weights} does not exist; give a local SAM 2.1 checkpoint")
        self._torch, build = _package()
        config = config_from_shapes(read_tensors(epath.Path(weights)).shapes, str(weights))
        device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self._predictor = _built(build, config, os.fspath(weights), size, device)
        self.size = size

    def follow(
        self, frames: Frames, prompts: Sequence[Prompt], reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `Segmenter.follow`."""
        torch, predictor = self._torch, self._predictor
        height, width = frames[0].shape[:2]
        with torch.inference_mode():
            state = self._state(frames, height, width)
            for prompt in sorted(prompts, key=lambda prompt: prompt.object):
                points, labels = prompt.coordinates()
                predictor.add_new_points_or_box(state, prompt.frame, obj_id=prompt.object, points=points, labels=labels)
            start = min(prompt.frame for prompt in prompts)
            steps = predictor.propagate_in_video(state, start_frame_idx=start, max_frame_num_to_track=limit, reverse=reverse)
            for frame, _, logits in steps:
                yield frame, logits[:, 0].float().cpu().numpy()
                _forget(state, frame, start)

    def _state(self, frames: Frames, height: int, width: int) -> dict[str, Any]:
        """The predictor's state over frames that are made when it asks for them, in place of a folder of JPEG files."""
        from sam2 import sam2_video_predictor

        loader = sam2_video_predictor.load_video_frames
        sam2_video_predictor.load_video_frames = lambda **_: (_Pictures(self._torch, frames, self.size), height, width)
        try:
            return self._predictor.init_state("", offload_video_to_cpu=True)
        finally:
            sam2_video_predictor.load_video_frames = loader


def _package() -> tuple[Any, Any]:
    """torch, and what makes a predictor. Both are optional, so they are imported when asked for."""
    try:
        import torch
        from sam2 import sam2_video_predictor
        from sam2.build_sam import build_sam2_video_predictor
    except ImportError as error:
        raise KeySyncError(f"the backend sam2 needs the sam2 package ({error}); {_INSTALL}; or take the backend flax") from error
    sam2_video_predictor.tqdm = lambda steps, **_: steps  # it would draw a progress bar for each direction
    return torch, build_sam2_video_predictor


def _built(build: Any, config: Sam2Config, weights: str, size: int, device: str) -> Any:
    name = size_name(config)
    if name not in _CONFIGS:
        raise KeySyncError(f"{weights}: the sam2 package has no configuration for these sizes; take the backend flax")
    overrides = [f"++model.image_size={size}"]
    try:
        predictor = build(f"configs/sam2.1/sam2.1_{_CONFIGS[name]}.yaml", weights, device=device, hydra_overrides_extra=overrides)
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise KeySyncError(f"{weights} is not a SAM 2.1 checkpoint of size {name} ({in_one_line(error)})") from error
    # Filling holes needs a compiled extension that the wheel lacks: off, so that every machine gives the same mask.
    predictor.fill_hole_area = 0
    return predictor


def _forget(state: dict[str, Any], frame: int, start: int) -> None:
    """Drops what no later frame can see; the package keeps all of it."""
    for outputs in state["output_dict_per_obj"].values():
        kept = outputs["non_cond_frame_outputs"]
        for at in [at for at in kept if min(abs(at - frame), abs(at - start)) >= POINTERS]:
            del kept[at]


class _Pictures:
    """What the package takes for a list of tensors `[3, size, size]`."""

    def __init__(self, torch: Any, frames: Frames, size: int):
        self._torch, self._frames, self._size = torch, frames, size

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Any:
        picture = prepare(self._frames[index], self._size).transpose(2, 0, 1)
        return self._torch.from_numpy(np.ascontiguousarray(picture))
