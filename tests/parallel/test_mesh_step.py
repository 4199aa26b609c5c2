"""A training step on eight devices is the step on one: in a process of its own, since the number of CPU devices is fixed at start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import close

WORKER = Path(__file__).with_name("mesh_worker.py")
# Compiling is what takes the time here, and nothing runs twice.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run_worker(*meshes):
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(WORKER.parents[1] / "helpers"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, str(WORKER), *meshes], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


@pytest.fixture(scope="module")
def fast():
    return run_worker("2x2x2+2")


def check(out, mesh):
    one, found = out["1x1x1"], out[mesh]
    assert one["grad_norm"] > 0.01  # else everything below would be 0 = 0
    # Devices sum their samples, then each other's sums. A device left out would change everything by an eighth.
    close(found["loss"], one["loss"], 32, err_msg="loss")
    close(found["grad_norm"], one["grad_norm"], 64, err_msg="norm of the gradient")
    close(found["mu"]["relative"], 0, 64, scale=1, err_msg="first moment")
    # Parameters, of size one, moved by a thousandth at most: by the gradient's rounding, and then they are rounded themselves.
    for name in ("params", "ema"):
        close(found[name]["absolute"], 0, 64, scale=1, err_msg=name)
    # What the program was compiled for is what the table says, to the byte.
    assert found["shardings_match"]
    assert found["argument_bytes"] == found["table_bytes"]


def test_all_axes_with_accumulation(fast):
    check(fast, "2x2x2+2")
    assert fast["2x2x2+2"]["sharded_leaves"] > 50


def test_constraints_under_set_mesh(fast):
    """JAX ignores the mesh of a bare `with mesh:` here, without a word: the loop has to enter it with `jax.set_mesh`."""
    assert fast["traps"]["set_mesh"] > 30
    assert fast["traps"]["bare"] == 0


@pytest.mark.slow
def test_every_mesh():
    meshes = ("8x1x1", "1x8x1", "2x4x1", "2x2x2", "1x1x8", "1x8x1+2", "2x4x1+2")  # 1x1x8 cuts through heads
    out = run_worker(*meshes)
    for mesh in meshes:
        check(out, mesh)
    # Parameters are gathered; activations stay where their samples are.
    assert out["1x8x1"]["activations_exchanged"] == 0
    assert out["2x4x1"]["activations_exchanged"] == 0
    assert out["8x1x1"]["sharded_leaves"] == 0
