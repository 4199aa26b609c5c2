"""Frames: the head texture warped by pose and jaw, with eyes and mouth painted analytically on top.

Everything is evaluated per output pixel with fractional coverage along every edge (the limit of supersampling), in chunks of frames
that stay in the cache.
"""

from __future__ import annotations

from typing import TypeVar

import cv2
import numpy as np

from keysync_jax.data_pipeline.synthetic.geometry import (
    INNER_INSET,
    Camera,
    Lids,
    Mouth,
    brow_shift,
    expand,
    face_to_pixels,
    jaw_displacement,
    lids_of,
    mouth_curve,
    pixels_to_face,
    upper_edge,
)
from keysync_jax.data_pipeline.synthetic.identity import Identity
from keysync_jax.data_pipeline.synthetic.motion import Motion
from keysync_jax.data_pipeline.synthetic.texture import LEFT, TOP, HeadTexture, backdrop, head_texture, smoothstep

_CHUNK_PIXELS = 128 * 128 * 4
Block = TypeVar("Block", Motion, Mouth, Lids)


def _take(block: Block, part: slice) -> Block:
    return block._replace(**{name: a[part] for name, a in block._asdict().items() if isinstance(a, np.ndarray)})


def _region(box: tuple[float, float, float, float], camera: Camera, motion: Motion) -> tuple[slice, slice]:
    """Pixel rows and columns that hold a face-space box (left, top, right, bottom) in every frame of `motion`."""
    xs = np.array([box[0], box[2], box[0], box[2]])[None]
    ys = np.array([box[1], box[1], box[3], box[3]])[None]
    px, py = face_to_pixels(xs, ys, camera, expand(motion, 1))
    rows = slice(max(int(py.min()) - 1, 0), min(int(np.ceil(py.max())) + 2, camera.size))
    columns = slice(max(int(px.min()) - 1, 0), min(int(np.ceil(px.max())) + 2, camera.size))
    return rows, columns


def _grid(rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the pixels of a region, [1, 1, w] and [1, h, 1]."""
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5
    y = np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5
    return x[None, None, :], y[None, :, None]


def _blend(canvas: np.ndarray, colour: np.ndarray, coverage: np.ndarray) -> None:
    """canvas [n, h, w, 3] moves towards colour (broadcastable) by coverage [n, h, w], in place."""
    canvas += (colour - canvas) * coverage[..., None]


def _warp_head(
    canvas: np.ndarray, texture: HeadTexture, room: np.ndarray, identity: Identity, camera: Camera, motion: Motion, mouth: Mouth
) -> None:
    """Warp the head texture into every frame of the chunk over the room."""
    every = slice(0, camera.size)
    px, py = _grid(every, every)
    x, y = pixels_to_face(px, py, camera, expand(motion, 2))
    shape = Mouth(*(a[:, None, None] for a in mouth))
    # Only rows that can hold the jaw in this chunk need its displacement; skipping the rest changes nothing (it is zero there).
    low = int(np.argmax((y > 0.5).any(axis=(0, 2))))
    dx, dy = jaw_displacement(x[:, low:], y[:, low:], shape, np.float32(identity.face_width * identity.jaw_width))
    x[:, low:] -= dx
    y[:, low:] -= dy
    raise_by = brow_shift(motion)
    if raise_by.any():
        lift = raise_by[:, None, None] * np.maximum(1 - ((y + 0.27) / 0.19) ** 2, 0) * np.maximum(1 - (x / 0.78) ** 4, 0)
        y += lift
    map_x, map_y = (x - LEFT) * texture.density - 0.5, (y - TOP) * texture.density - 0.5
    for i in range(len(canvas)):
        layer = cv2.remap(texture.image, map_x[i], map_y[i], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        keep = (255 - layer[..., 3:]) * np.float32(1 / 255)
        np.multiply(room, keep, out=canvas[i])
        canvas[i] += layer[..., :3]


def _draw_eyes(canvas: np.ndarray, identity: Identity, camera: Camera, motion: Motion, lids: Lids, light: float) -> None:
    """Paint both eyes: sclera, iris, pupil, glint, lash line, lid crease. Lids follow the blink."""
    rows, columns = _region((-0.56, -0.17, 0.56, 0.12), camera, motion)
    px, py = _grid(rows, columns)
    pose = expand(motion, 2)
    x, y = pixels_to_face(px, py, camera, pose)
    k = np.float32(camera.scale * camera.size)  # pixels per face unit: coverage = distance·k + 1/2
    side = np.sign(x)
    ax = np.abs(x)
    middle, half = (lids.inner_x + lids.outer_x) / 2, (lids.outer_x - lids.inner_x) / 2
    t = (ax - middle) * (1 / half)
    t2 = np.minimum(t * t, 4)
    base = (lids.inner_y + lids.outer_y) / 2 + (lids.outer_y - lids.inner_y) / 2 * t
    up, down = lids.upper[:, None, None], lids.lower[:, None, None]
    # Real lids are rounder than a parabola towards the nose; the quartic term leaves corners and landmarks where they are.
    top = base - up * (1 - t2)
    bottom = base + down * (1 - t2)
    fold = base - np.float32(lids.resting_upper + 0.045) * (1 - 0.8 * t2)
    inside = (t2 < 1.0).astype(np.float32)
    near = np.clip((1.12 - np.abs(t)) * half * k + 0.5, 0, 1)
    patch = canvas[:, rows, columns]
    skin = np.asarray(identity.skin, np.float32) * np.float32(light)
    # Closed lid: skin between crease and lash line, a little darker than the face.
    crease = np.exp(-(((y - fold) * np.float32(1 / 0.016)) ** 2)) * near * np.maximum(1 - 0.75 * t2, 0)
    _blend(patch, skin * np.array([0.50, 0.42, 0.40], np.float32), 0.55 * crease)
    shut = motion.blink[:, None, None]
    lid = np.clip((y - fold) * k + 0.5, 0, 1) * np.clip((top - y) * k + 0.5, 0, 1) * inside * shut
    _blend(patch, skin * np.array([0.87, 0.81, 0.79], np.float32), 0.75 * lid)
    aperture = np.clip(np.clip((y - top) * k + 0.5, 0, 1) + np.clip((bottom - y) * k + 0.5, 0, 1) - 1, 0, 1) * inside
    aperture *= np.clip((1 - np.abs(t)) * half * k + 0.5, 0, 1)
    # Eyeball: white rounded by shading, shadowed by the upper lid.
    white = 0.93 - 0.22 * t2 - 0.30 * np.exp(-np.maximum(y - top, 0) * np.float32(1 / 0.028))
    white = np.clip(white, 0.25, 1)[..., None] * np.array([236, 230, 226], np.float32) * np.float32(0.55 + 0.42 * light)
    ball_x = ax - middle - side * motion.gaze[:, None, None, 0] * np.float32(2 * half)
    ball_y = y - (lids.inner_y + lids.outer_y) / 2 + np.float32(0.016) - motion.gaze[:, None, None, 1] * np.float32(2 * half)
    r = np.sqrt(ball_x * ball_x + ball_y * ball_y)
    radius = np.float32(0.083 * identity.eye_size)
    iris = np.clip((radius - r) * k + 0.5, 0, 1)
    rim = 0.62 + 0.55 * np.clip(1 - r / radius, 0, 1) + 0.25 * np.clip(ball_y / radius, 0, 1)
    eye = white
    eye = eye + (np.asarray(identity.iris, np.float32) * (rim * np.float32(light))[..., None] - eye) * iris[..., None]
    pupil = np.clip((radius * np.float32(0.44) - r) * k + 0.5, 0, 1)
    eye = eye + (np.array([12, 10, 10], np.float32) - eye) * pupil[..., None]
    glint = np.exp(-(((ball_x * side - np.float32(0.03 * np.sign(identity.light[0] + 1e-6))) * 55) ** 2) - ((ball_y + 0.034) * 55) ** 2)
    eye = eye + (250 - eye) * (0.9 * glint)[..., None]
    _blend(patch, eye, aperture)
    thick = np.float32(0.022)
    outer = 1 + 0.35 * np.clip(t, -1, 1)  # lashes grow towards the temple
    lash = np.clip((y - top + thick * outer) * k + 0.5, 0, 1) * np.clip((top + np.float32(0.006) - y) * k + 0.5, 0, 1)
    _blend(patch, skin * np.array([0.20, 0.14, 0.13], np.float32), 0.88 * lash * np.clip((1.06 - np.abs(t)) * half * k + 0.5, 0, 1))
    rim_low = np.exp(-(((y - bottom - np.float32(0.006)) * np.float32(1 / 0.013)) ** 2)) * near * inside
    _blend(patch, skin * np.array([0.62, 0.48, 0.45], np.float32), 0.5 * rim_low)


def _draw_mouth(canvas: np.ndarray, identity: Identity, camera: Camera, motion: Motion, mouth: Mouth, light: float) -> None:
    """Paint lips, cavity, teeth and tongue of the chunk."""
    rows, columns = _region((-0.45, identity.mouth_y - 0.28, 0.45, identity.mouth_y + 0.56), camera, motion)
    px, py = _grid(rows, columns)
    x, y = pixels_to_face(px, py, camera, expand(motion, 2))
    k = np.float32(camera.scale * camera.size)
    m = Mouth(*(a[:, None, None] for a in mouth))
    half = m.width * 0.5
    t2 = np.minimum((x / half) ** 2, 1.5)
    inner_half = half - INNER_INSET
    s2 = np.minimum((x / inner_half) ** 2, 1.5)
    top = upper_edge(t2, m.corner_y, m.inner_top - m.upper_lip, m.upper_lip)
    bottom = mouth_curve(t2, m.corner_y, m.inner_bottom + m.lower_lip)
    gap_top = mouth_curve(s2, m.corner_y, m.inner_top)
    gap_bottom = mouth_curve(s2, m.corner_y, m.inner_bottom)
    ends = np.clip((half - np.abs(x)) * k + 0.5, 0, 1)
    patch = canvas[:, rows, columns]
    soft = k * np.float32(0.8)
    lips = np.clip(np.clip((y - top) * soft + 0.5, 0, 1) + np.clip((bottom - y) * soft + 0.5, 0, 1) - 1, 0, 1) * ends
    line = 0.5 * (gap_top + gap_bottom)
    lower = np.clip((y - line) * (1 / np.maximum(bottom - line, 0.02)), 0, 1)  # 0 at the lip line, 1 at the lower edge
    upper = np.clip((line - y) * (1 / np.maximum(line - top, 0.02)), 0, 1)
    is_low = y > line
    tone = np.where(is_low, 1.0 - 0.16 * lower * lower, 0.86 - 0.10 * (1 - upper)) - 0.10 * t2
    gloss = np.exp(-(((lower - 0.52) * 4.2) ** 2) - (x - np.float32(0.06 * identity.light[0])) ** 2 * np.float32(60)) * is_low
    seam = np.exp(-np.minimum(np.abs(y - gap_top), np.abs(y - gap_bottom)) * np.float32(1 / 0.014))
    tone = tone * (1 - 0.28 * seam)
    colour = np.asarray(identity.lips, np.float32) * np.asarray(identity.light_tint, np.float32) * (tone * np.float32(light))[..., None]
    colour = colour + (255 - colour) * (0.20 * gloss)[..., None]
    _blend(patch, colour, lips)
    gap = np.clip(np.clip((y - gap_top) * k + 0.5, 0, 1) + np.clip((gap_bottom - y) * k + 0.5, 0, 1) - 1, 0, 1)
    gap *= np.clip((inner_half - np.abs(x)) * k + 0.5, 0, 1)
    # Corner dimples: the lips end in a small shadow.
    corner = np.exp(-(((np.abs(x) - half) * 26) ** 2) - ((y - m.corner_y) * 30) ** 2)
    _blend(patch, np.asarray(identity.skin, np.float32) * np.array([0.42, 0.30, 0.28], np.float32), 0.45 * corner)
    high = gap_bottom - gap_top
    from_top, from_bottom = y - gap_top, gap_bottom - y
    # Cavity and tongue keep their distance from the lips on every skin, so that the gap can be measured.
    lip = np.asarray(identity.lips, np.float32) * np.float32(light)
    inside = np.minimum(np.array([46, 15, 17], np.float32), 0.30 * lip)
    flesh = np.minimum(np.array([112, 44, 48], np.float32), 0.55 * lip)
    tongue_height = np.minimum(0.42 * high, np.float32(0.12))
    tongue = smoothstep(-0.02, 0.03, tongue_height * (1 - 0.6 * s2) - from_bottom) * smoothstep(0.10, 0.22, m.opening)
    content = inside + (flesh - inside) * (0.8 * tongue * (0.3 + 5 * np.clip(from_bottom, 0, 0.14)))[..., None]
    teeth_height = np.minimum(0.40 * high, np.float32(0.085))
    teeth = np.clip((teeth_height - from_top) * k + 0.5, 0, 1) * np.clip((0.82 - np.sqrt(s2)) * inner_half * k * 0.6 + 0.5, 0, 1)
    enamel = (0.62 + 0.38 * np.clip(from_top * np.float32(1 / 0.03), 0, 1)) * (1 - 0.45 * s2)
    content = (
        content
        + (np.array([232, 226, 212], np.float32) * (enamel * np.float32(0.35 + 0.55 * light))[..., None] - content)
        * (0.95 * teeth)[..., None]
    )
    # The upper lip shades what is right below it, so that the gap starts dark even above teeth.
    content *= (1 - 0.62 * np.exp(-np.maximum(from_top, 0) * np.float32(1 / 0.014)))[..., None]
    _blend(patch, content, gap)


def mouth_light(identity: Identity) -> float:
    """Brightness of a surface facing the camera, as the skin shading gives it: eyes and lips share it."""
    return float(min(identity.ambient + (1.06 - identity.ambient) * identity.light[2] / max(identity.light[2], 0.55), 1.06))


def render(identity: Identity, camera: Camera, motion: Motion, mouth: Mouth) -> np.ndarray:
    """All frames of a clip, uint8 [T, size, size, 3]."""
    frames, size = len(mouth.opening), camera.size
    out = np.empty((frames, size, size, 3), np.uint8)
    texture, room = head_texture(identity, camera), backdrop(identity, camera)
    lids, light = lids_of(identity, motion), mouth_light(identity)
    step = max(1, _CHUNK_PIXELS // (size * size))
    for start in range(0, frames, step):
        part = slice(start, min(start + step, frames))
        move, shape = _take(motion, part), _take(mouth, part)
        canvas = np.empty((part.stop - start, size, size, 3), np.float32)
        _warp_head(canvas, texture, room, identity, camera, move, shape)
        _draw_eyes(canvas, identity, camera, move, _take(lids, part), light)
        _draw_mouth(canvas, identity, camera, move, shape, light)
        np.clip(canvas, 0, 255, out=canvas)
        canvas += 0.5
        out[part] = canvas.astype(np.uint8)
    return out
