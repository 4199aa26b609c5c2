"""The ablations on drawn talkers, from shards to tables: trains, exports and judges every run, all on the same held-out clips.

    keysync ablate --data data -o ablations --config.init.vae=vae_model

Each run is `keysync train` in a process of its own. Repeat the command after a stop: runs go on where they were, and what is finished is
not done again. Written are a model directory per run, `ablations.json` (every figure, per clip as well), `ablations.md` (the tables) and
`curves.png`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keysync_jax import assets
from keysync_jax.converters import model_directory
from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.converters.parts import STAGES, Part
from keysync_jax.core import cpu
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import local_folder, write_atomically, write_text
from keysync_jax.data_pipeline.dataset_layout import GROUP_FILE
from keysync_jax.evaluation import talkers, talkers_clips, talkers_report
from keysync_jax.evaluation.lip_metrics import mean_and_error
from keysync_jax.evaluation.talkers import TalkerTest
from keysync_jax.evaluation.talkers_model import TalkerModel, parse_grid
from keysync_jax.training import recipes
from keysync_jax.training.config import TrainConfig, train_config
from keysync_jax.training.export.export_run import parts_of
from keysync_jax.training.start import check as start_check
from keysync_jax.training.start import runs
from keysync_jax.training.start.stage_vae import located
from keysync_jax.training.watch import validation

# A quarter of the bundled model's 15,240 updates of 64 windows.
QUARTER = 3_810


class Run(NamedTuple):
    """One training run: a recipe and what is changed in it."""

    recipe: str
    settings: tuple[str, ...] = ()


RUNS: dict[str, Run] = {
    "box": Run("demo_keyframe"),
    "mouth": Run("demo_keyframe", ("stage.mask.kind=mouth", "stage.mask.nose_index=33")),
    "one_stage": Run("demo_keyframe", ("data.spacing=1", "data.min_spacing=1")),
    "interpolation": Run("demo_interpolation"),
}


@dataclasses.dataclass(frozen=True)
class Judged:
    """One row of figures.

    Attributes:
      label: what a person reads.
      runs: whose weights make the model.
      mode: of `TalkerTest`.
      guidance: audio/identity of both stages, compared on the same clips.
      silent: whether the clips are dubbed with silence too.
    """

    label: str
    runs: tuple[str, ...]
    mode: str
    guidance: tuple[str, ...]
    silent: bool = False


JUDGED: dict[str, Judged] = {
    "box": Judged("box", ("box",), "keyframes", ("5/2", "2.5/1.5", "2/2", "1/1"), silent=True),
    "mouth": Judged("mouth alone", ("mouth",), "keyframes", ("2.5/1.5", "1/1"), silent=True),
    "one_stage": Judged("one stage", ("one_stage",), "one stage", ("2.5/1.5",)),
    "two_stages": Judged("two stages", ("box", "interpolation"), "dub", ("2.5/1.5",)),
}
_MASK_FIGURES = ("silence_open", "silence_leak", "input_leak", "opening_r", "width_r")
_STAGE_FIGURES = ("flicker", "seam_flicker", "roughness", "opening_r", "width_r")
_GUIDANCE_FIGURES = ("opening_r", "width_r", "closed", "partial_r", "silence_open")
# What the paper chose and what was chosen for the bundled model against plain guidance and against none.
_GUIDANCE_PAIRS = (("5/2", "2/2"), ("2.5/1.5", "2/2"), ("5/2", "1/1"), ("2.5/1.5", "1/1"))
_children: set[subprocess.Popen] = set()
_NAMES = {
    "silence_open": "open under silence", "silence_leak": "weight of the input's mouth: under silence",
    "input_leak": "… under another voice",
    "opening_r": "opening", "width_r": "width", "closed": "closed at m, b, p", "partial_r": "opening given loudness",
    "flicker": "flicker of the pixels", "seam_flicker": "… where windows meet", "roughness": "roughness of the opening",
}  # fmt: skip


# -- training ------------------------------------------------------------------------------------------------------------------------


def train(name: str, folder: Path, data: str, overrides: Sequence[str], say: Callable[[str], None] = print) -> Path:
    """Trains and exports the run `name`, unless that was done; its output goes to `folder/NAME.log`, one line per interval to `say`.

    Args:
      name: of `RUNS`.
      folder: holds the workdir NAME and gets the model directory NAME_model (averaged weights).
      data: dataset directory.
      overrides: `--config.KEY=VALUE` for every run.
      say: takes the trainer's lines.

    Raises:
      KeySyncError: the trainer or the export failed; its own words are in the log.
    """
    model, log = folder / f"{name}_model", folder / f"{name}.log"
    if is_trained(name, folder, data, overrides):
        return model
    recipe, *settings = asked = _asked(name, data, overrides)
    write_text(_record(name, folder), json.dumps(asked) + "\n")
    _keysync(["train", "--config", recipe, "--workdir", str(folder / name), *settings], log, lambda line: say(f"{name}: {line}"))
    _keysync(["export", str(folder / name), "--ema", "-o", str(model)], log)
    return model


def is_trained(name: str, folder: Path, data: str, overrides: Sequence[str]) -> bool:
    """Whether the run `name` has been trained and exported.

    Raises:
      KeySyncError: it has, or has begun, with other settings: its figures must not pass for those of these.
    """
    model, run = folder / f"{name}_model", folder / name
    begun = [path for path, there in ((model, model.is_dir()), (run, runs.last_step(str(run)) is not None)) if there]
    if begun and _recorded(_record(name, folder)) != _asked(name, data, overrides):
        both = " and ".join(map(str, begun))
        raise KeySyncError(f"{begun[0]} was trained with other settings than these; name another folder with -o, or remove {both}")
    return model.is_dir()


def _asked(name: str, data: str, overrides: Sequence[str]) -> list[str]:
    """Recipe and settings of a run; what comes later prevails."""
    run = RUNS[name]
    return [run.recipe, *(f"--config.{s}" for s in (f"data.datasets={data}", f"num_steps={QUARTER}", *run.settings)), *overrides]


def _record(name: str, folder: Path) -> Path:
    return folder / f"{name}.settings.json"


def _recorded(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there or damaged: nothing is known


def _keysync(arguments: Sequence[str], log: Path, say: Callable[[str], None] = lambda line: None) -> None:
    command = [sys.executable, "-u", "-c", "import sys; from keysync_jax.cli.main import main; sys.exit(main())", *arguments]
    last = ""
    with log.open("a", encoding="utf-8") as file:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
            _children.add(process)
            for line in process.stdout or ():
                file.write(line)
                last = line.strip() or last
                if "ETA" in line:
                    say(line.strip())
    _children.discard(process)
    if process.returncode:
        reason = last.removeprefix("keysync: error: ")
        raise KeySyncError(f"keysync {' '.join(arguments[:4])} … failed (status {process.returncode}): {reason} (all of it in {log})")


def _stop(number: int, frame: Any) -> None:
    """SIGTERM, from a scheduler at its time limit: the runs save what they have, then this process ends as they do."""
    for process in list(_children):
        process.terminate()
    sys.exit(128 + number)


def train_all(names: Sequence[str], folder: Path, data: str, overrides: Sequence[str], jobs: int, say: Callable[[str], None]) -> None:
    """Trains several runs, `jobs` at a time. The first failure is raised once the others have ended: what they reached is kept."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(train, name, folder, data, overrides, say) for name in names]
        try:
            concurrent.futures.wait(waiting)
        except BaseException:  # stopped: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for done in waiting:
        done.result()


# -- what can be wrong, before anything starts ---------------------------------------------------------------------------------------


def check(
    names: Sequence[str], folder: Path, data: str, overrides: Sequence[str], extra: ModelDirectory | None, say: Callable[[str], None]
) -> None:
    """Refuses what would stop a run at its start, or its judgement at the end. Touches no device, whose memory the runs need.

    Args:
      names: of `RUNS`.
      folder: of the runs, which need not exist.
      data: dataset directory.
      overrides: `--config.KEY=VALUE` for every run.
      extra: gives the interpolation stage where none is trained.
      say: takes notes about the data.

    Raises:
      UsageError: a `--config.KEY=VALUE` that no recipe knows, no VAE to judge with, or stages of different masks in one row.
      KeySyncError: data that a run cannot read, or a model that was trained with other settings.
    """
    held = {} if extra is None else {"interpolation": set(extra.parts)}  # parts that each model will have
    masks = {}
    if extra is not None:
        masks["interpolation"] = extra.stage("interpolation").mask
        if "://" in extra.path:
            raise KeySyncError(f"--interpolation {extra.path}: copy the model directory to a local folder first")
    for name in names:
        if is_trained(name, folder, data, overrides):
            model = model_directory.load(folder / f"{name}_model", complete=False)
            held[name] = set(model.parts)
            masks[name] = next(model.stage(part).mask for part in model.parts if part in STAGES)
            continue
        recipe, *settings = _asked(name, data, overrides)
        trainable, _ = start_check.resolve(train_config(recipes.load(recipe, settings)), folder / name)
        config = trainable.config
        for path in config.data.datasets or [data]:
            if "://" not in path and not (path and (Path(path) / GROUP_FILE).is_file()):
                raise KeySyncError(f"--data {path!r} holds no shards; keysync data shards makes them")
        try:
            reader = trainable.reader()
            trainable.check_data(reader)
            reader.read([reader.sample(0, 0, 1)])  # shards are opened when they are read
            validation.open_reader(trainable, lambda line, name=name: say(f"{name}: {line}"))
        except (KeySyncError, ImportError) as error:  # the latter: the package that speaks gs:// is not installed
            raise KeySyncError(f"--data cannot train {name}: {error}") from error
        held[name], masks[name] = _parts_to_come(config), config.stage.mask
    for entry in JUDGED.values():
        parts = [held.get(run) for run in entry.runs]
        if None not in parts and not any("vae" in each for each in parts):
            raise UsageError(f"{entry.label} cannot be judged without a VAE: name a model directory with one, --config.init.vae=DIR")
        if None not in parts and entry.mode == "dub" and len({masks[run] for run in entry.runs}) > 1:
            kinds = " and ".join(f"{masks[run].kind} at landmark {masks[run].nose_index}" for run in entry.runs)
            raise UsageError(f"{entry.label} cannot be judged: {' and '.join(entry.runs)} have different masks ({kinds})")


def _parts_to_come(config: TrainConfig) -> set[str]:
    """What `keysync export` will find for a run: its stage, and the VAE of the directories that it starts from."""
    init = located(config.init)
    given = [path for path in (init.vae, init.path) if path]
    known = (model_directory.load(path, complete=False).parts for path in given if model_directory.is_model_directory(path))
    # What a run begins with that another run or the hub gives is known only then.
    later = init.kind == "run" or any(path.startswith("hub:") for path in given)
    return {config.stage.stage, *(["vae"] if later or any("vae" in parts for parts in known) else [])}


# -- judging -------------------------------------------------------------------------------------------------------------------------


def judge(name: str, sources: Sequence[Path], folder: Path, clips: int, seed: int, quiet: bool) -> list[dict[str, Any]]:
    """The reports of one row of `JUDGED`, one per guidance, cached in `folder/NAME.json`.

    Args:
      name: of `JUDGED`.
      sources: model directories; a stage is taken from the first that has it.
      folder: where the cache is.
      clips: held-out clips of six seconds.
      seed: of the clips.
      quiet: no progress.

    Raises:
      KeySyncError: no source has a part that is needed, or non-finite values.
    """
    entry, cache = JUDGED[name], folder / f"{name}.json"
    test = TalkerTest(clips=clips, silent_clips=clips if entry.silent else 0, seed=seed, mode=entry.mode)
    judged = {"test": dataclasses.asdict(test), "guidance": list(entry.guidance), "models": [_digest(path) for path in sources]}
    known = _recorded(cache)
    if isinstance(known, dict) and known.get("judged") == judged:
        return known["reports"]
    directory = _together([model_directory.load(path, complete=False) for path in sources], folder / f"{name}_together")
    model = TalkerModel(directory, entry.mode)
    scales = [grid for text in entry.guidance for grid in parse_grid(text)]
    with talkers_report.progress(entry.label, talkers.total_windows(test, model, len(scales)), quiet) as tick:
        reports = talkers.evaluate(directory, test, model, scales, tick)
    write_text(cache, json.dumps({"judged": judged, "reports": reports}, indent=1) + "\n")
    return reports


def _digest(model: Path) -> str:
    """SHA-256 of a model directory's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(model).rglob("*") if p.is_file()):
        digest.update(path.relative_to(model).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _together(sources: Sequence[ModelDirectory], path: Path) -> ModelDirectory:
    """One directory of all parts, written to `path` where there is more than one source."""
    if len(sources) == 1:
        return sources[0]
    parts: dict[str, Part] = {}
    for source in sources:
        for part in parts_of(source):
            parts.setdefault(part.name, part)
    return model_directory.save(path, list(parts.values()), force=True)


class Difference(NamedTuple):
    """One row minus another, clip by clip."""

    mean: float
    error: float
    higher: int
    lower: int
    clips: int

    @property
    def text(self) -> str:
        return f"{_with_error(f'{self.mean:+.3f}', self.error)} ({self.higher} higher, {self.lower} lower)"


def difference(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> Difference:
    """`a` minus `b` in one figure over the clips that both have: mean, its standard error, and in how many it is higher and lower."""
    one, two = _per_clip(a, key), _per_clip(b, key)
    values = [one[clip] - two[clip] for clip in sorted(one.keys() & two.keys())]
    if not values:
        raise KeySyncError(f"no clip has the figure {key} on both sides")
    mean, error = mean_and_error(values)
    return Difference(mean, error, sum(v > 0 for v in values), sum(v < 0 for v in values), len(values))


def _per_clip(report: Mapping[str, Any], key: str) -> dict[int, float]:
    silent = {"silence_open": "open", "silence_leak": "leak"}
    rows, name = (report["silence"]["per_clip"], silent[key]) if key in silent else (report["per_clip"], key)
    return {row["clip"]: row[name] for row in rows if row.get(name) is not None}


# -- tables and curves ---------------------------------------------------------------------------------------------------------------


def tables(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What was measured as Markdown: mask, stages, guidance; a table whose rows are not all there is left out."""
    out = []
    if {"box", "mouth"} <= found.keys():
        rows = [(JUDGED[name], report) for name in ("box", "mouth") for report in found[name] if report["guidance"] in ("1/1", "2.5/1.5")]
        rows.sort(key=lambda row: row[1]["guidance"])
        out.append(_table("keyframes", rows, _MASK_FIGURES, _every_second("mouth alone minus box", rows)))
    if {"one_stage", "two_stages"} <= found.keys():
        rows = [(JUDGED[name], report) for name in ("two_stages", "one_stage") for report in found[name]]
        out.append(_table("whole dubs", rows, _STAGE_FIGURES, _every_second("one stage minus two", rows)))
    if "box" in found:
        reports = {report["guidance"]: report for report in found["box"]}
        minus = [Minus("clip by clip", f"{a} minus {b}", reports[a], reports[b]) for a, b in _GUIDANCE_PAIRS if {a, b} <= reports.keys()]
        out.append(_table("keyframes, box", [(JUDGED["box"], report) for report in found["box"]], _GUIDANCE_FIGURES, minus))
    return "\n".join(out)


class Minus(NamedTuple):
    """A row of differences: one report minus another, clip by clip."""

    label: str
    guidance: str
    report: Mapping[str, Any]
    other: Mapping[str, Any]


def _every_second(label: str, rows: Sequence[tuple[Judged, Mapping[str, Any]]]) -> list[Minus]:
    """Each second row minus the one before it."""
    pairs = zip(rows[::2], rows[1::2], strict=False)
    return [Minus(f"{label}, clip by clip", second["guidance"], second, first) for (_, first), (_, second) in pairs]


def _table(title: str, rows: Sequence[tuple[Judged, Mapping[str, Any]]], keys: Sequence[str], differences: Sequence[Minus] = ()) -> str:
    clips = rows[0][1]["test"]["clips"]
    lines = [f"| {title}, {clips} clips | guidance | {' | '.join(_NAMES[key] for key in keys)} |", "| --- " * (2 + len(keys)) + "|"]
    for entry, report in rows:
        output = report["columns"]["output"]
        values = ("–" if output.get(key) is None else _with_error(f"{output[key]:.3f}", output[f"{key}_error"]) for key in keys)
        lines.append(f"| {entry.label} | {report['guidance']} | {' | '.join(values)} |")
    for minus in differences:
        cells = (difference(minus.report, minus.other, key).text for key in keys)
        lines.append(f"| {minus.label} | {minus.guidance} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_error(text: str, error: float | None) -> str:
    return text if error is None or not math.isfinite(error) else f"{text} ± {error:.3f}"  # one clip has no error


def draw_curves(folder: Path, names: Sequence[str]) -> Path:
    """Training loss of the runs over steps, on one pair of axes, as `folder/curves.png`."""
    from matplotlib.figure import Figure

    from keysync_jax.training.watch.metrics import read_metrics

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(step, row["loss"]) for step, row in read_metrics(folder / name).items() if row.get("loss") is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:  # none where the runs were too short for a row
        axes.legend()
    write_atomically(folder / "curves.png", lambda partial: figure.savefig(partial, dpi=110))
    return folder / "curves.png"


# -- command -------------------------------------------------------------------------------------------------------------------------


def run(
    output: str | os.PathLike, data: str, overrides: Sequence[str] = (), *, only: Sequence[str] = tuple(RUNS),
    interpolation: str | None = None, clips: int = 24, seed: int = 0, jobs: int = 1, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """All of it; see the module's text.

    Args:
      output: folder of the runs and results.
      data: dataset directory.
      overrides: `--config.KEY=VALUE` for every run.
      only: names of `RUNS`.
      interpolation: model directory whose interpolation stage the two-stage row takes where it is not trained here.
      clips: held-out clips of six seconds.
      seed: of the clips.
      jobs: runs that train at once.
      quiet: no progress.

    Returns:
      What `ablations.json` holds.

    Raises:
      UsageError: an unknown run, or what `check` says.
      KeySyncError: what `check` says, before anything is written; a run failed: what others reached is kept.
    """
    only = tuple(dict.fromkeys(only))
    unknown = [name for name in only if name not in RUNS]
    if unknown:
        raise UsageError(f"no run {unknown[0]!r}; choose among {', '.join(RUNS)}")
    # A wrong number is said before days of training, and so is whatever else can be known.
    test = TalkerTest(clips=clips, silent_clips=clips, seed=seed, mode="keyframes")
    talkers_clips.seeds_of(test.split, seed, 0)
    folder, lock = local_folder(output), threading.Lock()
    extra = None if interpolation is None else model_directory.load(assets.resolve(interpolation), complete=False)

    def say(line: str) -> None:
        if not quiet:
            with lock:
                print(line, file=sys.stderr, flush=True)

    check(only, folder, data, overrides, extra, say)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeySyncError(f"cannot write to {folder}: {error.strerror}; name another folder with -o") from error
    train_all(only, folder, data, overrides, jobs, say)
    models = {name: folder / f"{name}_model" for name in only}
    if extra is not None:
        models.setdefault("interpolation", Path(extra.path))
    found = {
        name: judge(name, [models[r] for r in entry.runs], folder, clips, seed, quiet)
        for name, entry in JUDGED.items()
        if all(r in models for r in entry.runs)
    }
    report = {
        "kind": "ablations", "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "settings": list(overrides),
        "runs": {name: RUNS[name]._asdict() for name in only}, "judged": found,
    }  # fmt: skip
    write_text(folder / "ablations.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "ablations.md", tables(found))
    draw_curves(folder, only)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="keysync ablate", description="Train and judge the ablations on drawn talkers.",
        epilog="--config.KEY=VALUE changes the recipe of every run, for example --config.init.vae=vae_model --config.num_steps=500.\n"
        "example:\n  keysync ablate --data data -o ablations --config.init.vae=vae_model --jobs 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", required=True, metavar="DIR", help="shards of drawn talkers (docs/ablations.md)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the runs; the same folder goes on")
    parser.add_argument("--only", default=",".join(RUNS), metavar="RUN,…", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--interpolation", metavar="DIR", help="take this model's interpolation stage where none is trained")
    parser.add_argument("--clips", type=int, default=24, metavar="N", help="held-out clips (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another set of clips")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs that train at once (default 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    cpu.prepare()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        if args.jobs < 1:
            raise UsageError(f"--jobs is {args.jobs}; it must be at least 1")
        report = run(
            args.output, args.data, [a for a in argv if a.startswith("--config.")], only=[name.strip() for name in args.only.split(",")],
            interpolation=args.interpolation, clips=args.clips, seed=args.seed, jobs=args.jobs, quiet=args.quiet,
        )  # fmt: skip
    except (KeySyncError, OSError) as error:
        print(f"keysync: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("keysync: error: stopped; the same command goes on", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print(tables(report["judged"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
