"""What a batch would do: its items with seconds of video, estimated time and disk; nothing is changed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from keysync_jax.batch import inputs
from keysync_jax.batch.folders import BatchFolder
from keysync_jax.batch.job_list import STATE_FOLDER, Job
from keysync_jax.batch.ledger import DONE, FINISHED, REVIEW, item_name
from keysync_jax.converters import model_directory
from keysync_jax.core import assets
from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError, in_one_line

_LINES = 200


class Listing(NamedTuple):
    """The list as text, and how many items cannot be tried."""

    text: str
    unfit: int


def dry_run(folder: BatchFolder, jobs: Sequence[Job], model: str) -> Listing:
    """Looks at every video's header, and at the ledger, if there is one, for what is done and how fast it went.

    Args:
      folder: of the batch; need not exist.
      jobs: the items of this run.
      model: model directory, for the size of latents on the disk.

    Raises:
      KeySyncError: no model directory there.
    """
    stage = model_directory.load(assets.resolve(model)).stage("keyframe")
    latent = 2 * 4 * stage.latent_size**2 * stage.unet.out_channels * FRAME_RATE  # bytes a second: known and generated
    finished, rate = _history(folder)
    lines, total, size, scratch, bad = [], 0.0, 0, 0.0, 0
    for job in jobs:
        if item_name(job.id) in finished:
            lines.append(f"{job.id}: {finished[item_name(job.id)]} already")
            continue
        seconds, problem = seconds_of(job)
        if problem:
            bad += 1
            lines.append(f"{job.id}: cannot be done: {problem}")
            continue
        total += seconds
        size += Path(job.video).stat().st_size if Path(job.video).is_file() else 0
        scratch = max(scratch, seconds * latent)
        lines.append(f"{job.id}: {seconds:.2f} s of video -> {job.output}" + (f", about {rate * seconds:.0f} s" if rate else ""))
    if len(lines) > _LINES:
        lines[_LINES:] = [f"and {len(lines) - _LINES} more"]
    there = next(each for each in (folder.root, *folder.root.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    time = (
        f"about {rate * total / 60:.1f} min for one worker, as fast as this batch has been"
        if rate
        else "the time is not known before some items are done; keysync plan --dub estimates it for a device"
    )
    lines.append(
        f"{len(jobs)} items, {total:.1f} s of video, {bad} cannot be done; {time}; disk: about {size / 1e6:.0f} MB of outputs and "
        f"{scratch / 1e6:.0f} MB of scratch for each worker, {free / 1e9:.1f} GB are free"
    )
    return Listing("\n".join(lines), bad)


def seconds_of(job: Job) -> tuple[float, str]:
    """Seconds of the job's video as its header says, and why the job cannot be done; "" where it can be tried."""
    if reason := inputs.unfit(job):
        return 0.0, reason
    try:
        return inputs.seconds_of(job), ""
    except KeySyncError as error:
        return 0.0, in_one_line(error)


def _history(folder: BatchFolder) -> tuple[dict[str, str], float | None]:
    """States of finished items by name, and seconds that a second of video took."""
    if not (folder.root / STATE_FOLDER / "ledger.json").exists():
        return {}, None
    ledger = folder.open_ledger()
    try:
        entries = list(ledger.entries())
    finally:
        ledger.close()
    done = [entry.result for entry in entries if entry.state in (DONE, REVIEW) and entry.result.get("video_seconds")]
    length = sum(float(result["video_seconds"]) for result in done)
    rate = sum(float(result["seconds"]) for result in done) / length if length else None
    return {entry.item.name: entry.state for entry in entries if entry.state in FINISHED}, rate
