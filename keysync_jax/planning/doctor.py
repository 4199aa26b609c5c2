"""Whether this machine can dub: versions, devices, attention, codecs, face models, model parts, disk, memory; each problem with its fix."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import av
import av.codec
import av.error
import jax
import jax.numpy as jnp

from keysync_jax.converters import model_directory
from keysync_jax.core import assets
from keysync_jax.core.compile_cache import use_compile_cache
from keysync_jax.core.errors import KeySyncError, first_line
from keysync_jax.core.version import __version__
from keysync_jax.inference.window_plan import WindowSizes
from keysync_jax.media import face_models
from keysync_jax.models.attention import select

OK, NOTE, BAD = "ok", "note", "bad"
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "scipy",
    "av",
    "opencv-python-headless",
    "ai-edge-litert",
    "safetensors",
    "soundfile",
    "soxr",
)
_ENCODERS = {
    "libx264": "most outputs",
    "libx265": "10-bit and RGB outputs",
    "libvpx-vp9": "odd sizes",
    "ffv1": "lossless .mkv",
    "aac": "sound",
}
_DECODERS = ("h264", "hevc", "vp9", "av1", "aac", "mp3", "opus")
_FULL_HEADS, _FULL_SIZE = 5, 64  # of the released network's widest level: heads of 64 numbers, latents of 64 x 64
_LEAST_DISK, _LEAST_MEMORY = 2 << 30, 4 << 30


class Finding(NamedTuple):
    """A line of the diagnosis.

    Attributes:
      state: `OK`, `NOTE` (works, but one should know) or `BAD` (a dub cannot run).
      what: the subject.
      found: what is there.
      fix: what to do about it; "" where nothing is.
    """

    state: str
    what: str
    found: str
    fix: str = ""


def diagnose(model: str | None = None, output: str | os.PathLike = ".") -> Iterator[Finding]:
    """Looks at everything that a dub needs; nothing is raised, problems are findings.

    Args:
      model: model directory, as `--model` names it; None leaves it out.
      output: the folder that outputs would go to.
    """
    yield from _versions()
    devices = list(_devices())
    yield from devices
    if all(finding.state != BAD for finding in devices):
        yield from _attention()
    yield from _codecs()
    yield _faces()
    yield from _model(model)
    yield from _disk(output)
    yield _memory()


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding(OK, "keysync", f"{__version__}, Python {python}, {platform.system()} {platform.machine()}")
    there, lacking = [], []
    for name in _PACKAGES:
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    if "opencv-python-headless" in lacking and _has("opencv-python"):
        lacking.remove("opencv-python-headless")
        there.append(f"opencv-python {importlib.metadata.version('opencv-python')}")
    yield Finding(OK, "packages", ", ".join(there))
    if lacking:
        yield Finding(BAD, "packages", f"not installed: {', '.join(lacking)}", f"pip install {' '.join(lacking)}")


def _devices() -> Iterator[Finding]:
    try:
        devices = jax.local_devices()
        value = float(jnp.ones(4, jnp.float32).sum())
    except Exception as error:  # a driver may fail in any way
        fix = "look at the driver (nvidia-smi), or set JAX_PLATFORMS=cpu to go without the device"
        yield Finding(BAD, "devices", first_line(error), fix)
        return
    kinds = ", ".join(f"{device.platform}:{device.device_kind}" for device in devices)
    if value != 4:
        yield Finding(BAD, "devices", f"{kinds}: 1 + 1 + 1 + 1 gave {value:g}", "the device computes wrongly; take it out of service")
        return
    if devices[0].platform == "cpu":
        gpu = Path("/proc/driver/nvidia/version").exists()
        fix = "pip install 'keysync-jax[cuda]' to use it" if gpu else "the released size needs a GPU or TPU; small models run"
        yield Finding(NOTE, "devices", f"{os.cpu_count()} CPU cores{', and an NVIDIA GPU that JAX does not use' if gpu else ''}", fix)
    else:
        memory = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        yield Finding(OK, "devices", kinds + (f", {memory[0] / 1e9:.0f} GB each for JAX" if memory[0] else ""))


def _attention() -> Iterator[Finding]:
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    keys = _FULL_SIZE**2
    try:
        chosen = select((1, keys, _FULL_HEADS, 64), keys, dtype)
    except KeySyncError as error:
        yield Finding(BAD, "attention", str(error), "unset KEYSYNC_ATTENTION")
        return
    if chosen == "xla" and not on_cpu:
        yield Finding(NOTE, "attention", "xla, no fused kernel", "update the driver, cuDNN and jax; keysync dub -v says why")
    else:
        yield Finding(OK, "attention", f"{chosen} at the released size in {jnp.dtype(dtype).name}")


def _codecs() -> Iterator[Finding]:
    lacking = [name for name in _ENCODERS if not _codec(name, "w")]
    undecoded = [name for name in _DECODERS if not _codec(name, "r")]
    fix = "pip install --force-reinstall av (a PyAV wheel brings FFmpeg with it; one built from source has what its FFmpeg has)"
    for name in lacking:
        state = BAD if name in ("libx264", "aac") else NOTE
        yield Finding(state, "codecs", f"no encoder {name}, which {_ENCODERS[name]} need", fix)
    if undecoded:
        yield Finding(NOTE, "codecs", f"no decoder for {', '.join(undecoded)}", fix)
    if not lacking and not undecoded:
        yield Finding(OK, "codecs", f"PyAV {av.__version__}: {', '.join(_ENCODERS)}; reads {', '.join(_DECODERS)}")


def _codec(name: str, mode: Literal["r", "w"]) -> bool:
    try:
        av.codec.Codec(name, mode)
    except (ValueError, av.error.FFmpegError):  # PyAV's own error for a name it does not know is a ValueError
        return False
    return True


def _faces() -> Finding:
    if face_models.is_here():
        return Finding(OK, "face models", str(face_models.folder()))
    return Finding(BAD, "face models", f"not in {face_models.folder()}", "keysync fetch faces")


def _model(model: str | None) -> Iterator[Finding]:
    if model is None:
        yield Finding(NOTE, "model", "none named", "keysync doctor --model DIR looks at one; keysync convert makes one")
        return
    try:
        directory = model_directory.load(assets.resolve(model))
        for part in directory.parts:
            directory.tensors(part)  # names and shapes, not the numbers
        stages = {name: directory.stage(name) for name in ("keyframe", "interpolation")}
        WindowSizes.of(stages["keyframe"], stages["interpolation"])
    except (KeySyncError, OSError) as error:
        yield Finding(BAD, "model", first_line(error), "convert or download it again; keysync inspect shows what is there")
        return
    encoders = sorted({name for stage in stages.values() for name in stage.audio_encoders})
    yield Finding(OK, "model", f"{directory.path}: {', '.join(directory.parts)}; hears by {', '.join(encoders)}")
    if directory.random:
        yield Finding(NOTE, "model", "some of its weights are random", "fine for trying the tools; what it draws is noise")


def _disk(output: str | os.PathLike) -> Iterator[Finding]:
    use_compile_cache()
    cache = jax.config.values["jax_compilation_cache_dir"]
    for what, folder in (("output", os.fspath(output)), ("scratch", tempfile.gettempdir()), ("compile cache", cache)):
        if not folder or "://" in str(folder):
            continue
        there = next((each for each in (Path(folder), *Path(folder).absolute().parents) if each.exists()), Path("/"))
        try:
            free = shutil.disk_usage(there).free
        except OSError as error:
            yield Finding(BAD, f"disk, {what}", f"{folder}: {error.strerror}", "name another folder")
            continue
        if not os.access(there, os.W_OK):
            state = NOTE if what == "compile cache" else BAD
            yield Finding(state, f"disk, {what}", f"{there} cannot be written to", "name another folder, or ask for permission")
        elif free < _LEAST_DISK:
            state = BAD if free < _LEAST_DISK // 16 else NOTE
            yield Finding(state, f"disk, {what}", f"{folder}: {free / 1e9:.2f} GB free", "make room; a dub needs its outputs and scratch")
        else:
            yield Finding(OK, f"disk, {what}", f"{folder}: {free / 1e9:.1f} GB free")


def _memory() -> Finding:
    free = _available_bytes()
    if free is None:
        return Finding(NOTE, "memory", "not known on this system")
    if free < _LEAST_MEMORY:
        return Finding(NOTE, "memory", f"{free / 1e9:.1f} GB available", "close other programs; the released size needs some 16 GB to load")
    return Finding(OK, "memory", f"{free / 1e9:.1f} GB available")


def _available_bytes() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
            limit = Path("/sys/fs/cgroup/memory.max")
            if limit.exists() and (text := limit.read_text().strip()).isdigit():  # a container's own limit
                used = Path("/sys/fs/cgroup/memory.current")
                return min(available, int(text) - (int(used.read_text()) if used.exists() else 0))
            return available
    return None


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
