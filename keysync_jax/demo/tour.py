"""`keysync demo`: a drawn talker that no training has seen, another voice, the bundled model, and the real job around it.

The clip goes through the same files, face detection, crop and compositing as anybody's video. Only the judging knows more: the drawing
gives the true target, and the mouth is read back from the pixels with the drawing's own eye corners.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from keysync_jax.converters.initialize import initialize
from keysync_jax.core import assets
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import local_folder, write_atomically, write_text
from keysync_jax.data_pipeline.synthetic import write_clip
from keysync_jax.demo import record as demo_record
from keysync_jax.evaluation import lip_metrics, marks, talkers_clips
from keysync_jax.evaluation.lip_metrics_plot import draw_curves, stack
from keysync_jax.evaluation.talkers_clips import HeldOut
from keysync_jax.inference.dub import DubResult
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.pipeline import KeySyncPipeline
from keysync_jax.media import audio, face_models, masks, video
from keysync_jax.media.strip import draw_strip

FRAMES = 150  # 6 s
SIZE = 256  # the model's crop is 128; twice that is pleasant to look at and the face detector misses fewer frames
_COLUMNS = 6
FILES = (
    "clip.mp4", "clip.landmarks.npy", "clip.truth.json", "voice.wav", "demo.mp4", "report.json", "figures.json", "strip.png",
)  # fmt: skip
_EDGE = 92, 4  # margins of `draw_strip`, so that curves and waveform share their time axis


class DemoResult(NamedTuple):
    """What a demo did.

    Attributes:
      dub: the job's own result.
      figures: by key; `marks.FOLLOW` says what they mean.
      below: keys of the figures below the model's recorded floor (none where nothing is recorded).
    """

    dub: DubResult
    figures: dict[str, float]
    below: list[str]

    @property
    def passed(self) -> bool:
        return not self.below


def run_demo(
    folder: str | Path,
    seed: int = 0,
    model: str | os.PathLike | None = None,
    *,
    frames: int = FRAMES,
    size: int = SIZE,
    quiet: bool = False,
) -> DemoResult:
    """Make the clip and the voice in `folder`, dub, measure, and draw `strip.png`.

    Args:
      folder: gets the files of `FILES` in place of an earlier demo's; other files in it stay.
      seed: another seed is another person with another voice.
      model: model directory; default the bundled one, and where the package holds none, a tiny random one made for the occasion.
      frames, size: of the clip.
      quiet: print nothing but figures below a floor.

    Raises:
      UsageError: a folder that is not on this machine.
      KeySyncError: a file in the folder's place, a model or its record that is incomplete or damaged, or anything the dub itself refuses.
    """
    console = Console(stderr=True, quiet=quiet)
    if not face_models.is_here():
        console.print(f"fetching the face models (mediapipe, {face_models.LICENCE}) into {face_models.folder()}, once …")
        face_models.fetch()
    folder = local_folder(folder)
    pipeline = KeySyncPipeline.from_pretrained(_model(model, folder, seed, console))
    recorded = demo_record.read(pipeline.describe())
    start = time.perf_counter()
    console.print("drawing a talker and inventing a second voice …")
    clip = talkers_clips.held_out("demo", seed, 0, frames, size)
    dub, measured = _dub(pipeline, clip, folder, seed, progress=not quiet)
    # Clips of another length or size are no fair comparison.
    judged = recorded if recorded and (recorded["frames"], recorded["size"]) == (frames, size) else None
    floors = {} if judged is None else judged["floors"]
    below = demo_record.below(measured.figures, floors)

    _draw(clip, measured, dub, folder / "strip.png")
    report = _report(clip, seed, pipeline, measured, judged, below, time.perf_counter() - start)
    write_text(folder / "figures.json", json.dumps(report, indent=1) + "\n")
    _show(console, report, dub, folder)
    return DemoResult(dub, measured.figures, below)


def record(
    folder: str | Path,
    model: str | os.PathLike,
    count: int,
    *,
    frames: int = FRAMES,
    size: int = SIZE,
    quiet: bool = False,
) -> str:
    """Dub the demo clips of seeds 0 to `count` - 1 and write what they reach into the model directory; returns a summary.

    Raises:
      UsageError: too few clips to tell how much they scatter, or a folder that is not on this machine.
      KeySyncError: a file in the folder's place, a model directory that cannot be written to, or anything the dub refuses.
    """
    if count < demo_record.FEWEST:
        raise UsageError(f"--record {count}: at least {demo_record.FEWEST} clips are needed to tell how much single clips scatter")
    folder = local_folder(folder)
    pipeline = KeySyncPipeline.from_pretrained(model)
    if not os.access(model, os.W_OK):  # before the dubs; a hub: or gs:// model is no folder of this machine either
        raise KeySyncError(f"{model}: {demo_record.FILE} cannot be written there; name a model directory of your own on this machine")
    console = Console(stderr=True, quiet=quiet)
    if not face_models.is_here():
        console.print(f"fetching the face models (mediapipe, {face_models.LICENCE}) into {face_models.folder()}, once …")
        face_models.fetch()
    rows = []
    for seed in range(count):
        clip = talkers_clips.held_out("demo", seed, 0, frames, size)
        _, measured = _dub(pipeline, clip, folder / f"seed_{seed}", seed, progress=False)
        rows.append(measured.figures)
        console.print(f"seed {seed} of {count}: " + ", ".join(f"{k} {v:.3f}" for k, v in measured.figures.items()), highlight=False)
    written = demo_record.write(pipeline.describe(), rows, frames=frames, size=size)
    return f"{written}: {count} clips, mean opening r {np.mean([row['opening_r'] for row in rows]):.3f}"


def _model(model: str | os.PathLike | None, folder: Path, seed: int, console: Console) -> str:
    """The model directory to dub with."""
    if model is not None or assets.is_bundled():
        return assets.resolve(assets.NAME if model is None else model)
    console.print("[bold yellow]this package holds no trained demo model: a random one is made, and the mouth will be noise[/bold yellow]")
    folder.mkdir(parents=True, exist_ok=True)
    return initialize("tiny", folder / "model", seed=seed, force=True, console=console).path


class _Measured(NamedTuple):
    figures: dict[str, float]
    frames: np.ndarray  # the dubbed ones, uint8 [T, H, W, 3]
    opening: dict[str, np.ndarray]  # curves by name, in eye-corner distances


def _dub(pipeline: KeySyncPipeline, clip: HeldOut, folder: Path, seed: int, progress: bool) -> tuple[DubResult, _Measured]:
    """Write the clip and the voice, run the job on the files, measure its output."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # should this run fail, no result of an earlier one stands beside its input
        (folder / name).unlink(missing_ok=True)
    write_clip(clip.source, folder / "clip.mp4")
    audio.save_wav(folder / "voice.wav", clip.target.samples, clip.target.sample_rate)
    result = pipeline(
        folder / "clip.mp4",
        folder / "voice.wav",
        folder / "demo.mp4",
        options=DubOptions(seed=seed % 2**32),
        report=folder / "report.json",
        progress=progress,
    )
    frames = np.stack([frame.rgb() for frame in video.read(folder / "demo.mp4")])
    source, target, output = (
        talkers_clips.measure(clip.source),
        talkers_clips.measure(clip.target),
        talkers_clips.measure(clip.target, frames),
    )
    truth = talkers_clips.mouth_truth(clip, source, target)
    figures = lip_metrics.follow_figures(*output, truth)
    copied = lip_metrics.follow_figures(*source, truth)
    figures = {key: figures[key] for key in demo_record.KEYS} | {"copied_opening_r": copied["opening_r"]}
    curves = {"true target": clip.target.opening, "output": output.opening, "input": source.opening}
    return result, _Measured(figures, frames, curves)


def _report(
    clip: HeldOut, seed: int, pipeline: KeySyncPipeline, measured: _Measured, recorded: dict[str, Any] | None, below: list[str],
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    description = pipeline.describe()
    return marks.clean(
        {
            "kind": "demo",
            "seed": seed,
            "frames": clip.num_frames,
            "size": clip.source.frames.shape[1],
            "figures": measured.figures,
            "marks": marks.judge(marks.FOLLOW, measured.figures),
            "recorded": recorded,
            "below_recorded": below,
            "seconds": seconds,
            "model": {"path": description["path"], "random": description["random"], **demo_record.hashes(description)},
            "opening": {name: [float(v) for v in values] for name, values in measured.opening.items()},
        }
    )


def _draw(clip: HeldOut, measured: _Measured, dub: DubResult, path: Path) -> None:
    """Input, mask, output, target at the same moments; below them the voice and the openings."""
    count = clip.num_frames
    moments = np.linspace(0, count - 1, _COLUMNS + 2).round().astype(int)[1:-1]
    size = clip.source.frames.shape[1]
    stage = dub.report["model"]["parts"]["keyframe"]["config"]
    region = masks.make_mask(clip.source.landmarks[moments], size, size, demo_record.mask_config(stage))
    before = clip.source.frames[moments]
    tinted = np.where(region[..., None] > 0, 0.5 * before + 0.5 * np.array([230, 60, 50]), before).astype(np.uint8)
    rows = [("input", before), ("mask", tinted), ("output", measured.frames[moments]), ("target", clip.target.frames[moments])]
    seconds = count / clip.source.fps
    times = [m / clip.source.fps for m in moments]
    strip = draw_strip([(name, list(frames)) for name, frames in rows], times, clip.target.samples, seconds)
    left, right = _EDGE
    curves = draw_curves(list(measured.opening.items()), seconds, "opening", strip.width, 150, left, right)
    write_atomically(path, stack([strip, curves]).save)


def _show(console: Console, report: dict[str, Any], dub: DubResult, folder: Path) -> None:
    console.print(dub.summary, highlight=False)
    columns = {"this clip": report["figures"]}
    recorded = report["recorded"]
    if recorded:
        columns |= {f"recorded mean of {recorded['clips']}": recorded["mean"], "recorded floor": recorded["floors"]}
    marks.show(
        "lip-sync of the dubbed mouth, read from the pixels (the marks are meant for the mean over 50 clips: one clip scatters)",
        marks.FOLLOW, columns, [("copied_opening_r", "for comparison, the input's own mouth: opening r")], ["this clip"], console,
    )  # fmt: skip
    console.print(f"\nlook at [b]{folder / 'demo.mp4'}[/b] and [b]{folder / 'strip.png'}[/b]; figures in {folder / 'figures.json'}")
    if report["model"]["random"]:
        console.print("[bold yellow]the model's weights are random[/bold yellow]: the mouth is noise; the rest is the real thing")
    else:
        console.print("this model draws [b]cartoon mouths[/b]; for real videos: keysync dub --help")
    if report["below_recorded"]:
        missed = (f"{key} {_number(report['figures'][key])} (floor {recorded['floors'][key]:g})" for key in report["below_recorded"])
        text = f"[bold red]below what this model is recorded to reach: {', '.join(missed)}[/bold red]"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)  # also with `quiet`: it is why the exit status is 1
    elif recorded:
        console.print("no figure is below what this model is recorded to reach")
    else:
        console.print("nothing is recorded for this model, so nothing is compared (keysync demo --record N does that)")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
