"""Floating-point operations of a program, counted in the program itself, and what devices can do.

Counted are matrix products, convolutions and attention kernels, 2 per multiply-add; element-wise work is bound by bandwidth and counts
nothing. XLA's own `cost_analysis` leaves out what custom kernels and loops do and counts what happens after optimisation, so the figures
here come from the traced program (jaxpr), before any compiler: scans count as often as they run, and recomputation is told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# The name that `jax.checkpoint` gives to what it computes again, and the modules whose work is the pixel loss of a stage.
_RECOMPUTED, _PIXELS = "rematted_computation", ("VAE", "LPIPS")
_BACKWARD = "transpose("


class Flops(NamedTuple):
    """FLOPs of one training step over the whole batch and all devices.

    Attributes:
      forward, backward: of the network.
      pixels: decoding, LPIPS and their gradients, for the pixel loss of a stage.
      recompute: what the backward pass computes a second time, in the network.
      pixels_recompute: likewise in the decoder and LPIPS.
    """

    forward: float = 0.0
    backward: float = 0.0
    pixels: float = 0.0
    recompute: float = 0.0
    pixels_recompute: float = 0.0

    @property
    def model(self) -> float:
        """Without recomputation: what MFU is measured by."""
        return self.forward + self.backward + self.pixels

    @property
    def total(self) -> float:
        """What the devices have to do."""
        return sum(self)

    def scaled(self, factor: float) -> Flops:
        return Flops(*(value * factor for value in self))


def count(function: Callable, *args: Any) -> float:
    """FLOPs of `function(*args)`; arguments may be shapes."""
    return sum(flops for _, flops in operations(jax.make_jaxpr(function)(*args)))


def count_step(jaxpr: ClosedJaxpr, *, decoder_is_network: bool = False) -> Flops:
    """FLOPs of a traced training step (`jax.jit(step).trace(...).jaxpr`).

    Args:
      jaxpr: the program.
      decoder_is_network: the autoencoder is what is trained, not part of a loss.
    """
    sums = dict.fromkeys(Flops._fields, 0.0)
    for stack, flops in operations(jaxpr):
        pixels = not decoder_is_network and any(module in stack for module in _PIXELS)
        if _RECOMPUTED in stack:
            sums["pixels_recompute" if pixels else "recompute"] += flops
        else:
            sums["pixels" if pixels else "backward" if _BACKWARD in stack else "forward"] += flops
    return Flops(**sums)


def operations(jaxpr: ClosedJaxpr | Jaxpr, stack: str = "", times: float = 1.0) -> Iterator[tuple[str, float]]:
    """(name stack, FLOPs) of every product, convolution and kernel in a program and in all programs within it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        here = f"{stack}/{eqn.source_info.name_stack}"
        if (rule := _RULES.get(name)) is not None:
            yield here, times * rule(eqn)
        elif name == "cond":  # only one branch runs: the one with the most work stands for it
            yield from max((list(operations(b, here, times)) for b in params["branches"]), key=lambda ops: sum(f for _, f in ops))
        else:
            for inner in _programs(params):
                yield from operations(inner, here, times * _runs(name, params))


def _runs(name: str, params: Mapping[str, Any]) -> int:
    """How often the programs within an equation run. A `while` whose end depends on data counts once."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # shapes within are those of one device
        return params["mesh"].size
    return 1


def _programs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                yield item


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(eqn: Any) -> float:
    # rhs_spec: (output features, input features, *space). A dilated input (the gradient of a strided convolution) is mostly zeros.
    kernel = eqn.invars[1].aval.shape
    taps = math.prod(kernel[i] for i in eqn.params["dimension_numbers"].rhs_spec[1:])
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * taps / math.prod(eqn.params["lhs_dilation"])


def _flash(products: int) -> Callable[[Any], float]:
    """cuDNN's attention over q `[B, L, N, D]` and k `[B, S, N, D]`: so many products of L x S x D."""

    def rule(eqn: Any) -> float:
        (batch, length, heads, size), (_, keys, _, _) = (eqn.invars[i].aval.shape for i in (0, 1))
        return 2.0 * products * batch * heads * length * keys * size

    return rule


_RULES: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": _flash(2),
    "dot_product_attention_bwd_wrapper": _flash(5),
}


class Device(NamedTuple):
    """A kind of accelerator, per chip.

    Attributes:
      name: as people call it.
      platform: "tpu", "gpu" or "cpu".
      peaks: FLOP/s by compute type, from the datasheet (dense); a float32 product on NVIDIA is TF32.
      measured: FLOP/s that a large matrix product reached, where somebody measured it.
      memory: bytes.
      bandwidth: of that memory, bytes/s.
    """

    name: str
    platform: str
    peaks: Mapping[str, float]
    measured: Mapping[str, float]
    memory: int
    bandwidth: float


_GB = 10**9
_GIB = 2**30
DEVICES = {
    "h200": Device("H200", "gpu", {"bfloat16": 989e12, "float32": 494e12}, {"bfloat16": 790e12}, 141 * _GB, 4.8e12),
    "h100": Device("H100 SXM", "gpu", {"bfloat16": 989e12, "float32": 494e12}, {}, 80 * _GB, 3.35e12),
    "a100": Device("A100 80 GB", "gpu", {"bfloat16": 312e12, "float32": 156e12}, {}, 80 * _GB, 2.04e12),
    "a100-40": Device("A100 40 GB", "gpu", {"bfloat16": 312e12, "float32": 156e12}, {}, 40 * _GB, 1.56e12),
    "l4": Device("L4", "gpu", {"bfloat16": 121e12, "float32": 60e12}, {}, 24 * _GB, 0.3e12),
    "v4": Device("TPU v4", "tpu", {"bfloat16": 275e12}, {}, 32 * _GIB, 1.23e12),
    "v5e": Device("TPU v5e", "tpu", {"bfloat16": 197e12}, {}, 16 * _GIB, 0.82e12),
    "v5p": Device("TPU v5p", "tpu", {"bfloat16": 459e12}, {}, 95 * _GIB, 2.77e12),
    "v6e": Device("TPU v6e", "tpu", {"bfloat16": 918e12}, {}, 32 * _GIB, 1.64e12),
    "cpu": Device("CPU", "cpu", {}, {}, 0, 0.0),
}
# What JAX calls them (`device.device_kind`), the more specific first.
_KINDS = (
    ("H200", "h200"), ("H100", "h100"), ("A100-SXM4-40GB", "a100-40"), ("A100-PCIE-40GB", "a100-40"), ("A100", "a100"), ("L4", "l4"),
    ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v6", "v6e"),
)  # fmt: skip


class Peak(NamedTuple):
    """FLOP/s of one device and where the number is from, for example "H200 bfloat16 (datasheet)"."""

    flops: float
    name: str


def device(kind: str) -> Device | None:
    """The entry for JAX's `device_kind`; None for one that is not in the table."""
    return next((DEVICES[key] for prefix, key in _KINDS if prefix in kind), DEVICES["cpu"] if kind == "cpu" else None)


def peak(entry: Device | None, dtype: str, *, measured: bool = False) -> Peak | None:
    """What the device can do in this compute type; None where that is not known (CPUs differ too much)."""
    if entry is None or dtype not in (table := entry.measured if measured else entry.peaks):
        return None
    return Peak(table[dtype], f"{entry.name} {dtype} ({'measured' if measured else 'datasheet'})")


def mfu(flops: float, seconds: float, peak_flops: float) -> float:
    """Share of the peak: model FLOPs of a step (no recomputation) over what `peak_flops` (of all devices) allows in `seconds`."""
    return flops / (seconds * peak_flops)
