"""How much memory a traced program needs for what it computes, estimated before any compiler sees it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_BACKWARD = "transpose("


class Activations(NamedTuple):
    """Bytes on the device that runs the program.

    Attributes:
      residuals: what the forward pass hands to the backward pass, by the rematerialisation policy.
      peak: most that is alive at once, residuals included and results left out. Every operation counts as if its result were written
        to memory; compilers fuse element-wise operations into their neighbours, so the truth is usually less.
    """

    residuals: int
    peak: int


def estimate(jaxpr: ClosedJaxpr) -> Activations:
    """Of a gradient program: its inputs and results (parameters, batch, gradients) are not counted."""
    program = jaxpr.jaxpr
    results = {var for var in program.outvars if not isinstance(var, Literal)}
    forward, residuals = set(), set()
    for eqn in program.eqns:
        if _BACKWARD in str(eqn.source_info.name_stack):
            residuals.update(var for var in _variables(eqn.invars) if var in forward)
        else:
            forward.update(eqn.outvars)
    return Activations(sum(_bytes(var) for var in residuals - results), _peak(program, results))


def _peak(program: Jaxpr, free: set[Any]) -> int:
    """Most bytes alive at once among what the program computes, but for the variables in `free`."""
    last = {}
    for i, eqn in enumerate(program.eqns):
        for var in _variables(eqn.invars):
            last[var] = i
    for var in _variables(program.outvars):
        last[var] = len(program.eqns)
    alive, now, most = {}, 0, 0
    for i, eqn in enumerate(program.eqns):
        made = {var: _bytes(var) for var in eqn.outvars if var not in free}
        within = max((_peak(inner, set()) for inner in _programs(eqn.params)), default=0)
        most = max(most, now + max(within, sum(made.values())))
        for var, size in made.items():
            if var in last:
                alive[var] = size
                now += size
        for var in {v for v in _variables(eqn.invars) if last[v] == i and v in alive}:
            now -= alive.pop(var)
    return most


def _programs(params: dict[str, Any]) -> list[Jaxpr]:
    items = [item for value in params.values() for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return [item.jaxpr if isinstance(item, ClosedJaxpr) else item for item in items if isinstance(item, (Jaxpr, ClosedJaxpr))]


def _variables(atoms: Any) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _bytes(var: Any) -> int:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)
