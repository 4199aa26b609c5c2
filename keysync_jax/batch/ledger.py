"""The ledger: which items are open, claimed, done, to be reviewed or failed. Two kinds keep it, in one folder inside the output folder.

- `sqlite` on a local disk: one file, transactions.
- `files` on a folder that several hosts share: a file appears with a claim, once; locks are not needed.

A claim is a lease: who holds it says again and again that it does, and a claim of which nothing was heard for `LEASE_S` is open again.
It names the driver that holds it. A driver notices its workers' deaths itself and counts them against the item in hand; a claim whose
driver is gone is open at once on the same host, and counts as a lapse, since whoever killed the driver need not have been the item.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from keysync_jax.batch.job_list import Job
from keysync_jax.batch.owner import Owner

LEASE_S = 120.0
BEAT_S = 15.0
MAX_DEATHS = 2  # of workers, with this item in hand
MAX_LAPSES = 4  # claims that ended with their driver: a machine that goes down under an item takes the driver along

OPEN, CLAIMED, DONE, REVIEW, FAILED = "open", "claimed", "done", "review", "failed"
STATES: tuple[str, ...] = (OPEN, CLAIMED, DONE, REVIEW, FAILED)
FINISHED = (DONE, REVIEW, FAILED)


class Item(NamedTuple):
    """An item as the ledger is told it.

    Attributes:
      name: of its files: a hash of the job's id.
      position: in the list.
      job: what to do.
      recipe: settings, model, version and microbatch, JSON values: what its result depends on beside the inputs.
      inputs: of each input path, size and time of change; [] for one that is not there.
    """

    name: str
    position: int
    job: Job
    recipe: Mapping[str, Any]
    inputs: Sequence[Sequence[Any]]

    def to_json(self) -> str:
        return json.dumps(self._replace(job=dataclasses.asdict(self.job))._asdict(), sort_keys=True)  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, text: str) -> Item:
        values = json.loads(text)
        return cls(**{**values, "job": Job(**values["job"])})


class Claim(NamedTuple):
    """The right to work on an item; `token` tells it from every other claim of the item."""

    item: Item
    token: str
    deaths: int


class Entry(NamedTuple):
    """An item as the ledger holds it. `result` is {} unless it is finished; `since`, in seconds of the epoch, of a claim."""

    item: Item
    state: str
    deaths: int
    result: Mapping[str, Any]
    since: float = 0.0


class Ledger(abc.ABC):
    """Every method is atomic, whoever else uses the ledger; one that ends with an error has changed nothing.

    Raises (all methods):
      MachineFault: the ledger cannot be read or written, for example because the disk is full.
    """

    @abc.abstractmethod
    def put(self, items: Sequence[Item]) -> None:
        """Adds items that are new, and replaces what is said of the others; their states stay."""

    @abc.abstractmethod
    def reopen(self, names: Collection[str]) -> None:
        """Makes finished items open again, with no deaths counted; others stay as they are."""

    @abc.abstractmethod
    def claim(self, owner: Owner, names: Collection[str], limit: int = 1) -> list[Claim]:
        """Claims the first open items among `names`: up to `limit`, but one alone if a worker has died with it; [] where none is open."""

    @abc.abstractmethod
    def beat(self, claim: Claim) -> bool:
        """Prolongs the lease. False: the claim is lost, and what was made must not be kept."""

    @abc.abstractmethod
    def release(self, claim: Claim) -> None:
        """Gives an item back, unblamed; nothing happens if the claim is lost."""

    @abc.abstractmethod
    def died(self, claim: Claim, reason: str) -> bool:
        """Counts a worker's death; True if the item is failed by it."""

    @abc.abstractmethod
    def finish(self, claim: Claim, state: str, result: Mapping[str, Any]) -> bool:
        """Enters the result of an item; False: the claim is lost, nothing was entered."""

    @abc.abstractmethod
    def entries(self) -> Iterator[Entry]:
        """All items in order of the list."""

    @abc.abstractmethod
    def counts(self, names: Collection[str] | None = None) -> dict[str, int]:
        """How many items are in each of the `STATES`; only those among `names`, if given."""

    def close(self) -> None:  # noqa: B027 - files need no closing
        """Frees what is held open."""


def item_name(job_id: str) -> str:
    """Name of an item's files."""
    return hashlib.sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def killed_twice(reason: str, deaths: int) -> str:
    """Why an item is failed whose workers died."""
    return f"its worker died {deaths} times while it was in hand, the last time: {reason}"


def lapsed(lapses: int) -> str:
    """Why an item is failed whose drivers ended."""
    return f"{lapses} times the program, or the machine, went down while it was in hand"
