"""Clips side by side sit in the rows that they have alone."""

import itertools
from types import SimpleNamespace

import pytest

from keysync_jax.batch.own_rows import OwnRows


def clip(name, count):
    return [SimpleNamespace(index=index, name=f"{name}{index}") for index in range(count)]


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_every_clip_begins_in_the_first_row_and_every_window_comes_once(microbatch):
    rows = {}

    def sampler(windows):
        for place, window in enumerate(windows):
            rows.setdefault(window.name, place % microbatch)
            yield window.name

    clips = [clip("a", 3), clip("b", 1), clip("c", 6)]
    windows = list(itertools.chain(*clips))
    assert list(OwnRows(sampler, None, microbatch)(windows)) == [window.name for window in windows]
    assert rows == {window.name: window.index % microbatch for window in windows}
