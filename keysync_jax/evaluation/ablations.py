"""The ablations on drawn talkers, from shards to tables: trains, exports and judges every run, all on the same held-out clips.

    keysync ablate --data data -o ablations --config.init.vae=vae_model

Each run is `keysync train` in a process of its own. Repeat the command after a stop: runs go on where they were, and what is finished is
not done again. Written are a model directory per run, `ablations.json` (every figure, per clip as well), `ablations.md` (the tables) and
`curves.png`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keysync_jax.converters import model_directory
from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.converters.parts import STAGES, Part
from keysync_jax.core import assets
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import local_folder, write_text
from keysync_jax.data_pipeline.dataset_layout import GROUP_FILE
from keysync_jax.evaluation import ablations_report, talkers, talkers_clips, talkers_report
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
Say = Callable[[str], None]


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


class Judged(NamedTuple):
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
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}; it must be at least 1")
    only = tuple(dict.fromkeys(only))
    if unknown := [name for name in only if name not in RUNS]:
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
    rows = {name: entry for name, entry in JUDGED.items() if all(r in models for r in entry.runs)}
    found = {name: judge(name, [models[r] for r in entry.runs], folder, clips, seed, quiet) for name, entry in rows.items()}
    report = {
        "kind": "ablations", "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "settings": list(overrides),
        "runs": {name: RUNS[name]._asdict() for name in only}, "judged": found,
    }  # fmt: skip
    write_text(folder / "ablations.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "ablations.md", tables(report))
    ablations_report.draw_curves(folder, only)
    return report


def tables(report: dict[str, Any]) -> str:
    """What `run` found, as Markdown."""
    return ablations_report.tables(report["judged"], {name: entry.label for name, entry in JUDGED.items()})


# -- training ------------------------------------------------------------------------------------------------------------------------


def train_all(names: Sequence[str], folder: Path, data: str, overrides: Sequence[str], jobs: int, say: Say) -> None:
    """Trains several runs, `jobs` at a time. The first failure is raised once the others have ended: what they reached is kept."""
    children: set[subprocess.Popen] = set()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(train, name, folder, data, overrides, say, children) for name in names]
        try:
            concurrent.futures.wait(waiting)
        except BaseException:  # stopped: what has not begun does not begin, and what runs saves what it has
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
            raise
    for done in waiting:
        done.result()


def train(
    name: str, folder: Path, data: str, overrides: Sequence[str], say: Say = print, children: set[subprocess.Popen] | None = None
) -> Path:
    """Trains and exports the run `name`, unless that was done; its output goes to `folder/NAME.log`, one line per interval to `say`.

    Args:
      name: of `RUNS`.
      folder: holds the workdir NAME and gets the model directory NAME_model (averaged weights).
      data, overrides: as for `run`.
      say: takes the trainer's lines.
      children: holds the process while it runs.

    Raises:
      KeySyncError: the trainer or the export failed; its own words are in the log.
    """
    model, log = folder / f"{name}_model", folder / f"{name}.log"
    if is_trained(name, folder, data, overrides):
        return model
    recipe, *settings = asked = _asked(name, data, overrides)
    write_text(_record(name, folder), json.dumps(asked) + "\n")
    children = set() if children is None else children
    words = ["train", "--config", recipe, "--workdir", str(folder / name), *settings]
    _keysync(words, log, children, lambda line: say(f"{name}: {line}"))
    _keysync(["export", str(folder / name), "--ema", "-o", str(model)], log, children)
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
    own = (f"data.datasets={data}", f"num_steps={QUARTER}", *run.settings)
    by_key = {each.partition("=")[0]: each for each in (*(f"--config.{setting}" for setting in own), *overrides)}
    return [run.recipe, *by_key.values()]


def _record(name: str, folder: Path) -> Path:
    return folder / f"{name}.settings.json"


def _recorded(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):  # not there or damaged: nothing is known
        return json.loads(path.read_text(encoding="utf-8"))


def _keysync(arguments: Sequence[str], log: Path, children: set[subprocess.Popen], say: Say = lambda line: None) -> None:
    command, last = [sys.executable, "-u", "-m", "keysync_jax", *arguments], ""
    with log.open("a", encoding="utf-8") as file:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
            children.add(process)
            for line in process.stdout or ():
                file.write(line)
                last = line.strip() or last
                if "ETA" in line:
                    say(line.strip())
    children.discard(process)
    if process.returncode:
        reason = last.removeprefix("keysync: error: ")
        raise KeySyncError(f"keysync {' '.join(arguments[:4])} … failed (status {process.returncode}): {reason} (all of it in {log})")


# -- what can be wrong, before anything starts ---------------------------------------------------------------------------------------


def check(names: Sequence[str], folder: Path, data: str, overrides: Sequence[str], extra: ModelDirectory | None, say: Say) -> None:
    """Refuses what would stop a run at its start, or its judgement at the end. Touches no device, whose memory the runs need.

    Args:
      names: of `RUNS`.
      folder: of the runs, which need not exist.
      data, overrides: as for `run`.
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
        if not all(run in held for run in entry.runs):
            continue
        if not any("vae" in held[run] for run in entry.runs):
            raise UsageError(f"{entry.label} cannot be judged without a VAE: name a model directory with one, --config.init.vae=DIR")
        if entry.mode == "dub" and len({masks[run] for run in entry.runs}) > 1:
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
