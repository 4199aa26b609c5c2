"""What is missing, unexpected or mis-shaped in a set of arrays, compared by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Container, Iterable, Mapping, Sequence

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 40  # names per kind in an error line; `keysync inspect` lists all


@dataclasses.dataclass(frozen=True)
class Differences:
    """Keys by what is wrong with them; `wrong` maps a key to (its shape, the expected one)."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong)

    def without(self, missing: Container[str] = (), unexpected: Container[str] = ()) -> Differences:
        """What is left when some keys are allowed: `missing` to be absent or mis-shaped, `unexpected` to be there."""
        return Differences(
            tuple(key for key in self.missing if key not in missing),
            tuple(key for key in self.unexpected if key not in unexpected),
            {key: shapes for key, shapes in self.wrong.items() if key not in missing},
        )

    def in_words(self, found: Collection[str]) -> str:
        """The first missing tensor with the nearest name among those found, then all by kind."""
        if not self.missing:
            return str(self)
        near = difflib.get_close_matches(self.missing[0], self.unexpected or found, 1, 0.8)
        nearest = f" (nearest name: {near[0]})" if near else ""
        return f"{self.missing[0]} is missing{nearest}; {self}"

    def __str__(self) -> str:
        wrong = [f"{key} is {found}, expected {wanted}" for key, (found, wanted) in self.wrong.items()]
        unexpected = self.unexpected
        if len(unexpected) > _SHOWN and len(patterns := patterns_for(unexpected)) < _SHOWN:
            unexpected = patterns
        kinds = (("missing", self.missing, self.missing), ("unexpected", unexpected, self.unexpected), ("of the wrong shape", wrong, wrong))
        return "; ".join(f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {some(shown)}" for what, shown, names in kinds if names)

    def one_by_one(self, limit: int = 4) -> str:
        """The first differences, each with its own words."""
        each = [f"{key} is missing" for key in self.missing] + [f"{key} is unknown" for key in self.unexpected]
        each += [f"{key} is {found}, not {wanted}" for key, (found, wanted) in self.wrong.items()]
        return "; ".join(each[:limit]) + (f" … ({len(each)} in all)" if len(each) > limit else "")


class Allowed:
    """Names that are allowed, given one by one or as patterns such as `model_ema.*`; a container of names."""

    def __init__(self, patterns: Iterable[str]):
        self.patterns = tuple(patterns)

    def __contains__(self, name: object) -> bool:
        return any(name == pattern or fnmatch.fnmatchcase(str(name), pattern) for pattern in self.patterns)


def patterns_for(names: Sequence[str]) -> list[str]:
    """Patterns that hold for all `names`: per first segment the longest shared beginning, and a lone name as it is."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(name.split(".", 1)[0], []).append(name.split("."))
    out = []
    for parts in groups.values():
        shared = [same[0] for same in _shared(parts)]
        out.append(".".join(parts[0]) if len(parts) == 1 else ".".join([*shared, "*"]))
    return out


def _shared(parts: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    columns = list(zip(*(part[:-1] for part in parts), strict=False))
    stop = next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    return columns[:stop]


def some(names: Sequence[str], limit: int = _SHOWN) -> str:
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def compare(found: Shapes, expected: Shapes) -> Differences:
    """Shapes by name against those expected, in the order of each."""
    return Differences(
        tuple(key for key in expected if key not in found),
        tuple(key for key in found if key not in expected),
        {key: (found[key], shape) for key, shape in expected.items() if key in found and found[key] != shape},
    )
