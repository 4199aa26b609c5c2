"""The tracker on the small network of the golden cases: several objects, both directions, bounded memory."""

import functools
from pathlib import Path

import numpy as np
import pytest
from bounds import close
from safetensors.numpy import load_file

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.models.sam2.sam2_config import UNUSED, config_from_shapes
from keysync_jax.models.sam2.sam2_table import sam2_table
from keysync_jax.models.table import to_flax
from keysync_jax.segmentation import object_tracker
from keysync_jax.segmentation.click_prompts import Prompt
from keysync_jax.segmentation.object_tracker import ObjectTracker, Prepared, Tracking, object_masks
from keysync_jax.segmentation.segmenters import open_segmenter

GOLDEN = Path(__file__).parents[1] / "golden"
FRAMES = 28


@functools.cache
def tracker():
    weights = load_file(GOLDEN / "sam2_video" / "weights.safetensors")
    config = config_from_shapes({k: v.shape for k, v in weights.items()}, num_heads=1, global_att_blocks=(4, 5))
    return ObjectTracker(config, to_flax(sam2_table(config), {k: v for k, v in weights.items() if k not in UNUSED}), 64)


class Video:
    """A disc on its way over noise, drawn when asked for; it remembers what was asked."""

    def __init__(self, count=FRAMES):
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.asked.append(index)
        rng = np.random.default_rng(index)
        y, x = np.mgrid[:48, :80]
        disc = (x - 20 - index) ** 2 + (y - 24) ** 2 < 100
        return np.where(disc[..., None], [200, 60, 60], rng.integers(80, 120, (48, 80, 3))).astype(np.uint8)


def test_several_objects_are_what_each_of_them_is_alone():
    video = Video(6)
    prompts = [Prompt(1, ((21, 24),), (True,)), Prompt(1, box=(10, 10, 40, 40), object=2)]
    together = list(tracker().follow(video, prompts))
    assert [frame for frame, _ in together] == [1, 2, 3, 4, 5]
    for i, prompt in enumerate(prompts):
        alone = dict(tracker().follow(video, [prompt]))
        for frame, logits in together:
            assert logits.shape == (2, 48, 80)
            close(logits[i], alone[frame][0], 2000, wrong=logits[1 - i])


def test_both_directions_and_the_union_of_objects():
    video, follow = Video(5), tracker().follow
    prompts = [Prompt(2, ((22, 24),), (True,)), Prompt(3, box=(10, 10, 40, 40), object=2)]
    assert [frame for frame, _ in follow(video, prompts[:1], True)] == [2, 1, 0]
    assert [frame for frame, _ in follow(video, prompts[:1], False, 1)] == [2, 3]
    assert not list(follow(video, [Prompt(0, ((22, 24),), (True,))], True))
    expected = np.zeros((5, 48, 80), bool)
    for prompt in prompts:
        for reverse in (False, True):
            for frame, logits in follow(video, [prompt], reverse):
                expected[frame] |= logits[0] > 0
    np.testing.assert_array_equal(object_masks(tracker(), video, prompts), expected)
    with pytest.raises(KeySyncError, match="a click on frame 9, but there are 5 frames"):
        object_masks(tracker(), video, [Prompt(9, ((22, 24),), (True,))])


def test_memory_and_work_stay_bounded_and_nothing_is_compiled_twice():
    video = Video()
    tracking = Tracking(tracker(), Prepared(video, 64), (48, 80))
    tracking.add(Prompt(0, ((21, 24),), (True,)))
    compiled, held = [], []
    for frame, _ in tracking.propagate(0):
        kept = tracking.tracked[1]
        held.append((len(kept), sum(found.memory.size > 0 for found in kept.values())))
        compiled.append(object_tracker._tracked._cache_size())
        assert video.asked.count(frame) == 1
    # Fifteen pointers behind the frame, and as many near the start for the way back; six memories likewise.
    assert max(n for n, _ in held) <= 2 * object_tracker.POINTERS and max(n for _, n in held) <= 14
    assert len(set(compiled[1:])) == 1


def test_unknown_backends_sizes_and_missing_weights_are_refused(tmp_path):
    with pytest.raises(UsageError, match="occlusion backend 'onnx' is unknown; choose one of flax, sam2"):
        open_segmenter(tmp_path / "x.pt", "onnx")
    for backend in ("flax", "sam2"):
        with pytest.raises(KeySyncError, match="x.pt does not exist; give a local SAM 2.1 checkpoint"):
            open_segmenter(tmp_path / "x.pt", backend)
    with pytest.raises(KeySyncError, match="a multiple of 32 pixels wide, not 500"):
        ObjectTracker(tracker().config, {}, 500)
