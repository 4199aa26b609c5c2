"""What dubbing so many clips needs on given devices, computed without any: windows, FLOPs, seconds, memory, disk and cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from keysync_jax.config import StageConfig, VAEConfig
from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import UsageError
from keysync_jax.costs import activations, flops
from keysync_jax.diffusion import schedules
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.diffusion.guidance import of_stage
from keysync_jax.inference.window_plan import WindowSizes, make_plan
from keysync_jax.models.stage import StageModel, abstract_params, abstract_vae_params
from keysync_jax.planning.recipe_plan import Topology

# Of the VAE's pictures at once, float32; three copies of the widest layer at full resolution are alive in a decoder.
_VAE_MICROBATCH, _VAE_COPIES = 2, 3
_HOST_BASE = 2 << 30  # bytes: JAX, decoder, encoder, a few dozen frames


@dataclasses.dataclass(frozen=True)
class DubPlan:
    """See `make_dub_plan`.

    Attributes:
      topology: the devices.
      clips, video_seconds: what is dubbed.
      windows: by stage.
      segments: windows of the second stage, as a dub's progress counts them.
      evaluations: calls of a network for a window: steps times branches.
      flops: of all windows.
      seconds: at the datasheet's peak over all devices; None where that is not known. Only the networks: faces, autoencoder, decoding and
        encoding come on top, and no program reaches the peak.
      device_bytes: weights of both stages and the autoencoder, and the larger stage's activations at the microbatch.
      host_bytes: estimate of a worker's.
      scratch_bytes: latents of the longest clip.
      cost: at the price given; None without one or without seconds.
    """

    topology: Topology
    clips: int
    video_seconds: float
    dtype: str
    microbatch: int
    windows: Mapping[str, int]
    evaluations: Mapping[str, int]
    flops: float
    peak: flops.Peak | None
    seconds: float | None
    device_bytes: int
    host_bytes: int
    scratch_bytes: int
    cost: float | None

    @property
    def segments(self) -> int:
        return self.windows["interpolation"]

    @property
    def fits(self) -> bool | None:
        """Whether one device has the memory; None where its memory is not known."""
        memory = self.topology.device.memory
        return self.device_bytes <= memory if memory else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, bytes and FLOPs in full."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        device = {"device": self.topology.device.name, "memory": self.topology.device.memory}
        peak = None if self.peak is None else self.peak._asdict()
        return plain | {"topology": self.topology._asdict() | device, "peak": peak, "segments": self.segments, "fits": self.fits}


def make_dub_plan(
    lengths: Sequence[float],
    stages: Mapping[str, StageConfig],
    vae: VAEConfig,
    topology: Topology,
    *,
    dtype: str | None = None,
    microbatch: int = 1,
    steps: int | None = None,
    price: float | None = None,
) -> DubPlan:
    """Plans windows as a dub does, for clips with a face in every frame, and traces each network once.

    Args:
      lengths: seconds of each clip.
      stages: by name.
      vae: the autoencoder.
      topology: devices.
      dtype: compute type; default that of the platform.
      microbatch: windows per device and call.
      steps: sampler steps; default the model's.
      price: of an hour of all devices together.

    Raises:
      UsageError: no clip, or a length that is none.
    """
    if not lengths or any(not (math.isfinite(each) and each > 0) for each in lengths):
        raise UsageError("plan --dub needs seconds of video above 0")
    dtype = dtype or ("float32" if topology.device.platform == "cpu" else "bfloat16")
    sizes = WindowSizes.of(stages["keyframe"], stages["interpolation"])
    windows = {"keyframe": 0, "interpolation": 0}
    for seconds in lengths:
        plan = make_plan(max(1, round(seconds * FRAME_RATE)), sizes.segment, keyframe_window=sizes.keyframes)
        windows["keyframe"] += sum(bool(window.kept) for window in plan.keyframe_windows)
        windows["interpolation"] += len(plan.segments)
    total, work, weights = 0.0, 0, _bytes(abstract_vae_params(vae))
    evaluations = {}
    for name, stage in stages.items():
        branches = len(of_stage(stage).needed().branches)
        evaluations[name] = branches * (len(schedules.ays_sigmas(stage.num_steps if steps is None else steps)) - 1)
        traced = _trace(stage, dtype, branches * microbatch)
        total += windows[name] * evaluations[name] * sum(each for _, each in flops.operations(traced)) / (branches * microbatch)
        work = max(work, activations.estimate(traced).peak)
        weights += _bytes(abstract_params(stage))
    pixels = _VAE_MICROBATCH * stages["keyframe"].resolution ** 2
    work = max(work, pixels * vae.base_channels * vae.channel_mult[0] * 4 * _VAE_COPIES)
    peak = flops.peak(topology.device, dtype)
    seconds = total / (peak.flops * topology.devices) if peak else None
    latent = stages["keyframe"].latent_size ** 2 * stages["keyframe"].unet.out_channels * 4
    return DubPlan(
        topology, len(lengths), sum(lengths), dtype, microbatch, windows, evaluations, total, peak, seconds, weights + work,
        _HOST_BASE + weights, int(2 * latent * max(lengths) * FRAME_RATE),
        None if price is None or seconds is None else price * seconds / 3600,
    )  # fmt: skip


def _trace(stage: StageConfig, dtype: str, rows: int) -> Any:
    """The network on so many windows, through the attention whose products the tracer sees."""
    model = StageModel(stage, jnp.dtype(dtype), "xla")
    size, channels, frames = stage.latent_size, stage.unet.out_channels, stage.num_frames
    wide = channels if stage.stage == "keyframe" else 2 * channels
    shape = jax.ShapeDtypeStruct
    concat = shape((rows, size, size, wide), jnp.float32)
    tokens = shape((rows, frames, stage.unet.context_dim), jnp.float32)
    vector = shape((rows, stage.unet.adm_in_channels), jnp.float32) if stage.unet.adm_in_channels else None
    x, noise = shape((rows, frames, size, size, channels), jnp.float32), shape((rows,), jnp.float32)

    def call(params: Any, x: Any, noise: Any, concat: Any, tokens: Any, vector: Any) -> Any:
        return model.apply({"params": params}, x, noise, Conditions(concat, tokens, vector=vector))

    return jax.make_jaxpr(call)(abstract_params(stage), x, noise, concat, tokens, vector)


def _bytes(tree: Any) -> int:
    """Of float32 parameters: the matrices that are held in the compute type are counted in full."""
    return sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
