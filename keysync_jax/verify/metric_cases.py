"""Parity runners of the metrics' networks: CLIP's vision tower, I3D, SyncNet, TOPIQ, Inception, the lip reader and its input."""

from __future__ import annotations

import cv2
import jax
import numpy as np

from keysync_jax.figures import lip_crop, sync
from keysync_jax.models.metrics import clip_vision, i3d, inception, lip_reader, syncnet, topiq
from keysync_jax.verify.case_tools import apply, from_images, params_of, to_images
from keysync_jax.verify.figure_cases import synchrony_figures
from keysync_jax.verify.harness import Case, runner


@runner("eval_clip_vision")
def run_clip_vision(case: Case) -> dict[str, np.ndarray]:
    known = {field: case.config[field] for field in clip_vision.ClipVisionConfig.__dataclass_fields__ if field in case.config}
    config = clip_vision.ClipVisionConfig(**known)
    params = params_of(clip_vision.clip_vision_table(config), case.weights, case.name)
    pictures = np.stack([clip_vision.cmmd_picture(x, config.image_size) for x in case.inputs["images"]])
    values = clip_vision.normalised(pictures)
    pooled, embeds = apply(clip_vision.ClipVision(config), params, values)
    embeds = np.asarray(embeds)
    out = {"out.cmmd_pixels_u8": pictures, "out.cmmd_pixel_values": from_images(values), "out.pooled": np.asarray(pooled)}
    return out | {"out.image_embeds": embeds, "out.embedding": embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)}


@runner("eval_i3d")
def run_i3d(case: Case) -> dict[str, np.ndarray]:
    params = params_of(i3d.i3d_table(), case.weights, case.name)
    pixels = i3d.fvd_pixels(case.inputs["video"][0])
    pool, logits = apply(i3d.I3d(), params, pixels[None])
    other = apply(i3d.I3d(epsilon=1e-3), params, pixels[None])[1]
    out = {"out.pixels_styleganv": np.moveaxis(np.asarray(pixels[0]), -1, 0), "out.pool": np.asarray(pool[0]).T}
    return out | {"out.logits": np.asarray(logits[0]), "out.logits_eps1e3": np.asarray(other[0])}


@runner("eval_syncnet")
def run_syncnet(case: Case) -> dict[str, np.ndarray]:
    params = params_of(syncnet.syncnet_table(), case.weights, case.name)
    frames = np.stack([cv2.resize(frame, (syncnet.SIDE, syncnet.SIDE)) for frame in case.inputs["frames"]])
    samples = case.inputs["audio"]
    cepstra = sync.mfcc(samples)
    count = min(len(frames), len(samples) // 640) - 5
    lip, aud = [], []
    for i in range(count):  # a window at a time: five frames are small
        lip.append(apply(syncnet.SyncNet(), params, frames[None, i : i + 5].astype(np.float32), method="lips")[0])
        heard = cepstra[4 * i : 4 * i + syncnet.CEPSTRA].T.astype(np.float32)
        aud.append(apply(syncnet.SyncNet(), params, heard[None, :, :, None], method="sound")[0])
    lip, aud = (np.asarray(jax.device_get(x)) for x in (lip, aud))
    found = synchrony_figures(sync.synchrony(lip, aud, case.config.get("vshift", 15)))
    return {"out.mfcc": cepstra.T, "out.lip": lip, "out.aud": aud} | {f"out.{key}": value for key, value in found.items()}


@runner("eval_inception")
def run_inception(case: Case) -> dict[str, np.ndarray]:
    weights = {key: value for key, value in case.weights.items() if key not in inception.UNUSED}
    pixels = inception.fid_pixels(case.inputs["images"])
    features = apply(inception.Inception(), params_of(inception.inception_table(), weights, case.name), pixels)
    return {"out.pixels": np.moveaxis(np.asarray(pixels[0]), -1, 0), "out.features": np.asarray(features)}


@runner("eval_lip_roi")
def run_lip_roi(case: Case) -> dict[str, np.ndarray]:
    filled = lip_crop.fill_landmarks(case.inputs["landmarks"], case.inputs["detected"])
    patches, matrices = lip_crop.lip_input(case.inputs["frames"], filled, case.inputs["mean_face"])
    return {"out.filled": filled, "out.transforms": matrices, "out.network_input": np.moveaxis(patches, -1, 1)}


@runner("eval_lip_encoder")
def run_lip_encoder(case: Case) -> dict[str, np.ndarray]:
    known = {field: case.config[field] for field in lip_reader.LipReaderConfig.__dataclass_fields__ if field in case.config}
    config = lip_reader.LipReaderConfig(**known)
    weights = {key: value for key, value in case.weights.items() if not key.startswith(lip_reader.UNUSED)}
    params = params_of(lip_reader.lip_reader_table(config), weights, case.name)
    module = lip_reader.LipReader(config)
    out = {f"out.{name}": np.asarray(apply(module, params, to_images(x)[None]))[0] for name, x in case.inputs.items()}
    a, b = out["out.a"], out["out.b"]
    cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return out | {"out.cosine": cosine, "out.lipscore": cosine.mean()}


@runner("eval_topiq")
def run_topiq(case: Case) -> dict[str, np.ndarray]:
    weights = {key: value for key, value in case.weights.items() if not topiq.UNUSED.match(key)}
    params = params_of(topiq.topiq_table(), weights, case.name)
    out = {}
    for name, given in case.inputs.items():
        pictures = to_images(given)
        if f"out.pixels.{name}" in case.expected:
            pictures = topiq.shorter_side_to(pictures, case.config["test_img_size"])
            out[f"out.pixels.{name}"] = from_images(pictures)[0]
        out[f"out.{name}"] = np.asarray(apply(topiq.Topiq(), params, pictures))[0]
    return out
