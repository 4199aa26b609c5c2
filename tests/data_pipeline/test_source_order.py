import numpy as np
import pytest
from bounds import spread

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.clip_index import Clip, order_clips
from keysync_jax.data_pipeline.source import order
from keysync_jax.data_pipeline.source.mixture import ClipFilter, DatasetChoice, select
from keysync_jax.data_pipeline.source.order import BLOCK, Order
from keysync_jax.data_pipeline.source.windows import InterpolationWindows, KeyframeWindows, windows_for


def test_keyframe_windows():
    windows = KeyframeWindows()
    assert windows.min_length == 171 and windows.fit(170) == (0, 0)
    assert windows.fit(171) == (13, 1) and windows.fit(250) == (13, 80)
    np.testing.assert_array_equal(windows.frames(5, 13), np.arange(5, 5 + 170, 13))
    # The last start leaves the clip's very last frame unused, as in the reference.
    assert windows.frames(79, 13)[-1] == 248


def test_interpolation_windows():
    windows = InterpolationWindows()
    assert windows.min_length == 15 and windows.fit(14) == (0, 0) and windows.fit(15) == (1, 1) and windows.fit(100) == (1, 86)
    np.testing.assert_array_equal(windows.frames(3, 1), np.arange(3, 17))


@pytest.mark.parametrize("length", range(15, 200))
def test_shorter_clips_get_the_largest_spacing_that_fits(length):
    spacing, starts = KeyframeWindows(min_spacing=1).fit(length)
    assert spacing == max(k for k in range(1, 14) if 13 * k + 2 <= length)
    assert starts >= 1 and (starts - 1) + 13 * spacing == length - 2


def test_bad_windows():
    with pytest.raises(KeySyncError, match="min_spacing <= spacing"):
        KeyframeWindows(min_spacing=14)
    with pytest.raises(KeySyncError, match="identity frame 'best'"):
        KeyframeWindows(identity="best")
    with pytest.raises(KeySyncError, match="stage 'both'"):
        windows_for("both")


def test_every_pass_is_a_new_permutation():
    pick = Order([37], [1.0], seed=5)
    passes = [[pick(37 * e + i) for i in range(37)] for e in range(4)]
    assert all(sorted(p.item for p in one) == list(range(37)) for one in passes)
    assert [{p.epoch for p in one} for one in passes] == [{0}, {1}, {2}, {3}]
    assert len({tuple(p.item for p in one) for one in passes}) == 4
    assert [p.item for p in passes[0]] != [Order([37], [1.0], seed=6)(i).item for i in range(37)]


def test_the_order_is_frozen():
    """A run that began under one version must continue under the next: these numbers may never change."""
    single, mixed = Order([1000], [1.0], seed=23), Order([10, 500, 70], [1, 2, 0.5], seed=23)
    assert [single(i).item for i in (0, 1, 2, 999, 1000, 123456)] == FROZEN_SINGLE
    assert [tuple(mixed(i)) for i in (0, 1, 2, 1023, 1024, 99999)] == FROZEN_MIXED
    assert order.bits(0, "start", 1) == FROZEN_BITS
    assert order.subset(14, 3, 23, "pixels", 7).tolist() == FROZEN_SUBSET


FROZEN_SINGLE = [210, 376, 7, 669, 241, 279]
FROZEN_MIXED = [(2, 44, 0), (2, 49, 0), (0, 7, 0), (2, 55, 2), (0, 4, 29), (1, 375, 114)]
FROZEN_BITS = 16000600916078471053
FROZEN_SUBSET = [0, 4, 11]


def test_mixture_has_exact_shares_and_no_replacement_within_a_dataset():
    sizes, weights = [10, 500, 70], [1, 2, 0.5]
    picks = [Order(sizes, weights, seed=1)(i) for i in range(3 * BLOCK)]
    for block in range(3):
        counts = np.bincount([p.dataset for p in picks[block * BLOCK : (block + 1) * BLOCK]])
        np.testing.assert_allclose(counts / BLOCK, np.array(weights) / 3.5, rtol=0, atol=1 / BLOCK)  # to one item of a block
    for dataset, size in enumerate(sizes):
        items = [p.item for p in picks if p.dataset == dataset]
        for begin in range(0, len(items) - size + 1, size):
            assert sorted(items[begin : begin + size]) == list(range(size))
    # The datasets are mixed, not one after the other: no long runs of the rarest.
    places = np.flatnonzero([p.dataset == 2 for p in picks])
    assert np.diff(places).max() < 100


@pytest.mark.parametrize("sizes, weights", [([], []), ([3, 0], [1, 1]), ([3, 3], [1, 0]), ([3, 3], [1, -1]), ([3, 3], [1, 1e-9])])
def test_bad_mixtures(sizes, weights):
    with pytest.raises(KeySyncError):
        Order(sizes, weights, 0)


def test_draws_are_uniform_and_independent():
    counts = np.bincount([order.integer(7, 3, "start", i) for i in range(14000)], minlength=7)
    assert len(counts) == 7 and np.abs(counts - 2000).max() < 14000 * spread((1 / 7 * 6 / 7) ** 0.5, 14000)
    floats = np.array([[order.uniform(3, purpose, i) for purpose in ("flip", "jitter")] for i in range(4000)])
    assert 0 <= floats.min() and floats.max() < 1 and np.abs(floats.mean(axis=0) - 0.5).max() < spread(12**-0.5, 4000)
    assert abs(np.corrcoef(floats.T)[0, 1]) < spread(1, 4000)
    assert order.bits(1, "a", 2, 3) != order.bits(1, "a", 3, 2) != order.bits(2, "a", 3, 2)
    subsets = np.array([order.subset(14, 3, 0, "pixels", i) for i in range(2000)])
    assert (np.diff(subsets, axis=1) > 0).all()
    assert np.abs(np.bincount(subsets.ravel(), minlength=14) - 6000 / 14).max() < 2000 * spread((3 / 14 * 11 / 14) ** 0.5, 2000)


def some_clips():
    return order_clips(
        Clip(f"c{i}", n, split="train" if i < 5 else "test", source="hdtf" if i % 2 else "own", licence="CC-BY" if i else "unknown",
             consent="yes" if i != 2 else "no", speaker=f"s{i}", scores={"quality": q} if q else {})
        for i, (n, q) in enumerate([(200, 0.9), (600, 0.5), (171, 0.7), (100, 0.8), (180, None), (300, 0.9)])
    )  # fmt: skip


@pytest.mark.parametrize(
    "condition, kept, dropped",
    [
        (ClipFilter(), "c0 c1 c2 c4", {"too short": 1}),
        (ClipFilter(min_scores={"quality": 0.7}), "c0 c2", {"min_scores.quality": 2, "too short": 1}),
        (ClipFilter(max_scores={"quality": 0.7}), "c1 c2", {"max_scores.quality": 3}),
        (ClipFilter(sources=("hdtf",)), "c1", {"sources": 3, "too short": 1}),
        (ClipFilter(exclude_sources=("hdtf",), consents=("yes",)), "c0 c4", {"exclude_sources": 2, "consents": 1}),
        (ClipFilter(licences=("CC-BY",), exclude_speakers=("s1",), exclude_clips=("c4",)), "c2",
         {"licences": 1, "exclude_speakers": 1, "exclude_clips": 1, "too short": 1}),
    ],
)  # fmt: skip
def test_filters(condition, kept, dropped):
    selection = select(DatasetChoice("DIR", filter=condition), some_clips(), KeyframeWindows())
    assert [c.id for c in selection.clips] == kept.split() and selection.dropped == dropped


def test_a_filter_takes_tuples_not_text():
    with pytest.raises(KeySyncError, match="filter exclude_speakers is 's1'; give a tuple"):
        ClipFilter(exclude_speakers="s1")


def test_sampling_by_duration_repeats_long_clips():
    selection = select(DatasetChoice("DIR"), some_clips(), KeyframeWindows(), "duration")
    assert np.bincount(selection.items).tolist() == [1, 3, 1, 1]
    selection = select(DatasetChoice("DIR"), some_clips(), InterpolationWindows(), "duration")
    assert np.bincount(selection.items).tolist() == [200 // 14, 600 // 14, 171 // 14, 100 // 14, 180 // 14]


@pytest.mark.parametrize(
    "choice, windows, message",
    [
        (DatasetChoice("DIR", "validation"), KeyframeWindows(), "DIR has no split 'validation'; it has test, train"),
        (DatasetChoice("DIR", filter=ClipFilter(min_scores={"sync": 1})), KeyframeWindows(),
         "DIR has no score 'sync' to filter by; it has quality"),
        (DatasetChoice("DIR", filter=ClipFilter(sources=("x",))), KeyframeWindows(), r"no clip of split 'train' can be used \(5 sources;"),
        (DatasetChoice("DIR"), KeyframeWindows(spacing=80, min_spacing=80),
         r"5 too short; keyframe windows need 1042 frames, the longest clip has 600\); relax the filter or lower min_spacing"),
    ],
)  # fmt: skip
def test_selections_without_a_clip_say_why(choice, windows, message):
    with pytest.raises(KeySyncError, match=message):
        select(choice, some_clips(), windows)
