"""Objects of classes that are not ours to know inside a pickle: skipped if they hold no tensor, and never run.

A checkpoint's hyper-parameters hold paths, namespaces, configurations and arrays. None of them is needed, so each becomes an empty thing
of the same name. What an object was given is looked through for tensors, because those would be lost with it. A name from Python's own
library that is no plain value (`os.system`) has no place in any checkpoint and stays refused.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

# Plain values of Python's own library, by module and by name.
_VALUE_MODULES = frozenset("pathlib argparse datetime decimal fractions uuid enum typing zoneinfo ipaddress dataclasses copyreg".split())
_VALUES = frozenset(
    ("types.SimpleNamespace", "builtins.object", "builtins.getattr", "builtins.slice", "builtins.range", "collections.Counter")
)
_DEPTH = 6
_LOOKED_AT = 100_000


def may_be_skipped(module: str, name: str) -> bool:
    """Whether a global is a class of somebody's own or a plain value, and not a function of Python's own library."""
    top = module.partition(".")[0]
    return top not in sys.stdlib_module_names or top in _VALUE_MODULES or f"{module}.{name}" in _VALUES


class Skipped:
    """What an object of a foreign class becomes: nothing that can be read, called or set."""

    __slots__ = ()

    def __new__(cls, *arguments: Any, **named: Any) -> Skipped:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


def skipped_class(name: str, is_tensor: Callable[[Any], bool], counted: Counter[str], holding: Counter[str]) -> type[Skipped]:
    """A class that stands for a foreign one in one pickle; what its objects hold is dropped.

    Args:
      name: module and name, as the pickle has them.
      is_tensor: whether a value is (part of) a tensor.
      counted: objects by name.
      holding: tensors that were given to objects, by name.
    """
    budget = [_LOOKED_AT]

    def look(*values: Any) -> None:
        holding[name] += sum(_tensors(values, is_tensor, budget))

    class Stand(Skipped):
        __slots__ = ()

        def __new__(cls, *arguments: Any, **named: Any) -> Skipped:
            counted[name] += 1
            look(arguments, named)
            return object.__new__(cls)

        def __setstate__(self, state: Any) -> None:
            look(state)

        def __setitem__(self, key: Any, value: Any) -> None:
            look(value)

        def append(self, value: Any) -> None:
            look(value)

        def extend(self, values: Any) -> None:
            look(values)

        def add(self, value: Any) -> None:
            look(value)

        def __call__(self, *arguments: Any) -> Skipped:  # e.g. a class got by `getattr` in an enumeration
            look(arguments)
            return self

    Stand.__qualname__ = name
    counted[name] += 0
    return Stand


def _tensors(value: Any, is_tensor: Callable[[Any], bool], budget: list[int], depth: int = _DEPTH) -> Iterable[int]:
    """A one for every tensor in nested containers."""
    budget[0] -= 1
    if budget[0] < 0:
        return
    if is_tensor(value):
        yield 1
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, is_tensor, budget, depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _tensors(item, is_tensor, budget, depth - 1)
