"""The one clock of pictures and sound (paper A.1): 25 frames a second, 16,000 samples a second, hence 640 samples to a frame of 40 ms."""

FRAME_RATE = 25  # frames per second that the networks were trained at
SAMPLE_RATE = 16000  # Hz, mono: what every speech encoder hears
SAMPLES_PER_FRAME = SAMPLE_RATE // FRAME_RATE
