"""Checks the library's types, laid out as it is installed: `python tests/check_types.py [PATH …]`, 0 where nothing is wrong.

`configs`, `converters` and `data_pipeline` stand beside the package in the repository and inside it where it is installed, and a type
checker follows the files. So it gets a copy, and paths in its messages are those of the repository. Settings stand in pyproject.toml.
With paths, only messages about files under them are printed and counted.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "converters", "data_pipeline")


def messages() -> list[dict]:
    """What pyright has to say, with the files' paths in the repository."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        shutil.copytree(ROOT / "keysync_jax", tree / "keysync_jax", ignore=shutil.ignore_patterns("__pycache__", "demo_model"))
        for name in FOLDERS:
            shutil.copytree(ROOT / name, tree / "keysync_jax" / name)
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
        (tree / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
        command = [sys.executable, "-m", "pyright", "--project", str(tree), "--pythonpath", sys.executable, "--threads", "--outputjson"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode > 1 or not done.stdout.startswith("{"):  # 1: there are errors; more: it did not run
            sys.exit(f"pyright failed ({done.returncode}): {(done.stderr or done.stdout)[-2000:]}")
        found = json.loads(done.stdout)["generalDiagnostics"]
        for message in found:
            path = Path(message["file"]).relative_to(tree / "keysync_jax")
            message["file"] = str(path if path.parts[0] in FOLDERS else "keysync_jax" / path)
    return found


def main(paths: list[str]) -> int:
    found = [m for m in messages() if not paths or any(Path(m["file"]).is_relative_to(path) for path in paths)]
    for message in sorted(found, key=lambda m: (m["file"], m["range"]["start"]["line"])):
        start, text = message["range"]["start"], " ".join(message["message"].split())
        where = f"{message['file']}:{start['line'] + 1}:{start['character'] + 1}"
        print(f"{where}: {message['severity']}: {text} {message.get('rule', '')}".rstrip())
    errors = sum(m["severity"] == "error" for m in found)
    print(f"types: {errors} errors")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
