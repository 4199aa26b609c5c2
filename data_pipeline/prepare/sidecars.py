"""Per-frame values that come from files beside the video: emotion and occluder masks."""

from __future__ import annotations

import json
import os
import zipfile
from typing import TYPE_CHECKING

import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare.item import ClipWork, Item
from keysync_jax.media.crop import Crop, extract
from keysync_jax.media.masks import downsample

if TYPE_CHECKING:
    from keysync_jax.data_pipeline.prepare.occluder import ClickMasker


def emotion(item: Item, sources: np.ndarray) -> dict[str, np.ndarray]:
    """Valence and arousal of the frames, -1 to 1, from `.npz` (arrays "valence", "arousal") or `.json` (lists of these names).

    Items without a sidecar get zeros and `emotion_known` False.

    Args:
      sources: int `[n]`, source frame of each frame of the clip.
    """
    count = len(sources)
    if not item.emotion:
        zeros = np.zeros(count, np.float32)
        return {"valence": zeros, "arousal": zeros.copy(), "emotion_known": np.zeros(count, bool)}
    name = os.path.basename(item.emotion)
    try:
        if item.emotion.endswith(".npz"):
            with np.load(item.emotion, allow_pickle=False) as file:
                table = {k: np.asarray(file[k], np.float32) for k in ("valence", "arousal")}
        else:
            with open(item.emotion, encoding="utf-8") as file:
                values = json.load(file)
            table = {k: np.asarray(values[k], np.float32) for k in ("valence", "arousal")}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise KeySyncError(f"{name} holds no valence and arousal ({error})") from error
    out = {}
    for key, column in table.items():
        if column.ndim != 1 or len(column) <= sources.max():
            raise KeySyncError(f"{name}: {key} has shape {column.shape}, the video has at least {sources.max() + 1} frames")
        picked = column[sources]
        if not (np.abs(picked) <= 1).all():
            raise KeySyncError(f"{name}: {key} must lie between -1 and 1")
        out[key] = picked
    return out | {"emotion_known": np.ones(count, bool)}


def occluder(item: Item, entry: ClipWork, cells: tuple[int, int], crop_size: int, masker: ClickMasker | None) -> np.ndarray:
    """Latent cells that an object covers, bool `[n, h, w]`.

    From the item's sidecar: `.npz` with "mask" bool `[N, H, W]`, a row per source frame; or `.json` with click points, which `masker`
    (SAM 2) follows through the clip. Items without a sidecar have no occluder.
    """
    count = len(entry.sources)
    if not item.occluder:
        return np.zeros((count, *cells), bool)
    crop = Crop(*entry.clip.crop)
    if item.occluder.endswith(".json"):
        if masker is None:
            raise KeySyncError(f"{os.path.basename(item.occluder)} holds click points; give SAM 2 weights: --column-weights occluder=FILE")
        crops = masker(item, entry.sources, crop, crop_size, entry.keyframes)
        return downsample(crops.astype(np.uint8) * 255, cells) > 127
    try:
        with np.load(item.occluder, allow_pickle=False) as file:
            masks = np.asarray(file["mask"]).astype(bool)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise KeySyncError(f"{os.path.basename(item.occluder)} holds no mask ({error})") from error
    if masks.ndim != 3 or len(masks) <= entry.sources.max():
        raise KeySyncError(f"{os.path.basename(item.occluder)}: mask has shape {masks.shape}; one [H, W] row per video frame is needed")
    masks = masks[entry.sources]
    cropped = np.stack([extract(mask.astype(np.uint8) * 255, crop, crop_size) for mask in masks])
    return downsample(cropped, cells) > 127
