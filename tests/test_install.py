"""What an installation holds, and the ways to run the library: installed, the same in the repository, editable, a bare checkout."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import keysync_jax

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "converters", "data_pipeline")
# What the library says of itself: where its parts are, which recipes it ships, and which general names it takes.
PROBE = """
import importlib.util, json
import keysync_jax
from keysync_jax import configs, converters, data_pipeline
from keysync_jax.core import assets
from keysync_jax.converters import lazy
from keysync_jax.data_pipeline import records
from keysync_jax.training import recipes
there = lambda name: importlib.util.find_spec(name) is not None
print(json.dumps({
    "package": keysync_jax.__file__,
    "folders": [module.__file__ for module in (configs, converters, data_pipeline, lazy, records)],
    "recipes": recipes.names(),
    "model": assets.is_bundled(),
    "taken": [name for name in ("configs", "converters", "data_pipeline", "tests") if there(name)],
    "strays": [name for name in ("keysync_jax.keysync_jax", "keysync_jax.tests", "keysync_jax.docs", "keysync_jax.setup") if there(name)],
}))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the repository builds from: building leaves folders behind."""
    tree = tmp_path_factory.mktemp("checkout") / "repository"
    for name in ("keysync_jax", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("tests", "docs"):
        (tree / name).mkdir()
        (tree / name / "__init__.py").touch()
    return tree


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", out, checkout)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder as site-packages is after `pip install .`."""
    site = tmp_path_factory.mktemp("installed") / "site"
    _pip("install", "--no-deps", "--target", site, wheel)
    return site


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


def _pip(*args: object) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def _run(*args: str, cwd: Path, path: Path | None = None, python: Path | str = sys.executable) -> str:
    """What a Python prints that is started in `cwd` and finds modules there, in `path` and among our dependencies."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([python, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _whole(found: dict, package: Path, folders: Path) -> None:
    assert Path(found["package"]) == package / "__init__.py"
    assert [Path(file) for file in found["folders"]] == [
        folders / name for name in (*(f"{f}/__init__.py" for f in FOLDERS), "converters/lazy.py", "data_pipeline/records.py")
    ]
    assert found["recipes"] == sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))
    assert found["model"] and found["strays"] == []


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"keysync_jax-{keysync_jax.__version__}.dist-info"
        assert {name.split("/")[0] for name in names} == {"keysync_jax", info}
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["keysync_jax"]
        assert "keysync = keysync_jax.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
    wanted = {f"keysync_jax/{path.relative_to(ROOT)}" for f in FOLDERS for path in (ROOT / f).rglob("*.py")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "keysync_jax").rglob("*.py")} | {"keysync_jax/py.typed"}
    assert wanted == {name for name in names if name.endswith((".py", "py.typed"))}


def test_installed_and_used_from_elsewhere(installed, elsewhere):
    found = json.loads(_run("-c", PROBE, cwd=elsewhere, path=installed))
    _whole(found, installed / "keysync_jax", installed / "keysync_jax")
    assert found["taken"] == []
    assert _run("-m", "keysync_jax", "--version", cwd=elsewhere, path=installed).split()[-1] == keysync_jax.__version__


def test_installed_and_python_started_in_the_repository(installed, checkout):
    """Python takes the package from the folder that it is started in; the three folders are found beside it."""
    found = json.loads(_run("-c", PROBE, cwd=checkout, path=installed))
    _whole(found, checkout / "keysync_jax", checkout)
    assert _run("-m", "keysync_jax", "--version", cwd=checkout, path=installed).split()[-1] == keysync_jax.__version__


def test_editable(checkout, elsewhere, tmp_path):
    home = tmp_path / "venv"
    venv.create(home)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (site,) = home.glob("**/site-packages")
    # What the library needs, and setuptools, come from this environment; the library itself, installed there or not, must not.
    for folder in {Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}:
        for entry in folder.iterdir():
            if "keysync" not in entry.name and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    _pip("--python", python, "install", "--no-deps", "--no-build-isolation", "--ignore-installed", "-e", checkout)
    found = json.loads(_run("-c", PROBE, cwd=elsewhere, python=python))
    _whole(found, checkout / "keysync_jax", checkout)
    assert found["taken"] == []
    assert _run("--version", cwd=elsewhere, python=python.with_name("keysync")).split()[-1] == keysync_jax.__version__


def test_a_bare_checkout(checkout, elsewhere):
    found = json.loads(_run("-c", PROBE, cwd=elsewhere, path=checkout))
    _whole(found, checkout / "keysync_jax", checkout)
    assert found["taken"] == [*FOLDERS, "tests"]  # as any folder on the path


def test_in_the_repository_the_folders_also_answer_to_their_own_names(checkout):
    told = "import converters, converters.lazy as lazy, keysync_jax.converters.lazy as ours; print(lazy.__file__ == ours.__file__)"
    assert _run("-c", told, cwd=checkout).split() == ["True"]
    for name in ("keysync_jax.keysync_jax", "keysync_jax.tests"):
        with pytest.raises(ModuleNotFoundError):
            __import__(name)


BENCH = """
import contextlib, io, sys
from keysync_jax.cli.main import main
from keysync_jax.planning import bench
if __name__ == "__main__":
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(["bench", "gpu"]) == 2, said.getvalue()
    assert "accelerator" in said.getvalue(), said.getvalue()
    # The way of a GPU's cases, a process of its own with a deadline, in a size for a processor. No case imports anything more.
    report = bench.run_all([bench.Case("attention", repeats=1, warmup=0)], budget=300)
    assert report["results"] and not any("error" in found for found in report["results"]), report
    foreign = [name for name in ("ml_collections", "safetensors", "av", "cv2", "PIL", "soundfile", "grain") if name in sys.modules]
    assert not foreign, foreign
"""


def test_bench_needs_jax_flax_optax_orbax_and_rich_alone(tmp_path):
    """In an environment of links to these five and to what they themselves need, and of nothing else."""
    site = tmp_path / "site"
    for name in _needed(("jax", "flax", "optax", "orbax-checkpoint", "rich")):
        for file in importlib.metadata.files(name) or ():
            if ".." not in file.parts:  # commands
                _link(site, Path(str(file.locate())), len(file.parts))
    script = tmp_path / "script.py"
    script.write_text(BENCH)
    env = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-S", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def _link(site: Path, file: Path, depth: int) -> None:
    """A link in `site` to the package that a file of a distribution belongs to; to the file alone where others share its folder."""
    above = list(file.parents)[depth - 1 :: -1]  # site-packages, and down to the file's folder
    whole = next((folder for folder in above[1:] if (folder / "__init__.py").exists()), file)
    link = site / whole.relative_to(above[0])
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(whole)


def _needed(names: tuple[str, ...]) -> set[str]:
    """Distributions that `names` need, themselves included."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # asked for under a condition that does not hold here
            continue
        if name not in found:
            found.add(name)
            left += [re.match(r"[\w.-]+", line)[0] for line in requires if "extra ==" not in line]
    return found
