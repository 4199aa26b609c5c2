"""Parity runners of the figures that are functions of arrays: distances of sets, synchrony, pictures, landmarks, votes."""

from __future__ import annotations

import functools

import numpy as np

from keysync_jax.figures import image_pairs, mouth_shape, sets, sync, votes
from keysync_jax.verify.harness import Case, runner


@runner("eval_cmmd")
def run_cmmd(case: Case) -> dict[str, np.ndarray]:
    return {key: np.asarray(sets.cmmd(*_two_sets(case, key.split(".")[1]))) for key in case.expected}


@runner("eval_frechet")
def run_frechet(case: Case) -> dict[str, np.ndarray]:
    return {key: np.asarray(sets.frechet(*_two_sets(case, key.split(".")[1]))) for key in case.expected}


def _two_sets(case: Case, name: str) -> tuple[np.ndarray, np.ndarray]:
    return case.inputs[f"{name}.x"], case.inputs[f"{name}.y"]


def synchrony_figures(found: sync.Synchrony) -> dict[str, np.ndarray]:
    """The names under which the cases store what `synchrony` returns."""
    values = {"dists": found.distances, "mean_dist": found.mean, "lse_d": found.lse_d, "lse_c": found.lse_c}
    return {key: np.asarray(value) for key, value in (values | {"offset": found.offset, "framewise": found.framewise}).items()}


@runner("eval_lse")
def run_lse(case: Case) -> dict[str, np.ndarray]:
    out = {}
    for key in case.expected:
        name, quantity = key.split(".")[1:]
        if name == "mfcc":
            out[key] = sync.mfcc(case.inputs[f"audio.{quantity}"])
        else:
            found = sync.synchrony(case.inputs[f"{name}.lip"], case.inputs[f"{name}.aud"], case.config.get("vshift", 15))
            out[key] = synchrony_figures(found)[quantity]
    return out


@runner("eval_image")
def run_image(case: Case) -> dict[str, np.ndarray]:
    pairs = list(zip(case.inputs["a"], case.inputs["b"], strict=True))
    return {
        "out.psnr": np.array([image_pairs.psnr(a, b) for a, b in pairs]),
        "out.ssim_gaussian": np.array([image_pairs.ssim(a, b) for a, b in pairs]),
        "out.vl": np.array([image_pairs.sharpness(a) for a, _ in pairs]),
    }


@runner("eval_landmarks")
def run_landmarks(case: Case) -> dict[str, np.ndarray]:
    pred, truth = case.inputs["pred"], case.inputs["truth"]
    frames, ratios = mouth_shape.landmark_distance(pred, truth), mouth_shape.mouth_ratios(pred)
    out = {f"out.mar_{name}": ratio for name, ratio in ratios.items()}
    return out | {
        "out.lmd_frames": frames,
        "out.lmd_mouth": frames.mean(),
        "out.lmd_face": mouth_shape.landmark_distance(pred, truth, slice(None)).mean(),
        "out.lmd_mouth_iod": (frames / mouth_shape.eye_distance(truth)).mean(),
        "out.lipleak": mouth_shape.leak_sweep(ratios["inner"]),
        "out.align": np.stack([mouth_shape.similarity(five, case.inputs["template"]) for five in case.inputs["five"]]),
    }


@runner("eval_votes")
def run_votes(case: Case) -> dict[str, np.ndarray]:
    a, b, winner = (case.inputs[name] for name in ("a", "b", "winner"))
    count = int(case.config.get("M", max(a.max(), b.max()) + 1))
    elo = functools.partial(votes.elo, count=count)
    rounds = np.stack([elo(a[order], b[order], winner[order]) for order in case.inputs["boot"].T])
    one, other, result = case.inputs["unique"].T
    table = functools.partial(votes.wins, one, other, np.choose(result, [1, 2, 0]), count)
    return {
        "out.elo": elo(a, b, winner),
        "out.elo_k32": elo(a, b, winner, k=32.0),
        "out.elo_reversed": elo(a[::-1], b[::-1], winner[::-1]),
        "out.elo_boot": rounds,
        "out.elo_median": np.floor(np.median(rounds, axis=0) + 0.5).astype(np.int64),
        "out.elo_low": np.quantile(rounds, 0.025, axis=0),
        "out.elo_high": np.quantile(rounds, 0.975, axis=0),
        "out.bt": votes.bradley_terry(votes.wins(a, b, winner, count)),
        "out.bt_boot": np.stack([votes.bradley_terry(table(weights)) for weights in case.inputs["boot_weights"]]),
        "out.win_fraction": votes.win_share(a, b, winner, count),
    }
