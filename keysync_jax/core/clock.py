"""The one clock of pictures and sound (paper A.1): 25 frames a second, 16,000 samples a second, hence 640 samples to a frame of 40 ms."""

import math
from fractions import Fraction

FRAME_RATE = 25  # frames per second that the networks were trained at
SAMPLE_RATE = 16000  # Hz, mono: what every speech encoder hears
SAMPLES_PER_FRAME = SAMPLE_RATE // FRAME_RATE


def model_frame(time: Fraction) -> int:
    """The model frame nearest to `time` seconds (halves go up)."""
    return math.floor(time * FRAME_RATE + Fraction(1, 2))
