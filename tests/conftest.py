"""Fixtures shared by the tests: where the reference cases lie, a tiny model, a drawn clip; how their programs are compiled."""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from keysync_jax.core import cpu

# Programs compiled by one test, or by a subprocess of one, are not compiled again by the next. A machine that runs the tests often may keep
# the folder: name it in the variable.
_CACHE = "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="keysync_xla_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# XLA splits sums by the number of its threads, which is that of the cores, but four wherever clips are prepared. With four everywhere, a
# process that has prepared clips, one that it starts, and one that has done neither give the same bits.
os.environ.setdefault("NPROC", "4")
# As every command does: processes started by a test compute what the test computes, and both are faster.
cpu.prepare()
# Compiling is what the tests spend their time with. For a training step of tests/helpers/tiny.py it takes 45 s of a core as users have it,
# 19 s without LLVM's optimisations, and 12 s if XLA's older emitters make the loops too; that step then takes as long as before. A module
# in one piece rather than in 32 takes a seventh less again. All tests but those of these rooms and files leave the optimisations out.
# `KEYSYNC_TESTS_COMPILE=full` compiles everything as users do.
_HURRY = os.environ.get("KEYSYNC_TESTS_COMPILE") != "full"
_OPTIMISED = ("demo",)  # recorded figures are of programs compiled as users have them
_FASTER = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
if _HURRY and importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends the process over a flag it does not know
    for flag, value in _FASTER.items():
        if flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}"
# A tenth of the time goes into Python's looks for garbage among millions of traced objects, and into the line numbers of every operation.
gc.set_threshold(100_000, 50, 1000)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
# Tests never reach for the network, whatever the machine has.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_unconfigure(config):
    if _CACHE and not hasattr(config, "workerinput"):  # in the process that made it, when those of pytest-xdist have ended
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def compiled_in_a_hurry(request):
    """Programs of a module and of processes that it starts are compiled without LLVM's optimisations, but in `_OPTIMISED`."""
    import jax  # reads the variables above when it is imported

    hurry = _HURRY and not {request.path.parent.name, request.path.stem} & set(_OPTIMISED)
    if hurry != jax.config.values["jax_disable_most_optimizations"]:
        jax.clear_caches()  # programs of another module were compiled the other way, and JAX would run them again
        jax.config.update("jax_disable_most_optimizations", hurry)
    with pytest.MonkeyPatch.context() as patch:
        if hurry:
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Model directory of `keysync init --size tiny`."""
    from keysync_jax.converters.initialize import initialize

    path = tmp_path_factory.mktemp("model") / "tiny"
    initialize("tiny", str(path), seed=0)
    return path


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    """Folder with `clip.mp4` (a drawn talker, 512 px, 25 fps, 30 frames, with its own voice) and `voice.wav` (another, 2 s)."""
    from keysync_jax.data_pipeline.synthetic import make_clip, write_clip
    from keysync_jax.media.audio import save_wav

    folder = tmp_path_factory.mktemp("talker")
    write_clip(make_clip(3, frames=30, size=512), folder / "clip.mp4")
    save_wav(folder / "voice.wav", make_clip(4, frames=50, size=128).samples, 16000)
    return folder


# Files that take the better part of a minute or more, longest first (`pytest --durations=150`).
_LONG = (
    "test_dub", "test_prepare_run", "test_loop_accidents", "test_step", "test_configs", "test_train_export", "test_golden", "test_talkers",
    "test_resume", "test_mesh_step", "test_ablations", "test_objective", "test_training_plan", "test_lpips", "test_bench", "test_train_cli",
    "test_optimizer_trajectory", "test_samples", "test_validation", "test_video_unet", "test_demo",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Long files come first, so that at the end no process has one before it while the others have none. Files with bounds are marked."""
    for item in items:
        if any(getattr(value, "__module__", None) == "bounds" for value in vars(item.module).values()):
            item.add_marker("numbers")
    order = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
