"""What a training run is: frozen dataclasses that a recipe (`configs/*.py`) is turned into, with unknown keys refused by name.

Defaults are the reference's keyframe recipe (paper Table 7 and the released code); the recipes spell out where the two differ.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from keysync_jax.config import ATTENTION, COMPUTE_DTYPES, Remat, StageConfig, VAEConfig, from_dict, to_dict
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import schedules
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.diffusion.sigma_sampling import P_MEAN, P_STD
from keysync_jax.parallel.mesh import MeshConfig as MeshConfig  # recipes of users import it from here


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KeySyncError(message)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as the reference runs it (torch's defaults), after a linear warm-up at a constant rate."""

    learning_rate: float = 1e-5  # paper Table 7
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # decoupled; on every trained tensor, norms and biases included, as in the reference
    warmup_steps: int = 1000
    warmup_start: float = 1e-6  # multiplier of the first update
    clip_norm: float = 0.0  # global gradient norm; 0 turns clipping off, as in the reference
    accumulate: int = 1  # microbatches per update
    ema_decay: float = 0.0  # of the averaged weights; 0 keeps none, as in the reference
    max_skipped: int = 10  # non-finite updates in a row after which the run stops

    def __post_init__(self):
        rate = self.learning_rate
        _require(0 < rate < math.inf, f"optimizer.learning_rate is {rate}; it must be positive and finite")
        for name in ("b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        _require(0 < self.eps < math.inf, f"optimizer.eps is {self.eps}; it must be positive")
        _require(0 <= self.weight_decay < math.inf, f"optimizer.weight_decay is {self.weight_decay}; it must not be negative")
        _require(0 <= self.ema_decay < 1, f"optimizer.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        _require(self.accumulate >= 1, f"optimizer.accumulate is {self.accumulate}; it counts microbatches and must be at least 1")
        _require(self.clip_norm >= 0, f"optimizer.clip_norm is {self.clip_norm}; it must not be negative")
        start = self.warmup_start
        _require(0 <= start <= 1, f"optimizer.warmup_start is {start}; it is the share of the rate that the first update has")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; it must not be negative")
        _require(self.max_skipped >= 1, f"optimizer.max_skipped is {self.max_skipped}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Noise levels: ln(sigma) ~ N(p_mean, p_std^2), one per video."""

    p_mean: float = P_MEAN
    p_std: float = P_STD

    def __post_init__(self):
        _require(math.isfinite(self.p_mean), f"noise.p_mean is {self.p_mean}; it must be finite")
        _require(0 < self.p_std < math.inf, f"noise.p_std is {self.p_std}; it must be positive and finite")


@dataclasses.dataclass(frozen=True)
class DropoutConfig:
    """Conditions that are dropped so that guidance has an unconditional branch (paper: 20 % audio, 10 % identity)."""

    audio: float = 0.2  # per video
    identity: float = 0.1
    # The released keyframe model drew it for every frame (an accident of the reference: KeyFace drew it per video, the paper says
    # "per condition"); the interpolation stage always drops both endpoints of a video together.
    identity_per_frame: bool = True

    def __post_init__(self):
        for name in ("audio", "identity"):
            rate = getattr(self, name)
            _require(0 <= rate <= 1, f"dropout.{name} is {rate}; it is a probability")


@dataclasses.dataclass(frozen=True)
class VaeLossConfig:
    """Objective of the autoencoder: reconstruction + KL (Rombach et al. 2022), optionally LPIPS and more weight on the mouth."""

    l1_weight: float = 1.0
    kl_weight: float = 1e-6  # on the KL divergence per latent element
    mouth_weight: float = 0.0  # extra weight of pixels around the mouth, from the landmarks
    lpips_weight: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _require(getattr(self, field.name) >= 0, f"vae_loss.{field.name} is {getattr(self, field.name)}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, see `data_pipeline.source`.

    Attributes:
      datasets: directories that `keysync prepare` wrote (stages), or manifests and folders of videos (VAE).
      weights: share of each dataset; empty for equal ones.
      split: which split to train on.
      validation: directory to validate on; empty takes those of `datasets` that have the split.
      validation_split: its split; empty turns validation and samples off.
      batch_size: global, over all devices and microbatches.
      identity: "first", "clip_first" or "random" frame conditions the keyframe stage.
      spacing: frames between keyframes, 1 for consecutive ones (a keyframe network that makes a video in one stage).
      min_spacing: keyframe clips too short for 13 frames between keyframes are used down to this spacing.
      sampling: "clip" or "duration".
      min_scores: smallest score of a clip by name, e.g. {"quality": 0.5}.
      sources: use only clips of these collections; empty for all.
      use_occluder, flip, box_jitter: see `SourceConfig`.
      emotion: of stages that read it: "continuous", or "labels" for the nearest of eight classes.
      crop: VAE only: side of random crops, 0 for whole frames.
      frames_per_clip: VAE only: frames taken from one decoded video.
      threads, workers, prefetch: reading.
      allow_mismatch: mix datasets that were prepared with other weights of VAE or speech encoder.
    """

    datasets: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    split: str = "train"
    validation: str = ""
    validation_split: str = "validation"
    batch_size: int = 32  # paper Table 7
    identity: str = "first"
    spacing: int = 13
    min_spacing: int = 13
    sampling: str = "clip"
    min_scores: dict = dataclasses.field(default_factory=dict)
    sources: tuple[str, ...] = ()
    use_occluder: bool = False
    flip: bool = False
    box_jitter: float = 0.0
    emotion: str = "continuous"
    crop: int = 0
    frames_per_clip: int = 4
    threads: int = 4
    workers: int = 0
    prefetch: int = 4
    allow_mismatch: bool = False

    def __post_init__(self):
        _require(self.emotion in ("continuous", "labels"), f"data.emotion is {self.emotion!r}; choose continuous or labels")
        for name, least in (("batch_size", 1), ("threads", 0), ("workers", 0), ("prefetch", 1)):
            _require(getattr(self, name) >= least, f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.weights:
            count = len(self.datasets)
            _require(len(self.weights) == count, f"data.weights has {len(self.weights)} entries for {count} datasets; give one each")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the weights come from.

    Attributes:
      kind: "scratch", "svd" (only what the stage cannot take from SVD is drawn anew), "model" (a KeySync model directory) or "run"
        (another training run).
      path: SVD checkpoint or diffusers folder, model directory, or workdir of a run.
      step: of a run; -1 for its last checkpoint.
      ema: of a run: start from the averaged weights.
      vae: model directory whose VAE decodes for the pixel loss and for sample pictures; "demo" is the bundled model (as a `path` of kind
        "model" is); empty takes it from `path`.
      zero_init: scratch: start the layers at zero that the reference starts at zero.
      redraw: svd, model, run: regular expressions; the tensors in whose names (the reference's) one is found are drawn anew, for
        example `conditioner` for tokens of another audio encoder.
    """

    kind: str = "scratch"
    path: str = ""
    step: int = -1
    ema: bool = False
    vae: str = ""
    zero_init: bool = True
    redraw: tuple[str, ...] = ()

    def __post_init__(self):
        kinds = ("scratch", "svd", "model", "run")
        _require(self.kind in kinds, f"init.kind is {self.kind!r}; choose one of {', '.join(kinds)}")
        _require(self.kind == "scratch" or bool(self.path), f"init.kind {self.kind!r} needs init.path")
        unset = self.step == -1 and not self.ema
        _require(self.kind == "run" or unset, f"init.step and init.ema are of a run to start from, and init.kind is {self.kind!r}")
        _require(self.kind != "scratch" or not self.redraw, "init.redraw is of no use with init.kind 'scratch': all is drawn anew")
        for pattern in self.redraw:
            try:
                re.compile(pattern)
            except re.error as error:
                raise KeySyncError(f"init.redraw: {pattern!r} is no regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved. The reference keeps the last of every 5,000 steps and one of every 25,000 for good."""

    every: int = 5000
    keep_last: int = 2
    keep_every: int = 25000  # 0: none are kept for good
    weak_at: int = 0  # this one is kept for good, as the worse network of autoguidance, which `keysync export` then adds; 0: none

    def __post_init__(self):
        _require(self.every >= 1, f"checkpoint.every is {self.every}; it must be at least 1")
        _require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}; it must be at least 1")
        _require(self.keep_every >= 0, f"checkpoint.keep_every is {self.keep_every}; it must not be negative")
        _require(self.weak_at >= 0, f"checkpoint.weak_at is {self.weak_at}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a person sees, and how often (in steps; 0 turns an item off)."""

    every: int = 50
    validate_every: int = 1000
    validation_batches: int = 8
    samples_every: int = 1000
    samples: int = 4
    sample_steps: int = 10
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self):
        for name in ("every", "validate_every", "validation_batches", "samples_every", "samples"):
            _require(getattr(self, name) >= 0, f"log.{name} is {getattr(self, name)}; it must not be negative (0 turns it off)")
        least = schedules.MIN_STEPS
        _require(self.sample_steps >= least, f"log.sample_steps is {self.sample_steps}; the noise schedule has at least {least}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      model: what is trained, a name in `trainables.TRAINABLES`: "stage" or "vae".
      num_steps: updates of the whole run.
      freeze: "temporal" (the reference's rule: temporal layers stay as SVD left them) or "none".
      dtype: compute type; parameters, optimizer and losses are float32.
      remat: see `models.remat`.
      attention: see `models.attention`.
      vae: the autoencoder, for `model="vae"`; stages read the config of theirs from the model directory.
      resolution: VAE only: side of the frames.
    """

    model: str = "stage"
    seed: int = 23
    num_steps: int = 60_000
    stage: StageConfig = StageConfig()
    vae: VAEConfig = VAEConfig()
    resolution: int = 512
    freeze: str = "temporal"
    dtype: str = "bfloat16"
    remat: str = "conv_aware"
    attention: str = "auto"
    noise: NoiseConfig = NoiseConfig()
    dropout: DropoutConfig = DropoutConfig()
    loss: LossConfig = LossConfig()
    pixel_frames: int = 1  # frames of each window that the pixel loss decodes
    vae_loss: VaeLossConfig = VaeLossConfig()
    lpips: str = ""  # folder with the weights of an LPIPS term, see `training.lpips`
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        for name, allowed in (
            ("freeze", ("temporal", "none")),
            ("dtype", COMPUTE_DTYPES),
            ("remat", tuple(r.value for r in Remat)),
            ("attention", ATTENTION),
        ):
            _require(getattr(self, name) in allowed, f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; choose one from 0 to {2**32 - 1}")  # JAX's keys have no more bits
        scale = self.stage.latent_scale
        _require(0 < scale < math.inf, f"stage.latent_scale is {scale}; it must be positive")
        nose = self.stage.mask.nose_index
        _require(0 <= nose < 68, f"stage.mask.nose_index is {nose}; it names one of the 68 landmarks, 0 to 67")
        _require(self.num_steps >= 1, f"num_steps is {self.num_steps}; it must be at least 1")
        accumulate = self.optimizer.accumulate
        batch = self.data.batch_size
        _require(batch % accumulate == 0, f"data.batch_size {batch} is not a multiple of optimizer.accumulate {accumulate}")

    @property
    def microbatch(self) -> int:
        return self.data.batch_size // self.optimizer.accumulate

    @property
    def uses_pixels(self) -> bool:
        """Whether the loss of a stage decodes frames."""
        return self.loss.pixel_weight > 0


def train_config(values: Any, where: str = "config") -> TrainConfig:
    """A recipe (ConfigDict or dict) as a `TrainConfig`.

    Raises:
      KeySyncError: an unknown key, a wrong type, or values that do not fit each other.
    """
    return from_dict(TrainConfig, values.to_dict() if hasattr(values, "to_dict") else dict(values), where)


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored recipe with today's default for every key that it lacks: an older version did not know the key, and did what it does."""

    def merge(default: Any, value: Any) -> Any:
        if not (isinstance(default, dict) and isinstance(value, Mapping)):
            return value
        return dict(value) | {name: merge(entry, value[name]) if name in value else entry for name, entry in default.items()}

    return merge(to_dict(TrainConfig()), values)
