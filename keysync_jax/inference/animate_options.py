"""What a person may choose about an animation."""

from __future__ import annotations

import dataclasses
import re

from keysync_jax.config import StageConfig
from keysync_jax.core.errors import UsageError
from keysync_jax.inference.emotion import NEUTRAL, EmotionCurve
from keysync_jax.inference.options import GuidanceOption
from keysync_jax.media import voice_channels
from keysync_jax.media.tracking import Selection

CROPS = ("face", "none")  # the square around a face, or the whole picture as it is
LEAST_SIZE = 16


@dataclasses.dataclass(frozen=True)
class AnimateOptions:
    """Settings of one animation; None means the model's own value."""

    seed: int = 23
    steps: int | None = None
    emotion: str = NEUTRAL  # see `EmotionCurve.parse`
    emotion_strength: float = 1.0
    audio_scale: float | None = None  # of keyframes
    identity_scale: float | None = None
    guidance: str | None = None  # of keyframes, see `GuidanceOption.parse`
    autoguidance: float | None = None  # away from the worse interpolation network; 1: without it
    at: float | None = None  # of a video: the moment of the picture, seconds
    crop: str = "face"  # of `CROPS`
    faces: str = "mediapipe"
    face_weights: str | None = None
    face: str = "largest"  # which face of several: "largest", "center", "left", "right" or "X,Y" in pixels
    size: int | None = None  # side of the square that is written
    paste: bool = False  # into the still picture instead
    crf: int | None = None
    lossless: bool = False
    codec: str | None = None  # of `encoding.CODECS`
    pix_fmt: str | None = None  # FFmpeg's name
    language: str | None = None  # of the voice, where its file does not say it
    audio_stream: int | None = None  # of the voice's file, from 0
    voice_channel: str = "auto"  # which channels the model hears, see `voice_channels.CHOICES`
    c2pa: str | None = None  # certificate chain, a PEM file: the output is signed
    key: str | None = None  # its private key
    consent: str | None = None  # who agreed to it; for the report and the manifest

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed} is out of range; choose 0 to {2**32 - 1}")
        self.curve()
        for name in ("audio_scale", "identity_scale", "autoguidance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 100:
                raise UsageError(f"--{name.replace('_', '-')} {value} is out of range; choose 0 to 100")
            if value is not None and self.guidance is not None and name != "autoguidance":
                raise UsageError(f"--{name.replace('_', '-')} and --guidance contradict each other; give one")
        if self.guidance is not None:
            GuidanceOption.parse(self.guidance)
        if self.crop not in CROPS:
            raise UsageError(f"--crop {self.crop} is unknown; choose {' or '.join(CROPS)}")
        Selection.parse(self.face)
        if (self.c2pa is None) != (self.key is None):
            raise UsageError("--c2pa CERT and --key KEY belong together; give both")
        if self.face_weights is not None and self.faces != "fan":
            raise UsageError("--face-weights are FAN's; give --faces fan with them")
        if self.at is not None and not 0 <= self.at < float("inf"):
            raise UsageError(f"--at {self.at} is out of range; give seconds from the start of the video")
        if self.size is not None and (self.size < LEAST_SIZE or self.size % 2):
            raise UsageError(f"--size {self.size}: give an even number of pixels, at least {LEAST_SIZE}")
        if self.size is not None and self.paste:
            raise UsageError("--size and --paste contradict each other: what is pasted has the picture's size; give one")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise UsageError(f"--crf {self.crf} is out of range; choose 0 to 51 (16 is the default, lower is better)")
        if self.crf is not None and self.lossless:
            raise UsageError("--crf and --lossless contradict each other; give one")
        if (self.audio_stream or 0) < 0:
            raise UsageError(f"--audio-stream {self.audio_stream} is out of range; streams are counted from 0")
        if self.language is not None and not re.fullmatch("[a-z]{3}", self.language):
            raise UsageError(f"--language {self.language}: give three letters as in ISO 639-2, for example eng or deu")
        voice_channels.check_choice(self.voice_channel)

    def curve(self) -> EmotionCurve:
        """The emotion over time that is asked for.

        Raises:
          UsageError, KeySyncError: see `EmotionCurve.parse`.
        """
        return EmotionCurve.parse(self.emotion, self.emotion_strength)

    def guided(self, stage: StageConfig) -> StageConfig:
        """A stage with the guidance asked for.

        Raises:
          UsageError: a number that its rule does not read.
        """
        if stage.stage == "interpolation":
            if self.autoguidance is None:
                return stage
            if stage.guidance.kind != "auto":
                raise UsageError(
                    f"--autoguidance: the model's interpolation stage is guided by {stage.guidance.kind!r}, not away from a network"
                )
            return dataclasses.replace(stage, guidance=dataclasses.replace(stage.guidance, scale=self.autoguidance))
        if self.guidance is not None:
            return GuidanceOption.parse(self.guidance).applied(stage)
        scales = {"audio": self.audio_scale, "identity": self.identity_scale}
        return GuidanceOption(None, {name: scale for name, scale in scales.items() if scale is not None}).applied(stage)
