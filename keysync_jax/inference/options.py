"""What a person may choose about a dub."""

from __future__ import annotations

import dataclasses

from keysync_jax.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class DubOptions:
    """Settings of one dubbing job; None means the model's own value."""

    seed: int = 23
    steps: int | None = None
    audio_scale: float | None = None
    identity_scale: float | None = None
    mask: str | None = None
    reference_windows: bool = False  # the PyTorch reference's window plan, with its slips and its dropped tail
    faces: str = "mediapipe"
    face_weights: str | None = None
    face: str = "largest"  # which face of several: "largest", "center", "left", "right" or "X,Y" in pixels
    crf: int | None = None
    lossless: bool = False

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed} is out of range; choose 0 to {2**32 - 1}")
        for name in ("audio_scale", "identity_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 100:
                raise UsageError(f"--{name.replace('_', '-')} {value} is out of range; choose 0 to 100 (the paper uses 5 and 2)")
        if self.face_weights is not None and self.faces != "fan":
            raise UsageError("--face-weights are FAN's; give --faces fan with them")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise UsageError(f"--crf {self.crf} is out of range; choose 0 to 51 (16 is the default, lower is better)")
        if self.crf is not None and self.lossless:
            raise UsageError("--crf and --lossless contradict each other; give one")
