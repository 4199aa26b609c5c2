"""Devices that are not here, as XLA's compilers know them: TPU slices through libtpu, NVIDIA GPUs through JAX's CUDA plugin."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

from jax.sharding import Mesh

from keysync_jax.core.errors import KeySyncError, UsageError, first_line
from keysync_jax.parallel import mesh as meshes
from keysync_jax.planning.recipe_plan import Topology
from keysync_jax.training.config import TrainConfig

# CUDA's version by the plugin that brings it, the newest first.
_PLUGINS = {"jax_cuda13_plugin": (13, 0), "jax_cuda12_plugin": (12, 9)}
# libtpu takes a v4 chip for two devices unless told that its cores work as one; of later chips it knows.
_CHIP_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


class _Gpu(NamedTuple):
    """What the compiler asks about a GPU besides its memory; from NVIDIA's datasheets and the limits of its compute capability.

    Attributes:
      name: as the driver calls it.
      capability: of CUDA, major and minor.
      cores: streaming multiprocessors.
      units: float32 units of one.
      threads: that one holds at most.
      shared, shared_block: bytes of shared memory of one, and the most that a block of threads may ask for.
      cache: bytes of the L2 cache.
      clock: GHz, boosted.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    shared: int
    shared_block: int
    cache: int
    clock: float


_KIB, _MIB = 2**10, 2**20
_HOPPER = _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 * _KIB, 227 * _KIB, 50 * _MIB, 1.98)
_AMPERE = _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164 * _KIB, 163 * _KIB, 40 * _MIB, 1.41)
_GPUS = {
    "h200": _HOPPER._replace(name="NVIDIA H200"),
    "h100": _HOPPER,
    "a100": _AMPERE,
    "a100-40": _AMPERE._replace(name="NVIDIA A100-SXM4-40GB"),
    "l4": _Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 100 * _KIB, 99 * _KIB, 48 * _MIB, 2.04),
}


def check(topology: Topology) -> None:
    """Raises:
    UsageError: neither TPUs nor GPUs.
    KeySyncError: the compiler for them is not installed.
    """
    platform = topology.device.platform
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise KeySyncError(f"compiling for {topology.name} needs libtpu, which is not installed (pip install 'jax[tpu]')")
    if platform == "gpu" and _plugin() is None:
        raise KeySyncError(f"compiling for {topology.name} needs JAX's CUDA plugin, which is not installed (pip install 'jax[cuda13]')")
    if platform not in ("tpu", "gpu"):
        raise UsageError(f"--compile needs a topology of TPUs or GPUs such as v5e:4x4 or h200x8, not {topology.name}")


def environment(topology: Topology) -> tuple[dict[str, str], str]:
    """Environment variables, and flags for `XLA_FLAGS`, of a process that compiles for devices that are not here and touches none."""
    if topology.device.platform == "gpu":
        # There is no GPU to time kernels on, and untimed, XLA gives up on some matrix products that it would leave to Triton.
        return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}, "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    # libtpu looks for the machine that it runs on and for others that use it.
    variables = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": _accelerator(topology),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return variables, ""


def mesh(config: TrainConfig, topology: Topology) -> Mesh:
    """The recipe's mesh over the devices of its slices (GPUs: hosts), each of the topology, that need not be here.

    Raises:
      KeySyncError: the compiler does not know the topology.
    """
    from jax.experimental import topologies

    slices = config.mesh.slices
    options: dict[str, Any]
    if topology.device.platform == "gpu":
        compiler, platform, name = "JAX's CUDA plugin", "cuda", ""
        # One process for each host.
        options = {"target_config": gpu_target(topology), "topology": f"{slices}x1x{topology.devices}"}
    else:
        compiler, platform, name = "libtpu", "tpu", topology.name
        options = _CHIP_OPTIONS.get(topology.kind, {}) | ({"num_slices": slices} if slices > 1 else {})
    try:
        found = topologies.get_topology_desc(platform=platform, topology_name=name, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = first_line(error, 160)
        raise KeySyncError(f"{compiler} cannot compile for {topology.name}: {reason}") from error
    return meshes.train_mesh(config.mesh, found.devices)


def gpu_target(topology: Topology) -> str:
    """A GPU as XLA's `GpuTargetConfig`, a text-format protocol buffer."""
    gpu, device = _GPUS[topology.kind], topology.device
    plugin = _plugin()
    assert plugin is not None  # `check` said so
    major, minor = _PLUGINS[plugin]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {gpu.threads}
          shared_memory_per_block: {48 * _KIB}  shared_memory_per_block_optin: {gpu.shared_block}  shared_memory_per_core: {gpu.shared}
          core_count: {gpu.cores}  fpus_per_core: {gpu.units}  clock_rate_ghz: {gpu.clock}
          block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
          registers_per_core_limit: 65536  registers_per_block_limit: 65536
          device_memory_size: {device.memory}  memory_bandwidth: {int(device.bandwidth)}  l2_cache_size: {gpu.cache}
          cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: {major} minor: {minor} }}
        device_description_str: "{gpu.name}"
        """


def _plugin() -> str | None:
    return next((name for name in _PLUGINS if importlib.util.find_spec(name) is not None), None)


def _accelerator(topology: Topology) -> str:
    chips = topology.devices
    return {"v5e": f"v5litepod-{chips}", "v6e": f"v6e-{chips}"}.get(topology.kind, f"{topology.kind}-{2 * chips}")
