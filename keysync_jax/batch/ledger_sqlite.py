"""The ledger in SQLite, for a local disk."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keysync_jax.batch import ledger as base
from keysync_jax.batch.faults import MachineFault
from keysync_jax.batch.ledger import CLAIMED, FAILED, OPEN, Claim, Entry, Item, Ledger
from keysync_jax.batch.owner import Owner

_BUSY_S = 60.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
  name TEXT PRIMARY KEY, position INTEGER NOT NULL, item TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'open', token TEXT, owner TEXT,
  since REAL NOT NULL DEFAULT 0, lease REAL NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0, lapses INTEGER NOT NULL DEFAULT 0,
  result TEXT NOT NULL DEFAULT '{}'
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_state ON items (state, position);
"""
_FREE = "token = NULL, owner = NULL, lease = 0"


class SqliteLedger(Ledger):
    """One file. Every thread and process opens its own.

    Args:
      folder: that holds it; must exist.
      lease_s: how long a claim lasts without a beat, seconds.
    """

    def __init__(self, folder: Path, lease_s: float = base.LEASE_S):
        self._path, self._lease = folder / "ledger.sqlite", lease_s
        with self._faults():
            self._db = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            # A write-ahead log lets `--status` read while workers write. With NORMAL a loss of power may lose the last entries, whose items
            # are then made again, and never damages the file.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)

    def put(self, items: Sequence[Item]) -> None:
        rows = [(item.name, item.position, item.to_json()) for item in items]
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO items (name, position, item) VALUES (?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET position = excluded.position, item = excluded.item",
                rows,
            )

    def reopen(self, names: Collection[str]) -> None:
        with self._transaction() as db:
            change = f"state = 'open', deaths = 0, lapses = 0, result = '{{}}', {_FREE}"
            rows = [(name,) for name in names]
            db.executemany(f"UPDATE items SET {change} WHERE name = ? AND state NOT IN ('open', 'claimed')", rows)

    def claim(self, owner: Owner, names: Collection[str], limit: int = 1) -> list[Claim]:
        claims: list[Claim] = []
        with self._transaction() as db:
            now = time.time()
            columns = "name, item, state, owner, lease, deaths, lapses"
            for name, item, state, holder, lease, deaths, lapses in db.execute(
                f"SELECT {columns} FROM items WHERE state IN ('open', 'claimed') ORDER BY position"
            ):
                if name not in names or (state == CLAIMED and not _is_free(holder, lease, now)):
                    continue
                if claims and deaths:
                    continue
                lapses += state == CLAIMED
                if lapses >= base.MAX_LAPSES:
                    self._fail(db, name, base.lapsed(lapses))
                    continue
                token = uuid.uuid4().hex
                db.execute(
                    "UPDATE items SET state = 'claimed', token = ?, owner = ?, since = ?, lease = ?, lapses = ? WHERE name = ?",
                    (token, json.dumps(owner), now, now + self._lease, lapses, name),
                )
                claims.append(Claim(Item.from_json(item), token, deaths))
                if len(claims) >= limit or deaths:
                    break
        return claims

    def beat(self, claim: Claim) -> bool:
        with self._transaction() as db:
            return self._mine(db, "lease = ?", (time.time() + self._lease,), claim)

    def release(self, claim: Claim) -> None:
        with self._transaction() as db:
            self._mine(db, f"state = 'open', {_FREE}", (), claim)

    def died(self, claim: Claim, reason: str) -> bool:
        with self._transaction() as db:
            if not self._mine(db, f"state = 'open', deaths = deaths + 1, {_FREE}", (), claim):
                return False
            deaths = db.execute("SELECT deaths FROM items WHERE name = ?", (claim.item.name,)).fetchone()[0]
            if deaths >= base.MAX_DEATHS:
                self._fail(db, claim.item.name, base.killed_twice(reason, deaths))
            return deaths >= base.MAX_DEATHS

    def finish(self, claim: Claim, state: str, result: Mapping[str, Any]) -> bool:
        with self._transaction() as db:
            return self._mine(db, f"state = ?, result = ?, {_FREE}", (state, json.dumps(dict(result))), claim)

    def entries(self) -> Iterator[Entry]:
        with self._faults():
            rows = self._db.execute("SELECT item, state, owner, lease, since, deaths, result FROM items ORDER BY position").fetchall()
        now = time.time()
        for item, state, owner, lease, since, deaths, result in rows:
            shown = OPEN if state == CLAIMED and _is_free(owner, lease, now) else state
            yield Entry(Item.from_json(item), shown, deaths, json.loads(result), since)

    def counts(self, names: Collection[str] | None = None) -> dict[str, int]:
        counts = dict.fromkeys(base.STATES, 0)
        with self._faults():
            rows = self._db.execute("SELECT name, state, owner, lease FROM items").fetchall()
        now = time.time()
        for name, state, owner, lease in rows:
            if names is None or name in names:
                counts[OPEN if state == CLAIMED and _is_free(owner, lease, now) else state] += 1
        return counts

    def close(self) -> None:
        self._db.close()

    def _mine(self, db: sqlite3.Connection, change: str, values: Sequence[Any], claim: Claim) -> bool:
        where = "WHERE name = ? AND token = ? AND state = 'claimed'"
        return db.execute(f"UPDATE items SET {change} {where}", (*values, claim.item.name, claim.token)).rowcount == 1

    def _fail(self, db: sqlite3.Connection, name: str, reason: str) -> None:
        result = json.dumps({"reason": reason, "ended": time.time()})
        db.execute(f"UPDATE items SET state = '{FAILED}', result = ?, {_FREE} WHERE name = ?", (result, name))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._faults():
            self._db.execute("BEGIN IMMEDIATE")  # readers that become writers later may find that another was faster
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise MachineFault(f"the ledger {self._path} cannot be used: {error}; make room, or give another output folder") from error


def _is_free(owner: str | None, lease: float, now: float) -> bool:
    return lease < now or owner is None or Owner.from_json(json.loads(owner)).gone
