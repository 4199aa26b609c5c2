"""Hands in a frame: palm detection, then 21 points of each hand (mediapipe's networks, Zhang et al. 2020, run by LiteRT).

Each frame stands alone: a hand is found in it or not, whatever the frame before showed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.media import face_models, ssd
from keysync_jax.media.faces import box_iou, check_frame
from keysync_jax.media.tflite import TfliteFile

HAND_POINTS = 21

_PALM_SIZE, _HAND_SIZE = 192, 224  # input sides of the networks
_GRIDS = ((24, 2), (12, 6))
_PRESENCE = 0.5  # lowest probability of a hand, mediapipe's own default
_OVERLAP = 0.3  # boxes of one palm
_SAME_HAND = 0.5  # squares that overlap more show one hand
_WRIST, _MIDDLE = 0, 2  # of the palm's seven points: they tell which way the fingers point
_SCALE, _SHIFT = 2.6, -0.5  # the hand's square: its side and its shift towards the fingers, in palm boxes


class Hand(NamedTuple):
    """One hand of one frame.

    Attributes:
      points: float32 `[21, 2]`, (x, y) in pixels of the frame: wrist, then four of each finger from thumb to little finger.
      score: probability that it is a hand.
      palm: float32 `[7, 2]`, the palm detector's points.
    """

    points: np.ndarray
    score: float
    palm: np.ndarray


class Square(NamedTuple):
    """Centre and side in pixels of a square, and the clockwise angle in radians by which its content is turned."""

    x: float
    y: float
    side: float
    angle: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.side / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


class HandDetector:
    """Every hand of a frame, the surest palm first.

    Args:
      max_hands: only this many palms are looked at.
      least: lowest score of a palm.

    Raises:
      KeySyncError: the models are not here.
    """

    def __init__(self, max_hands: int = 4, least: float = 0.5):
        self._palms = TfliteFile(face_models.locate(face_models.PALM_DETECTOR)).network()
        self._hands = TfliteFile(face_models.locate(face_models.HAND_LANDMARKS)).network()
        self._anchors = ssd.anchor_centres(_GRIDS)
        self._max_hands, self._least = max_hands, least

    def detect(self, rgb: np.ndarray) -> list[Hand]:
        """Hands of uint8 `[H, W, 3]`; [] where there is none.

        Raises:
          KeySyncError: the array is not an RGB frame.
        """
        rgb = check_frame(rgb)
        square, place = ssd.letterboxed(rgb, _PALM_SIZE)
        raw, logits = self._palms(square[None] / np.float32(255))
        found = ssd.suppress(ssd.decode(raw[0], logits[0, :, 0], self._anchors, _PALM_SIZE, self._least), _OVERLAP)
        squares: list[tuple[ssd.Detection, Square]] = []
        for palm in (detection.placed(*place) for detection in found[: self._max_hands]):
            around = _square_of(palm)
            # Of two squares that show one hand the later one stays, as in mediapipe.
            squares = [(p, s) for p, s in squares if box_iou(s.box, around.box) <= _SAME_HAND]
            squares.append((palm, around))
        hands = [Hand(*self._look(rgb, square), palm.points.astype(np.float32)) for palm, square in squares]
        return [hand for hand in hands if hand.score > _PRESENCE]

    def _look(self, rgb: np.ndarray, around: Square) -> tuple[np.ndarray, float]:
        """Points `[21, 2]` in pixels of the frame and presence, of the hand in a turned square."""
        scale = around.side / _HAND_SIZE
        cos, sin = math.cos(around.angle) * scale, math.sin(around.angle) * scale
        half = _HAND_SIZE / 2
        back = np.array([[cos, -sin, around.x - cos * half + sin * half], [sin, cos, around.y - sin * half - cos * half]])
        image = ssd.warped(rgb, back, _HAND_SIZE, cv2.BORDER_REPLICATE)
        points, presence, *_ = self._hands(image[None] / np.float32(255))
        at = points.reshape(HAND_POINTS, 3)[:, :2].astype(np.float64)
        return (at @ back[:, :2].T + back[:, 2]).astype(np.float32), float(presence.item())


def _square_of(palm: ssd.Detection) -> Square:
    """The square in which a palm's whole hand lies upright, fingers up."""
    x0, y0, x1, y1 = palm.box
    fingers = palm.points[_MIDDLE] - palm.points[_WRIST]
    angle = math.pi / 2 - math.atan2(-fingers[1], fingers[0])
    angle -= 2 * math.pi * math.floor((angle + math.pi) / (2 * math.pi))
    shift = (y1 - y0) * _SHIFT
    x, y = (x0 + x1) / 2 - shift * math.sin(angle), (y0 + y1) / 2 + shift * math.cos(angle)
    return Square(float(x), float(y), _SCALE * max(x1 - x0, y1 - y0), angle)
