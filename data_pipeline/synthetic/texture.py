"""The parts of a picture that are painted once per clip: the resting head without eyes and mouth, and what is behind it.

The skin is shaded from a height field (skull, nose, eye sockets, cheekbones, lips' muzzle, chin) under one directional light, with
occlusion in the sockets, under nose, lip and jaw. Layers carry coverage, so edges are anti-aliased at any size.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.data_pipeline.synthetic.geometry import OUTLINE_CENTRE_Y, Camera, brow_points, nose_points, outline_radius
from keysync_jax.data_pipeline.synthetic.identity import Identity

LEFT, TOP, RIGHT, BOTTOM = -1.5, -1.42, 1.5, 2.3  # extent of the head texture in face units
TEXELS_PER_PIXEL = 1.5
_NECK = 0.44


class HeadTexture(NamedTuple):
    """Premultiplied RGBA uint8 [h, w, 4] over LEFT..RIGHT × TOP..BOTTOM, `density` texels per face unit."""

    image: np.ndarray
    density: float


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, smooth between (works with low > high as a falling step)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _bell(x: np.ndarray, y: np.ndarray, cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
    return np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)


def value_noise(rng: np.random.Generator, cells: int, width: int, height: int) -> np.ndarray:
    """Smooth noise in about -1..1 [height, width]; its content does not depend on the resolution."""
    coarse = rng.normal(0, 0.5, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


class _Canvas:
    """Premultiplied float RGBA layers painted back to front."""

    def __init__(self, shape: tuple[int, int]):
        self.rgb = np.zeros((*shape, 3), np.float32)
        self.alpha = np.zeros(shape, np.float32)

    def over(self, colour: np.ndarray, coverage: np.ndarray) -> None:
        keep = 1 - coverage
        self.rgb = self.rgb * keep[..., None] + np.asarray(colour, np.float32) * coverage[..., None]
        self.alpha = self.alpha * keep + coverage

    def tint(self, factor: np.ndarray, coverage: np.ndarray) -> None:
        """Multiply what is painted by `factor` where covered."""
        self.rgb *= 1 - coverage[..., None] * (1 - np.asarray(factor, np.float32))


def _relief(x: np.ndarray, y: np.ndarray, ax: np.ndarray, identity: Identity) -> np.ndarray:
    """Height of the face towards the camera in face units."""
    long, wide = identity.nose_length, identity.nose_width
    skull = np.sqrt(np.maximum(1.02 - (x / 0.92) ** 2 - ((y - 0.22) / 1.34) ** 2, 0.01)) * 0.62
    ridge = smoothstep(-0.12, 0.42 * long, y) * smoothstep(0.60 * long, 0.46 * long, y)
    z = skull + 0.17 * ridge * np.exp(-((x / (wide * (0.075 + 0.05 * np.clip(y, 0, 1)))) ** 2))
    z += 0.075 * _bell(x, y, 0, 0.435 * long, 0.095 * wide, 0.085)
    z += 0.05 * _bell(ax, y, 0.118 * wide, 0.49 * long, 0.05, 0.055)
    z -= 0.085 * _bell(ax, y, 0.30, 0.01, 0.20, 0.11) + 0.035 * _bell(ax, y, 0.15, 0.0, 0.07, 0.10)
    z += 0.042 * _bell(ax, y, 0.345, 0.015, 0.13, 0.062)  # eyeball under the lids
    z += 0.055 * _bell(ax, y, 0.34, -identity.brow_height + 0.02, 0.26, 0.085)
    z += 0.055 * _bell(ax, y, 0.50, 0.36, 0.20, 0.17)
    z += 0.06 * _bell(x, y, 0, identity.mouth_y, 0.33, 0.20)
    z -= 0.022 * _bell(x, y, 0, identity.mouth_y + 0.185, 0.17, 0.045)
    z += 0.065 * _bell(x, y, 0, 0.5 + 0.70 * identity.chin_length, 0.19, 0.13)
    z -= 0.007 * np.exp(-(((ax - (0.185 + 0.42 * (y - 0.50))) / 0.035) ** 2)) * smoothstep(0.45, 0.56, y) * smoothstep(0.84, 0.70, y)
    z -= 0.010 * _bell(x, y, 0, 0.645, 0.030, 0.055)
    return z


def _skin(x: np.ndarray, y: np.ndarray, depth: np.ndarray, identity: Identity, density: float, rng: np.random.Generator) -> np.ndarray:
    """Shaded skin colour [h, w, 3]; `depth` is the distance inside the outline."""
    ax = np.abs(x)
    z = _relief(x, y, ax, identity)
    dy, dx = np.gradient(z, 1 / density)
    light = identity.light
    # The skull's slope runs away at the outline; a softened normal keeps the rim readable.
    dx, dy = dx / (1 + 0.25 * np.abs(dx)), dy / (1 + 0.25 * np.abs(dy))
    norm = 1 / np.sqrt(1 + dx * dx + dy * dy)
    lambert = np.maximum((-dx * light[0] - dy * light[1] + light[2]) * norm, 0)
    shade = identity.ambient + (1.06 - identity.ambient) * lambert / max(light[2], 0.55)
    shade = np.minimum(shade, 1.16)
    long, wide = identity.nose_length, identity.nose_width
    dark = 0.30 * _bell(ax, y, 0.235, -0.045, 0.15, 0.075) + 0.14 * _bell(ax, y, 0.33, 0.095, 0.15, 0.04)
    dark += 0.13 * _bell(ax, y, 0.36, -0.10, 0.17, 0.05)
    dark += 0.30 * _bell(x, y, 0, 0.585 * long, 0.13 * wide, 0.035) + 0.16 * _bell(ax, y, 0.185 * wide, 0.50 * long, 0.028, 0.06)
    dark += 0.18 * _bell(x, y, 0, identity.mouth_y + 0.175, 0.17, 0.04)
    dark += 0.10 * np.exp(-(((ax - (0.20 + 0.42 * (y - 0.50))) / 0.03) ** 2)) * smoothstep(0.46, 0.58, y) * smoothstep(0.84, 0.68, y)
    dark += 0.16 * smoothstep(0.10, 0.0, depth) + 0.10 * smoothstep(0.95, 1.35, y)
    shade = shade * (1 - np.minimum(dark, 0.85))
    skin = np.asarray(identity.skin, np.float32)
    colour = skin * np.asarray(identity.light_tint, np.float32) * shade[..., None]
    # Light scattered in skin: shadows turn red, not grey.
    shadow = np.clip(1 - shade, 0, 1)[..., None]
    colour = colour * (1 + shadow * np.array([0.05, -0.04, -0.06], np.float32))
    red = 0.09 * identity.blush * (_bell(ax, y, 0.47, 0.46, 0.17, 0.14) + 0.8 * _bell(x, y, 0, 0.44 * long, 0.10, 0.09))
    colour = colour * (1 - red[..., None] * np.array([-0.25, 1.0, 0.8], np.float32))
    if identity.stubble:
        beard = smoothstep(0.55, 0.85, y + 0.35 * np.maximum(ax - 0.35, 0)) * smoothstep(0.0, 0.06, depth)
        beard = np.maximum(beard, _bell(x, y, 0, 0.69, 0.26, 0.05))
        grain = 1 + 0.35 * value_noise(rng, 90, x.shape[1], x.shape[0])
        amount = (0.24 * identity.stubble * np.clip(beard * grain, 0, 1))[..., None]
        colour = colour * (1 - amount) + np.asarray(identity.hair, np.float32) * 0.5 * amount
    if identity.freckles:
        spots = np.zeros(x.shape, np.float32)
        for _ in range(identity.freckles):
            px, py, r = rng.uniform(-0.62, 0.62), rng.uniform(0.15, 1.15), rng.uniform(0.010, 0.020)
            spots += rng.uniform(0.2, 0.6) * _bell(x, y, px, py, r, r)
        colour = colour * (1 - np.minimum(spots, 0.7)[..., None] * np.array([0.5, 0.7, 0.75], np.float32))
    shine = 0.11 * _bell(x, y, 0.25 * light[0], 0.40 * long, 0.035, 0.05) + 0.07 * _bell(x, y, 0.45 * light[0], -0.50, 0.25, 0.12)
    shine += 0.05 * _bell(x, y, 0.05 * light[0], 0.2, 0.022, 0.15) + 0.05 * _bell(ax, y, 0.47, 0.27, 0.10, 0.05)
    return colour + (255 - colour) * shine[..., None]


def _nostrils(x: np.ndarray, y: np.ndarray, identity: Identity) -> np.ndarray:
    ax = np.abs(x)
    base = nose_points(identity)[5]  # landmark 32
    lean = (ax + base[0]) * 0.55
    return np.minimum(0.85 * _bell(ax, y + lean, -base[0], base[1] - 0.012, 0.040, 0.021) * 1.25, 0.85)


def _strands(x: np.ndarray, y: np.ndarray, identity: Identity, rng: np.random.Generator) -> np.ndarray:
    """Hair colour [h, w, 3]: streaks that fan out from the parting, with a band of gloss."""
    angle = np.arctan2(x - identity.parting * 0.5, -(y + 0.95) + 1.2)
    turns = (angle / np.pi + 1) * 0.5
    streak = np.interp(turns, np.linspace(0, 1, 400), rng.normal(0, 1, 400).clip(-1.5, 1.5)).astype(np.float32)
    broad = np.interp(turns, np.linspace(0, 1, 60), rng.normal(0, 1, 60).clip(-1.5, 1.5)).astype(np.float32)
    if identity.hair_style == "curly":
        streak = value_noise(rng, 40, x.shape[1], x.shape[0]) * 2
    light = identity.light
    band = np.exp(-(((np.hypot(x - 0.3 * light[0], (y + 0.1)) - 0.93) / 0.10) ** 2)) * smoothstep(-0.2, -0.7, y)
    shade = 0.82 + 0.10 * streak + 0.08 * broad + 0.34 * band * (1 + 0.4 * streak) + 0.22 * (x * light[0]) - 0.10 * smoothstep(-0.4, 0.8, y)
    return np.asarray(identity.hair, np.float32) * np.clip(shade, 0.3, 1.6)[..., None] + (10 * np.clip(band, 0, 1))[..., None]


def _hair_shapes(
    x: np.ndarray, y: np.ndarray, identity: Identity, density: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the hair behind the face and of the hair over the forehead and temples."""
    style, volume = identity.hair_style, identity.hair_volume
    crown = -0.94 * identity.forehead - 0.55 * volume
    half = 0.80 * identity.face_width + 0.75 * volume
    centre_y = -0.02
    if style == "curly":
        half, crown = half + 0.05, crown - 0.05
    angle = np.arctan2(x, centre_y - y)
    wobble = np.interp((angle / np.pi + 1) * 0.5, np.linspace(0, 1, 48), rng.normal(0, 0.04 if style == "curly" else 0.008, 48))
    top = np.hypot(x / half, (y - centre_y) / (centre_y - crown)) + wobble
    cap = np.clip((1 - top) * density * (centre_y - crown) * 0.5 + 0.5, 0, 1) * (y < centre_y)
    drop = {"short": 0.05, "bald": 0.0, "curly": 0.45, "medium": 1.0, "long": 1.95}[style]
    flare = half + 0.06 * np.clip(y, 0, 2) - (0.10 if style == "medium" else 0.0) * np.clip(y - 0.5, 0, 1)
    fall = np.clip((flare * (1 - wobble) - np.abs(x)) * density * 0.7 + 0.5, 0, 1) * (y >= centre_y)
    fall = fall * smoothstep(drop + 0.10, drop - 0.05, y + 0.12 * x * x + 2 * wobble)
    # Long hair hangs beside the neck and over the shoulders; between them the neck shows.
    fall = fall * np.maximum(smoothstep(0.95, 0.75, y), smoothstep(0.35, 0.46, np.abs(x) - 0.03 * wobble))
    back = np.maximum(cap, fall)
    hairline = identity.hairline + 0.42 * np.maximum(np.abs(x) - 0.30, 0) ** 1.5 - 0.16 * np.exp(-(((x - identity.parting) / 0.18) ** 2))
    fringe = np.interp(x, np.linspace(-1.5, 1.5, 64), rng.normal(0, 0.007, 64))
    front = smoothstep(-0.035, 0.045, hairline + fringe - y)
    temple = 0.735 * identity.face_width + (0.0 if style in ("medium", "long") else 0.035)
    sides = np.clip((np.abs(x) - temple + 0.05 * np.clip(y, -1, 0.3)) * density * 0.4 + 0.5, 0, 1)
    sides = sides * smoothstep(min(drop, 0.3) + 0.05, min(drop, 0.3) - 0.25, y)
    front = np.maximum(front, sides) * back
    if style == "bald":
        return np.zeros_like(back), np.zeros_like(front)
    return back, front


def _brows(x: np.ndarray, y: np.ndarray, identity: Identity, density: float, rng: np.random.Generator) -> np.ndarray:
    """Coverage of both brows; their upper edges pass through landmarks 17..26."""
    points = brow_points(identity)
    ax = np.abs(x)
    upper = np.interp(ax, points[:, 0], points[:, 1])
    share = np.clip((ax - points[0, 0]) / (points[-1, 0] - points[0, 0]), 0, 1)
    thick = identity.brow_thickness * (1.1 - 0.75 * share**1.6)
    across = (y - upper) / thick
    body = smoothstep(-0.12, 0.22, across) * smoothstep(1.12, 0.62, across)
    ends = smoothstep(points[0, 0] - 0.03, points[0, 0] + 0.035, ax) * smoothstep(points[-1, 0] + 0.015, points[-1, 0] - 0.05, ax)
    hairs = 0.88 + 0.2 * value_noise(rng, 120, x.shape[1], x.shape[0])
    return np.clip(body * ends * hairs * 0.9, 0, 0.95)


def head_texture(identity: Identity, camera: Camera) -> HeadTexture:
    """Paint the resting head of an identity at the density the camera needs."""
    density = camera.scale * camera.size * TEXELS_PER_PIXEL
    width, height = int(round((RIGHT - LEFT) * density)), int(round((BOTTOM - TOP) * density))
    x = (LEFT + (np.arange(width, dtype=np.float32) + 0.5) / density)[None, :].repeat(height, 0)
    y = (TOP + (np.arange(height, dtype=np.float32) + 0.5) / density)[:, None].repeat(width, 1)
    rng = np.random.default_rng(np.random.SeedSequence([0x7E37, identity.texture_seed]))
    streams = rng.spawn(4)
    canvas = _Canvas((height, width))
    back, front = _hair_shapes(x, y, identity, density, streams[0])
    strands = _strands(x, y, identity, streams[1]).astype(np.float32)
    canvas.over(strands * 0.72, back)
    # The jaw's shadow falls on whatever is behind it: painted as darkness outside the outline.
    angle = np.arctan2(x, y - OUTLINE_CENTRE_Y)
    turns = np.linspace(-np.pi, np.pi, 721)
    outline = np.interp(angle, turns, outline_radius(identity)(turns)).astype(np.float32)
    inside = outline - np.hypot(x, y - OUTLINE_CENTRE_Y)
    cast = 0.55 * smoothstep(-0.30, 0.02, inside) * smoothstep(0.75, 1.0, y) * smoothstep(_NECK + 0.10, _NECK - 0.06, np.abs(x))
    canvas.over(np.array([18, 10, 8], np.float32), cast)
    skin = _skin(x, y, inside, identity, density, streams[2])
    ear_x = 0.80 * identity.face_width
    ear = np.hypot((np.abs(x) - ear_x) / 0.095, (y - 0.16) / 0.20)
    lit = np.asarray(identity.skin, np.float32) * (0.66 + 0.12 * smoothstep(0.2, 0.9, ear))[..., None] * [1.05, 0.95, 0.93]
    canvas.over(lit, np.clip((1 - ear) * density * 0.095 + 0.5, 0, 1) * (identity.hair_style not in ("long", "medium")))
    canvas.over(skin, np.clip(inside * density + 0.5, 0, 1))
    canvas.tint(np.array([0.30, 0.16, 0.14], np.float32), _nostrils(x, y, identity))
    canvas.over(np.asarray(identity.brows, np.float32), _brows(x, y, identity, density, streams[3]))
    shadow = 0.30 * np.clip(cv2.GaussianBlur(front, (0, 0), 0.06 * density) - front, 0, 1) * (inside > 0)
    canvas.tint(np.array([0.35, 0.28, 0.28], np.float32), shadow)
    canvas.over(strands, front)
    rgba = np.concatenate([np.clip(canvas.rgb, 0, 255), 255 * canvas.alpha[..., None]], axis=-1)
    return HeadTexture(np.ascontiguousarray(np.rint(rgba).astype(np.uint8)), density)


def backdrop(identity: Identity, camera: Camera) -> np.ndarray:
    """Room, clothes and neck behind the head: float32 [size, size, 3], still for the whole clip."""
    size = camera.size
    rng = np.random.default_rng(np.random.SeedSequence([0xBAC4, identity.texture_seed]))
    row = (np.arange(size, dtype=np.float32) + 0.5) / size
    px, py = row[None, :].repeat(size, 0), row[:, None].repeat(size, 1)
    first, second = (np.asarray(c, np.float32) for c in identity.background_colours)
    slope = rng.uniform(-1, 1, 2)
    mix = smoothstep(-0.7, 0.7, (px - 0.5) * slope[0] + (py - 0.5) * slope[1] + 0.15 * value_noise(rng, 4, size, size))
    room = first + (second - first) * mix[..., None]
    if identity.background == "blobs":
        for _ in range(7):
            cx, cy, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.14)
            glow = smoothstep(1.15, 0.8, np.hypot(px - cx, py - cy) / r) * rng.uniform(0.1, 0.35)
            room += (rng.uniform(60, 255, 3).astype(np.float32) - room) * glow[..., None]
    elif identity.background == "panels":
        for _ in range(4):
            cx, w, top = rng.uniform(0, 1), rng.uniform(0.03, 0.16), rng.uniform(-0.2, 0.5)
            edge = smoothstep(-0.02, 0.02, w - np.abs(px - cx)) * smoothstep(-0.02, 0.02, py - top)
            room *= (1 + edge * rng.uniform(-0.25, 0.18))[..., None]
    x = (px - camera.centre[0]) / camera.scale
    y = (py - camera.centre[1]) / camera.scale
    ax = np.abs(x)
    density = camera.scale * size

    def cover(inside: np.ndarray) -> np.ndarray:
        return np.clip(inside * density + 0.5, 0, 1)[..., None]

    light = identity.light
    collar = 1.72 + 0.25 * (x / 0.8) ** 2
    body = cover(np.minimum(y - (1.62 + 0.34 * smoothstep(0.35, 1.5, ax)), 1.75 - ax + 0.1 * y))
    folds = 1 + 0.10 * value_noise(rng, 7, size, size) + 0.20 * x * light[0] - 0.18 * smoothstep(0.7, 1.7, ax)
    picture = room + (np.asarray(identity.clothes, np.float32) * np.clip(folds, 0.4, 1.4)[..., None] - room) * body
    wide = _NECK + 0.16 * smoothstep(1.45, 1.9, y)
    roundness = np.sqrt(np.clip(1 - (x / (wide + 0.05)) ** 2, 0.05, 1))
    shade = (0.55 + 0.33 * roundness + 0.20 * x * light[0]) * (0.80 + 0.15 * smoothstep(1.3, 1.75, y))
    neck = np.asarray(identity.skin, np.float32) * np.asarray(identity.light_tint, np.float32) * shade[..., None] * [1.0, 0.94, 0.92]
    picture += (neck - picture) * cover(np.minimum(wide - ax, np.minimum(collar - 0.25 * (ax < 0) - y + 0.1, y - 0.6)))
    return np.clip(picture, 0, 255).astype(np.float32)
