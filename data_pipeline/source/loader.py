"""Batches for one host, read ahead by Grain. The only state is the number of the next step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from keysync_jax.core.errors import KeySyncError

# Steps that an endless run is declared to have (Grain wants a length).
_ENDLESS = 2**40


class Reader(Protocol):
    """What batches are read with: pure maps from (step, row) to samples, and from samples to arrays. See `WindowReader`."""

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal orders of samples."""
        ...

    def sample(self, step: int, row: int, batch_size: int, shift: int = 0) -> Any:
        """Row `row` of the global batch of `step`."""
        ...

    def read(self, samples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Arrays of some samples, the batch axis first."""
        ...


class BatchSource:
    """Random access by step to this host's part of every global batch (Grain's `RandomAccessDataSource`)."""

    def __init__(
        self,
        reader: Reader,
        batch_size: int,
        host: int = 0,
        hosts: int = 1,
        first_step: int = 0,
        num_steps: int = _ENDLESS,
        seen: int | None = None,
    ):
        """Args:
          reader: gives the samples.
          batch_size: samples of the global batch, over all hosts.
          host, hosts: this host's number and how many there are; host k has rows k b / hosts to (k + 1) b / hosts - 1.
          first_step: element 0 is the batch of this step.
          num_steps: length.
          seen: samples of all steps before the first one; None if all had this batch size.

        Raises:
          KeySyncError: the batch does not divide among the hosts.
        """
        if batch_size < 1 or hosts < 1 or batch_size % hosts or not 0 <= host < hosts:
            raise KeySyncError(f"a global batch of {batch_size} does not divide among {hosts} hosts (this is {host}); choose a multiple")
        if first_step < 0:
            raise KeySyncError(f"first step is {first_step}; steps count from 0")
        self._reader = reader
        self._batch_size = batch_size
        self._rows = range(host * batch_size // hosts, (host + 1) * batch_size // hosts)
        self._first_step = first_step
        self._num_steps = num_steps
        self._shift = 0 if seen is None else seen - first_step * batch_size

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step = self._first_step + int(index)
        return self._reader.read([self._reader.sample(step, row, self._batch_size, self._shift) for row in self._rows])

    def __repr__(self) -> str:
        return f"BatchSource({len(self._rows)} of {self._batch_size} rows from step {self._first_step})"


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterator over this host's batches (keys of `WindowReader.read`), beginning with any step.

    `step` is the number of the batch that comes next; a run saved with it continues exactly with `first_step=step`, on any number of
    hosts, threads and workers. Use as a context manager, or call `close`, so that worker processes end.
    """

    def __init__(
        self,
        reader: Reader,
        batch_size: int,
        first_step: int = 0,
        host: int = 0,
        hosts: int = 1,
        threads: int = 2,
        workers: int = 0,
        prefetch: int = 4,
        num_steps: int | None = None,
        seen: int | None = None,
    ):
        """Args:
        reader, batch_size, first_step, host, hosts, seen: see `BatchSource`.
        threads: reading threads in each process; 0 reads in the calling thread.
        workers: reading processes; 0 for none. Worth it only with many cores: arrays are copied between processes. A script that
          asks for workers must be importable (`if __name__ == "__main__":`), since they are spawned.
        prefetch: batches read ahead, per process.
        num_steps: stop after so many batches; None never stops.
        """
        import grain

        if min(threads, workers) < 0 or prefetch < 1:
            raise KeySyncError(f"threads {threads} and workers {workers} must not be negative, prefetch {prefetch} must be positive")
        self.step = first_step
        source = BatchSource(reader, batch_size, host, hosts, first_step, _ENDLESS if num_steps is None else num_steps, seen)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads) if threads else 0)
        dataset = grain.MapDataset.source(source).to_iter_dataset(options)
        if workers:
            _parse_flags()
            processes = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
            dataset = dataset.mp_prefetch(processes)
        self._iterator = iter(dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def close(self) -> None:
        """End reading threads and processes."""
        self._iterator.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _parse_flags() -> None:
    """Grain's workers read absl flags, which raise where no absl main ran; their defaults are what we want then."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
