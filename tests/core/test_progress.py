import io

from rich.console import Console

from keysync_jax.core import progress


def test_a_log_file_gets_lines_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with progress.Bars() as bars:
        task = bars.add_task("encode", total=4)
        for _ in range(4):
            bars.advance(task)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and [line.split(" after")[0] for line in lines] == [f"encode: {n}/4" for n in (1, 2, 3, 4)]
    assert lines[2].endswith("s left") and "\x1b" not in err


def test_a_short_job_and_a_quiet_one_leave_a_log_file_alone(capsys, monkeypatch):
    for quiet in (False, True):
        monkeypatch.setattr(progress, "LINE_SECONDS", 0 if quiet else 30)
        with progress.Bars(quiet) as bars:
            bars.advance(bars.add_task("encode", total=2))
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_the_whole_name():
    bars = progress.Bars()
    bars.add_task("take [final].mp4", total=2)
    shown = io.StringIO()
    Console(file=shown, width=100).print(bars.get_renderable())
    assert "take [final].mp4" in shown.getvalue()
