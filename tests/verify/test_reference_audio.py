"""The reference's raw audio pipeline: where it cuts, and what that loses."""

import json
from pathlib import Path

import numpy as np
from bounds import close
from tiny_speech import encoder

from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.verify import reference_audio


def features(kind: str) -> reference_audio.Features:
    return AudioFeatures(*encoder(kind))


def noise(seconds: float) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(round(seconds * 16000))).astype(np.float32)


def test_splits():
    stored = json.loads((Path(__file__).parents[1] / "golden" / "hubert" / "splits.json").read_text())
    for chunk, totals in stored.items():
        for total, paths in totals.items():
            for sizes in paths.values():
                assert reference_audio.calculate_splits(int(total), int(chunk.removeprefix("chunk_"))) == sizes


def test_frames_are_lost_at_the_cuts_and_only_there(monkeypatch):
    monkeypatch.setattr(reference_audio, "SPLIT_SAMPLES", 2 * 16000)
    run, wav = features("hubert"), noise(9.0)
    assert len(reference_audio.hubert_frames(run, wav)) == 224  # each cut loses a token
    assert len(run(wav)) == 225


def test_wavlm_may_give_a_frame_more():
    run, wav = features("wavlm"), noise(1.0)
    reference = reference_audio.wavlm_frames(run, wav)
    assert len(reference) == 26
    close(reference[:25], run(wav), 4, terms=400)  # some twenty layers, sums of up to 400 terms
