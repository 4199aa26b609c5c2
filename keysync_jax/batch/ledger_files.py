"""The ledger in files, for a folder that several hosts share.

    items/NAME.json           what to do
    claims/NAME.0003          the third claim of the item: who holds it and, once it has ended, how
    results/NAME.json         the result

A claim is made by creating the file of the next number, which the file system lets one process do (`link` to a name that must not exist,
which NFS does well, too). It is held while it is the highest number, and prolonged by its time of change. The clock is the file server's,
read off a file that was just written, so hosts whose clocks differ agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keysync_jax.batch import ledger as base
from keysync_jax.batch.faults import MachineFault
from keysync_jax.batch.ledger import CLAIMED, FAILED, OPEN, Claim, Entry, Item, Ledger
from keysync_jax.batch.owner import Owner

_HELD, _RELEASED, _DIED, _RETRY = "held", "released", "died", "retry"
_CLOCK_S = 5.0  # how long a reading of the server's clock is good for


class FileLedger(Ledger):
    """Files in folders.

    Args:
      folder: that holds them; must exist.
      lease_s: how long a claim lasts without a beat, seconds.
    """

    def __init__(self, folder: Path, lease_s: float = base.LEASE_S):
        self._folder, self._lease = folder, lease_s
        self._items, self._claims, self._results, self._new = (folder / name for name in ("items", "claims", "results", "new"))
        self._known: dict[str, Item] = {}
        self._finished: set[str] = set()
        self._ended: dict[str, str] = {}
        self._offset, self._read = 0.0, -_CLOCK_S
        with self._faults():
            for each in (self._items, self._claims, self._results, self._new):
                each.mkdir(exist_ok=True)

    def put(self, items: Sequence[Item]) -> None:
        with self._faults():
            for item in items:
                path, text = self._items / f"{item.name}.json", item.to_json()
                if not path.exists() or path.read_text(encoding="utf-8") != text:
                    os.replace(self._written(text), path)
                self._known[item.name] = item

    def reopen(self, names: Collection[str]) -> None:
        with self._faults():
            for name in names:
                if self._result(name) is not None:
                    self._next(name, self._last(name) + 1, {"state": _RETRY})
                    (self._results / f"{name}.json").unlink(missing_ok=True)
                    self._finished.discard(name)
                    self._ended.pop(name, None)

    def claim(self, owner: Owner, names: Collection[str], limit: int = 1) -> list[Claim]:
        claims: list[Claim] = []
        with self._faults():
            lasts = self._lasts()
            self._finished |= set(self._names(self._results))
            for item in self._in_order():
                if item.name not in names or item.name in self._finished:
                    continue
                history = [self._read_claim(item.name, number) for number in range(1, lasts.get(item.name, 0) + 1)]
                if history and history[-1]["state"] == _HELD and not self._is_free(item.name, len(history), history[-1]):
                    continue
                deaths, lapses = _tally(history)
                if claims and deaths:
                    continue
                if lapses >= base.MAX_LAPSES:
                    self._enter(item.name, FAILED, {"reason": base.lapsed(lapses), "ended": time.time()})
                    continue
                number = len(history) + 1
                if self._next(item.name, number, {"state": _HELD, "owner": list(owner), "since": time.time()}):
                    claims.append(Claim(item, str(number), deaths))
                if len(claims) >= limit or (claims and deaths):
                    break
        return claims

    def beat(self, claim: Claim) -> bool:
        with self._faults():
            if not self._is_mine(claim):
                return False
            os.utime(self._path(claim.item.name, int(claim.token)))
            return True

    def release(self, claim: Claim) -> None:
        self._end(claim, {"state": _RELEASED})

    def died(self, claim: Claim, reason: str) -> bool:
        if not self._end(claim, {"state": _DIED, "reason": reason}):
            return False
        with self._faults():
            history = [self._read_claim(claim.item.name, number) for number in range(1, int(claim.token) + 1)]
            deaths = _tally(history)[0]
            if deaths >= base.MAX_DEATHS:
                self._enter(claim.item.name, FAILED, {"reason": base.killed_twice(reason, deaths), "ended": time.time()})
            return deaths >= base.MAX_DEATHS

    def finish(self, claim: Claim, state: str, result: Mapping[str, Any]) -> bool:
        with self._faults():
            return self._is_mine(claim) and self._enter(claim.item.name, state, result)

    def entries(self) -> Iterator[Entry]:
        with self._faults():
            lasts = self._lasts()
            items = self._in_order()
        for item in items:
            with self._faults():
                history = [self._read_claim(item.name, number) for number in range(1, lasts.get(item.name, 0) + 1)]
                result = self._result(item.name)
                held = bool(history) and history[-1]["state"] == _HELD and not self._is_free(item.name, len(history), history[-1])
            state = result["state"] if result else CLAIMED if held else OPEN
            since = history[-1].get("since", 0.0) if history else 0.0
            yield Entry(item, state, _tally(history)[0], result["result"] if result else {}, since)

    def counts(self, names: Collection[str] | None = None) -> dict[str, int]:
        counts = dict.fromkeys(base.STATES, 0)
        with self._faults():
            lasts, finished = self._lasts(), set(self._names(self._results))
            self._ended = {name: state for name, state in self._ended.items() if name in finished}
            for item in self._in_order():
                if names is None or item.name in names:
                    counts[self._state(item.name, item.name in finished, lasts.get(item.name, 0))] += 1
        return counts

    def _state(self, name: str, finished: bool, last: int) -> str:
        """A finished item's result is read once, an unfinished one's last claim every time: thousands are asked after twice a second."""
        if finished and name not in self._ended and (result := self._result(name)) is not None:
            self._ended[name] = result["state"]
        if finished:
            return self._ended.get(name, OPEN)
        held = self._read_claim(name, last) if last else {"state": _RELEASED}
        return CLAIMED if held["state"] == _HELD and not self._is_free(name, last, held) else OPEN

    def _in_order(self) -> list[Item]:
        for name in self._names(self._items):
            if name not in self._known:
                self._known[name] = Item.from_json((self._items / f"{name}.json").read_text(encoding="utf-8"))
        return sorted(self._known.values(), key=lambda item: (item.position, item.name))

    @staticmethod
    def _names(folder: Path) -> list[str]:
        return [entry.name.removesuffix(".json") for entry in os.scandir(folder) if entry.name.endswith(".json")]

    def _lasts(self) -> dict[str, int]:
        """The highest number of a claim by item."""
        lasts: dict[str, int] = {}
        for entry in os.scandir(self._claims):
            name, _, number = entry.name.rpartition(".")
            if number.isdigit():  # NFS has files of its own there for a while
                lasts[name] = max(lasts.get(name, 0), int(number))
        return lasts

    def _last(self, name: str) -> int:
        number = 0
        while self._path(name, number + 1).exists():
            number += 1
        return number

    def _path(self, name: str, number: int) -> Path:
        return self._claims / f"{name}.{number:04d}"

    def _read_claim(self, name: str, number: int) -> dict[str, Any]:
        return json.loads(self._path(name, number).read_text(encoding="utf-8"))

    def _result(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self._results / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _is_mine(self, claim: Claim) -> bool:
        name, number = claim.item.name, int(claim.token)
        if (self._results / f"{name}.json").exists():
            return False
        return not self._path(name, number + 1).exists() and self._read_claim(name, number)["state"] == _HELD

    def _is_free(self, name: str, number: int, held: Mapping[str, Any]) -> bool:
        return Owner.from_json(held["owner"]).gone or self._path(name, number).stat().st_mtime < self._now() - self._lease

    def _end(self, claim: Claim, values: Mapping[str, Any]) -> bool:
        with self._faults():
            if not self._is_mine(claim):
                return False
            os.replace(self._written(json.dumps(values)), self._path(claim.item.name, int(claim.token)))
            return True

    def _enter(self, name: str, state: str, result: Mapping[str, Any]) -> bool:
        self._finished.add(name)
        return self._linked(json.dumps({"state": state, "result": dict(result)}), self._results / f"{name}.json")

    def _next(self, name: str, number: int, values: Mapping[str, Any]) -> bool:
        return self._linked(json.dumps(values), self._path(name, number))

    def _linked(self, text: str, path: Path) -> bool:
        """A file that appears whole, if nobody has made it before."""
        new = self._written(text)
        try:
            os.link(new, path)
        except FileExistsError:
            return False
        finally:
            new.unlink(missing_ok=True)
        return True

    def _written(self, text: str) -> Path:
        path = self._new / uuid.uuid4().hex
        try:
            path.write_text(text, encoding="utf-8")
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def _now(self) -> float:
        """The file server's clock."""
        if time.monotonic() - self._read >= _CLOCK_S:
            probe = self._written("")
            self._offset = probe.stat().st_mtime - time.time()
            probe.unlink()
            self._read = time.monotonic()
        return time.time() + self._offset

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineFault(f"the ledger {self._folder} cannot be used: {error}; make room, or give another output folder") from error


def _tally(history: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Deaths, and claims that just ended, since the last retry; the last claim is taken for ended."""
    deaths = lapses = 0
    for claim in history:
        if claim["state"] == _RETRY:
            deaths = lapses = 0
        deaths += claim["state"] == _DIED
        lapses += claim["state"] == _HELD
    return deaths, lapses
