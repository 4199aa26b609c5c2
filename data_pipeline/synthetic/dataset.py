"""A folder of drawn talkers with a manifest: what `keysync data synth` makes.

Every clip is a pure function of (seed, index, settings), so the folder does not depend on the number of workers, on the order in
which clips finish or on how often the run was interrupted; finished clips are kept.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import local_folder, write_atomically, write_text
from keysync_jax.core.locking import only_process
from keysync_jax.core.processes import end_with_parent
from keysync_jax.core.progress import Bars
from keysync_jax.data_pipeline.synthetic.clip import TalkerOptions, check_extent, make_clip
from keysync_jax.data_pipeline.synthetic.occluders import OCCLUDERS
from keysync_jax.data_pipeline.synthetic.write import TRUTH_FILE, check_clip, check_suffix, sidecar, write_clip

MANIFEST_FIELDS = ("path", "speaker", "split", "source", "consent", "licence")
SOURCE, CONSENT, LICENCE = "synthetic-talkers", "not needed (drawn)", "CC0-1.0"
SPLITS = ("train", "validation", "test")
_TAG = 0xDA7A
_SETTINGS = "synth.json"
_MAX_CLIPS = 1_000_000  # names have six digits


@dataclasses.dataclass(frozen=True)
class SynthSettings:
    """What the clips of a set are like; shares are probabilities per clip.

    `speakers` None gives every clip its own identity. Silent clips have room noise (one in five digital silence) and a shut mouth.
    """

    seed: int = 0
    frames: int = 180
    size: int = 128
    speakers: int | None = None
    silent_share: float = 0.06
    laughter_share: float = 0.0
    occluder_share: float = 0.0
    emotion_share: float = 0.0
    validation_share: float = 0.05
    test_share: float = 0.05
    suffix: str = ".mp4"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed must be a non-negative integer, not {self.seed}")
        check_extent(self.frames, self.size)
        check_suffix(Path(f"clip{self.suffix}"))
        if self.speakers is not None and self.speakers < 1:
            raise UsageError(f"speakers must be at least 1, not {self.speakers}")
        for field in dataclasses.fields(self):
            if field.name.endswith("_share") and not 0 <= getattr(self, field.name) <= 1:
                raise UsageError(f"{field.name} must lie between 0 and 1, not {getattr(self, field.name)}")
        if self.validation_share + self.test_share > 1:
            raise UsageError("validation_share and test_share add up to more than 1")


class ClipPlan(NamedTuple):
    """One clip of a set: its file name, who speaks, in which split, and what `make_clip` is called with."""

    name: str
    speaker: str
    split: str
    identity_seed: int
    audio_seed: int
    motion_seed: int
    options: TalkerOptions


class SynthSummary(NamedTuple):
    """What a run did: the manifest's path, clips made now, clips found finished, seconds of video in the set."""

    manifest: Path
    made: int
    kept: int
    seconds: float


def _integers(*key: int, count: int) -> list[int]:
    return [int(v) & (2**62 - 1) for v in np.random.SeedSequence([_TAG, *key]).generate_state(count, np.uint64)]


def _split_of(speaker: int, settings: SynthSettings) -> str:
    """Speakers fall evenly into the splits (golden-ratio sequence), whatever the number of clips."""
    start = _integers(settings.seed, 2, count=1)[0] / 2**62
    position = (start + speaker * 0.6180339887498949) % 1
    if position < settings.test_share:
        return "test"
    return "validation" if position < settings.test_share + settings.validation_share else "train"


def plan_clip(index: int, settings: SynthSettings) -> ClipPlan:
    """Clip `index` of the set; a pure function of its arguments."""
    speaker = index if settings.speakers is None else index % settings.speakers
    identity_seed = _integers(settings.seed, 0, speaker, count=1)[0]
    audio_seed, motion_seed, kinds = _integers(settings.seed, 1, index, count=3)
    rng = np.random.default_rng(kinds)
    silent, digital, laughs, occluded, felt = rng.random(5) < (
        settings.silent_share,
        0.2,
        settings.laughter_share,
        settings.occluder_share,
        settings.emotion_share,
    )
    options = TalkerOptions(
        silent=bool(silent),
        room_db=float("-inf") if silent and digital else None,
        laughter=0.4 if laughs else 0.0,
        occluder=str(rng.choice(OCCLUDERS)) if occluded else None,
        emotion=bool(felt),
    )
    name = f"talker_{index:06d}{settings.suffix}"
    return ClipPlan(
        name, f"synth{settings.seed}-{speaker:05d}", _split_of(speaker, settings), identity_seed, audio_seed, motion_seed, options
    )


def _finished(path: Path, plan: ClipPlan, settings: SynthSettings) -> bool:
    """The truth is written last: a clip whose truth names the planned seeds is complete, unless its files were damaged since."""
    try:
        record = json.loads(sidecar(path, TRUTH_FILE).read_text(encoding="utf-8"))
        seeds = record["seeds"]
        extent = check_clip(path, occluder=plan.options.occluder is not None)
    except (KeySyncError, OSError, ValueError, KeyError, TypeError):
        return False  # not there or damaged: it is drawn again
    wanted = {"identity": plan.identity_seed, "audio": plan.audio_seed, "motion": plan.motion_seed}
    return seeds == wanted and extent == (settings.frames, settings.size)


def _make(index: int, folder: str, settings: SynthSettings) -> int:
    plan = plan_clip(index, settings)
    clip = make_clip(0, settings.frames, settings.size, plan.identity_seed, plan.audio_seed, plan.motion_seed, plan.options)
    write_clip(clip, Path(folder) / plan.name)
    return index


def _start_worker() -> None:
    import cv2

    cv2.setNumThreads(1)  # the processes already fill the cores
    end_with_parent()


def _run(todo: list[int], folder: Path, settings: SynthSettings, workers: int) -> Iterator[int]:
    """Make the clips, yielding each index as it is done."""
    if workers <= 1:
        for index in todo:
            yield _make(index, str(folder), settings)
        return
    # Spawned, not forked: the parent may hold JAX threads.
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(workers, len(todo), os.cpu_count() or 1))  # more than cores would only wait
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        futures = [pool.submit(_make, index, str(folder), settings) for index in todo]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise KeySyncError("a process that draws was killed (out of memory?); the same command goes on, try fewer --workers") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other drawing in the folder: two would take each other's unfinished files for rubbish. That of killed ones is removed."""
    with contextlib.ExitStack() as stack:
        try:
            refusal = f"another process is drawing into {folder}; wait for it to end, or choose another folder"
            stack.enter_context(only_process(str(folder), refusal))
            for name in ("talker_*", "manifest", "synth"):
                for rest in folder.glob(f".{name}.*.part*"):
                    rest.unlink(missing_ok=True)
        except OSError as error:
            raise KeySyncError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
        yield


def _check_folder(folder: Path, settings: SynthSettings) -> None:
    """Refuse to mix two sets in one folder; remember the settings of a new one."""
    record = folder / _SETTINGS
    wanted = dataclasses.asdict(settings)
    if record.exists():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise KeySyncError(f"{record} cannot be read ({error}); choose another folder") from None
        if not isinstance(found, dict):
            raise KeySyncError(f"{record} holds no settings; choose another folder")
        different = sorted(k for k in wanted if found.get(k) != wanted[k])
        if different:
            detail = ", ".join(f"{k} {found.get(k)} against {wanted[k]}" for k in different)
            raise KeySyncError(f"{folder} holds clips made with other settings ({detail}); choose another folder or the same settings")
    else:
        write_text(record, json.dumps(wanted, indent=1))


def _write_manifest(folder: Path, plans: list[ClipPlan]) -> Path:
    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(MANIFEST_FIELDS)
            table.writerows((p.name, p.speaker, p.split, SOURCE, CONSENT, LICENCE) for p in plans)

    write_atomically(folder / "manifest.csv", write)
    return folder / "manifest.csv"


def synth_dataset(
    n: int, out_dir: str | Path, settings: SynthSettings | None = None, *, workers: int = 1, quiet: bool = False
) -> SynthSummary:
    """Make (or finish, or extend) a folder of `n` clips with `manifest.csv`.

    Args:
        n: 1 to 1,000,000.
        out_dir: local folder; clips already finished there are kept, damaged ones are drawn again.
        settings: what the clips are like; must equal the folder's if it holds some.
        workers: processes, at least 1; the result does not depend on it.
        quiet: no progress bar.

    Raises:
        UsageError: an impossible number, or no local folder.
        KeySyncError: the folder holds another set, is being drawn into, or cannot be written.
    """
    if not 1 <= n <= _MAX_CLIPS:
        raise UsageError(f"the number of clips must be 1 to {_MAX_CLIPS}, not {n}")
    if workers < 1:
        raise UsageError(f"--workers is {workers}; it must be at least 1")
    settings = settings or SynthSettings()
    folder = local_folder(out_dir)
    with _alone(folder):
        _check_folder(folder, settings)
        plans = [plan_clip(i, settings) for i in range(n)]
        todo = [i for i, plan in enumerate(plans) if not _finished(folder / plan.name, plan, settings)]
        with Bars(quiet) as progress:
            task = progress.add_task("drawing talkers", total=n, completed=n - len(todo))
            for _ in _run(todo, folder, settings, workers):
                progress.advance(task)
        return SynthSummary(_write_manifest(folder, plans), len(todo), n - len(todo), n * settings.frames / FRAME_RATE)
