"""Every stored reference case through our code, and those of `KEYSYNC_GOLDEN` where it points to more."""

import os
from pathlib import Path

import pytest

from keysync_jax.verify.harness import load_case, run_case

_FOLDERS = [Path(__file__).parents[1] / "golden"]
if os.environ.get("KEYSYNC_GOLDEN"):
    _FOLDERS.append(Path(os.environ["KEYSYNC_GOLDEN"]))
_CASES = {path.parent.name: path.parent for folder in _FOLDERS for path in sorted(folder.glob("*/case.json"))}


@pytest.mark.parametrize("name", sorted(_CASES))
def test_case(name):
    result = run_case(load_case(_CASES[name]))
    assert result.ok, result.reason or f"worst: {result.worst}"


def test_the_repository_carries_the_cases_that_ci_needs():
    assert {"sampler_keyframes", "loss", "hubert", "wavlm", "masks", "pipeline_windows", "vae_autoencoding_engine"} <= set(_CASES)
