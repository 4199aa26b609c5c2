"""Parity runners of KeyFace's bookkeeping: named emotions and their curves, and the windows of its pipeline."""

from __future__ import annotations

import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.inference.emotion import NAMED
from keysync_jax.verify import reference_keyface
from keysync_jax.verify.harness import Case, runner


@runner("keyface_emotions")
def run_emotions(case: Case) -> dict[str, np.ndarray]:
    case.check_equal("names of emotions", list(NAMED), case.meta["table_names"])
    out = {"out.table": np.array(list(NAMED.values()))}
    for number, run in enumerate(case.meta["runs"]):
        refused = case.meta["errors"].get(str(number))
        try:
            curves = reference_keyface.emotion_curves(run["states"], run["total_frames"], run["accentuate"])
        except KeySyncError as error:
            case.check(f"run {number}", refused is not None, f"the reference makes this curve, we refuse it: {error}")
            continue
        case.check(f"run {number}", refused is None, f"the reference refuses this curve ({refused}), we make it")
        for name, curve in zip(("valence", "arousal"), curves, strict=True):
            out[f"out.{number}.{name}"] = curve
            out[f"out.{number}.pipeline_{name}"] = reference_keyface.accented(curve) if run["accentuate"] else curve
    return out


@runner("keyface_windows")
def run_windows(case: Case) -> dict[str, np.ndarray]:
    recorded = case.json("windows.json")
    case.check_equal("number of runs", len(recorded), len(case.meta["runs"]))
    for number, run in enumerate(recorded):
        lengths = " ".join(f"{name} {run[f'n_{name}']}" for name in ("wavlm", "wav2vec2", "beats"))
        name = f"windows[{number}] {lengths} {run['input']} until {run['compute_until']}"
        try:
            ours = reference_keyface.describe(run)
        except KeySyncError as error:
            case.check(name, run["error"] is not None, f"the reference plans this clip, we refuse it: {error}")
            continue
        if run["error"] is not None:
            case.check(name, False, f"the reference refuses this clip ({run['error']}), we plan it")
            continue
        for part, value in ours.items():
            case.check_equal(f"{name} {part}", value, run[part])
    return {}
