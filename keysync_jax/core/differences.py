"""What is missing, unexpected or mis-shaped in a set of arrays, compared by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence

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

    def __str__(self) -> str:
        wrong = [f"{key} is {found}, expected {wanted}" for key, (found, wanted) in self.wrong.items()]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of the wrong shape", wrong))
        return "; ".join(f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {some(names)}" for what, names in kinds if names)

    def one_by_one(self, limit: int = 4) -> str:
        """The first differences, each with its own words."""
        each = [f"{key} is missing" for key in self.missing] + [f"{key} is unknown" for key in self.unexpected]
        each += [f"{key} is {found}, not {wanted}" for key, (found, wanted) in self.wrong.items()]
        return "; ".join(each[:limit]) + (f" … ({len(each)} in all)" if len(each) > limit else "")


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
