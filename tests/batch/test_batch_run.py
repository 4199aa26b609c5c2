"""A batch with work that costs nothing: done, failed, killed, too long, stopped, gone on with; whatever dies, nothing is lost."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from copy_work import open_copy, open_dying, open_nothing

from keysync_jax.batch.batch_run import Shard, local, run_batch, status
from keysync_jax.batch.faults import MachineFault
from keysync_jax.batch.folders import BatchFolder
from keysync_jax.batch.job_list import Job
from keysync_jax.core.errors import UsageError

RECIPE = {"model": "m", "microbatch": 1}


def make_jobs(folder: Path, *ids: str) -> list[Job]:
    jobs = []
    for name in ids:
        path = folder / f"{name}.in"
        path.write_bytes(name.encode())
        jobs.append(Job(name, str(path), str(path), f"{name}.mp4"))
    return jobs


def run(folder, jobs, work=open_copy, workers=1, recipe=RECIPE, **more):
    return run_batch(BatchFolder(folder), jobs, recipe, work, engine=local(workers), **more)


def lines(folder):
    return {row["id"]: row for row in map(json.loads, (folder / "report.jsonl").read_text().splitlines())}


def test_good_and_bad_items_with_two_workers(tmp_path):
    out = tmp_path / "out"
    good = [f"good{n}" for n in range(4)]
    jobs = make_jobs(tmp_path, "fail", "kill", "bug", "hang", "look", "refused", "lost", *good)
    jobs[5] = jobs[5].__class__(**{**vars(jobs[5]), "error": "--seed -1 is out of range"})
    Path(jobs[6].video).unlink()
    done = run(out, jobs, workers=2, item_timeout=4)
    assert done.failed == 6 and done.status.counts == {"open": 0, "claimed": 0, "done": 4, "review": 1, "failed": 6}
    found = lines(out)
    assert [found[name]["state"] for name in good] == ["done"] * 4
    assert [(out / f"{name}.mp4").read_text() for name in good] == good
    assert found["look"]["reason"] == "lips do not follow" and (out / "look.mp4").exists()
    for name, words in {"fail": "no face", "kill": "died 2 times", "bug": "ValueError: a bug", "hang": "exceeded its time of 4 s",
                        "refused": "--seed -1", "lost": "does not exist"}.items():  # fmt: skip
        assert words in found[name]["reason"] and found[name]["output"] is None and not (out / f"{name}.mp4").exists()
    assert "SIGKILL" in found["kill"]["reason"] and found["kill"]["deaths"] == 2
    page = (out / "report.html").read_text()
    assert page.index("<b class=failed>") < page.index("<b class=review>") < page.index("<b class=done>") and "data:image/jpeg" in page
    assert list((out / ".keysync-batch" / "scratch").iterdir()) == []
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [".keysync-batch", "look.mp4", "report.html", "report.jsonl", *(f"{name}.mp4" for name in good)]
    )


def test_again_does_nothing_twice_and_failed_items_are_tried_when_asked(tmp_path):
    log = tmp_path / "log"
    work = functools.partial(open_copy, log=str(log))
    jobs = make_jobs(tmp_path, "a", "b", "fail")
    run(tmp_path / "out", jobs, work)
    assert log.read_text().count("\n") == 3
    assert run(tmp_path / "out", jobs, work).failed == 1
    assert log.read_text().count("\n") == 3  # the model was not even opened
    (tmp_path / "out" / "a.mp4").unlink()
    run(tmp_path / "out", jobs, work, retry_failed=True)
    assert [line.split()[0] for line in log.read_text().splitlines()][3:] == ["a", "fail"]


def test_other_settings_models_and_inputs_do_not_mix(tmp_path):
    out, jobs = tmp_path / "out", make_jobs(tmp_path, "a", "fail")
    run(out, jobs)
    before = (out / "report.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"a made with another model \(m, now n\)"):
        run(out, jobs, recipe={**RECIPE, "model": "n"})
    with pytest.raises(UsageError, match="another seed"):
        run(out, [jobs[0].__class__(**{**vars(jobs[0]), "options": {"seed": 4}})])
    os.utime(jobs[0].video, (5, 5))
    with pytest.raises(UsageError, match="another video .*a.in has changed"):
        run(out, jobs)
    assert (out / "report.jsonl").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.mp4").write_text("precious")
    with pytest.raises(UsageError, match="is there and is not of this batch"):
        run(tmp_path / "other", make_jobs(tmp_path, "b"))
    assert (tmp_path / "other" / "b.mp4").read_text() == "precious"


@pytest.mark.parametrize("kind", ["sqlite", "files"])
def test_shards_share_a_folder_and_any_of_them_writes_the_report(tmp_path, kind):
    out, jobs = tmp_path / "out", make_jobs(tmp_path, *"abcd", "fail")
    assert run(out, jobs, shard=Shard.parse("0/2"), ledger_kind=kind).failed == 1
    assert {name: row["state"] for name, row in lines(out).items()} == {
        "a": "done", "b": "open", "c": "done", "d": "open", "fail": "failed"}  # fmt: skip
    assert run(out, jobs, shard=Shard.parse("1/2")).failed == 0
    assert status(BatchFolder(out)).status.counts["done"] == 4
    with pytest.raises(UsageError, match="leave --ledger out"):
        run(out, jobs, ledger_kind="files" if kind == "sqlite" else "sqlite")


def test_a_fault_of_the_machine_blames_no_item(tmp_path):
    out, jobs = tmp_path / "out", make_jobs(tmp_path, "a", "full", "b")
    (tmp_path / "full").touch()
    with pytest.raises(MachineFault, match="No space left"):
        run(out, jobs)
    assert status(BatchFolder(out)).status.counts == {"open": 2, "claimed": 0, "done": 1, "review": 0, "failed": 0}
    (tmp_path / "full").unlink()
    assert run(out, jobs).status.counts["done"] == 3
    with pytest.raises(MachineFault, match="model is not there"):
        run(tmp_path / "none", jobs, open_nothing)
    with pytest.raises(MachineFault, match="before they take an item: SIGKILL"):
        run(tmp_path / "dying", jobs, open_dying)
    assert status(BatchFolder(tmp_path / "dying")).status.counts["open"] == 3


def test_several_items_at_once_and_a_killer_among_them(tmp_path):
    log = tmp_path / "log"
    jobs = make_jobs(tmp_path, "a", "kill", "b", "c", "d")
    done = run(tmp_path / "out", jobs, functools.partial(open_copy, together=3, log=str(log)))
    assert done.status.counts["done"] == 4 and done.failed == 1
    assert lines(tmp_path / "out")["kill"]["reason"].startswith("its worker died 2 times")
    assert log.read_text().splitlines()[0].endswith(" 3")


_SCRIPT = """
import functools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where a shell ignores it
sys.path.insert(0, {helpers!r})
from pathlib import Path
from copy_work import open_copy
from keysync_jax.batch.batch_run import local, run_batch
from keysync_jax.batch.folders import BatchFolder
from keysync_jax.batch.job_list import Job
if __name__ == "__main__":
    ids = [f"i{{n}}" for n in range({items})]
    jobs = [Job(i, str(Path({folder!r}) / f"{{i}}.in"), str(Path({folder!r}) / f"{{i}}.in"), f"{{i}}.mp4") for i in ids]
    try:
        run_batch(BatchFolder(Path({folder!r}) / "out"), jobs, {{}}, functools.partial(open_copy, slow=0.4, log={log!r}), engine=local(2))
    except KeyboardInterrupt:
        sys.exit(9)
"""


def test_killed_and_interrupted_drivers_leave_what_goes_on(tmp_path):
    items = 24  # so many that on a slow machine some are left when the interrupt comes
    make_jobs(tmp_path, *(f"i{n}" for n in range(items)))
    log, out = tmp_path / "log", tmp_path / "out"
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.format(helpers=str(Path(__file__).parents[1] / "helpers"), folder=str(tmp_path), log=str(log), items=items))

    def begun() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    def begin() -> subprocess.Popen:
        """A batch that has begun three items itself: a signal that comes before a process is itself is lost."""
        before = begun()
        process = subprocess.Popen([sys.executable, str(script)])
        while begun() < before + 3:
            assert process.poll() is None
            time.sleep(0.02)
        return process

    process = begin()
    pids = {int(line.split()[1]) for line in log.read_text().splitlines()}
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "a killed driver's workers end by themselves"
    process = begin()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 9
    assert status(BatchFolder(out)).status.counts["claimed"] == 0
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    assert status(BatchFolder(out)).status.counts["done"] == items
    assert all(row["deaths"] == 0 for row in lines(out).values())
    assert list((out / ".keysync-batch" / "scratch").iterdir()) == []
