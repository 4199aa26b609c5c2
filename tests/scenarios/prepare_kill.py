"""Prepare drawn talkers and broken files; kill it twice with SIGKILL; run it again; compare every byte. Also 1 against 2 workers.

    python tests/scenarios/prepare_kill.py FOLDER [-n 24] [--frames 180]

Prints what became of each broken input and figures per stage. About 10 minutes on 2 cores with the defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from broken_inputs import EXPECTED, write_broken_inputs  # noqa: E402

_RUN = """
import json, sys
from keysync_jax.data_pipeline.prepare.manifest import read_inputs
from keysync_jax.data_pipeline.prepare.run import prepare
from keysync_jax.data_pipeline.prepare.settings import Curation, Output
if __name__ == "__main__":
    folder, output, model, workers, size = sys.argv[1:6]
    items = read_inputs(folder)
    print(prepare(items, output, model, Curation(crop_size=128), Output(shard_megabytes=float(size)), workers=int(workers)))
"""
# Run-dependent: seconds and memory.
_NOT_COMPARED = ("report.json", "report.html")


def start(folder: Path, output: Path, workers: int = 1, shard_mb: float = 2.0) -> subprocess.Popen:
    """A preparation in a session of its own, so that all its processes can be killed together."""
    script = folder / "run_prepare.py"
    script.write_text(_RUN)
    command = [sys.executable, str(script), str(folder / "videos"), str(output), str(folder / "model"), str(workers), str(shard_mb)]
    log = (folder / f"{output.name}.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, folder: Path, name: str) -> None:
    if process.wait() != 0:
        raise SystemExit(f"{name} failed:\n" + (folder / f"{name}.log").read_text()[-3000:])


def kill_when(process: subprocess.Popen, ready, what: str) -> None:
    """SIGKILL the whole session as soon as `ready()`."""
    while not ready():
        if process.poll() is not None:
            raise SystemExit(f"the run ended before it could be killed {what}")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed {what}")


def tree(root: Path) -> dict[str, bytes]:
    """Every file of a dataset but the work folder and the report."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and ".work" not in p.relative_to(root).parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in files if p.name not in _NOT_COMPARED}


def compare(a: Path, b: Path) -> None:
    left, right = tree(a), tree(b)
    differing = sorted(set(left) ^ set(right)) + sorted(n for n in set(left) & set(right) if left[n] != right[n])
    if differing:
        raise SystemExit(f"{a.name} and {b.name} differ: {', '.join(differing)}")
    print(f"{a.name} and {b.name}: {len(left)} files, {sum(map(len, left.values())) / 1e6:.1f} MB, byte-identical")


def check_broken(output: Path) -> None:
    """Every broken input has its reason; every good one its clips."""
    letters = [json.loads(line) for line in (output / "dead_letter.jsonl").read_text().splitlines()]
    clips = [json.loads(line) for line in (output / "clips.jsonl").read_text().splitlines()]
    for name, reason in EXPECTED.items():
        got = sorted({d["reason"] for d in letters if d["path"].endswith(name)})
        kept = [c["id"] for c in clips if c["video"].endswith(name)]
        good = (got == [reason] and not kept) if reason else (kept and not got)
        detail = next((d["detail"] for d in letters if d["path"].endswith(name)), f"{len(kept)} clip kept")
        print(f"  {name:<22} {', '.join(got) or 'used':<14} {detail}")
        if not good:
            raise SystemExit(f"{name}: expected {reason or 'to be used'}, got {got or 'nothing'} and {len(kept)} clips")


def figures(output: Path) -> None:
    """Figures per stage from the report."""
    work = json.loads((output / "report.json").read_text())["work"]
    print(f"{work['videos']} videos, {work['clips']} clips, {work['shard_megabytes']} MB of shards, peak memory {work['peak_memory_mb']}")
    for stage, row in work["stages"].items():
        print(f"  {stage:<28} {row['seconds']:>8.2f} s {row['clips_per_minute'] or 0:>10.1f} clips/min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-n", type=int, default=24)
    parser.add_argument("--frames", type=int, default=180)
    args = parser.parse_args()
    folder = args.folder.resolve()
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
    from keysync_jax.converters.initialize import initialize
    from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset

    initialize("tiny", str(folder / "model"), force=True)
    synth_dataset(args.n, folder / "videos" / "talkers", SynthSettings(frames=args.frames, size=128), quiet=True)
    write_broken_inputs(folder / "videos" / "broken", args.frames)

    began = time.monotonic()
    finish(start(folder, folder / "whole"), folder, "whole")
    print(f"uninterrupted, 1 worker: {time.monotonic() - began:.0f} s")
    check_broken(folder / "whole")
    figures(folder / "whole")

    killed = folder / "killed"
    process = start(folder, killed)
    kill_when(process, lambda: len(list((killed / ".work" / "features").glob("*.json"))) > 3 * args.n // 2, "while computing features")
    process = start(folder, killed)
    kill_when(process, lambda: any((killed / "checksums").glob("*.json")), "while writing shards")
    began = time.monotonic()
    finish(start(folder, killed), folder, "killed")
    print(f"the rest after two kills: {time.monotonic() - began:.0f} s")
    compare(folder / "whole", killed)

    began = time.monotonic()
    finish(start(folder, folder / "two_workers", workers=2), folder, "two_workers")
    print(f"2 workers: {time.monotonic() - began:.0f} s")
    compare(folder / "whole", folder / "two_workers")


if __name__ == "__main__":
    main()
