"""`constraints/py3XX.txt`: exact versions of an install, in step with what pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "constraints").glob("py3*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("data", "dev", "docs")  # what README's commands install; dev takes docs with it


def pins(file: Path) -> dict[str, str]:
    return dict(line.split("==") for line in file.read_text(encoding="utf-8").splitlines())


def requirements(python: str) -> list[Requirement]:
    """What README's commands ask for by name on that Python."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra])]
    found = [each for each in map(Requirement, lines) if each.name != PROJECT["name"]]
    return [
        each
        for each in found
        if each.marker is None or each.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"})
    ]


def test_there_is_a_file_for_each_python_that_was_installed():
    assert {"py311.txt", "py312.txt"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_names_and_versions_only(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(names) and all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9][\w.!+-]*", line) for line in lines)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_requirement_is_met(file):
    python = f"3.{file.stem.removeprefix('py3')}"
    versions = pins(file)
    # pip is the environment's own, and setuptools what builds the package; neither is held.
    wanted = [each for each in requirements(python) if canonicalize_name(each.name) not in ("pip", "setuptools")]
    missing = [each.name for each in wanted if canonicalize_name(each.name) not in versions]
    outside = [f"{each} is {versions[canonicalize_name(each.name)]}" for each in wanted if each.name not in missing and
               not each.specifier.contains(versions[canonicalize_name(each.name)], prereleases=True)]  # fmt: skip
    assert (missing, outside) == ([], [])
