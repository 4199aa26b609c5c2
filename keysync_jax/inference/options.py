"""What a person may choose about a dub."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from keysync_jax.config import GUIDANCES, MISMATCHES, RETIMED, StageConfig
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.timeline import Part
from keysync_jax.media import provenance, voice_channels

NO_FACE = ("fail", "pass")  # a video without any face
# Numbers of a guidance that are not negative.
_SCALES = ("audio", "identity", "scale")


class GuidanceOption(NamedTuple):
    """What `--guidance [KIND:][NAME=NUMBER,...]` asks for; None and missing numbers leave what the model's config says."""

    kind: str | None
    numbers: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> GuidanceOption:
        """`audio=5,identity=2`, `apg:audio=5,identity=2`, `cfg:scale=2` or `none`.

        Raises:
          UsageError: something else.
        """
        head, colon, tail = text.partition(":")
        kind, pairs = (head.strip(), tail) if colon or "=" not in text else (None, text)
        if kind is not None and kind not in GUIDANCES:
            raise UsageError(f"--guidance {text}: there is no guidance {kind!r}; choose one of {', '.join(GUIDANCES)}")
        known = GUIDANCES[kind] if kind else {name: None for names in GUIDANCES.values() for name in names}
        numbers: dict[str, float] = {}
        for pair in filter(None, map(str.strip, pairs.split(","))):
            name, _, value = (part.strip() for part in pair.partition("="))
            try:
                numbers[name] = float(value)
            except ValueError:
                raise UsageError(f"--guidance {text}: {pair!r} is no NAME=NUMBER; write for example audio=5,identity=2") from None
            if name not in known:
                raise UsageError(f"--guidance {text}: {name!r} cannot be set; choose from {', '.join(known) or 'nothing'}")
            if name in _SCALES and not 0 <= numbers[name] < 100 or not math.isfinite(numbers[name]):
                raise UsageError(f"--guidance {text}: {name} {value} is out of range; choose 0 to 100 (the paper: audio 5, identity 2)")
        return cls(kind, numbers)

    def applied(self, stage: StageConfig) -> StageConfig:
        """The stage with this guidance in place of its own.

        Raises:
          UsageError: a number that the stage's own guidance does not read.
        """
        kind = self.kind or stage.guidance.kind
        if unread := [name for name in self.numbers if name not in GUIDANCES[kind]]:
            fitting = next(other for other, names in GUIDANCES.items() if set(unread) <= set(names))
            raise UsageError(
                f"{kind} guidance of the {stage.stage} stage reads no {unread[0]!r}; write --guidance {fitting}:{unread[0]}=..."
            )
        scales = {f"{name}_scale": self.numbers[name] for name in ("audio", "identity") if name in self.numbers}
        rest = {name: value for name, value in self.numbers.items() if f"{name}_scale" not in scales}
        return dataclasses.replace(stage, **scales, guidance=dataclasses.replace(stage.guidance, kind=kind, **rest))


_VERBS = {"keysync": ("KeySync", "dubs a video", "keysync dub"), "keyface": ("KeyFace", "animates a picture", "keysync animate")}


class _Configured(Protocol):
    @property
    def config(self) -> StageConfig: ...


def require_system(samplers: Mapping[str, _Configured], wanted: str) -> None:
    """Refuses a stage of the other system, of `config.SYSTEMS`, than the verb is for.

    Raises:
      KeySyncError: naming the stage and the verb that runs it.
    """
    for name, sampler in samplers.items():
        if (system := sampler.config.system) != wanted:
            theirs, does, verb = _VERBS[system]
            raise KeySyncError(
                f"the model's {name} stage is {theirs}'s, which {does}: run it with {verb}, or give a {_VERBS[wanted][0]} model"
            )


class _Marked(Protocol):
    @property
    def c2pa(self) -> str | None: ...

    @property
    def key(self) -> str | None: ...

    @property
    def consent(self) -> str | None: ...


def mark_of(kind: str, source: str | None, options: _Marked) -> provenance.Mark:
    """What an output says of itself.

    Args:
      kind: of `provenance.KINDS`.
      source: what it is made from; None, a folder or pattern: nothing that could be named in a manifest.
      options: how it is signed.

    Raises:
      KeySyncError: a certificate or key that cannot sign.
    """
    signature = None if options.c2pa is None else provenance.Signature(options.c2pa, options.key)
    return provenance.Mark(kind, source if source is not None and os.path.isfile(source) else None, options.consent or "", signature)


@dataclasses.dataclass(frozen=True)
class DubOptions:
    """Settings of one dubbing job; None means the model's own value."""

    seed: int = 23
    steps: int | None = None
    audio_scale: float | None = None
    identity_scale: float | None = None
    guidance: str | None = None  # see `GuidanceOption.parse`; of both stages
    mask: str | None = None
    reference_windows: bool = False  # the PyTorch reference's window plan, with its slips and its dropped tail
    faces: str = "mediapipe"
    face_weights: str | None = None
    face: str = "largest"  # which face of several: "largest", "center", "left", "right" or "X,Y" in pixels
    no_face: str = "fail"  # what becomes of a video without any face: one of `NO_FACE`
    crf: int | None = None
    lossless: bool = False
    codec: str | None = None  # of `encoding.CODECS`
    pix_fmt: str | None = None  # FFmpeg's name
    mismatch: str = "source"  # of `MISMATCHES`: what becomes of a voice that is longer or shorter than the video
    range: str | None = None  # part to dub, "A:B" in seconds, see `timeline.Part`; the voice begins there
    keep_audio: bool = False  # the source's own sound, as further tracks
    language: str | None = None  # of the voice, where its file does not say it
    video_stream: int | None = None  # position among the file's, from 0
    audio_stream: int | None = None  # of the voice's file
    voice_channel: str = "auto"  # which channels the model hears, see `voice_channels.CHOICES`
    allow_damaged: bool = False
    c2pa: str | None = None  # certificate chain, a PEM file: the output is signed
    key: str | None = None  # its private key
    consent: str | None = None  # who agreed to it; for the report and the manifest

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed} is out of range; choose 0 to {2**32 - 1}")
        for name in ("audio_scale", "identity_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 100:
                raise UsageError(f"--{name.replace('_', '-')} {value} is out of range; choose 0 to 100 (the paper uses 5 and 2)")
            if value is not None and self.guidance is not None:
                raise UsageError(f"--{name.replace('_', '-')} and --guidance contradict each other; give one")
        if self.guidance is not None:
            GuidanceOption.parse(self.guidance)
        if self.no_face not in NO_FACE:
            raise UsageError(f"--no-face {self.no_face} is unknown; choose {' or '.join(NO_FACE)}")
        if self.mismatch not in MISMATCHES:
            raise UsageError(f"--mismatch {self.mismatch} is unknown; choose {', '.join(MISMATCHES)}")
        if self.keep_audio and self.mismatch in RETIMED:
            raise UsageError(f"--keep-audio and --mismatch {self.mismatch} contradict each other: the video's own sound no longer fits")
        if self.range is not None and self.mismatch not in ("source", "silence"):
            raise UsageError(f"--range and --mismatch {self.mismatch} contradict each other: a part is replaced where it stands")
        Part.parse(self.range)
        if (self.c2pa is None) != (self.key is None):
            raise UsageError("--c2pa CERT and --key KEY belong together; give both")
        if self.face_weights is not None and self.faces != "fan":
            raise UsageError("--face-weights are FAN's; give --faces fan with them")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise UsageError(f"--crf {self.crf} is out of range; choose 0 to 51 (16 is the default, lower is better)")
        if self.crf is not None and self.lossless:
            raise UsageError("--crf and --lossless contradict each other; give one")
        for name in ("video_stream", "audio_stream"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is out of range; streams are counted from 0")
        if self.language is not None and not re.fullmatch("[a-z]{3}", self.language):
            raise UsageError(f"--language {self.language}: give three letters as in ISO 639-2, for example eng or deu")
        voice_channels.check_choice(self.voice_channel)

    @property
    def part(self) -> Part:
        """What `range` says."""
        return Part.parse(self.range)

    def guided(self, stage: StageConfig) -> StageConfig:
        """The stage with the guidance asked for.

        Raises:
          UsageError: a number that its rule does not read.
        """
        if self.guidance is not None:
            return GuidanceOption.parse(self.guidance).applied(stage)
        scales = {"audio": self.audio_scale, "identity": self.identity_scale}
        return GuidanceOption(None, {name: scale for name, scale in scales.items() if scale is not None}).applied(stage)
