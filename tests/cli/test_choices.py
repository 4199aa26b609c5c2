"""Every list of choices stands once: what the commands offer is what the code behind them knows."""

import argparse

import pytest

from keysync_jax import config
from keysync_jax.cli import bench_verbs, data_verbs, dub_verbs, evaluate_verbs, prepare_verbs, weights_verbs
from keysync_jax.converters.lazy import FLOAT_TYPES
from keysync_jax.evaluation.talkers_clips import SPLITS
from keysync_jax.evaluation.video_metrics import RATIOS
from keysync_jax.media import faces, masks
from keysync_jax.models import attention
from keysync_jax.planning import bench


def test_what_is_offered_is_what_is_known():
    assert list(masks.KINDS) == config.MASK_KINDS
    assert tuple(faces.BACKENDS) == config.FACE_BACKENDS
    assert tuple(FLOAT_TYPES) == config.STORED_DTYPES
    assert ("auto", *attention._KERNELS) == config.ATTENTION
    assert tuple(bench.SIZES) == config.BENCH_SIZES
    assert tuple(RATIOS) == config.LIP_RATIOS
    assert set(config.HELD_OUT) < set(SPLITS)


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (["dub", "a", "b", "-o", "c", "--mask"], config.MASK_KINDS),
        (["convert", "a", "-o", "b", "--mask"], config.MASK_KINDS),
        (["data", "inspect", "a", "--mask"], config.MASK_KINDS),
        (["dub", "a", "b", "-o", "c", "--faces"], config.FACE_BACKENDS),
        (["prepare", "a", "-o", "b", "--model", "c", "--faces"], config.FACE_BACKENDS),
        (["evaluate", "--video", "a", "--faces"], config.FACE_BACKENDS),
        (["evaluate", "--video", "a", "--ratio"], config.LIP_RATIOS),
        (["evaluate", "--talkers", "--split"], config.HELD_OUT),
        (["export", "a", "-o", "b", "--format"], config.EXPORT_FORMATS),
        (["export", "a", "-o", "b", "--stage"], config.STAGES),
        (["bench", "train", "--remat"], [each.value for each in config.Remat]),
        (["bench", "unet", "--size"], config.BENCH_SIZES),
    ],
)
def test_a_command_takes_all_and_nothing_else(words, choices, capsys):
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(required=True)
    for add in (bench_verbs.add_bench, data_verbs.add_data, dub_verbs.add_dub, evaluate_verbs.add_evaluate, prepare_verbs.add_prepare):
        add(verbs)
    weights_verbs.add_verbs(verbs)
    for choice in choices:
        assert choice in str(parser.parse_args([*words, choice]))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([*words, "another"])
    assert stop.value.code == 2 and all(repr(choice) in capsys.readouterr().err for choice in choices[:1])
