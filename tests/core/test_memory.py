"""Peak memory, in one unit on every platform."""

import resource
import sys

import numpy as np

from keysync_jax.core.memory import peak_bytes


def test_the_peak_counts_bytes():
    before = peak_bytes()
    block = np.ones(before // 8 + (64 << 20) // 8)  # more than was ever there
    assert block.nbytes < peak_bytes() < before + block.nbytes + (32 << 20)


def test_macos_counts_bytes_already(monkeypatch):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak <= peak_bytes() < 1024 * peak


def test_windows_does_not_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes() == 0
