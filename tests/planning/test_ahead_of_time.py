"""What the compilers for absent devices are asked and what is read from them.

Without libtpu and the CUDA plugin themselves, large downloads: a stand-in writes the dumps of real ones.
"""

import importlib.util
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.planning import ahead_of_time, compile_targets
from keysync_jax.planning.recipe_plan import parse_topology
from keysync_jax.training.config import MeshConfig, TrainConfig

V5E, H200 = parse_topology("v5e:2x2"), parse_topology("h200x2")
# Cut from the dumps of libtpu 0.0.42.1.
USAGE = """\
Memory Space: default (color=0)
Total bytes: 198542336 (189.34MiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
    7.00MiB(  2%);    7.00MiB;     24281088;                1; f32[14,1,1024,128]
Memory Space: vmem (color=1)
Total bytes: 117440512 (112.00MiB)
"""
ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 reduce_sum.2 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 917504, parameter 707, shape |f32[1,14,32,32,4]| at ShapeIndex {}:
 value: <58644 param.244 @0> (size=917504,offset=0): f32[1,14,32,32,4]{3,4,2,1,0:T(4,128)}
allocation 3: size 196608, parameter 2, shape |f32[768,64]| at ShapeIndex {}, maybe-live-out:
 value: <58796 param.258 @0> (size=196608,offset=0): f32[768,64]{0,1:T(8,128)}
allocation 709: size 186418176, preallocated-temp:
"""
# Likewise of libtpu 0.0.52.
PAGED_ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <11 region_0.5 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 147456, page 0, parameter 90, shape |f32[3,3,32,32]| at ShapeIndex {}, maybe-live-out:
 value: <4177 param.162 @0> (size=147456,offset=0): f32[3,3,32,32]{3,2,1,0:T(8,128)}
allocation 2: size 512, page 0, parameter 7, shape |f32[32]| at ShapeIndex {}:
allocation 900: size 198394368, page 0, preallocated-temp:
"""
# Likewise of the CUDA plugin 0.10.2.
GPU_USAGE = """\
Memory Space: default (color=0)
Total bytes: 3754681716 (3.50GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
"""
GPU_ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 58982400, parameter 634, shape |bf16[3,3,2560,1280]| at ShapeIndex {}:
 value: <23802 params__output_blocks_0_0____in_layers_2____kernel__.1 @0> (size=58982400,offset=0): bf16[3,3,2560,1280]{3,2,1,0}
allocation 5: size 44236800, parameter 1025, shape |bf16[3,3,1920,1280]| at ShapeIndex {}:
allocation 3033: size 4, thread-local:
allocation 3035: size 700817088, preallocated-temp:
"""


@pytest.fixture
def compiler(monkeypatch):
    """Sets what the child process does: Python that may call `dump(ending, text)`."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ahead_of_time, "_LOOK_SECONDS", 0.05)
    prelude = """
        import os, pathlib, re, sys, time
        folder = pathlib.Path(re.search(r"--xla_dump_to=(\\S+)", os.environ["XLA_FLAGS"]).group(1))
        folder.mkdir()
        def dump(ending, text):
            (folder / ("module_0003.jit_step." + ending)).write_text(text)
        """

    def use(program):
        text = textwrap.dedent(prelude) + textwrap.dedent(program)
        monkeypatch.setattr(ahead_of_time, "_command", lambda recipe, topology: [sys.executable, "-c", text])

    return use


PLACED = f"""
dump("cl_1.after_optimizations-buffer-assignment.txt", {ASSIGNMENT!r})
dump("cl_1.after_optimizations-memory-usage-report.txt", {USAGE!r})
dump("cl_1.after_optimizations_after_buffer_assignment.txt", "HloModule")
"""
GPU_PLACED = f"""
dump("sm_9.0a_gpu_after_optimizations-buffer-assignment.txt", {GPU_ASSIGNMENT!r})
dump("sm_9.0a_gpu_after_optimizations-memory-usage-report.txt", {GPU_USAGE!r})
dump("0.ir-no-opt.ll", "define void @fusion()")
"""


def test_the_compiler_is_stopped_once_its_buffers_are_placed(compiler):
    compiler(PLACED + "time.sleep(600)")
    begin = time.monotonic()
    found = ahead_of_time.compile_step(TrainConfig(), V5E, quiet=True)
    assert found.arguments == 917504 + 196608 and found.total == 198542336 and found.code is None
    assert time.monotonic() - begin < 60


def test_so_is_the_one_for_gpus(compiler):
    compiler(GPU_PLACED + "time.sleep(600)")
    found = ahead_of_time.compile_step(TrainConfig(), H200, quiet=True)
    assert (found.arguments, found.total, found.code) == (58982400 + 44236800, 3754681716, None)


@pytest.mark.parametrize("text, arguments", [(ASSIGNMENT, 917504 + 196608), (PAGED_ASSIGNMENT, 147456 + 512)])
def test_both_forms_of_an_assignment_are_read(tmp_path, text, arguments):
    (tmp_path / "module_0003.jit_step.cl_1.after_optimizations-buffer-assignment.txt").write_text(text)
    (tmp_path / "module_0003.jit_step.cl_1.after_optimizations-memory-usage-report.txt").write_text(USAGE)
    sizes = ahead_of_time.read_assignment(tmp_path)
    assert sizes == {"arguments": arguments, "temporaries": 198542336 - arguments, "code": None}


@pytest.mark.parametrize(
    "name, slices, options",
    [("v5e:2x2", 1, {}), ("v5e:2x2", 2, {"num_slices": 2}), ("v4:2x2x1", 1, {"chip_config_name": "megacore"})],
)
def test_libtpu_is_asked_for_the_slices_of_the_plan(monkeypatch, name, slices, options):
    from jax.experimental import topologies

    asked = {}

    def describe(platform, topology_name, **given):
        asked.update(platform=platform, topology_name=topology_name, **given)
        return SimpleNamespace(devices=["chip"] * 4 * slices)

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    monkeypatch.setattr(compile_targets.meshes, "train_mesh", lambda config, devices: len(devices))
    config = TrainConfig(mesh=MeshConfig(data=slices, fsdp=4, slices=slices))
    topology = parse_topology(name)
    assert compile_targets.mesh(config, topology) == topology.devices * slices
    assert asked == {"platform": "tpu", "topology_name": name} | options


@pytest.mark.parametrize(
    "name, slices, shape, lines",
    [
        ("h200x8", 4, "4x1x8", ['"NVIDIA H200"', "major: 9 minor: 0", "device_memory_size: 141000000000 ", "core_count: 132 "]),
        ("a100-40x2", 1, "1x1x2", ['"NVIDIA A100-SXM4-40GB"', "major: 8 minor: 0", "device_memory_size: 40000000000 ", "core_count: 108 "]),
        ("l4", 1, "1x1x1", ['"NVIDIA L4"', "major: 8 minor: 9", "core_count: 58 ", "memory_bandwidth: 300000000000 "]),
    ],
)
def test_the_cuda_plugin_is_asked_for_the_gpus_of_the_plan(monkeypatch, name, slices, shape, lines):
    from jax.experimental import topologies

    asked = {}
    monkeypatch.setattr(compile_targets, "_plugin", lambda: "jax_cuda13_plugin")
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **given: asked.update(given) or SimpleNamespace(devices=["gpu"]))
    monkeypatch.setattr(compile_targets.meshes, "train_mesh", lambda config, devices: len(devices))
    compile_targets.mesh(TrainConfig(mesh=MeshConfig(slices=slices)), parse_topology(name))
    assert (asked["platform"], asked["topology"]) == ("cuda", shape) and "runtime_version { major: 13 minor: 0 }" in asked["target_config"]
    assert [line for line in lines if line not in asked["target_config"]] == []


def test_the_compiler_touches_no_device(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--given")
    gpu, tpu = (ahead_of_time._environment(Path("/dump"), topology) for topology in (H200, V5E))
    assert gpu["JAX_PLATFORMS"] == tpu["JAX_PLATFORMS"] == "cpu"
    assert gpu["CUDA_VISIBLE_DEVICES"] == "-1" and tpu["TPU_SKIP_MDS_QUERY"] == "1"
    assert gpu["XLA_FLAGS"].startswith("--given --xla_gpu_autotune_level=0 ") and "gpu" not in tpu["XLA_FLAGS"]
    assert all("--xla_dump_to=/dump" in each["XLA_FLAGS"] for each in (gpu, tpu))


def test_the_whole_program_is_waited_for(compiler):
    compiler(PLACED + """time.sleep(0.5); print('{"arguments": 10, "temporaries": 20, "code": 7000}')""")
    found = ahead_of_time.compile_step(TrainConfig(), V5E, whole=True, quiet=True)
    assert found[:3] == (10, 20, 7000) and found.total == 7030 and found.seconds >= 0.5


def test_what_the_compiler_says_is_the_error(compiler):
    compiler('sys.exit("error: the step does not fit v5e:2x2: RESOURCE_EXHAUSTED")')
    with pytest.raises(KeySyncError, match=r"^the step does not fit v5e:2x2"):
        ahead_of_time.compile_step(TrainConfig(), V5E, quiet=True)
    compiler("raise TypeError('a plugin of another version')")
    with pytest.raises(KeySyncError, match="ended with status 1: TypeError: a plugin of another version"):
        ahead_of_time.compile_step(TrainConfig(), V5E, quiet=True)
    compiler("os.abort()")
    with pytest.raises(KeySyncError, match="ended with status -6"):
        ahead_of_time.compile_step(TrainConfig(), V5E, quiet=True)


def test_a_plan_in_an_unknown_form_is_not_guessed_at(compiler):
    compiler(PLACED.replace("Total bytes", "Sum") + "time.sleep(600)")
    with pytest.raises(KeySyncError, match="--compile=whole"):
        ahead_of_time.compile_step(TrainConfig(), V5E, quiet=True)


def test_one_is_told_what_the_compiler_does(compiler, capsys, monkeypatch):
    monkeypatch.setattr(ahead_of_time, "_LINE_SECONDS", 0.01)
    compiler('dump("before_optimizations.txt", "HloModule"); time.sleep(1)' + PLACED)
    ahead_of_time.compile_step(TrainConfig(), V5E)
    assert "s: the compiler optimises the program" in capsys.readouterr().err


def test_without_the_compiler_or_such_a_device_it_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KeySyncError, match=r"needs libtpu, which is not installed \(pip install 'jax\[tpu\]'\)"):
        ahead_of_time.compile_step(TrainConfig(), V5E)
    with pytest.raises(KeySyncError, match=r"h200x2 needs JAX's CUDA plugin, which is not installed \(pip install 'jax\[cuda13\]'\)"):
        ahead_of_time.compile_step(TrainConfig(), H200)
    with pytest.raises(UsageError, match=r"such as v5e:4x4 or h200x8, not cpu:8"):
        ahead_of_time.compile_step(TrainConfig(), parse_topology("cpu:8"))


def test_the_compiler_ends_when_its_starter_is_killed(tmp_path):
    folder, ready = tmp_path / "compile", tmp_path / "ready"
    folder.mkdir()
    child = (
        "import os, pathlib, time; from keysync_jax.planning import ahead_of_time as a; a._LOOK_SECONDS = 0.05; "
        f"a.end_with(os.getppid(), pathlib.Path({str(folder)!r})); pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    )
    starter = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    wait_for(ready.exists)
    assert folder.exists()
    process.kill()
    process.wait()
    wait_for(lambda: not folder.exists())
    wait_for(lambda: not running(pid))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that has ended and that nobody waits for any more is still listed.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
