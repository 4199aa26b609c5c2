"""Work for the tests of batches that costs nothing: an item's output is a copy of its video, and its id says what goes wrong."""

import dataclasses
import errno
import os
import shutil
import signal
import time
from pathlib import Path

from keysync_jax.batch.worker import Outcome
from keysync_jax.core.errors import KeySyncError


@dataclasses.dataclass
class CopyWork:
    """Ids: `fail…` cannot be done, `bug…` raises, `kill…` kills its worker, `hang…` never ends, `full…` finds no room while a file `full`
    stands beside its video, `look…` is to be reviewed. `slow` seconds pass with every item."""

    slow: float = 0.0
    together: int = 1
    log: str = ""

    def limit_s(self, job):
        return 600.0

    def check(self):
        pass

    def run(self, tasks):
        for task in tasks:
            job = task.job
            if self.log:
                with open(self.log, "a") as log:
                    log.write(f"{job.id} {os.getpid()} {len(tasks)}\n")
            try:
                yield self._one(task, job)
            except (KeySyncError, OSError, ValueError) as error:
                yield error

    def _one(self, task, job):
        time.sleep(self.slow)
        if job.id.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if job.id.startswith("hang"):
            time.sleep(3600)
        if job.id.startswith("fail"):
            raise KeySyncError(f"{job.video}: no face")
        if job.id.startswith("bug"):
            raise ValueError("a bug")
        if job.id.startswith("full") and (Path(job.video).parent / "full").exists():
            raise KeySyncError(f"cannot write {task.target}") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shutil.copy(job.video, task.target)
        review = ["lips do not follow"] if job.id.startswith("look") else []
        return Outcome(review, {"video_seconds": 2.0, "inputs": {"video": "v", "audio": "a"}}, {"shots": []}, b"\xff\xd8strip")


def open_copy(slow=0.0, together=1, log=""):
    return CopyWork(slow, together, log)


def open_nothing():
    raise KeySyncError("model is not there")


def open_dying():
    os.kill(os.getpid(), signal.SIGKILL)
