"""Both kinds of ledger keep the same promises."""

import dataclasses
import multiprocessing
import os
import time

import pytest

from keysync_jax.batch.job_list import Job
from keysync_jax.batch.ledger import CLAIMED, DONE, FAILED, OPEN, Item, item_name
from keysync_jax.batch.ledger_files import FileLedger
from keysync_jax.batch.ledger_sqlite import SqliteLedger
from keysync_jax.batch.owner import Owner

GONE = Owner.of_this_process()._replace(pid=2**22 + 1)
ELSEWHERE = Owner("another host", 1, 1)


@pytest.fixture(params=[SqliteLedger, FileLedger])
def kind(request):
    return request.param


def items(count=3):
    jobs = [Job(f"item {n}", "/v", "/a", f"{n}.mp4") for n in range(count)]
    return [Item(item_name(job.id), n, job, {"model": "m", "options": {}}, [[], []]) for n, job in enumerate(jobs)]


def names(found):
    return {item.name for item in found}


def states(ledger):
    return [entry.state for entry in ledger.entries()]


def test_an_item_is_claimed_once_and_finished_once(kind, tmp_path):
    ledger, other, mine = kind(tmp_path), kind(tmp_path), Owner.of_this_process()
    ledger.put(items())
    ledger.put(items())
    (first,), (second,) = ledger.claim(mine, names(items())), other.claim(mine, names(items()))
    assert [first.item.position, second.item.position] == [0, 1]
    assert first.item == items()[0]
    assert states(ledger) == [CLAIMED, CLAIMED, OPEN]
    assert ledger.finish(first, DONE, {"seconds": 1.5}) and not ledger.finish(first, DONE, {"seconds": 9})
    assert not ledger.beat(first) and other.beat(second)
    assert next(iter(other.entries())).result == {"seconds": 1.5}
    assert [claim.item.position for claim in other.claim(mine, names(items()), limit=5)] == [2]
    assert other.claim(mine, names(items())) == []
    assert other.counts() == {"open": 0, "claimed": 2, "done": 1, "review": 0, "failed": 0}


def test_only_the_items_of_a_shard_are_claimed(kind, tmp_path):
    ledger = kind(tmp_path)
    ledger.put(items(6))
    shard = names(items(6)[1::2])
    assert [claim.item.position for claim in ledger.claim(ELSEWHERE, shard, limit=9)] == [1, 3, 5]
    assert ledger.counts(shard)[CLAIMED] == 3 and ledger.counts(names(items(6)[::2]))[OPEN] == 3


def test_two_deaths_fail_an_item_and_a_retry_forgets_them(kind, tmp_path):
    ledger = kind(tmp_path)
    ledger.put(items(2))
    (claim,) = ledger.claim(ELSEWHERE, names(items()))
    assert not ledger.died(claim, "SIGKILL")
    again = ledger.claim(ELSEWHERE, names(items()), limit=2)
    assert [each.deaths for each in again] == [1]  # alone: it may be the one that kills
    assert ledger.died(again[0], "SIGKILL (Killed)")
    assert states(ledger) == [FAILED, OPEN]
    assert next(iter(ledger.entries())).result["reason"].endswith("died 2 times while it was in hand, the last time: SIGKILL (Killed)")
    ledger.reopen(names(items()))
    assert states(ledger) == [OPEN, OPEN]
    assert [each.deaths for each in ledger.claim(ELSEWHERE, names(items()), limit=2)] == [0, 0]


def test_a_released_claim_is_open_and_blames_nobody(kind, tmp_path):
    ledger = kind(tmp_path)
    ledger.put(items(1))
    for _ in range(6):
        (claim,) = ledger.claim(ELSEWHERE, names(items()))
        ledger.release(claim)
    assert states(ledger) == [OPEN]
    assert not ledger.finish(claim, DONE, {}) and not ledger.died(claim, "late")
    assert ledger.claim(ELSEWHERE, names(items()))[0].deaths == 0


def test_a_claim_of_a_driver_that_is_gone_is_open_at_once_a_few_times(kind, tmp_path):
    ledger = kind(tmp_path)
    ledger.put(items(1))
    for _ in range(4):
        (claim,) = ledger.claim(GONE, names(items()))
        assert states(ledger) == [OPEN]
    assert ledger.claim(GONE, names(items())) == []
    assert states(ledger) == [FAILED]
    assert not ledger.finish(claim, DONE, {})


def test_a_claim_lapses_without_a_beat_and_its_holder_is_told(kind, tmp_path):
    ledger = kind(tmp_path, lease_s=0.4)
    ledger.put(items(1))
    (claim,) = ledger.claim(ELSEWHERE, names(items()))
    for _ in range(3):
        time.sleep(0.2)
        assert ledger.beat(claim) and ledger.claim(ELSEWHERE, names(items())) == []
    time.sleep(0.7)
    (taken,) = ledger.claim(ELSEWHERE, names(items()))
    assert not ledger.beat(claim) and not ledger.finish(claim, DONE, {}) and ledger.finish(taken, DONE, {})


def test_what_is_said_of_an_item_can_change_and_its_state_stays(kind, tmp_path):
    ledger = kind(tmp_path)
    ledger.put(items(2))
    (claim,) = ledger.claim(ELSEWHERE, names(items()))
    ledger.finish(claim, DONE, {})
    changed = items(2)[0]._replace(job=dataclasses.replace(items(1)[0].job, consent="signed"))
    ledger.put([changed])
    assert states(ledger) == [DONE, OPEN] and next(iter(kind(tmp_path).entries())).item.job.consent == "signed"


def _claim_all(kind, folder, out):
    ledger, mine = kind(folder), Owner.of_this_process()
    while claims := ledger.claim(mine, names(items(60))):
        with open(out, "a") as log:
            log.write(f"{claims[0].item.position}\n")
        ledger.finish(claims[0], DONE, {})


def test_processes_that_race_get_every_item_once(kind, tmp_path):
    kind(tmp_path).put(items(60))
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=_claim_all, args=(kind, tmp_path, tmp_path / f"{n}.txt")) for n in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    got = [int(line) for path in tmp_path.glob("?.txt") for line in path.read_text().split()]
    assert sorted(got) == list(range(60))


def test_an_item_costs_little_of_the_ledgers_time(kind, tmp_path):
    ledger, mine = kind(tmp_path), Owner.of_this_process()
    ledger.put(items(100))
    wanted, began = names(items(100)), time.process_time()
    for _ in range(100):
        (claim,) = ledger.claim(mine, wanted)
        assert ledger.beat(claim) and ledger.finish(claim, DONE, {"seconds": 1})
    assert ledger.counts(wanted)[DONE] == 100
    assert (time.process_time() - began) / 100 < 0.02


def test_an_owner_is_gone_when_its_process_is():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(30,))
    process.start()
    owner = Owner.of_this_process()._replace(pid=process.pid)
    assert not Owner.of_this_process().gone and not ELSEWHERE.gone
    assert owner.gone  # its number belongs to a process that began at another time
    process.kill()
    process.join()
    assert owner.gone and os.getpid() != owner.pid
