"""Awkward files, made from a clip of your own, dubbed with a true model, and measured by decoding what comes out.

    python tests/scenarios/awkward_files.py CLIP [-o DIR] [--model DIR] [--only WORDS ...] [--json FILE] [--before FILE]

CLIP is an upright video of one talking person with sound. Every case of tests/helpers/awkward_cases.py is made in DIR, dubbed through
the command line, and its figures stand in the table with what was wanted; `--before` takes the figures of an earlier `--json`, of
another version, into a column of their own. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import traceback
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from awkward_cases import BURSTS, CASES, MS, Case, Studio  # noqa: E402

from keysync_jax.cli.main import main as keysync  # noqa: E402
from keysync_jax.core.errors import KeySyncError  # noqa: E402
from keysync_jax.media import audio, video  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("awkward_files_out"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS", help="cases whose names hold one of these")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--before", type=Path, help="figures of another version")
    args = parser.parse_args()
    if not video.probe(args.clip).has_audio:
        parser.error(f"{args.clip} has no sound; give a clip with a voice")
    args.output.mkdir(parents=True, exist_ok=True)
    studio = Studio(args.clip, args.output)
    before = json.loads(args.before.read_text()) if args.before else {}
    table = Table("case", *(["before"] if before else []), "now", "wanted", "result")
    found: dict[str, dict[str, Any]] = {}
    failures = 0
    for name, case in CASES.items():
        if args.only and not any(words in name for words in args.only):
            continue
        found[name] = dub_and_measure(studio, name, case, args.model)
        wrong = problems(case.expect, found[name], args.output)
        failures += bool(wrong)
        verdict = "FAIL: " + "; ".join(wrong) if wrong else "done" if case.done else "said"
        shown = [_words(before.get(name, {}), case)] if before else []
        table.add_row(name, *shown, _words(found[name], case), _wanted(case), verdict)
        print(f"{name}: {verdict}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    Console(width=200).print(table)
    return 1 if failures else 0


def dub_and_measure(studio: Studio, name: str, case: Case, model: str) -> dict[str, Any]:
    """Make a case, dub it, and decode the output: figures by name, exit status and what was said among them."""
    source, voice = case.make(studio)
    output = studio.folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}_out{case.out}"
    report = output.with_suffix(".json")
    for path in (output, report):
        path.unlink(missing_ok=True)
    words = ["dub", source, voice, "-o", output, "--model", model, "--report", report, *case.options]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = keysync([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        except Exception:  # a traceback is what one row shows; the others go on
            traceback.print_exc()
            status = 1
    # What is said of a file is not its name.
    text = said.getvalue().replace(str(studio.folder), "")
    figures: dict[str, Any] = {"exit": status, "said": text, "output": output.exists(), "file": output.name}
    if report.exists():
        figures["dubbed"] = json.loads(report.read_text())["frames_dubbed"]
    return figures | (measure(output) if output.exists() else {})


def measure(path: Path) -> dict[str, Any]:
    """What a player would meet."""
    info = video.probe(path)
    times, alpha = [], None
    for frame in video.read(path, info):
        times.append(frame.time)
        if frame.alpha is not None:
            alpha = [int(frame.alpha.min()), int(frame.alpha.max())]
    with av.open(str(path)) as container:
        length = container.duration / av.time_base
        language = container.streams.audio[0].metadata.get("language") if container.streams.audio else None
    steps = [float(b - a) for a, b in zip(times, times[1:], strict=False)]
    return {
        "length": round(length, 3), "first": round(float(times[0]), 4), "pictures": len(times), "size": [info.width, info.height],
        "steps": [round(min(steps), 4), round(max(steps), 4)] if steps else [], "codec": info.codec, "pix_fmt": info.source_pix_fmt,
        "alpha": alpha, "language": language, "mastering": info.mastering.display, "bottom_first": info.interlaced and info.bottom_first,
        "voice_ms": voice_lag_ms(path, times),
    }  # fmt: skip


def voice_lag_ms(path: Path, times: list[Fraction]) -> float | None:
    """By how much the bursts of the voice come late on the output's clock; None where there are none."""
    try:
        clip = audio.load_audio(path)
    except KeySyncError:
        return None
    loud = np.abs(clip.samples) > 0.02
    # `load_audio` counts from the first picture or sample; the container from its own zero.
    zero = float(video.probe(path).start_time)
    lags = []
    for begin, _ in BURSTS[:2]:
        near = np.flatnonzero(loud[int((begin - 0.1) * 16000) : int((begin + 0.1) * 16000)])
        if len(near):
            lags.append(1000 * (near[0] / 16000 - 0.1 + zero))
    return round(float(np.mean(lags)), 1) if lags else None


def problems(expect: dict[str, Any], got: dict[str, Any], folder: Path) -> list[str]:
    """What is not as it was wanted."""
    wrong = ["traceback"] if "Traceback" in got["said"] else []
    for name, wanted in expect.items():
        value = got.get(name)
        if name == "says":
            fine = re.search(wanted, " ".join(got["said"].split())) is not None
        elif name == "same_as":
            fine = value_of_mouth(folder, got, wanted) <= 1.0
        elif name in ("length", "first"):
            fine = value is not None and abs(value - wanted[0]) <= wanted[1]
        elif name == "voice_ms":
            fine = value is not None and abs(value) <= wanted
        elif name == "even":
            fine = bool(got.get("steps")) and max(abs(step - wanted) for step in got["steps"]) < float(MS)
        elif name in ("codec", "pix_fmt"):
            fine = value in wanted
        elif name == "size":
            fine = value == list(wanted)
        elif name == "alpha":
            fine = value is not None and value[0] < 6000 and value[1] > 60000
        else:
            fine = value == wanted
        if not fine:
            wrong.append(f"{name} is {value!r}, wanted {wanted!r}" if name not in ("says", "same_as") else f"{name} {wanted!r}")
    return wrong


def value_of_mouth(folder: Path, got: dict[str, Any], other: str) -> float:
    """Mean difference of the pictures from another case's, code values."""
    name = f"{re.sub(r'[^a-z0-9]+', '_', other.lower())}_out{CASES[other].out}"
    pairs = zip(video.read(folder / got["file"]), video.read(folder / name), strict=True)
    return float(np.mean([np.abs(a.rgb().astype(int) - b.rgb()).mean() for a, b in pairs]))


def _words(figures: dict[str, Any], case: Case) -> str:
    if not figures:
        return "–"
    shown = [f"exit {figures['exit']}"]
    shown += [f"{name} {figures.get(name)}" for name in case.expect if name not in ("exit", "says", "same_as", "even", "output")]
    shown += [f"steps {figures.get('steps')}"] if "even" in case.expect else []
    if "says" in case.expect:
        lines = [line.strip() for line in figures["said"].splitlines() if re.search(case.expect["says"], line)]
        shown.append(f"“{lines[0][:110]}”" if lines else "nothing said")
    return ", ".join(shown)


def _wanted(case: Case) -> str:
    return ", ".join(f"{name} {wanted}" for name, wanted in case.expect.items())


if __name__ == "__main__":
    sys.exit(main())
