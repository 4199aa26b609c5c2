"""What can be trained: the interface between the trainer and a kind of model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from keysync_jax.config import StageConfig, VAEConfig
from keysync_jax.converters.parts import Part
from keysync_jax.data_pipeline.source.loader import Reader
from keysync_jax.diffusion.loss import Perceptual
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.objective import Objective
from keysync_jax.training.start.weights_layout import Weights, checked
from keysync_jax.training.state import Tree
from keysync_jax.training.watch.pictures import Item

Shapes = dict[str, jax.ShapeDtypeStruct]  # of a batch: arrays by name, the batch axis first
Say = Callable[[str], None]  # takes a line for the person who watches


class SampleMaker(abc.ABC):
    """Makes sample pictures of a run, for `watch.samples`.

    Attributes:
      error: name of the figure that comes with them.
      what: what is made, for the log ("generating 4 windows of 14 frames").
      caption: how, for the title.
      times: of the frames, in seconds.
      rate, moving_rows: of the clip.
    """

    error: str
    what: str
    caption: str
    times: Sequence[float]
    rate: Fraction
    moving_rows: tuple[int, ...]

    @abc.abstractmethod
    def __call__(self, params: Tree, frozen: Tree) -> tuple[list[Item], float]:
        """The items, none if what was made is not finite, and the figure."""


@dataclasses.dataclass(frozen=True)
class Trainable(abc.ABC):
    """A kind of model with the recipe of a run. The loop, checkpoints, validation, plans and exports ask it, and never which kind it is.

    Another kind is a subclass whose class stands in `trainables.TRAINABLES` under the name that `config.model` gives it. It must say what
    is abstract here, and may say the rest.

    Attributes:
      unit, item: what a sample is called in the log, and in the plural of the validation's words.
      noise_levels: whether its objective draws `normals`, the noise levels that validation then fixes.
      decodes_in_network: whether a VAE's decoder is a part of what is trained (for the count of FLOPs) and not of the loss alone.
      defining: keys of the recipe that say what the model is, or sections of them (`"stage."`): a run does not go on with other values.
      switches: keys that may change, but neither to nor from zero.
      unread: sections that it never reads.
    """

    config: TrainConfig

    unit: ClassVar[str] = "clips"
    item: ClassVar[str] = "windows"
    noise_levels: ClassVar[bool] = False
    decodes_in_network: ClassVar[bool] = False
    defining: ClassVar[tuple[str, ...]] = ("model",)
    switches: ClassVar[tuple[str, ...]] = ()
    unread: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        """Raises a KeySyncError where the recipe does not fit the kind of model."""
        return None

    # -- the model --------------------------------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def part(self) -> str:
        """Which part of a model directory it becomes, for example "keyframe"."""

    @property
    def network(self) -> StageConfig | VAEConfig | None:
        """What that part's config.json says; None: it has no place in a model directory."""
        return None

    @abc.abstractmethod
    def trained_for(self) -> dict[str, Any]:
        """What a checkpoint says of its model, for people and for other programs."""

    @abc.abstractmethod
    def abstract_model(self) -> Tree:
        """Shapes of the whole model, trained and frozen leaves together."""

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """The model's leaves as (trained, frozen)."""
        return params, {}

    # -- the start --------------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def model_weights(self) -> tuple[Tree, list[str]]:
        """The whole model before step 0 (float32 NumPy arrays), and lines that say where it comes from.

        Raises:
          KeySyncError: the source does not hold what the config describes; names the tensors or keys that differ.
        """

    def resolved(self, stored: TrainConfig | None, workdir: str) -> tuple[Trainable, list[str]]:
        """With what its sources decide in its config, and lines that say so; `stored` is the config of a run that goes on."""
        return self, []

    def vae_part(self, missing_ok: bool = False) -> Part | None:
        """The VAE beside the model that its sources give, None if they give none; with `missing_ok` also where a path is gone."""
        return None

    def abstract_weights(self) -> Weights:
        """Shapes of all leaves of a run, from the config (and, with a pixel loss, the config of the VAE) alone."""
        return Weights(*self.split(self.abstract_model()), None)

    def initial_weights(self) -> Weights:
        """The weights before step 0, float32 NumPy arrays.

        Raises:
          KeySyncError: as `model_weights`.
        """
        params, notes = self.model_weights()
        checked(params, self.abstract_model(), self.config.init.path or "config.init")
        return Weights(*self.split(params), None, tuple(notes))

    # -- the data ---------------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def reader(self, split: str | None = None) -> Reader:
        """Opens the datasets; a `split` other than the training split reads the validation data.

        Raises:
          KeySyncError: nothing to read, or data that do not fit the model.
        """

    @abc.abstractmethod
    def batch_shapes(self, batch_size: int) -> Shapes:
        """What a step reads, as `reader` delivers it."""

    def check_data(self, reader: Reader) -> None:
        """Refuses data that fit the config and not the model, with a KeySyncError."""
        return None

    # -- the loss ---------------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def objective(self, vae: VAEConfig | None, lpips: Perceptual | None) -> Objective:
        """The loss, given the config of the VAE among the frozen leaves (`Weights.vae`) and the perceptual distance, where it uses them."""

    @property
    def uses_pixels(self) -> bool:
        """Whether the loss decodes frames, so that the frozen leaves hold the decoder of a VAE."""
        return False

    @property
    def uses_lpips(self) -> bool:
        """Whether the loss holds a perceptual term, whose weights `config.lpips` names."""
        return False

    def samples(self, reader: Reader, mesh: Mesh, say: Say, vae: VAEConfig | None) -> SampleMaker | None:
        """Makes sample pictures of a few items of `reader`; `vae` as for `objective`. None: this kind of model shows none."""
        return None
