"""Parity runners of SAM 2.1, part by part; whole videos are in `sam2_video_cases`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from keysync_jax.models.sam2 import sam2_config
from keysync_jax.models.sam2.hiera import ImageEncoder
from keysync_jax.models.sam2.mask_decoder import MaskDecoder, Masks
from keysync_jax.models.sam2.object_memory import MemoryAttention, MemoryEncoder
from keysync_jax.models.sam2.prompt_encoder import PromptEncoder
from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.sam2.sam2_layers import sine_grid
from keysync_jax.models.sam2.sam2_network import MASK_SCALE, MASK_SHIFT, Features, Sam2
from keysync_jax.models.sam2.sam2_table import sam2_table
from keysync_jax.verify.case_tools import apply, from_images, params_of, to_images
from keysync_jax.verify.harness import Case, runner


def network(case: Case, replaced: Mapping[str, np.ndarray] | None = None) -> tuple[Sam2Config, dict[str, Any]]:
    """Sizes and parameters of a case's network, some tensors `replaced`; what shapes do not say stands in its config."""
    weights = {key: value for key, value in (case.weights | dict(replaced or {})).items() if key not in sam2_config.UNUSED}
    config = sam2_config.config_from_shapes(
        {key: value.shape for key, value in weights.items()},
        case.name,
        num_heads=case.config.get("num_heads"),
        global_att_blocks=case.config.get("global_att_blocks"),
        window_spec=case.config.get("window_spec"),
    )
    return config, params_of(sam2_table(config), weights, case.name)


def _placed(level: Any, batch: int) -> np.ndarray:
    """Position encoding of a level `[B, h, w, C]` in torch's layout."""
    return np.broadcast_to(from_images(sine_grid(*level.shape[1:])[None]), (batch, level.shape[3], *level.shape[1:3]))


@runner("sam2_image_encoder")
def run_image_encoder(case: Case) -> dict[str, np.ndarray]:
    config, params = network(case)
    picture = to_images(case.inputs["image"])
    stages = apply(ImageEncoder(config), params["image_encoder"], picture, method="stages")
    features: Features = apply(Sam2(config), params, picture, method="features")
    out = {f"mid.stage{i}": from_images(x) for i, x in enumerate(stages)}
    batch, height, width, channels = features.coarse.shape
    for i, level in enumerate((*features.fine, features.coarse)):
        out[f"out.fpn{i}"] = from_images(level)
        scale = 2 ** (2 - i)
        out[f"out.pos{i}"] = _placed(np.empty((batch, scale * height, scale * width, channels)), batch)
    return out


@runner("sam2_prompt_encoder")
def run_prompt_encoder(case: Case) -> dict[str, np.ndarray]:
    config, params = network(case)
    module, own = PromptEncoder(config), params["sam_prompt_encoder"]
    dense = apply(module, own, to_images(case.inputs["mask"]), method="masks")
    batch, height, width, channels = dense.shape
    out: dict[str, np.ndarray] = {"out.mask.dense": from_images(dense)}
    grid: Any = module.apply({"params": own}, height, width, method="grid")
    out["out.dense_pe"] = from_images(grid[None])
    no_mask: Any = module.apply({"params": own}, method="no_mask")
    nothing = np.broadcast_to(no_mask, (batch, height, width, channels))
    out["out.no_mask.dense"] = from_images(nothing)
    for key in case.expected:
        name, quantity = key.split(".")[1:] if key.count(".") == 2 else ("", "")
        if quantity == "sparse":
            points, labels = case.inputs[name], case.inputs[f"{name}_labels"]
            out[key] = np.asarray(apply(module, own, points, labels, 16.0 * height, method="points"))
    return out


@runner("sam2_mask_decoder")
def run_mask_decoder(case: Case) -> dict[str, np.ndarray]:
    config, params = network(case)
    given = case.inputs
    features, dense = to_images(given["image_embeddings"]), to_images(given["dense"])
    fine = (to_images(given["high_res_0"]), to_images(given["high_res_1"]))
    place = PromptEncoder(config).apply({"params": params["sam_prompt_encoder"]}, *features.shape[1:3], method="grid")
    module, own = MaskDecoder(config), params["sam_mask_decoder"]
    out = {}
    for name, method in (("single", "single"), ("multi", "several")):
        masks: Masks = apply(module, own, features, place, given["sparse"], dense, fine, method=method)
        out |= {f"out.{name}.masks": masks.logits, f"out.{name}.ious": masks.iou}
        out |= {f"out.{name}.tokens": masks.tokens, f"out.{name}.object_score": masks.score}
    return {key: np.asarray(value) for key, value in out.items()}


@runner("sam2_memory_encoder")
def run_memory_encoder(case: Case) -> dict[str, np.ndarray]:
    config, params = network(case)
    mask = np.asarray(jax.nn.sigmoid(to_images(case.inputs["mask_logits"])) * MASK_SCALE + MASK_SHIFT)
    memory = apply(MemoryEncoder(config), params["memory_encoder"], to_images(case.inputs["pix_feat"]), mask)
    return {"mid.mask": from_images(mask), "out.features": from_images(memory), "out.pos": _placed(memory, len(memory))}


@runner("sam2_memory_attention")
def run_memory_attention(case: Case) -> dict[str, np.ndarray]:
    config, params = network(case)
    first = {name: np.moveaxis(case.inputs[name], 0, 1) for name in ("curr", "curr_pos", "memory", "memory_pos")}
    tokens = first["curr"].shape[1]
    # Grids come first, then pointers; how many of these is said in words.
    said = re.search(r"num_obj_ptr_tokens=(\d+)", case.meta.get("call", ""))
    placed = first["memory"].shape[1]
    placed = placed - int(said[1]) if said else placed // tokens * tokens
    y = MemoryAttention(config).apply({"params": params["memory_attention"]}, *first.values(), placed)
    return {"out.y": np.moveaxis(np.asarray(y), 0, 1)}
