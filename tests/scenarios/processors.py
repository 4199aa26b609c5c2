"""The tests that compare numbers, on this processor as on others: one change at a time of how XLA computes.

    python tests/scenarios/processors.py                                    every change, the files marked `numbers`
    python tests/scenarios/processors.py --only ynn-off --only one-thread tests/models
    python tests/scenarios/processors.py --whole                            the whole suite in place of those files

Each change has a compile cache of its own, and says how many tests passed and failed, which share of its bound the worst comparison used
(tests/helpers/bounds.py) and how long it took. YNN chooses its kernels by the processor itself: no flag shows here what another one does.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
YNN = "--xla_cpu_experimental_ynn_fusion_type"
# The suite as it runs: YNN for sums only (keysync_jax/core/cpu.py), two threads.
BASE = {"NPROC": "2"}
CHANGES = {
    "as-it-runs": {},
    "optimised": {"KEYSYNC_TESTS_COMPILE": "full"},  # every program compiled as users have it
    "ynn-default": {"XLA_FLAGS": f"{YNN}=+LIBRARY_FUSION_TYPE_REDUCE"},  # what XLA hands to YNN by itself, where sums are among it
    "ynn-off": {"XLA_FLAGS": f"{YNN}="},
    "sse4": {"XLA_FLAGS": f"{YNN}= --xla_cpu_max_isa=SSE4_2"},
    "one-thread": {"NPROC": "1"},
    "four-threads": {"NPROC": "4"},
}


def run(change: str, arguments: list[str]) -> dict:
    """Status and figures of pytest under one change; its output goes to stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(prefix="keysync_processors_") as folder:
        shares = Path(folder) / "bounds.jsonl"
        environment = os.environ | BASE | CHANGES[change] | {"JAX_COMPILATION_CACHE_DIR": folder, "KEYSYNC_BOUNDS": str(shares)}
        command = [sys.executable, "-m", "pytest", "--durations=0", "--durations-min=60", "-rf", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        lines = []
        for line in process.stdout:
            sys.stderr.write(line)
            lines.append(line)
        status = process.wait()
        found = [json.loads(line) for line in shares.read_text().splitlines()] if shares.exists() else []
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", lines[-1] if lines else "")}
    worst = max(found, key=lambda row: row["share"], default={"share": 0.0, "test": "", "what": ""})
    minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
    return {"status": status, "counts": counts, "compared": len(found), "worst": worst, "core_minutes": minutes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*CHANGES], metavar="CHANGE", help=f"one of {', '.join(CHANGES)}; may repeat")
    parser.add_argument("--whole", action="store_true", help="every test, not only the files that compare numbers")
    parser.add_argument("arguments", nargs="*", help="files, and options of pytest after --")
    options = parser.parse_args()
    chosen = ["-m", "not slow" if options.whole else "numbers and not slow", *options.arguments]
    heads = ("change", "passed", "failed", "compared", "worst share of a bound", "in", "core-minutes")
    print(f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", sep="\n")
    status = 0
    for change in options.only or CHANGES:
        found = run(change, chosen)
        status = status or found["status"]
        failed = found["counts"].get("failed", 0) + found["counts"].get("error", 0)
        place = f"{found['worst']['test'].removeprefix('tests/')} {found['worst']['what']}".strip()
        print(
            f"| {change} | {found['counts'].get('passed', 0)} | {failed} | {found['compared']} | {found['worst']['share']:.2f} | {place} | "
            f"{found['core_minutes']:.1f} |",
            flush=True,
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
