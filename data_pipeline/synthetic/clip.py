"""One drawn talker: frames, voice and everything that is true about them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from keysync_jax.core.clock import FRAME_RATE, SAMPLE_RATE
from keysync_jax.core.errors import UsageError
from keysync_jax.data_pipeline.synthetic.draw import render
from keysync_jax.data_pipeline.synthetic.geometry import camera_of, landmarks_of, mouth_of
from keysync_jax.data_pipeline.synthetic.identity import sample_identity
from keysync_jax.data_pipeline.synthetic.motion import sample_motion
from keysync_jax.data_pipeline.synthetic.occluders import OCCLUDERS, add_occluder
from keysync_jax.data_pipeline.synthetic.phonemes import Phoneme, articulate, at_frames, sample_phonemes
from keysync_jax.data_pipeline.synthetic.voice import sample_voice, synthesize

MIN_SIZE, MAX_SIZE = 48, 4096
MAX_FRAMES = 15_000  # ten minutes: the voice is made in one piece
_MAX_BYTES = 4 << 30  # of a clip's frames, which are all in memory


@dataclasses.dataclass(frozen=True)
class TalkerOptions:
    """What a clip holds beside a plain talking head.

    Attributes:
        silent: no speech at all, room noise only, mouth shut throughout.
        pause_share: expected share of time in pauses between phrases.
        long_silence: probability of one silent stretch of 1.2 to 2.4 s.
        laughter: probability that a phrase is laughter-like.
        occluder: "hand", "microphone" or None.
        emotion: draw valence and arousal expressions (else both are zero).
        motion: scales head motion; 0 holds the head still.
        room_db: level of the room noise in dB full scale; None draws it, -inf is digital silence.
    """

    silent: bool = False
    pause_share: float = 0.14
    long_silence: float = 0.3
    laughter: float = 0.0
    occluder: str | None = None
    emotion: bool = False
    motion: float = 1.0
    room_db: float | None = None

    def __post_init__(self) -> None:
        if self.occluder is not None and self.occluder not in OCCLUDERS:
            raise UsageError(f"no occluder called {self.occluder!r}: choose {' or '.join(OCCLUDERS)}")
        for name in ("pause_share", "long_silence", "laughter"):
            value = getattr(self, name)
            if not 0 <= value <= (0.9 if name == "pause_share" else 1):
                raise UsageError(f"{name} must lie between 0 and {0.9 if name == 'pause_share' else 1}, not {value}")
        if not 0 <= self.motion < math.inf:
            raise UsageError(f"motion must be a finite number that is not negative, not {self.motion}")
        if self.room_db is not None and not self.room_db <= 0:
            raise UsageError(f"room_db is a level in dB full scale, at most 0, not {self.room_db}")


def check_extent(frames: int, size: int) -> None:
    """Refuses a clip that cannot be drawn.

    Args:
        frames: length at 25 fps.
        size: side of the frames in pixels.

    Raises:
        UsageError: no frame, more than ten minutes, an odd, too small or too large side, or frames that are too many for the memory.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise UsageError(f"a talker clip has 1 to {MAX_FRAMES} frames, not {frames}")
    if not MIN_SIZE <= size <= MAX_SIZE or size % 2:
        raise UsageError(f"frame size must be even and {MIN_SIZE} to {MAX_SIZE} pixels, not {size}")
    if frames * size * size * 3 > _MAX_BYTES:
        raise UsageError(
            f"{frames} frames of {size} pixels are {frames * size * size * 3 / 1e9:.0f} GB in memory; choose fewer frames or a smaller size"
        )


@dataclasses.dataclass(frozen=True)
class TalkerClip:
    """A clip with its truth. Lengths `opening` and `width` are in distances between the outer eye corners.

    Attributes:
        frames: uint8 [T, H, W, 3], sRGB.
        samples: float32 [S], 16 kHz mono, S = 640·T.
        landmarks: float32 [T, 68, 2] iBUG points, continuous pixels ((0, 0) is the corner of the first pixel).
        opening: float32 [T], gap between the inner lips (landmarks 62 to 66) in the face's own plane.
        width: float32 [T], distance of the mouth corners (48 to 54).
        phonemes: what is said, with times in seconds.
        is_closure: bool [T], the frame's centre lies in m, b or p (the lips are then shut).
        valence, arousal: float32 [T] in -1..1.
        occluder_mask: bool [T, H, W] or None.
        identity: every parameter of the face, light and background.
        seeds: the three seeds the clip was made from.
    """

    frames: np.ndarray
    samples: np.ndarray
    landmarks: np.ndarray
    opening: np.ndarray
    width: np.ndarray
    phonemes: list[Phoneme]
    is_closure: np.ndarray
    valence: np.ndarray
    arousal: np.ndarray
    occluder_mask: np.ndarray | None
    identity: dict[str, Any]
    seeds: dict[str, int]
    options: TalkerOptions
    fps: int = FRAME_RATE
    sample_rate: int = SAMPLE_RATE


def make_clip(
    seed: int,
    frames: int = 180,
    size: int = 128,
    identity_seed: int | None = None,
    audio_seed: int | None = None,
    motion_seed: int | None = None,
    options: TalkerOptions | None = None,
) -> TalkerClip:
    """Draw one clip. Pure: equal arguments give byte-identical arrays, whatever was made before.

    Face, light and background come from `identity_seed`; words, voice, room noise and the mouth from `audio_seed`; head motion,
    blinks, gaze, expression and the occluder's path from `motion_seed`. Each defaults to `seed`. Rendering a clip's identity and
    motion with another clip's audio gives the exact target of dubbing it.

    Args:
        seed: non-negative integer.
        frames: number of frames at 25 fps.
        size: side of the square frames in pixels, even, 48 to 4096.
        options: see `TalkerOptions`.

    Raises:
        UsageError: a negative seed, or a length or size that `check_extent` refuses.
    """
    options = options or TalkerOptions()
    seeds = {
        "identity": seed if identity_seed is None else identity_seed,
        "audio": seed if audio_seed is None else audio_seed,
        "motion": seed if motion_seed is None else motion_seed,
    }
    for name, value in seeds.items():
        if value < 0:
            raise UsageError(f"{name} seed must be a non-negative integer, not {value}")
    check_extent(frames, size)
    seconds = frames / FRAME_RATE
    phonemes: list[Phoneme] = []
    if not options.silent:
        phonemes = sample_phonemes(
            seeds["audio"], seconds, pause_share=options.pause_share, long_silence=options.long_silence, laughter=options.laughter
        )
    articulation = articulate(phonemes, seconds, seeds["audio"])
    samples = synthesize(articulation, sample_voice(seeds["audio"], options.room_db), seeds["audio"], frames * SAMPLE_RATE // FRAME_RATE)
    identity = sample_identity(seeds["identity"])
    motion = sample_motion(seeds["motion"], frames, amount=options.motion, emotion=options.emotion)
    camera = camera_of(identity, size)
    mouth = mouth_of(identity, at_frames(articulation.opening, frames), at_frames(articulation.width, frames), motion.valence)
    pictures = render(identity, camera, motion, mouth)
    occluder = None if options.occluder is None else add_occluder(pictures, options.occluder, identity, camera, seeds["motion"])
    centres = (np.arange(frames) + 0.5) / FRAME_RATE
    closed = np.zeros(frames, bool)
    for item in phonemes:
        if item.closure:
            closed |= (centres >= item.start) & (centres < item.end)
    return TalkerClip(
        frames=pictures,
        samples=samples,
        landmarks=landmarks_of(identity, camera, motion, mouth),
        opening=mouth.opening,
        width=mouth.width,
        phonemes=phonemes,
        is_closure=closed,
        valence=motion.valence,
        arousal=motion.arousal,
        occluder_mask=occluder,
        identity=identity.to_dict(),
        seeds=seeds,
        options=options,
    )
