"""Parity runner for the masks: landmark scaling, every mask kind at image and latent size, and the occluder rule."""

from __future__ import annotations

import re

import numpy as np

from keysync_jax.config import MaskConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.media.masks import remove_occluder
from keysync_jax.verify import reference_masks
from keysync_jax.verify.harness import Case, runner

PIPELINE_SIZE = (512, 512)  # the reference's inference path rasterises at its model resolution


@runner("masks")
def run_masks(case: Case) -> dict[str, np.ndarray]:
    """Every expected tensor, taken apart by its name: `out.{spec}.{what}[.{kind}[.is255]]` or `out.arms.{kind}`."""
    return {key: _compute(case, key) for key in case.expected}


def _compute(case: Case, key: str) -> np.ndarray:
    spec, what, *rest = key.removeprefix("out.").split(".")
    if spec == "arms":
        mask = _pipeline(case, _arms_spec(case), _config(case, what), target=True)
        return remove_occluder(mask, case.inputs["mask_arms"])[:, None].astype(np.uint8)
    if what == "scaled":
        return _scaled(case, spec)
    if what == "box_expand":
        return _cells(_pipeline(case, spec, _config(case, "box", box_expand=case.meta["box_expand"]), target=True))
    if what.startswith("box_nose"):
        index = int(what.removeprefix("box_nose") or case.meta["extra_nose_index"])
        return _cells(_pipeline(case, spec, _config(case, "box", nose_index=index), target=True))
    config = _config(case, rest[0])
    if what == "pipe":
        return _cells(_pipeline(case, spec, config, target=True))
    if what == "raw":
        return _cells(_native(case, spec, config, target=True))
    if what in ("full512", "fullraw"):
        full = _pipeline(case, spec, config, target=False) if what == "full512" else _native(case, spec, config, target=False)
        return np.packbits(full == 255 if rest[1:] == ["is255"] else full != 0, axis=-1)
    raise KeySyncError(f"masks case has an unknown tensor {key}")


def _config(case: Case, kind: str, **changes) -> MaskConfig:
    return MaskConfig(**({"kind": kind, "nose_index": case.meta["nose_index"]} | changes))


def _arms_spec(case: Case) -> str:
    """Which landmarks the occluder masks were combined with: case.json names them in the description of the tensor."""
    words = re.findall(r"\w+", case.meta["call"]["out.arms.{kind}"])
    named = [word for word in words if word in case.meta["specs"]]
    if not named:
        raise KeySyncError(f"{case.folder}: case.json does not say which landmarks out.arms belongs to")
    return named[0]


def _image_size(case: Case, spec: str) -> tuple[int, int]:
    return case.meta["specs"][spec]["H"], case.meta["specs"][spec]["W"]


def _scaled(case: Case, spec: str) -> np.ndarray:
    return reference_masks.scale_landmarks(case.inputs[f"{spec}.landmarks"], _image_size(case, spec), PIPELINE_SIZE)


def _pipeline(case: Case, spec: str, config: MaskConfig, target: bool) -> np.ndarray:
    """Inference path: integer landmarks at the model resolution."""
    size = tuple(case.meta["target_size"]) if target else None
    return reference_masks.make_mask(_scaled(case, spec), *PIPELINE_SIZE, config, size)


def _native(case: Case, spec: str, config: MaskConfig, target: bool) -> np.ndarray:
    """Training path: float landmarks at the picture's own size."""
    size = tuple(case.meta["target_size"]) if target else None
    return reference_masks.make_mask(case.inputs[f"{spec}.landmarks"], *_image_size(case, spec), config, size)


def _cells(mask: np.ndarray) -> np.ndarray:
    return mask[:, None].astype(np.uint8)
