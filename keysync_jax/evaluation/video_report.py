"""`keysync evaluate --video`: reads one video or two, prints and returns their figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keysync_jax.core.errors import UsageError
from keysync_jax.core.files import write_atomically
from keysync_jax.evaluation import marks, talkers_report, video_metrics
from keysync_jax.evaluation.lip_metrics_plot import draw_curves
from keysync_jax.media import faces, video

_ROWS = (
    ("open", "frames with an open mouth"),
    ("ratio_mean", "mouth aspect ratio, mean"),
    ("ratio_std", "mouth aspect ratio, deviation"),
    ("ratio_max", "mouth aspect ratio, largest"),
    ("sharpness", "variance of Laplacian, frame"),
    ("mouth_sharpness", "variance of Laplacian, mouth"),
    ("frames_with_face", "frames with a face"),
    ("frames", "frames"),
)
_SMALLEST_PLOT, _LARGEST_PLOT = 480, 1600


def evaluate_video(
    generated: str | os.PathLike,
    reference: str | os.PathLike | None = None,
    *,
    silent: bool = False,
    threshold: float = video_metrics.THRESHOLD,
    ratio: str = "inner",
    series: str | os.PathLike | None = None,
    plot: str | os.PathLike | None = None,
    backend: str = "mediapipe",
    weights: str | None = None,
    face: str = "largest",
    quiet: bool = False,
) -> dict[str, Any]:
    """Figures of a video, beside a reference's if there is one.

    Args:
      generated: the video to judge.
      reference: what it is compared with at the same times, counted from the first frames.
      silent: `generated` was driven by silence, so its share of open frames is LipLeak.
      threshold: mouth aspect ratio above which a mouth is open.
      ratio: which points, see `video_metrics.RATIOS`.
      series: where to write the figures of every frame of `generated` (.csv or .json).
      plot: where to draw the mouth aspect ratio over time.
      backend, weights, face: landmark detector and which face, as in a dub.
      quiet: no progress.

    Raises:
      KeySyncError: unreadable video, no face, or an output that cannot be written.
      UsageError: a threshold outside 0 to 2, an unknown file type.
    """
    if not 0 < threshold < 2:
        raise UsageError(f"--threshold {threshold:g} is no mouth aspect ratio; choose between 0 and 2 (the paper uses 0.25)")
    if series is not None:
        video_metrics.check_series(series)
    if plot is not None and Path(plot).suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: write a .png")
    figures = [_read(path, backend, weights, face, quiet) for path in (generated, reference) if path is not None]
    summaries = [video_metrics.summarize(each, ratio, threshold) for each in figures]
    report: dict[str, Any] = {"kind": "video", "path": os.fspath(generated), "audio_silent": silent, "generated": summaries[0]}
    if silent:
        report["lip_leak"] = summaries[0]["open"]
    if reference is not None:
        report |= {"reference_path": os.fspath(reference), "reference": summaries[1]}
        report["comparison"] = video_metrics.compare(figures[0], figures[1], ratio, threshold)
    if series is not None:
        video_metrics.write_series(series, figures[0])
    if plot is not None:
        curves = list(zip(("generated", "reference"), (each.ratios[ratio] for each in figures), strict=False))
        times = [each.time - each.time[0] + video_metrics.frame_step(each.time) / 2 for each in figures]
        seconds = max(float(time[-1]) + video_metrics.frame_step(time) / 2 for time in times)
        width = min(max(_SMALLEST_PLOT, 100 + 4 * len(curves[0][1])), _LARGEST_PLOT)
        picture = draw_curves(curves, seconds, "gap / width", width, 200, levels=(threshold,), times=times)
        write_atomically(Path(plot), picture.save)
    report = marks.clean(report)
    _show(report, ratio, threshold)
    return report


def _read(path: str | os.PathLike, backend: str, weights: str | None, face: str, quiet: bool) -> video_metrics.FrameFigures:
    count = video.probe(path).frames or 0
    options = {"weights": weights} if weights else {}
    # Opened before the bar: while it opens, all of stderr is silenced.
    with faces.open_backend(backend, **options) as detector, talkers_report.progress(Path(path).name[:24], 2 * count, quiet) as tick:
        return video_metrics.read_figures(path, detector, face, tick)


def _show(report: dict[str, Any], ratio: str, threshold: float) -> None:
    columns = {"generated": report["generated"]} | ({"reference": report["reference"]} if "reference" in report else {})
    # A Text, because a file's name may hold what rich would take for a style: "take [final].mp4".
    title = Text(f"{report['path']} ({ratio} lips, open above {threshold:g})")
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("figure")
    for heading in columns:
        table.add_column(heading, justify="right")
    for key, label in _ROWS:
        name = "frames with an open mouth (generated: LipLeak)" if key == "open" and report["audio_silent"] else label
        table.add_row(name, *(_text(column[key]) for column in columns.values()))
    table.add_section()
    for bound in report["generated"]["sweep"]:
        table.add_row(f"open above {bound}", *(_text(column["sweep"][bound]) for column in columns.values()))
    console = Console()
    console.print(table)
    if "comparison" in report:
        both = report["comparison"]
        console.print(
            f"mouth aspect ratio against the reference over {both['frames_compared']} frames: correlation {_text(both['ratio_r'])}, "
            f"mean difference {_text(both['ratio_difference'])}",
            highlight=False,
        )
        if both["frames_apart"]:
            longer = "longer" if both["frames_apart"] > 0 else "shorter"
            console.print(f"note: the generated video is {abs(both['frames_apart'])} frames {longer}; the rest is not compared")


def _text(value: float | int | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
