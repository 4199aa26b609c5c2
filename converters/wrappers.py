"""What trainers put around a state dict, taken off by the shape of the tree and not by a list of trainers.

A saved object is a tree of dicts. Any dict that holds tensors may be the state dict; the one whose names are those of a known model is.
Within its names, a wrapper is a segment on the path that the most tensors share: leaving some of those out makes the names known.
A running average that is kept beside the weights is told by its names, each of which is a trained tensor's.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keysync_jax.converters.lazy import LazyTensor, Tensors

_CHAIN = 8  # segments of the shared path that are tried: the deepest known stack of wrappers has five
_AVERAGE = ("ema", "average", "avg", "shadow")
_COUNTERS = ("decay", "num_updates", "n_averaged", "initted", "step")

Known = Callable[[Tensors], bool]


class StateDict(NamedTuple):
    """A dict with tensors inside a saved object: its keys from the top, and the dict."""

    path: tuple[str, ...]
    values: Mapping[str, Any]

    @property
    def is_average(self) -> bool:
        return any(_says_average(name) for name in self.path)


def state_dicts(saved: Any, depth: int = 6) -> list[StateDict]:
    """Every dict in a saved object that holds tensors by name, from the top down. Optimizer states, whose keys are numbers, are not."""
    out: list[StateDict] = []
    level: list[StateDict] = [StateDict((), saved)] if isinstance(saved, Mapping) else []
    for _ in range(depth):
        out += [each for each in level if any(isinstance(v, LazyTensor) and isinstance(k, str) for k, v in each.values.items())]
        level = [
            StateDict((*each.path, key), value)
            for each in level
            for key, value in each.values.items()
            if isinstance(key, str) and isinstance(value, Mapping)
        ]
    return out


def without_wrappers(tensors: Tensors, known: Known) -> Tensors:
    """The tensors under the names of the model itself.

    Private segments (`_orig_mod`, `_forward_module`, `_fsdp_wrapped_module`), which no model has, go wherever they stand. Of the path
    that the most tensors share, as few segments go as make the names known; if none do, the names stay.
    """
    tensors = _renamed(tensors, lambda parts: [part for part in parts if not _is_private(part)])
    if known(tensors):
        return tensors
    chain = _heavy_path(tensors)
    for count in range(1, len(chain) + 1):
        for places in itertools.combinations(range(len(chain)), count):
            candidate = _renamed(tensors, lambda parts, places=places: _without(parts, chain, places), unique=False)
            if known(candidate):
                return candidate
    return tensors


def _is_private(segment: str) -> bool:
    return len(segment) > 1 and segment.startswith("_")


def _renamed(tensors: Tensors, rename: Callable[[list[str]], list[str]], unique: bool = True) -> Tensors:
    """Renamed segment by segment; where two would be called alike, `unique` refuses it, else nothing is renamed."""
    names = {key: ".".join(rename(key.split("."))) or key for key in tensors}
    if not unique and len(set(names.values())) < len(names):
        return tensors
    return tensors.renamed(names)


def _without(parts: list[str], chain: list[str], places: tuple[int, ...]) -> list[str]:
    """A name without those segments of the shared path that it goes along; what branches off keeps the rest."""
    along = next((i for i, (a, b) in enumerate(zip(parts, chain, strict=False)) if a != b), min(len(parts), len(chain)))
    along = min(along, len(parts) - 1)  # a tensor's own name is no wrapper
    return [part for i, part in enumerate(parts) if i >= along or i not in places]


def _heavy_path(tensors: Tensors) -> list[str]:
    """The segments from the root along which the most tensors lie."""
    keys = [key.split(".") for key in tensors]
    path: list[str] = []
    while len(path) < _CHAIN:
        counts = Counter(parts[len(path)] for parts in keys if len(parts) > len(path) + 1)
        if not counts:
            break
        segment = counts.most_common(1)[0][0]
        keys = [parts for parts in keys if len(parts) > len(path) + 1 and parts[len(path)] == segment]
        path.append(segment)
    return path


class Averaged(NamedTuple):
    """A state dict taken apart: the weights as trained, the same with the average in their place, and the average's names."""

    trained: Tensors
    average: Tensors
    names: tuple[str, ...]
    under: str


def averaged(tensors: Tensors) -> Averaged | None:
    """The running average that a state dict carries under names of its own, or None.

    sgm and latent diffusion keep it as `model_ema.` and the name without dots; others keep the whole name under `ema.` and the like.
    """
    for under in dict.fromkeys(key.split(".", 1)[0] for key in tensors if "." in key):
        if not _says_average(under):
            continue
        own = [key for key in tensors if key.startswith(f"{under}.")]
        squashed = {name: key for key in tensors if not key.startswith(f"{under}.") for name in _short_names(key)}
        found = {}
        for key in own:
            rest = key[len(under) + 1 :]
            target = squashed.get(rest.replace(".", ""))
            if target is not None and tensors.info(target).shape == tensors.info(key).shape:
                found[target] = key
        if found and all(key in found.values() or key.rsplit(".", 1)[-1] in _COUNTERS for key in own):
            trained = tensors.select(key for key in tensors if key not in set(own))
            average = trained.updated({target: tensors.info(key) for target, key in found.items()})
            return Averaged(trained, average, tuple(own), under)
    return None


def _says_average(name: str) -> bool:
    return any(word in _AVERAGE for word in name.lower().replace("-", "_").split("_"))


def _short_names(key: str) -> list[str]:
    """A name without dots, as a whole and without its first segment: an average is kept by the module that it averages."""
    return [key.replace(".", ""), key.partition(".")[2].replace(".", "")]
