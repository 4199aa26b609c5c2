"""The work of a batch of dubs in which items meet accidents by their id: `kills…` kills its worker, `hangs…` never ends."""

import os
import signal
import time

from keysync_jax.batch.dub_work import DubSettings, DubWork


class AccidentWork(DubWork):
    def run(self, tasks):
        for task in tasks:
            if task.job.id.startswith("kills"):
                os.kill(os.getpid(), signal.SIGKILL)
            if task.job.id.startswith("hangs"):
                time.sleep(3600)
        yield from super().run(tasks)


def open_accidents(settings: DubSettings) -> AccidentWork:
    return AccidentWork(settings)
