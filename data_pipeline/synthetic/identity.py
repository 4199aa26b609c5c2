"""Who is drawn: the parameters of one face, its light and its background, sampled from a seed.

Face units: the distance between the outer eye corners is 1, the origin lies midway between the eyes, x points to the viewer's right
and y down. A frame shows `scale` of its width per unit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

HAIR_STYLES = ("short", "medium", "long", "bald", "curly")
BACKGROUNDS = ("gradient", "blobs", "panels")

_TAG = 0x1DE27
_SKIN_TONES = np.array([[252, 222, 205], [241, 200, 174], [226, 178, 148], [200, 148, 116], [160, 110, 82], [120, 80, 60]], np.float32)
_HAIR_TONES = np.array(
    [[28, 22, 20], [58, 38, 28], [96, 62, 38], [150, 104, 60], [206, 170, 112], [140, 62, 34], [150, 148, 146]], np.float32
)
_IRIS_TONES = np.array([[70, 44, 26], [104, 72, 40], [82, 100, 60], [78, 112, 146], [92, 100, 108]], np.float32)


@dataclasses.dataclass(frozen=True)
class Identity:
    """One drawn person with camera, light and background. Colours are sRGB 0..255; lengths are face units unless said."""

    scale: float  # fraction of the frame width that one face unit covers
    centre: tuple[float, float]  # where the point between the eyes rests, as fractions of width and height
    jaw_width: float  # multiplies the outline below the eyes
    face_width: float
    chin_length: float
    chin_width: float
    forehead: float
    eye_size: float
    eye_height: float
    eye_tilt: float
    brow_height: float
    brow_thickness: float
    brow_arch: float
    nose_width: float
    nose_length: float
    mouth_y: float
    mouth_width: float  # multiplies every mouth width
    mouth_opening: float  # multiplies every mouth opening
    upper_lip: float
    lower_lip: float
    lip_corner: float  # resting height of the corners, positive is up
    skin: tuple[float, float, float]
    lips: tuple[float, float, float]
    hair: tuple[float, float, float]
    brows: tuple[float, float, float]
    iris: tuple[float, float, float]
    blush: float
    stubble: float
    freckles: int
    hair_style: str
    hairline: float
    hair_volume: float
    parting: float
    light: tuple[float, float, float]  # unit vector towards the light (x right, y down, z to the camera)
    ambient: float
    light_tint: tuple[float, float, float]
    background: str
    background_colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    clothes: tuple[float, float, float]
    texture_seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready mapping of every field."""
        return dataclasses.asdict(self)


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    r, g, b = (round(float(v), 4) for v in values)
    return r, g, b


def _between(tones: np.ndarray, position: float) -> np.ndarray:
    low = min(int(position), len(tones) - 2)
    part = position - low
    return tones[low] * (1 - part) + tones[low + 1] * part


def lip_colour(skin: np.ndarray, strength: float, hue: float) -> np.ndarray:
    """Lips are the skin with green and blue taken out, so that log(R/G) separates them from the skin in any light.

    Args:
        skin: [3] sRGB; strength: 0 natural .. 1 lipstick; hue: -1 brownish .. 1 pinkish.
    """
    keep = np.array([0.86 - 0.08 * strength, 0.56 - 0.14 * strength, 0.60 - 0.12 * strength + 0.07 * hue], np.float32)
    return skin * keep


def sample_identity(seed: int) -> Identity:
    """Draw one identity; a pure function of `seed` (a non-negative integer)."""
    rng = np.random.default_rng(np.random.SeedSequence([_TAG, seed]))

    def spread(middle: float, width: float) -> float:
        return round(float(middle + width * np.clip(rng.normal(0, 0.5), -1, 1)), 5)

    def uniform(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 5)

    skin = np.clip(_between(_SKIN_TONES, rng.uniform(0, len(_SKIN_TONES) - 1)) * rng.uniform(0.95, 1.03) + rng.normal(0, 3, 3), 20, 250)
    hair = np.clip(_HAIR_TONES[rng.integers(len(_HAIR_TONES))] * rng.uniform(0.8, 1.2) + rng.normal(0, 3, 3), 8, 235)
    brows = hair * 0.62 + np.array([14, 10, 8])
    brows = np.minimum(brows, skin * 0.58)
    azimuth, elevation = rng.uniform(-0.75, 0.75), rng.uniform(0.25, 0.75)
    light = np.array([np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    warmth = rng.uniform(-1, 1)
    tint = np.array([1 + 0.04 * warmth, 1.0, 1 - 0.06 * warmth]) * rng.uniform(0.92, 1.06)
    tint *= min(1.0, 232 / float((skin * tint).max()))  # lit skin must not clip, or it turns yellow
    backdrop = rng.uniform(40, 215, (2, 3))
    backdrop = backdrop * 0.45 + backdrop.mean(1, keepdims=True) * 0.55  # rooms are rarely saturated
    if abs(backdrop[0].mean() - skin.mean()) < 30:  # a face as bright as the wall is a face without an outline
        backdrop = np.clip(backdrop + np.where(skin.mean() > 128, -55, 55), 20, 240)
    masculine = rng.random() < 0.5
    style = str(rng.choice(HAIR_STYLES, p=[0.5, 0.1, 0.05, 0.2, 0.15] if masculine else [0.12, 0.33, 0.37, 0.02, 0.16]))
    return Identity(
        scale=uniform(0.305, 0.335),
        centre=(uniform(0.485, 0.515), uniform(0.425, 0.455)),
        jaw_width=spread(1.03 if masculine else 0.98, 0.06),
        face_width=spread(1.0, 0.045),
        chin_length=spread(1.0, 0.06),
        chin_width=spread(1.06 if masculine else 0.94, 0.14),
        forehead=spread(1.0, 0.07),
        eye_size=spread(1.0 if masculine else 1.06, 0.08),
        eye_height=spread(1.0 if masculine else 1.1, 0.15),
        eye_tilt=spread(0.012, 0.02),
        brow_height=spread(0.235 if masculine else 0.255, 0.03),
        brow_thickness=spread(0.058 if masculine else 0.042, 0.012),
        brow_arch=spread(0.045, 0.03),
        nose_width=spread(1.03 if masculine else 0.96, 0.1),
        nose_length=spread(1.0, 0.05),
        mouth_y=spread(0.835, 0.025),
        mouth_width=spread(1.0, 0.08),
        mouth_opening=spread(1.0, 0.1),
        upper_lip=spread(0.075 if masculine else 0.088, 0.016),
        lower_lip=spread(0.105 if masculine else 0.118, 0.02),
        lip_corner=spread(0.018, 0.014),
        skin=_triple(skin),
        lips=_triple(lip_colour(skin, uniform(0, 0.35) if masculine else uniform(0.2, 1.0), uniform(-1, 1))),
        hair=_triple(hair),
        brows=_triple(brows),
        iris=_triple(_IRIS_TONES[rng.integers(len(_IRIS_TONES))] * rng.uniform(0.85, 1.15)),
        blush=uniform(0.3, 1.0),
        stubble=uniform(0.2, 1.0) if masculine and rng.random() < 0.6 else 0.0,
        freckles=int(rng.integers(0, 40)) if rng.random() < 0.35 else int(rng.integers(0, 4)),
        hair_style=style,
        hairline=uniform(-0.70, -0.52),
        hair_volume=uniform(0.10, 0.22),
        parting=uniform(-0.45, 0.45),
        light=_triple(light),
        ambient=uniform(0.44, 0.60),
        light_tint=_triple(tint),
        background=str(rng.choice(BACKGROUNDS)),
        background_colours=(_triple(backdrop[0]), _triple(backdrop[1])),
        clothes=_triple(rng.uniform(20, 220, 3) * 0.8 + 20),
        texture_seed=int(rng.integers(2**31)),
    )
