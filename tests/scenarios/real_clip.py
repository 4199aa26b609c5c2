"""Everything a dub promises, on a clip of your own, at the tiny model's size.

    python tests/scenarios/real_clip.py VIDEO VOICE [-o DIR] [--only NAME]

Derives harder inputs from VIDEO (other rates, a rotation tag, black frames, a cut, stereo audio), dubs each one losslessly through
the command line, measures what must hold, prints a table, and leaves the outputs and picture strips in DIR to look at. Exit status 1
if anything fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from PIL import Image
from rich.console import Console
from rich.table import Table

from keysync_jax.media import audio, video
from keysync_jax.media.strip import draw_strip, tint_changes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("voice", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("real_clip_out"))
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model = args.output / "model"
    _keysync("init", "--size", "tiny", "-o", model, "--force")
    stereo = args.output / "voice_44100_stereo.wav"
    samples = audio.load_audio(args.voice).samples
    wide = soxr.resample(samples, 16000, 44100)
    soundfile.write(stereo, np.stack([wide, 0.5 * wide], -1), 44100, subtype="PCM_16")

    scenarios = {
        "as it is": lambda p: (args.video, args.voice),
        "30 fps": lambda p: (retime(args.video, p, Fraction(30)), args.voice),
        "23.976 fps": lambda p: (retime(args.video, p, Fraction(24000, 1001)), args.voice),
        "variable rate": lambda p: (retime(args.video, p, None), args.voice),
        "rotation tag": lambda p: (rewrite(args.video, p, rotation=90), args.voice),
        "black frames": lambda p: (rewrite(args.video, p, black=range(100, 110)), args.voice),
        "cut": lambda p: (rewrite(args.video, p, cut=120), args.voice),
        "stereo voice": lambda p: (args.video, stereo),
    }
    table = Table("scenario", "seconds", "peak MiB", "frames", "dubbed", "shots", "inside |Δ|", "outside Δ", "result")
    failures = 0
    for name, make in scenarios.items():
        if args.only and name not in args.only:
            continue
        slug = name.replace(" ", "_").replace(".", "_")
        source, voice = make(args.output / f"{slug}_input.mp4")
        row, problems = check(name, source, voice, args.output / f"{slug}.mov", model, args.output / f"{slug}.png")
        failures += bool(problems)
        table.add_row(name, *row, _verdict(problems))
        print(f"{name}: {_verdict(problems)} ({row[0]} s, {row[1]} MiB)", flush=True)
    if not args.only or "seed and voice" in args.only:
        problems = seeds_and_voices(args, model)
        failures += bool(problems)
        table.add_row("seed and voice", *[""] * 7, _verdict(problems))
    Console(width=160).print(table)
    return 1 if failures else 0


def check(name: str, source: Path, voice: Path, output: Path, model: Path, picture: Path) -> tuple[list[str], list[str]]:
    """Dub and measure; returns the table's cells and what is wrong."""
    report_path = output.with_suffix(".json")
    start = time.perf_counter()
    peak = _keysync("dub", source, voice, "-o", output, "--model", model, "--lossless", "--report", report_path)
    seconds = time.perf_counter() - start
    report = json.loads(report_path.read_text())
    problems = []
    before, after = video.probe(source), video.probe(output)
    if (before.width, before.height, before.rotation, before.pix_fmt) != (after.width, after.height, after.rotation, after.pix_fmt):
        problems.append("size, rotation or pixel format changed")
    untouched = {f for shot in report["shots"] for part in shot["skipped"] for f in range(*part["frames"])}
    boxes = {f: shot["face_box"] for shot in report["shots"] for f in range(*shot["frames"])}
    inside, outside, times, moments = [], 0, 0, []
    frames = 0
    for a, b in zip(video.read(source), video.read(output), strict=True):
        times += a.time - before.start_time != b.time - after.start_time  # the output begins with the programme
        frames += 1
        rgb_a, rgb_b = a.rgb(), b.rgb()
        difference = np.abs(rgb_a.astype(np.int16) - rgb_b)
        box = None if a.index in untouched else boxes[a.index]
        outside = max(outside, largest_change_outside(a, b, box))
        if box is not None:
            changed = difference.max(-1) > 0
            inside.append(float(difference[changed].mean()) if changed.any() else 0.0)
        if a.index % 50 == 25:
            moments.append((float(a.time), rgb_a, rgb_b))
    if times:
        problems.append(f"{times} timestamps differ")
    if outside:
        problems.append(f"samples outside the crop changed by up to {outside}")
    if np.mean(inside) <= 5:
        problems.append(f"mean change inside is {np.mean(inside):.1f}/255")
    if peak > 2560:
        problems.append(f"peak memory {peak:.0f} MiB")
    problems += audio_problems(voice, output)
    changed = [tint_changes(m[1], m[2], 0) for m in moments]
    rows = [("input", [m[1] for m in moments]), ("changed", changed), ("output", [m[2] for m in moments])]
    draw_strip(rows, [m[0] for m in moments], audio.load_audio(voice).samples).save(picture)
    x0, y0, x1, y1 = (max(0, int(v)) for v in report["shots"][0]["face_box"])
    close = [np.concatenate([m[1][y0:y1, x0:x1], m[2][y0:y1, x0:x1]]) for m in moments if boxes[0] is not None]
    Image.fromarray(np.concatenate(close, 1)).save(picture.with_name(picture.stem + "_close.png"))
    cells = [f"{seconds:.0f}", f"{peak:.0f}", frames, report["frames_dubbed"], len(report["shots"]), f"{np.mean(inside):.1f}", outside]
    return [str(c) for c in cells], problems


def largest_change_outside(a: video.Frame, b: video.Frame, box: list[int] | None) -> int:
    """Largest difference of any decoded Y, U or V sample outside the crop; anywhere, without one."""
    info, largest = a.info, 0
    for before, after in zip(a.planes(), b.planes(), strict=True):
        difference = np.abs(before.astype(np.int32) - after)
        if box is not None:
            upright = (box[0], box[1], box[2] - box[0])
            x0, y0, side = info.orientation.stored_box(upright, info.display_width, info.display_height)
            step = info.width // before.shape[1]  # 2 for the chroma planes of 4:2:0
            rows, cols = (slice(max(0, int(v)) // step, int(v + side) // step) for v in (y0, x0))
            difference[rows, cols] = 0
        largest = max(largest, int(difference.max()))
    return largest


def _verdict(problems: list[str]) -> str:
    return "FAIL: " + "; ".join(problems) if problems else "ok"


def audio_problems(voice: Path, output: Path) -> list[str]:
    """The output must carry the given audio, sample for sample (a .mov copies its packets)."""
    given, got = audio.load_audio(voice).samples, audio.load_audio(output).samples
    n = min(len(given), len(got))
    if n < 1600 or np.abs(given[:n] - got[:n]).max() > 1e-3:
        return ["the audio in the output is not the given one"]
    return []


def seeds_and_voices(args, model: Path) -> list[str]:
    """Same seed, same bytes; another voice, another mouth."""
    outputs = {}
    reverse = args.output / "voice_reversed.wav"
    soundfile.write(reverse, audio.load_audio(args.voice).samples[::-1], 16000)
    for name, voice in (("first", args.voice), ("second", args.voice), ("other", reverse)):
        outputs[name] = args.output / f"bytes_{name}.mp4"
        _keysync("dub", args.video, voice, "-o", outputs[name], "--model", model)
    problems = []
    digest = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in outputs.items()}
    if digest["first"] != digest["second"]:
        problems.append("the same seed gave other bytes")
    pairs = zip(video.read(outputs["first"]), video.read(outputs["other"]), strict=True)
    change = [np.abs(a.rgb().astype(np.int16) - b.rgb()).max() for a, b in pairs]
    if np.median(change) < 30:
        problems.append("another voice gave the same mouth")
    return problems


def retime(source: Path, target: Path, rate: Fraction | None) -> Path:
    """The same frames at another rate; None: a variable one."""
    base = Fraction(1, 90000)
    steps = np.random.default_rng(0).integers(2000, 6000, 100_000).cumsum()

    def pts(index: int) -> int:
        return int(steps[index]) if rate is None else round(index / rate / base)

    return rewrite(source, target, pts=pts, time_base=base, rate=rate)


def rewrite(source, target, *, pts=None, time_base=None, rate=None, rotation=0, black=(), cut=None) -> Path:
    """Lossless copy with changes: timestamps, a rotation tag, black frames, a cut to a mirrored close-up at frame `cut`."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        stream.thread_type = "AUTO"
        time_base = time_base or stream.time_base
        out = writer.add_stream("libx264", rate=rate or stream.average_rate, options={"qp": "0", "preset": "ultrafast", "bf": "0"})
        out.width, out.height = (stream.height, stream.width) if rotation % 180 else (stream.width, stream.height)
        out.pix_fmt = "yuv420p"
        out.codec_context.time_base = time_base
        if rotation:
            out.set_display_rotation(rotation)
        for index, frame in enumerate(reader.decode(stream)):
            stamp = pts(index) if pts else frame.pts
            if index in black or rotation or (cut is not None and index >= cut):
                rgb = frame.to_ndarray(format="rgb24")
                if index in black:
                    rgb = np.zeros_like(rgb)
                if cut is not None and index >= cut:
                    h, w = rgb.shape[:2]
                    close = rgb[h // 10 : h // 10 + 4 * h // 5, w // 10 : w // 10 + 4 * w // 5, ::1]
                    rgb = np.asarray(Image.fromarray(close).resize((w, h)))[:, ::-1] // 2 + 20
                if rotation:
                    rgb = np.rot90(rgb, -rotation // 90)  # stored lying on its side, shown upright by the tag
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base, frame.pict_type = stamp, time_base, 0
            writer.mux(out.encode(frame))
        writer.mux(out.encode())
    return target


def _keysync(*words: object) -> float:
    """Run the command line in a process of its own; returns its peak memory in MiB.

    Raises:
      SystemExit: it failed.
    """
    code = (
        "import resource, sys\nfrom keysync_jax.cli.main import main\nstatus = main(sys.argv[1:])\n"
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"keysync {' '.join(map(str, words))} exited {done.returncode}:\n{done.stderr}")
    return float(done.stdout.rsplit("PEAK", 1)[1])


if __name__ == "__main__":
    sys.exit(main())
