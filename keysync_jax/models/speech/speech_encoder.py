"""What the system knows of a speech encoder: one record for each, made in the encoder's own file and found by `registry`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import flax.linen as nn
import jax
import numpy as np

from keysync_jax.config import SpeechEncoderConfig
from keysync_jax.models.speech.waveform import fill, pad_to_frames
from keysync_jax.models.table import Table

C = TypeVar("C", bound=SpeechEncoderConfig)


class Geometry(NamedTuple):
    """Which samples a token sees: `[hop * i - left, hop * i - left + receptive)` for token i.

    With a `group` above one the tokens of a moment come together, so many at once, and all see the samples of its first.
    """

    hop: int
    receptive: int
    left: int = 0
    group: int = 1

    def tokens(self, samples: int) -> int:
        """Number of tokens of a waveform with that many samples."""
        return self.group * max(0, (samples + 2 * self.left - self.receptive) // (self.hop * self.group) + 1)


class Moments(NamedTuple):
    """Mean and variance over time of the first convolution's output, `[C]` each; the statistics of its group norm."""

    mean: jax.Array | np.ndarray
    variance: jax.Array | np.ndarray


class FirstConvolution(NamedTuple):
    """Kernel, stride and channels of a first convolution whose output is normalised over the whole clip."""

    kernel: int
    stride: int
    channels: int


@dataclasses.dataclass(frozen=True)
class Published(Generic[C]):
    """A form in which an encoder's weights are published, and how they are read.

    Attributes:
      kind: what the form is called; the encoder's own name where there is one form.
      title: for people.
      recognise: whether tensors of these names, with these values of a `config.json` beside them (empty without one), are in this form.
      rename: (a tensor's name, configuration) -> its name in the encoder's table.
      config: (values of the `cfg` inside the file, its name) -> configuration; None where a transformers `config.json` lies beside it.
      unused: how the names of tensors begin that belong to a task's head, not to the encoder; they are left out.
    """

    kind: str
    title: str
    recognise: Callable[[Collection[str], Mapping[str, Any]], bool]
    rename: Callable[[str, C], str]
    config: Callable[[Mapping[str, Any], str], C] | None = None
    unused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SpeechEncoder(Generic[C]):
    """An encoder that this package runs: prepared, trained with, stored in a model directory and dubbed with.

    Its module is made by `module(config, dtype)`. `__call__` maps a waveform `[B, S]` to tokens `[B, N, D]` in one pass. For long clips
    there are `features(waveform, moments)`, the local part that can run in blocks, `[B, S]` -> `[B, N, C]`; `encode(features, count)`
    over a window of features of which `count` `[B]` are real; and, where there is a `first_convolution`, a method of that name:
    its output `[B, N0, C]`.

    Attributes:
      name: as stages, columns and parts of a model directory say it; the encoder's file has this name.
      title: for people.
      config: class of its configuration; `kind` must default to or be given as `name`.
      module: linen module of a configuration; the dtype is that of matmuls and convolutions (norms and softmax stay in float32).
      geometry: hop, receptive field and left margin of a token, in samples.
      prepare: (configuration, waveform `[S]`) -> what the network reads, `[640 F]`: normalised, padded to whole frames.
      align: (tokens `[N, D]`, 2 F) -> two tokens for each of F frames, `[2 F, D]`.
      first_convolution: of a configuration whose features need `Moments` of the whole clip; None for all others.
      table: the names of its weights; empty without any.
      of_width: for an encoder without weights, the configuration that gives tokens of D numbers.
      column: for an encoder without weights, the configuration of the column that `keysync prepare` computes of its own accord.
      settle: (configuration, names of the tensors found) -> what the tensors show and the configuration does not say.
      published: forms of its weights that `keysync convert` reads.
      from_hf: (values of a transformers `config.json`, values of its `preprocessor_config.json`, file name) -> configuration, for the
        `model_type` that is called `name`; None if transformers has none.
    """

    name: str
    title: str
    config: type[C]
    module: Callable[[C, Any], nn.Module]
    geometry: Callable[[C], Geometry]
    prepare: Callable[[C, np.ndarray], np.ndarray] = lambda config, wav: pad_to_frames(wav)
    align: Callable[[np.ndarray, int], np.ndarray] = fill
    first_convolution: Callable[[C], FirstConvolution | None] = lambda config: None
    table: Callable[[C], Table] = lambda config: []
    of_width: Callable[[int], C] | None = None
    column: C | None = None
    settle: Callable[[C, Collection[str]], C] = lambda config, names: config
    published: tuple[Published[C], ...] = ()
    from_hf: Callable[[Mapping[str, Any], Mapping[str, Any] | None, str], C] | None = None


@dataclasses.dataclass(frozen=True)
class ColumnEncoder:
    """An encoder that runs in PyTorch alone: `keysync prepare` computes a column of its tokens, and nothing else can. A stage can be
    trained on them and cannot dub.

    Attributes:
      name: as columns and stages say it, and the `model_type` of its transformers folder; its file has this name.
      width_field: field of the folder's `config.json` that holds the width of its tokens.
      open: folder -> function from 16 kHz samples float32 `[S]` to tokens float32 `[ceil(S / 640), 2, D]`.
    """

    name: str
    width_field: str
    open: Callable[[str], Callable[[np.ndarray], np.ndarray]]
