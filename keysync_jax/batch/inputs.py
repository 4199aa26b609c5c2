"""The files that an item reads: whether they are there, how long they are, and what they are known again by."""

from __future__ import annotations

import os
import stat
from typing import Any

from keysync_jax.batch.job_list import Job
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare.work import digest, file_digest
from keysync_jax.inference.clip_io import open_video
from keysync_jax.inference.sequences import PictureSequence, is_sequence
from keysync_jax.media import audio


def unfit(job: Job) -> str:
    """Why a job need not be tried, "" if it can be; opening a pipe or a device as a video would never end."""
    if job.error:
        return job.error
    for path, what in ((job.video, "picture" if job.kind == "animate" else "video"), (job.audio, "voice")):
        if what == "video" and is_sequence(path):
            continue
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return f"the {what} {path} does not exist"
        except (OSError, ValueError) as error:
            return f"the {what} {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        if not stat.S_ISREG(mode):
            return f"the {what} {path} is no ordinary file"
    return ""


def seen(path: str) -> list[Any]:
    """Path, size and time of change; [] where nothing is there. Of pictures: of all of them."""
    try:
        if is_sequence(path):
            return [path, *(list(os.stat(each)[6:9:2]) for each in PictureSequence(path).paths)]
        found = os.stat(path)
    except (OSError, ValueError, KeySyncError):
        return []
    return [path, found.st_size, found.st_mtime_ns]


def content_digest(path: str) -> str:
    """SHA-256 of a file's content; of pictures, of all their digests in order."""
    return digest([file_digest(each) for each in PictureSequence(path).paths]) if is_sequence(path) else file_digest(path)


def seconds_of(job: Job) -> float:
    """Seconds of what a job makes, as the header of its video, or of an animation's voice, says.

    Raises:
      KeySyncError: it cannot be read.
    """
    return audio.probe_audio(job.audio).duration_s or 0.0 if job.kind == "animate" else length_s(job.video)


def length_s(path: str) -> float:
    """Seconds of a video, as its header says.

    Raises:
      KeySyncError: it cannot be read.
    """
    info = open_video(path).info
    if info.duration_s:
        return float(info.duration_s)
    return float((info.frames or 0) / info.average_rate) if info.average_rate else 0.0
