"""A batch of many items, some broken in every way, whose processes are killed at random: nothing is lost, repeated or changed.

    python tests/scenarios/batch_kill.py [-n 200] [--broken 30] [--workers 2] [--seed N] [-o DIR] [--loop 6]

Draws talkers and voices, runs the list once undisturbed, then again while a worker (twice) and the driver (once) get SIGKILL; checks that
each good item came once and bit-equal, that each broken one says why, and that no process and no scratch file is left. The network is the
tests' smallest: what is tried is the batch. Prints the reasons, and items a minute beside a shell loop of `keysync dub`. Status 1 if
anything is wrong. Ten minutes on two cores with the defaults.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import psutil
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_talker_model  # noqa: E402
from accident_work import open_accidents  # noqa: E402

from keysync_jax.batch.batch_run import local, run_batch, status  # noqa: E402
from keysync_jax.batch.dub_work import DubSettings  # noqa: E402
from keysync_jax.batch.folders import BatchFolder  # noqa: E402
from keysync_jax.batch.job_list import Job, read_jobs  # noqa: E402
from keysync_jax.cli.batch_verbs import dub_columns  # noqa: E402
from keysync_jax.data_pipeline.synthetic import make_clip, write_clip  # noqa: E402
from keysync_jax.media.audio import save_wav  # noqa: E402

FRAMES, VIDEOS, VOICES = 10, 10, 5
ITEM_TIMEOUT_S = 60.0  # an item takes some two seconds; one of them never ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="items")
    parser.add_argument("--broken", type=int, default=30, help="of them, in fifteen ways")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the times at which processes are killed")
    parser.add_argument("--loop", type=int, default=6, help="items of the shell loop")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive is not None:
        return drive(args.output, args.drive, args.workers)
    with tempfile.TemporaryDirectory(prefix="keysync-batch-") as scratch:
        folder = (args.output or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        reasons = make(folder, args.n, args.broken)
        began = time.monotonic()
        finish(start(folder, "quiet", args.workers))
        quiet_s = time.monotonic() - began
        began = time.monotonic()
        kills = disturb(folder, args.workers, args.n - args.broken, random.Random(args.seed))
        disturbed_s = time.monotonic() - began
        wrong = check(folder, reasons, args.n)
        print(f"killed: {', '.join(kills)}; undisturbed {quiet_s:.0f} s, disturbed {disturbed_s:.0f} s")
        print(f"{60 * args.n / quiet_s:.1f} items a minute with {args.workers} workers")
        if args.loop:
            print(f"{shell_loop(folder, args.loop):.1f} items a minute in a shell loop of keysync dub")
        for line in wrong:
            print(f"WRONG: {line}")
        print("failed" if wrong else f"{args.n - args.broken} done once and bit-equal, {args.broken} said why not")
        return int(bool(wrong))


def make(folder: Path, items: int, broken: int) -> dict[str, str]:
    """Inputs, model and list; of each broken item the words that its reason must hold."""
    media = folder / "media"
    media.mkdir(exist_ok=True)
    tiny_talker_model.make(folder / "model")
    for number in range(VIDEOS):
        write_clip(make_clip(3 + number, frames=FRAMES, size=96), media / f"{number}.mp4")
    for number in range(VOICES):
        save_wav(media / f"{number}.wav", make_clip(50 + number, frames=FRAMES, size=48).samples, 16000)
    kinds = make_broken(media)
    rows, reasons = [], {}
    for number in range(broken):
        name, (video, voice, seed, words) = list(kinds.items())[number % len(kinds)]
        rows.append((f"{name}-{number}", video, voice, seed))
        reasons[f"{name}-{number}"] = words
    combinations = [(video, voice, seed) for seed in range(1 + items // 50) for video in range(VIDEOS) for voice in range(VOICES)]
    rows += [(f"good-{v}-{a}-{s}", f"{v}.mp4", f"{a}.wav", str(s)) for v, a, s in combinations[: items - broken]]
    random.Random(1).shuffle(rows)
    lines = [f"{name},media/{video},media/{voice},{seed},{name}.mkv,true" for name, video, voice, seed in rows]
    (folder / "jobs.csv").write_text("\n".join(["id,video,audio,seed,output,lossless", *lines]) + "\n")
    return reasons


def make_broken(media: Path) -> dict[str, tuple[str, str, str, str]]:
    """Fifteen ways: (video, voice, seed, words of the reason)."""
    whole = (media / "0.mp4").read_bytes()
    (media / "text.mp4").write_text("minutes of a meeting\n" * 40)
    (media / "none.mp4").touch()
    (media / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (media / "zeros.mp4").write_bytes(bytes(4096))
    (media / "folder").mkdir(exist_ok=True)
    if not (media / "pipe.mp4").exists():
        os.mkfifo(media / "pipe.mp4")
    save_wav(media / "empty.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(media / "nan.wav", np.full(6400, np.nan, np.float32), 16000, subtype="FLOAT")
    (media / "text.wav").write_text("la la la\n" * 40)
    shutil.copy(media / "0.wav", media / "sound.mp4")
    with av.open(str(media / "blank.mp4"), "w") as writer:
        stream = writer.add_stream("libx264", rate=25)
        stream.width = stream.height = 96
        for shade in range(5):
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((96, 96, 3), 60 + shade, np.uint8), format="rgb24")))
        writer.mux(stream.encode())
    return {
        "text": ("text.mp4", "0.wav", "1", "text.mp4"),
        "none": ("none.mp4", "0.wav", "1", "empty"),
        "half": ("half.mp4", "0.wav", "1", "half.mp4"),
        "zeros": ("zeros.mp4", "0.wav", "1", "zeros.mp4"),
        "folder": ("folder", "0.wav", "1", "no pictures"),
        "pipe": ("pipe.mp4", "0.wav", "1", "no ordinary file"),
        "gone": ("gone.mp4", "0.wav", "1", "does not exist"),
        "faceless": ("blank.mp4", "0.wav", "1", "face"),
        "soundonly": ("sound.mp4", "0.wav", "1", "sound.mp4"),
        "mute": ("0.mp4", "empty.wav", "1", "empty.wav"),
        "nan": ("0.mp4", "nan.wav", "1", "finite"),
        "noise": ("0.mp4", "text.wav", "1", "text.wav"),
        "option": ("0.mp4", "0.wav", "-1", "--seed -1"),
        "kills": ("1.mp4", "1.wav", "1", "died 2 times"),
        "hangs": ("2.mp4", "2.wav", "1", "exceeded its time"),
    }


def drive(folder: Path, out: Path, workers: int) -> int:
    """What `keysync batch` does, but for items that kill their worker or hang."""
    settings = DubSettings(str(folder / "model"))
    jobs: list[Job] = read_jobs([str(folder / "jobs.csv")], dub_columns())
    work = functools.partial(open_accidents, settings)
    run_batch(BatchFolder(out), jobs, settings.recipe(), work, engine=local(workers), item_timeout=ITEM_TIMEOUT_S)
    return 0


def start(folder: Path, out: str, workers: int) -> subprocess.Popen:
    words = [sys.executable, __file__, "--drive", folder / out, "-o", folder, "--workers", str(workers)]
    with (folder / f"{out}.log").open("a") as log:
        return subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)


def finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        raise SystemExit(f"the driver ended with status {process.returncode}; see the log in the output folder")


def disturb(folder: Path, workers: int, good: int, rng: random.Random) -> list[str]:
    """Runs the batch to its end while two workers and the driver are killed after a random number of items each."""
    out = folder / "disturbed"
    kills = []
    process = start(folder, out.name, workers)
    for what in rng.sample(["worker", "worker", "driver"], 3):
        wanted = done_in(out) + rng.randint(1, max(1, good // 6))
        while done_in(out) < wanted:
            if process.poll() is not None:
                raise SystemExit(f"the driver ended with status {process.returncode} before it was killed")
            time.sleep(0.2)
        children = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(rng.random())
        if what == "worker":
            rng.choice(children).send_signal(signal.SIGKILL)
        else:
            process.kill()
            process.wait()
            gone, alive = psutil.wait_procs(children, timeout=30)
            if alive:
                raise SystemExit(f"workers of a killed driver live on: {[child.pid for child in alive]}")
            process = start(folder, out.name, workers)
        kills.append(f"{what} after {wanted} items")
    finish(process)
    return kills


def done_in(out: Path) -> int:
    return sum(1 for _ in out.glob("*.mkv")) if out.exists() else 0


def check(folder: Path, reasons: dict[str, str], items: int) -> list[str]:
    """What is wrong with the disturbed batch, in lines; nothing, if nothing is."""
    wrong = []
    quiet, disturbed = (
        {row["id"]: row for row in map(json.loads, (folder / name / "report.jsonl").read_text().splitlines())}
        for name in ("quiet", "disturbed")
    )
    if len(disturbed) != items:
        wrong.append(f"{len(disturbed)} lines in the report, not {items}")
    for name, row in sorted(disturbed.items()):
        if name in reasons:
            said = f"{name}: {row['state']}: {row['reason']}"
            if row["state"] != "failed" or reasons[name] not in (row["reason"] or "") or (folder / "disturbed" / f"{name}.mkv").exists():
                wrong.append(said)
            print(said)
            continue
        a, b = (folder / run / f"{name}.mkv" for run in ("quiet", "disturbed"))
        if row["state"] not in ("done", "review") or row["state"] != quiet[name]["state"]:
            wrong.append(f"{name} is {row['state']} ({row['reason']}), undisturbed {quiet[name]['state']}")
        elif sha(a) != sha(b):
            wrong.append(f"{name}: other bytes than undisturbed")
    for run in ("quiet", "disturbed"):
        if left := sorted(path.name for path in (folder / run / ".keysync-batch" / "scratch").iterdir()):
            wrong.append(f"{run}: left in scratch: {left}")
        if (
            strange := {path.name for path in (folder / run).iterdir()}
            - {f"{name}.mkv" for name in disturbed}
            - {".keysync-batch", "report.jsonl", "report.html"}
        ):
            wrong.append(f"{run}: strange files: {sorted(strange)}")
        if (counts := status(BatchFolder(folder / run)).status.counts)["open"] or counts["claimed"]:
            wrong.append(f"{run}: {counts}")
    mine = [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or []) and p.pid != os.getpid()]
    if mine:
        wrong.append(f"processes are left: {mine}")
    return wrong


def rows_of(out: Path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, (out / "report.jsonl").read_text().splitlines())}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shell_loop(folder: Path, items: int) -> float:
    """Items a minute of one `keysync dub` after the other."""
    began = time.monotonic()
    for number in range(items):
        words = ["dub", folder / "media" / f"{number % VIDEOS}.mp4", folder / "media" / f"{number % VOICES}.wav", "-o", folder / "loop.mkv"]
        words = [*map(str, words), "--model", str(folder / "model"), "--lossless"]
        subprocess.run([sys.executable, "-m", "keysync_jax", *words], check=True, capture_output=True)
    return 60 * items / (time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
