"""The RUN lines of a Dockerfile, one after another, on a machine without Docker.

    python tests/scenarios/dockerfiles.py Dockerfile

Paths of the image (/src, /opt/keysync, /cache, /work) become folders of a scratch directory, `python` the one that runs this. Lines that
change the machine's users are said and left out. Status 1 if a line fails, else the installed command prints its version.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PATHS = ("/src", "/opt/keysync", "/cache", "/work")


def run_lines(text: str) -> list[str]:
    """The commands of the RUN lines, continuation lines joined."""
    return [line.removeprefix("RUN ").strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("RUN ")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dockerfile", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keysync-docker-") as scratch:
        tree = Path(scratch) / "src"
        for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        env.pop("PYTHONPATH", None)
        for command in run_lines(args.dockerfile.read_text()):
            if "useradd" in command:
                print(f"left out: {command}")
                continue
            for path in _PATHS:
                command = command.replace(path, scratch + path)
            print(f"run: {command}", flush=True)
            if subprocess.run(command, shell=True, cwd=tree, env=env).returncode:
                return 1
        return subprocess.run([f"{scratch}/opt/keysync/bin/keysync", "--version"], cwd=scratch, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
