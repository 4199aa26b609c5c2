"""README's install, the demo and the fast tests on every Python of this machine; what is not here is resolved.

    python tests/scenarios/pythons.py [--only 3.13] [-o table.json]

For each supported version found (pyenv's, or `python3.X` on the path): a fresh environment, the package with its extras `data` and `dev`,
`keysync demo`, the fast tests, and the versions that pip chose, which go to `constraints/py3XX.txt` with `--constraints`. A version or a
processor that is not here is resolved (`pip install uv` first): every package must have a wheel for it. Prints a table; status 1 if a row
failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = {"x86-64": "x86_64-manylinux_2_28", "arm64": "aarch64-manylinux_2_28"}
SOURCE_ONLY = ("--no-binary", "promise")  # of tensorflow-datasets: plain Python, published as source alone
FAST = ("tests/test_house.py", "tests/core", "tests/diffusion", "tests/media")


def find(version: str) -> str | None:
    """An interpreter of that version."""
    homes = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in (*map(str, homes), shutil.which(f"python{version}")):
        if candidate is None:
            continue
        said = subprocess.run([candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True)
        if said.stdout.strip() == version:
            return candidate
    return None


def run(version: str, python: str, folder: Path, constraints: bool) -> dict:
    """Install, demo and fast tests in a fresh environment."""
    begin = time.monotonic()
    tree = folder / "tree"
    tree.mkdir()
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    subprocess.check_call([python, "-m", "venv", folder / "env"])
    bin_ = folder / "env" / "bin"
    row: dict = {"python": version, "how": "run"}
    steps = {
        "install": [bin_ / "python", "-m", "pip", "install", "-q", ".[data,dev]"],
        "demo": [bin_ / "keysync", "demo", "-o", "demo"],
        "tests": [bin_ / "python", "-m", "pytest", *FAST],
    }
    for name, command in steps.items():
        start = time.monotonic()
        done = subprocess.run([str(part) for part in command], cwd=tree, capture_output=True, text=True)
        row[f"{name}_s"] = round(time.monotonic() - start)
        if done.returncode:
            return row | {"status": f"{name} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}"}
    listed = json.loads(subprocess.check_output([bin_ / "python", "-m", "pip", "list", "--format", "json"], text=True))
    versions = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in listed}
    figures = json.loads((tree / "demo" / "figures.json").read_text())["figures"]
    row |= {"jax": versions["jax"], "figures": figures, "seconds": round(time.monotonic() - begin), "status": "passed"}
    if constraints:
        own = ("keysync-jax", "pip", "setuptools")
        lines = [f"{name}=={versions[name]}" for name in sorted(versions) if name not in own]
        target = ROOT / "constraints" / f"py{version.replace('.', '')}.txt"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join(lines) + "\n")
    return row


def resolve(version: str, processor: str, folder: Path) -> dict:
    """Whether there is a wheel of everything for a Python and processor that are not here."""
    begin = time.monotonic()
    chosen = folder / "chosen.txt"
    command = [
        "uv", "pip", "compile", "pyproject.toml", "--extra", "data", "--extra", "dev", "--quiet", "--no-header", "--no-annotate",
        "--python-version", version, "--python-platform", PLATFORMS[processor], "--only-binary", ":all:", *SOURCE_ONLY, "-o", str(chosen),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    row = {"python": version, "processor": processor, "how": "resolved, not run", "seconds": round(time.monotonic() - begin)}
    if done.returncode:
        return row | {"status": f"failed: {' '.join(done.stderr.split())[:300]}"}
    found = dict(line.split("==") for line in chosen.read_text().splitlines() if "==" in line)
    return row | {"status": f"resolved: {len(found)} packages", "jax": found["jax"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="3.X", help="this version only (repeat for more)")
    parser.add_argument("--constraints", action="store_true", help="write constraints/py3XX.txt of what was run")
    parser.add_argument("--resolve-only", action="store_true", help="run nothing")
    parser.add_argument("-o", "--output", metavar="JSON")
    args = parser.parse_args()
    rows = []
    for version in args.only or VERSIONS:
        python = find(version)
        jobs = [("run", python)] if python and not args.resolve_only else [("resolve", "x86-64")]
        for how, what in [*jobs, ("resolve", "arm64")]:
            with tempfile.TemporaryDirectory(prefix="keysync-python-") as scratch:
                made = run(version, what, Path(scratch), args.constraints) if how == "run" else resolve(version, what, Path(scratch))
            rows.append({"processor": "x86-64"} | made)
            print(json.dumps(rows[-1]), flush=True)
            if args.output:
                Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")
    print("\n| Python | processor | how | status | seconds | jax |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['python']} | {row['processor']} | {row['how']} | {row['status']} | {row.get('seconds', '')} | {row.get('jax', '')} |"
        )
    return int(any("failed" in row["status"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
