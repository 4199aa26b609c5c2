import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.parallel import distributed

WORKER = Path(__file__).with_name("hosts_worker.py")


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(address, count, number, seconds, timeout=120):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(WORKER), address, str(count), str(number), str(seconds), str(timeout)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_alone_nothing_happens(monkeypatch):
    for name in (distributed.COORDINATOR, distributed.NUM_PROCESSES, distributed.PROCESS_ID):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "detected", lambda environ: None)
    called = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **kw: called.append(kw))
    distributed.start()
    assert not called


def test_environment_is_as_good_as_flags(monkeypatch):
    called = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **kw: called.append(kw))
    monkeypatch.setenv(distributed.COORDINATOR, "10.0.0.1:99")
    monkeypatch.setenv(distributed.NUM_PROCESSES, "4")
    monkeypatch.setenv(distributed.PROCESS_ID, "0")
    distributed.start(process_id=3)  # a flag wins
    assert called[0]["coordinator_address"] == "10.0.0.1:99"
    assert (called[0]["num_processes"], called[0]["process_id"]) == (4, 3)
    assert called[0]["heartbeat_timeout_seconds"] + called[0]["shutdown_timeout_seconds"] < 30


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("h:1", None, None), "--num-processes"),
        (("h:1", 2, 2), "counts from 0 to 1"),
        (("h", 2, 1), "host:port"),
    ],
)
def test_half_a_start_is_refused(arguments, words, monkeypatch):
    for name in (distributed.COORDINATOR, distributed.NUM_PROCESSES, distributed.PROCESS_ID):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=words):
        distributed.start(*arguments)


@pytest.mark.parametrize(
    "environ, cluster",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, None),  # a shell within an allocation is not a step of it
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "TPU"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a", "TPU_WORKER_HOSTNAMES": "a"}, "TPU"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "Kubernetes"),
    ],
)
def test_clusters(environ, cluster, tmp_path):
    assert distributed.detected(environ, devices=tmp_path) == cluster


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "visible"),
    [
        ({"SLURM_STEP_NUM_NODES": "2"}, "all"),  # one task a node, as docs/training.md has it
        ({"SLURM_STEP_NUM_NODES": "1"}, "0"),  # two on one node: a GPU each
        ({"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "3"}, "all"),  # Slurm has dealt them out already
        ({"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "0,1"}, "0,1"),  # the user has
    ],
)
def test_a_slurm_task_takes_the_gpus_that_are_its_own(environ, visible):
    code = (
        "import jax; from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES as visible; from keysync_jax.parallel import distributed; "
        "distributed.start(timeout=60); print(jax.process_index(), jax.process_count(), visible.value)"
    )
    base = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COORDINATOR_PORT": str(port())} | SLURM | environ
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=base | {"SLURM_PROCID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        assert [p.communicate(timeout=120)[0].split()[:3] for p in processes] == [[str(i), "2", visible] for i in range(2)]
    finally:
        for process in processes:
            process.kill()


def test_a_pod_of_an_indexed_job_is_told_what_to_say(monkeypatch):
    for name in (distributed.COORDINATOR, distributed.NUM_PROCESSES, distributed.PROCESS_ID):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KeySyncError, match="give --num-processes 1 if it is the only one; for several, pip install 'jax\\[k8s\\]'"):
        distributed.start()
    called = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **kw: called.append(kw))
    distributed.start(num_processes=1)
    monkeypatch.setenv(distributed.NUM_PROCESSES, "1")
    distributed.start()
    assert not called
    with pytest.raises(UsageError, match="--coordinator"):
        distributed.start(num_processes=2)


def test_nobody_answers():
    """Fatal, and one line."""
    process = worker(f"127.0.0.1:{port()}", 2, 1, 1, timeout=3)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_dies(victim):
    address = f"127.0.0.1:{port()}"
    processes = [worker(address, 2, i, 120) for i in range(2)]
    try:
        assert [p.stdout.readline().split() for p in processes] == [["joined", str(i), "2", "2"] for i in range(2)]
        processes[victim].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        assert processes[1 - victim].wait(timeout=60) != 0
        assert time.monotonic() - begin < 30
    finally:
        for process in processes:
            process.kill()
            process.wait()
