"""The two rounds of windows through the devices, for one clip or for many: keyframes, then the segments between keyframes.

A clip is a batch of one. Windows of all clips lie side by side, so that short clips fill the devices together; each brings its own seed and
guidance, so what it becomes does not depend on its neighbours. A window with values that are not finite fails its clip, and no other.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import jax
import numpy as np

from keysync_jax.config import StageConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.guidance import Guidance
from keysync_jax.diffusion.sampler import require_finite
from keysync_jax.inference.engine import StageSampler, Window
from keysync_jax.inference.phases import PhaseProgress
from keysync_jax.inference.window_plan import WindowPlan


@dataclasses.dataclass
class Stretch:
    """N frames of a clip, one after the other, that are generated in one piece.

    Attributes:
      plan: its windows.
      audio: features `[N, 2, D]` by name of the speech encoder.
      known: from frame numbers to the scaled latents of the source `[n, h, w, 4]`; None: there is no source, and no mask.
      masks: bool `[h, w]` of each frame, True = regenerate.
      write: takes (frame, scaled latents `[h, w, 4]`) of each frame of the result; called in the second round.
      keyframes: scaled latents `[h, w, 4]` by number of the keyframe, once the first round is over.
      identity: scaled latent of the person `[h, w, 4]`; None: that of the first frame, as in the KeySync reference.
      emotion: valence and arousal `[N]` by name, for stages that read them.
    """

    plan: WindowPlan
    audio: Mapping[str, np.ndarray]
    known: Callable[[list[int]], np.ndarray] | None
    masks: Sequence[np.ndarray] | np.ndarray | None
    write: Callable[[int, np.ndarray], None]
    keyframes: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    identity: np.ndarray | None = None
    emotion: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Clip:
    """What one clip asks of the rounds, and whether it failed.

    Attributes:
      stretches: what is generated, in order.
      seed: of the noise.
      steps: sampler steps.
      guidance: by stage, without branches that do not matter (`Guidance.needed`).
      first_index: number, for the noise, of the clip's first window in each round.
      error: why the clip failed; its stretches are then incomplete.
      finished: whether it has been through the rounds.
    """

    stretches: Sequence[Stretch]
    seed: int
    steps: int
    guidance: Mapping[str, Guidance]
    first_index: int = 0
    error: KeySyncError | None = None
    finished: bool = False


@dataclasses.dataclass(frozen=True)
class _Task(abc.ABC):
    """One window of a round: number `index` of its clip's windows, on `frames` of a stretch."""

    clip: Clip
    stretch: Stretch
    index: int
    frames: Sequence[int]

    stage: ClassVar[str]

    def window(self, config: StageConfig) -> Window:
        """The conditions, read when the window's turn comes."""
        clip, stretch, frames = self.clip, self.stretch, list(self.frames)
        masks = None if stretch.masks is None else np.stack([stretch.masks[frame] for frame in frames])
        return Window(
            seed=np.uint32(clip.seed),
            index=np.int32(clip.first_index + self.index),
            guidance=clip.guidance[self.stage],
            latents=self._latents(),
            audio=stretch.audio[config.audio_encoder][frames],
            known=None if stretch.known is None else stretch.known(frames),
            mask=None if masks is None else masks[..., None].astype(np.float32),
            steps=clip.steps,
            emotion={name: values[frames] for name, values in stretch.emotion.items()} if stretch.emotion and config.emotion_dim else {},
        )

    def finish(self, latents: np.ndarray) -> None:
        """Puts the result `[T, h, w, 4]` where it belongs, or fails the clip."""
        if self.clip.error is None:
            try:
                require_finite(latents, f"{self.stage} window {self.index}")
                self._keep(latents)
            except KeySyncError as error:
                self.clip.error = error

    @abc.abstractmethod
    def _latents(self) -> np.ndarray:
        """See `Window.latents`."""

    @abc.abstractmethod
    def _keep(self, latents: np.ndarray) -> None:
        """Puts finite latents where they belong."""


@dataclasses.dataclass(frozen=True)
class _KeyframeTask(_Task):
    kept: Sequence[tuple[int, int]]  # (position in the window, number of the keyframe)

    stage = "keyframe"

    @classmethod
    def of(cls, clip: Clip) -> Iterator[_KeyframeTask]:
        planned = [(stretch, window) for stretch in clip.stretches for window in stretch.plan.keyframe_windows if window.kept]
        return (cls(clip, stretch, index, window.frames, window.kept) for index, (stretch, window) in enumerate(planned))

    def _latents(self) -> np.ndarray:
        stretch = self.stretch
        if stretch.identity is not None:
            return stretch.identity
        if stretch.known is None:
            raise ValueError("a stretch without a source needs its identity")
        return stretch.known([0])[0]  # the identity is the first frame, as in the reference

    def _keep(self, latents: np.ndarray) -> None:
        self.stretch.keyframes.update({number: latents[position] for position, number in self.kept})


@dataclasses.dataclass(frozen=True)
class _SegmentTask(_Task):
    outputs: range  # the first so many places of the window are these frames of the result
    number: int  # of the keyframe at the start; the next one stands at the end

    stage = "interpolation"

    @classmethod
    def of(cls, clip: Clip) -> Iterator[_SegmentTask]:
        planned = [(stretch, number, segment) for stretch in clip.stretches for number, segment in enumerate(stretch.plan.segments)]
        return (cls(clip, stretch, index, s.frames, s.outputs, number) for index, (stretch, number, s) in enumerate(planned))

    def _latents(self) -> np.ndarray:
        return np.stack(self._ends())

    def _keep(self, latents: np.ndarray) -> None:
        start, end = self._ends()
        # The ends are the keyframes themselves; neighbouring segments agree on them.
        for frame, latent in zip(self.outputs, [start, *latents[1:-1], end], strict=False):
            self.stretch.write(frame, latent)

    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        return self.stretch.keyframes[self.number], self.stretch.keyframes[self.number + 1]


# In order, and what the phase is called for those who watch.
_ROUNDS = ((_KeyframeTask, "keyframes"), (_SegmentTask, "interpolate"))


def generate(samplers: Mapping[str, StageSampler], clips: Sequence[Clip], progress: PhaseProgress) -> None:
    """Runs every window of the clips through both rounds, each window once; their stretches receive the results.

    A clip that fails says so in its `error` and takes no part in the next round. With a sampler for "keyframe" alone, only the first round
    runs.

    Args:
      samplers: by stage.
      clips: in the order in which their windows lie on the devices.
      progress: told of every window.
    """
    for kind, phase in _ROUNDS:
        if (sampler := samplers.get(kind.stage)) is None:
            continue
        tasks = _by_program([task for clip in clips if clip.error is None for task in kind.of(clip)])
        windows = (task.window(sampler.config) for task in tasks)
        with progress.phase(phase, len(tasks)) as advance:
            for task, latents in zip(tasks, sampler(windows) if tasks else (), strict=True):
                task.finish(latents)
                advance()
                if all(clip.error for clip in clips):
                    return
    for clip in clips:
        clip.finished = clip.error is None


def _by_program(tasks: Sequence[_Task]) -> list[_Task]:
    """The tasks, those whose windows run in one program (one set of branches, one number of steps) side by side, else in order."""
    groups: dict[object, list[_Task]] = {}
    for task in tasks:
        groups.setdefault((jax.tree.structure(task.clip.guidance[task.stage]), task.clip.steps), []).append(task)
    return [task for group in groups.values() for task in group]
