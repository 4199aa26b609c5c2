"""A Beam pipeline with one worker process that an element kills, for the test of its supervision."""

import os
import signal
from pathlib import Path

import apache_beam as beam

from keysync_jax.data_pipeline.prepare import jobs
from keysync_jax.data_pipeline.prepare.supervise import Marks
from keysync_jax.data_pipeline.prepare.work_state import Folders

ELEMENTS = ("a", "killer", "z")


class Touch(beam.DoFn):
    def __init__(self, folder, marks):
        self._folder, self._marks = folder, marks

    def setup(self):
        self._marks.end_with_pipeline()

    def process(self, name):
        with self._marks.holding(name):
            if name == "killer":
                os.kill(os.getpid(), signal.SIGKILL)
            (Path(self._folder) / name).touch()


def run(folder, aside, marks):
    flags = [*jobs.beam_flags(1), "--direct_num_workers=1", "--direct_running_mode=multi_processing"]
    with jobs._running(flags, Folders(folder, folder)) as pipeline:
        (
            pipeline
            | beam.Create([name for name in ELEMENTS if name not in aside])
            | beam.Reshuffle()
            | beam.ParDo(Touch(folder, Marks(marks)))
        )


def fail(aside, marks):
    raise OSError("no such disk")
