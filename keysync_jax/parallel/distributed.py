"""Start of a run that spans several processes. A start that fails ends the run: half a pod that trains alone is worse than none."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from keysync_jax.core.errors import KeySyncError, UsageError, first_line

# Read where the flags are not given.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "KEYSYNC_COORDINATOR", "KEYSYNC_NUM_PROCESSES", "KEYSYNC_PROCESS_ID"
STARTUP_SECONDS = 300  # hosts of a pod do not come up together
# A process that stops answering is dead after so long, and all others end with it. JAX's 100 s would waste a pod's time.
HEARTBEAT_SECONDS = 15
# How long a process that ends waits for the others: one that ends by an error must not keep them waiting.
SHUTDOWN_SECONDS = 10


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *, timeout: int = STARTUP_SECONDS
) -> None:
    """Join the other processes of the run, before anything else touches JAX.

    With none of the arguments given, here or in `KEYSYNC_COORDINATOR`, `KEYSYNC_NUM_PROCESSES` and `KEYSYNC_PROCESS_ID`, TPU pods, GKE,
    Slurm and Open MPI are recognised by what they put into the environment; elsewhere the process stays alone and nothing happens. One
    process on a machine has all of its GPUs; several have one each.

    From then on, a process that dies takes all others with it: they end with a status other than 0 within `HEARTBEAT_SECONDS` or so.

    Args:
      coordinator: host:port of process 0.
      num_processes: of the run; 1 alone says that there is no other, whatever the environment looks like.
      process_id: of this one, from 0.
      timeout: seconds to wait for the others.

    Raises:
      UsageError: some of the three are given but not all, or they are no numbers.
      KeySyncError: the processes did not find each other.
    """
    given = _given(coordinator, num_processes, process_id, os.environ)
    cluster = None if given else detected(os.environ)
    if given == _ALONE or (not given and cluster is None) or jax.distributed.is_initialized():
        return
    if cluster == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise KeySyncError(
            "this is a pod of an Indexed Job: give --num-processes 1 if it is the only one; for several, pip install 'jax[k8s]', "
            "or give --coordinator, --num-processes and --process-id"
        )
    where = f"the {cluster} cluster"
    if given:
        where = f"{given['coordinator_address']} as process {given['process_id']} of {given['num_processes']}"
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )
    except (RuntimeError, ValueError, TypeError, OSError, KeyError) as error:
        raise KeySyncError(
            f"cannot join {where}: {first_line(error)}; check that all processes run and can reach the coordinator"
        ) from error
    if _owns_gpus(os.environ):
        # On Slurm and Open MPI, JAX takes one GPU a process, the local number's, however many processes the machine has.
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, "all")


_ALONE = {"num_processes": 1}


def _owns_gpus(environ: Mapping[str, str]) -> bool:
    """Whether every GPU that this process can see is its own: it is the only one of its machine, or was given a single GPU."""
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return False
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    one_a_node = tasks > 0 and tasks == _number(environ, "SLURM_STEP_NUM_NODES")
    seen = environ.get("CUDA_VISIBLE_DEVICES", "")
    return one_a_node or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (seen != "" and "," not in seen)


def _given(coordinator: str | None, num_processes: int | None, process_id: int | None, environ: Mapping[str, str]) -> dict:
    """Arguments of `jax.distributed.initialize`; {} if nothing is given, `_ALONE` if there is one process."""
    values = {COORDINATOR: coordinator, NUM_PROCESSES: num_processes, PROCESS_ID: process_id}
    values = {name: environ.get(name) or None if value is None else value for name, value in values.items()}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == 3:
        return {}
    if missing == [COORDINATOR, PROCESS_ID] and values[NUM_PROCESSES] in (1, "1"):
        return _ALONE
    if missing:
        flags = {COORDINATOR: "--coordinator", NUM_PROCESSES: "--num-processes", PROCESS_ID: "--process-id"}
        raise UsageError(f"several processes need all of coordinator, number and id: {flags[missing[0]]} or {missing[0]} is missing")
    try:
        count, number = int(values[NUM_PROCESSES] or ""), int(values[PROCESS_ID] or "")
    except ValueError:
        raise UsageError(f"{NUM_PROCESSES}={values[NUM_PROCESSES]} and {PROCESS_ID}={values[PROCESS_ID]} must be whole numbers") from None
    if not 0 <= number < count:
        raise UsageError(f"process id {number} of {count} processes: it counts from 0 to {count - 1}")
    if ":" not in str(values[COORDINATOR]):
        raise UsageError(f"coordinator {values[COORDINATOR]!r} must read host:port")
    return {"coordinator_address": values[COORDINATOR], "num_processes": count, "process_id": number}


def detected(environ: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """Name of the cluster that this process is one of several in, None if it is alone."""
    if _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        return "Slurm"
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    hosts = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(hosts) > 1 or environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return "TPU"
    if "JOB_COMPLETION_INDEX" in environ and "KUBERNETES_SERVICE_HOST" in environ and not hosts:
        return "Kubernetes"
    # A TPU VM says nothing in the environment; JAX asks its metadata server, and finds one process on a single host.
    platforms = environ.get("JAX_PLATFORMS", "")
    if not hosts and platforms in ("", "tpu") and importlib.util.find_spec("libtpu") and any(devices.glob("accel*")):
        return "TPU"
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def sync(name: str) -> None:
    """Waits until all processes have come to the point of this name; does nothing in a single one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
