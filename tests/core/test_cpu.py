"""The settings that a CPU needs: made where they belong, not where they would do harm, and what they are for."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest

from keysync_jax.cli import main as cli
from keysync_jax.core import cpu
from keysync_jax.data_pipeline.prepare import features

FLAG = "xla_cpu_experimental_ynn_fusion_type"


def prepared(monkeypatch, flags="", platforms="", found=()):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    return cpu.prepare(), os.environ["XLA_FLAGS"]


def test_on_a_cpu_the_flag_is_set_beside_what_was_there(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    assert prepared(monkeypatch, "--xla_force_host_platform_device_count=8") == (
        True, f"--xla_force_host_platform_device_count=8 --{FLAG}=LIBRARY_FUSION_TYPE_REDUCE",
    )  # fmt: skip


def test_what_the_user_set_prevails(monkeypatch):
    assert prepared(monkeypatch, f"--{FLAG}=") == (True, f"--{FLAG}=")


def test_a_version_it_was_not_measured_with_is_left_alone(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    assert prepared(monkeypatch) == (True, "")


def test_nothing_is_done_where_an_accelerator_computes(monkeypatch):
    assert prepared(monkeypatch, found=("jax_cuda13_plugin",)) == (False, "")
    assert prepared(monkeypatch, found=("libtpu",)) == (False, "")


def test_an_accelerator_that_is_not_asked_for_does_not_count(monkeypatch):
    assert prepared(monkeypatch, platforms="cpu", found=("libtpu",))[0]


def test_commands_and_beam_workers_make_them(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(cpu, "prepare", lambda: made.append(True))
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 1 and len(made) == 1
    monkeypatch.setenv("NPROC", "1")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    with features.as_it_was():
        features.settle_jax()
        assert len(made) == 2 and os.environ["NPROC"] == "4"
    assert os.environ["NPROC"] == "1" and "XLA_PYTHON_CLIENT_PREALLOCATE" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_is_kept_between_steps():
    """Working memory that is allocated again in another thread, as XLA does, is not cleared by the kernel again."""
    script = """
import ctypes, resource, sys, threading
from keysync_jax.core import cpu
if sys.argv[1] == "yes":
    cpu.prepare()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def step():
    for _ in range(10):
        block = libc.malloc(100 << 20)
        ctypes.memset(block, 1, 100 << 20)
        libc.free(block)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=step)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    without, given = (
        int(subprocess.run([sys.executable, "-c", script, word], env=environment, capture_output=True, text=True, check=True).stdout)
        for word in ("no", "yes")
    )
    assert given < without / 4
