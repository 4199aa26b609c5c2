"""What is missing, unexpected or mis-shaped in a set of tensors, in one place and one wording."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence

from keysync_jax.converters.lazy import Tensors

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


def some(names: Sequence[str], limit: int = _SHOWN) -> str:
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def compare(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> Differences:
    """`tensors` against expected shapes by key."""
    return Differences(
        tuple(key for key in expected if key not in tensors),
        tuple(key for key in tensors if key not in expected),
        {
            key: (tensors.info(key).shape, tuple(shape))
            for key, shape in expected.items()
            if key in tensors and tensors.info(key).shape != tuple(shape)
        },
    )
