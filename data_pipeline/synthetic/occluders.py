"""Things that pass in front of the mouth: a hand or a microphone, with the exact mask of the pixels they cover."""

from __future__ import annotations

import numpy as np

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.data_pipeline.synthetic.geometry import Camera
from keysync_jax.data_pipeline.synthetic.identity import Identity

OCCLUDERS = ("hand", "microphone")
_TAG = 0x0CC1
# Fingers of a right hand pointing up: base x, base y, tip x, tip y, radius in face units about the wrist's top.
_FINGERS = (
    (-0.27, -0.42, -0.36, -0.92, 0.082),
    (-0.10, -0.50, -0.13, -1.10, 0.088),
    (0.08, -0.50, 0.10, -1.06, 0.086),
    (0.25, -0.42, 0.32, -0.88, 0.075),
    (-0.33, -0.12, -0.62, -0.42, 0.090),
)


def _path(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Presence 0..1 (0 out of the picture) and a slow drift [frames] in x and y, face units."""
    time = np.arange(frames) / max(frames - 1, 1)
    enter, leave = rng.uniform(0.08, 0.3), rng.uniform(0.65, 0.92)
    ramp = 0.10
    up = np.clip((time - enter) / ramp, 0, 1)
    down = np.clip((leave - time) / ramp, 0, 1)
    presence = np.minimum(up, down)
    seconds = np.arange(frames) / FRAME_RATE
    drift = [0.05 * np.sin(2 * np.pi * rng.uniform(0.15, 0.5) * seconds + rng.uniform(0, 6.28)) for _ in range(2)]
    return presence * presence * (3 - 2 * presence), drift[0], drift[1]


def _capsule(x: np.ndarray, y: np.ndarray, ax: float, ay: float, bx: float, by: float, radius: float) -> np.ndarray:
    """Distance inside a capsule (positive inside)."""
    dx, dy = bx - ax, by - ay
    t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return radius - np.hypot(x - ax - t * dx, y - ay - t * dy)


def _hand(x: np.ndarray, y: np.ndarray, k: float, identity: Identity) -> tuple[np.ndarray, np.ndarray]:
    """Colour [h, w, 3] and coverage [h, w] of a hand whose wrist top is the origin."""
    skin = np.asarray(identity.skin, np.float32) * np.asarray(identity.light_tint, np.float32)
    colour = np.zeros((*x.shape, 3), np.float32)
    coverage = np.zeros(x.shape, np.float32)
    palm = 0.36 - np.hypot(x / 1.0, (y + 0.22) / 1.05)
    wrist = _capsule(x, y, 0.02, 0.0, 0.06, 1.6, 0.24)
    for inside, radius in [(wrist, 0.24), (palm, 0.36)] + [(_capsule(x, y, *f), f[4]) for f in _FINGERS]:
        part = np.clip(inside * k + 0.5, 0, 1)
        depth = np.clip(inside / (0.55 * min(radius, 0.12)), 0, 1)
        shade = 0.60 + 0.36 * np.sqrt(np.clip(depth, 0, 1))
        tone = skin * shade[..., None] * np.array([1.0, 0.95, 0.93], np.float32)
        colour = colour * (1 - part[..., None]) + tone * part[..., None]
        coverage = coverage * (1 - part) + part
    return colour / np.maximum(coverage, 1e-3)[..., None], coverage


def _microphone(x: np.ndarray, y: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray]:
    """Colour and coverage of a microphone whose head is centred on the origin and whose handle points down."""
    ball = 0.25 - np.hypot(x, y / 1.12)
    handle = np.minimum(0.105 + 0.03 * np.clip(1.2 - y, 0, 1) - np.abs(x), y - 0.15)
    ring = np.minimum(0.19 - np.abs(x), 0.045 - np.abs(y - 0.23))
    lit = np.clip(1 - ((x + 0.07) ** 2 + (y + 0.09) ** 2) / 0.09, 0, 1)
    mesh = 1 + 0.18 * np.sin(x * 90) * np.sin(y * 90) * np.clip(k / 120, 0, 1)
    colour = np.array([30, 30, 34], np.float32) + 70 * np.exp(-(((x + 0.05) / 0.035) ** 2))[..., None]
    coverage = np.clip(handle * k + 0.5, 0, 1)
    for part, tone in (
        (ball, (52 + 95 * lit * lit) * mesh),
        (ring, 120 + 60 * np.exp(-(((x + 0.06) / 0.05) ** 2))),
    ):
        cover = np.clip(part * k + 0.5, 0, 1)
        colour = colour * (1 - cover[..., None]) + (tone * cover)[..., None]
        coverage = np.maximum(coverage, cover)
    return colour, coverage


def add_occluder(frames: np.ndarray, kind: str, identity: Identity, camera: Camera, motion_seed: int) -> np.ndarray:
    """Draw the occluder over `frames` [T, H, W, 3] in place; it comes up from below, hovers at the mouth and goes.

    Returns:
        bool [T, H, W], true where the occluder covers at least half of the pixel.
    """
    rng = np.random.default_rng(np.random.SeedSequence([_TAG, motion_seed]))
    count, size = len(frames), camera.size
    presence, drift_x, drift_y = _path(rng, count)
    angle = rng.uniform(-0.45, 0.45) if kind == "microphone" else rng.uniform(-0.6, 0.6)
    aim_x = rng.uniform(-0.25, 0.25)
    aim_y = identity.mouth_y + (rng.uniform(0.05, 0.30) if kind == "microphone" else rng.uniform(0.75, 1.0))
    masks = np.zeros((count, size, size), bool)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / (size * camera.scale)
    k = camera.scale * size
    cos, sin = np.cos(angle), np.sin(angle)
    for i in np.flatnonzero(presence > 0):
        x = (grid - camera.centre[0] / camera.scale - aim_x - drift_x[i])[None, :]
        y = (grid - camera.centre[1] / camera.scale - aim_y - drift_y[i] - 2.6 * (1 - presence[i]))[:, None]
        # Only rows and columns within the occluder's reach are painted.
        row, column = int(np.searchsorted(y[:, 0], -1.3)), slice(*(int(v) for v in np.searchsorted(x[0], (-1.6, 1.6))))
        x, y = x[:, column], y[row:]
        turned_x, turned_y = cos * x + sin * y, cos * y - sin * x
        colour, coverage = _microphone(turned_x, turned_y, k) if kind == "microphone" else _hand(turned_x, turned_y, k, identity)
        window = frames[i, row:, column].astype(np.float32)
        window += (colour - window) * coverage[..., None]
        frames[i, row:, column] = np.clip(np.rint(window), 0, 255).astype(np.uint8)
        masks[i, row:, column] = coverage >= 0.5
    return masks
