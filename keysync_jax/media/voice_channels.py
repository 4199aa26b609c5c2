"""Which channels of a voice are the speech: what the model hears of stereo and surround sound.

A film's speech is in the centre; a stereo pair is averaged, unless its channels cancel (a balanced microphone recorded as stereo has the
one upside down), where the louder one is taken. Other choices can be asked for.
"""

from __future__ import annotations

import dataclasses
import os

import av
import numpy as np

from keysync_jax.core.errors import KeySyncError, UsageError

CHOICES = ("auto", "mix", "left", "right", "center")
_NAMES = {"left": "FL", "right": "FR", "center": "FC"}
_CENTRE_LEAST = 0.01  # of the front pair's energy: 20 dB below it
# The mean of N channels of which one speaks has 1 / N² of its energy. Less than this part of that is a sum that cancels ...
_CANCELS = 0.6
_CANCELLED_SHARE = 0.3  # ... if so much of the energy is lost that way
_USUAL = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_SILENT = 1e-6  # of the loudest channel's energy: 60 dB below it
_FULL_SCALE = {"u1": 2.0**7, "i2": 2.0**15, "i4": 2.0**31, "i8": 2.0**63}


@dataclasses.dataclass
class Levels:
    """How loud the channels of one layout are.

    Attributes:
      names: of the channels.
      energy: of each.
      lost: of each group whose mean was looked at, the energy of frames in which it cancels, and of all.
    """

    names: tuple[str, ...]
    energy: np.ndarray
    lost: dict[tuple[int, ...], list[float]]

    @classmethod
    def of(cls, frame: av.AudioFrame) -> Levels:
        names = tuple(channel.name for channel in frame.layout.channels)
        if "NONE" in names:  # the file does not say what they are, and its writer kept to the usual order
            usual = _USUAL.get(len(names))
            names = tuple(each.name for each in av.AudioLayout(usual).channels) if usual else tuple(map(str, range(len(names))))
        return cls(names, np.zeros(len(names)), {group: [0.0, 0.0] for group in {_front(names), _speakers(names)} if len(group) > 1})

    def add(self, channels: np.ndarray) -> None:
        """Count a frame `[C, S]`."""
        energy = (channels**2).sum(axis=1)
        self.energy += energy
        for group, sums in self.lost.items():
            loudest = float(energy[list(group)].max())
            mixed = float((channels[list(group)].mean(axis=0) ** 2).sum())
            sums[0] += loudest if mixed < _CANCELS * loudest / len(group) ** 2 else 0.0
            sums[1] += loudest

    def cancels(self, group: tuple[int, ...]) -> bool:
        """Whether the mean of some channels is lost."""
        lost, total = self.lost.get(group, (0.0, 0.0))
        return total > 0 and lost > _CANCELLED_SHARE * total


def check_choice(choice: str) -> None:
    """Raises UsageError for what is no choice of a channel."""
    if choice not in CHOICES and not choice.isdecimal():
        raise UsageError(f"--voice-channel {choice}: choose {', '.join(CHOICES)}, or a channel's number from 0")


def choose(levels: Levels, choice: str, path: str | os.PathLike) -> tuple[tuple[int, ...], str]:
    """(channels whose mean is heard, in words).

    Args:
      levels: of the whole file, of this layout.
      choice: one of `CHOICES`, or a channel's number from 0.
      path: of the file, for messages.

    Raises:
      UsageError: the layout has no such channel.
    """
    names = levels.names
    everything = tuple(range(len(names)))
    if choice.isdecimal():
        if int(choice) >= len(names):
            raise UsageError(f"{path}: --voice-channel {choice}: the sound has {len(names)} channel(s), counted from 0")
        return (int(choice),), f"channel {choice} ({names[int(choice)]}), as asked"
    if choice in _NAMES and len(names) > 1:
        if _NAMES[choice] not in names:
            raise UsageError(f"{path}: --voice-channel {choice}: the sound has the channels {', '.join(names)}; give one by its number")
        return (names.index(_NAMES[choice]),), f"the {choice} channel, as asked"
    if len(names) == 1:
        return everything, "the only channel"
    if choice == "mix":
        return everything, f"the mean of all {len(names)} channels, as asked"
    return _spoken(levels)


def _spoken(levels: Levels) -> tuple[tuple[int, ...], str]:
    names, energy = levels.names, levels.energy
    pair = _front(names)
    group = _speakers(names)
    if "FC" in names:
        centre = names.index("FC")
        front = float(energy[list(pair)].mean()) if pair else 0.0
        if energy[centre] > 0 and energy[centre] >= _CENTRE_LEAST * front:
            return (centre,), f"the centre of {len(names)} channels"
        group = pair or group
    loudest = int(np.argmax(energy))
    if energy[list(group)].max() <= _SILENT * energy[loudest]:
        return (loudest,), f"channel {loudest} ({names[loudest]}), the only one with sound among those of {len(names)}"
    if levels.cancels(group):
        best = max(group, key=lambda channel: energy[channel])
        return (best,), f"channel {best} ({names[best]}): channels are out of phase, and their mean would cancel"
    which = "the front pair" if len(group) < len(names) and group == pair else f"{len(group)} channels"
    return group, f"the mean of {which}"


def _front(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(names.index(name) for name in ("FL", "FR") if name in names)


def _speakers(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(index for index, name in enumerate(names) if name != "LFE") or tuple(range(len(names)))


def samples_of(frame: av.AudioFrame) -> np.ndarray:
    """Decoded channels float64 `[C, S]`, full scale 1."""
    x = frame.to_ndarray()  # planar [channels, samples], packed [1, samples * channels]
    if not frame.format.is_planar:
        x = x.reshape(-1, frame.layout.nb_channels).T
    kind = x.dtype.str[1:]
    x = x.astype(np.float64)
    return (x - 128 if kind == "u1" else x) / _FULL_SCALE[kind] if kind in _FULL_SCALE else x


def refuse_silence(heard: float, loudest: float, words: str, path: str | os.PathLike) -> None:
    """Refuses a choice of channels that is silent where the file is not.

    Args:
      heard: energy of what is heard.
      loudest: energy of the loudest channel.
      words: what is heard.
      path: of the file.

    Raises:
      KeySyncError: see above.
    """
    if loudest > 0 and heard <= _SILENT * loudest:
        raise KeySyncError(f"{path}: {words} is silent, but the file is not; choose another --voice-channel ({', '.join(CHOICES)}, number)")
