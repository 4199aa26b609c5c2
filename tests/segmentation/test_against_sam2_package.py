"""Both backends on the same random weights, through the same interface. Needs torch and the sam2 package; a few minutes.

pytest tests/segmentation/test_against_sam2_package.py -m slow -n 0 -s
"""

import json
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.segmentation.click_prompts import Prompt
from keysync_jax.segmentation.object_tracker import object_masks
from keysync_jax.segmentation.segmenters import open_segmenter

pytestmark = pytest.mark.slow

MANIFEST = Path(__file__).parents[1] / "golden" / "manifests" / "sam2.1_hiera_tiny.json"
SIZE, FRAMES = 128, 24  # more frames than pointers are kept for


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random SAM 2.1 (tiny), drawn so that masks have both signs, in the format of the published checkpoints."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("sam2")
    rng = np.random.default_rng(3)
    state = {}
    for key, tensor in json.loads(MANIFEST.read_text())["tensors"].items():
        shape = tensor["shape"]
        scale = 0.5 if "embed" in key or len(shape) < 2 else 1 / np.sqrt(np.prod(shape[1:]))
        value = rng.normal(0, scale, shape)
        if "norm" in key and key.endswith("weight"):
            value = 1 + 0.1 * value
        state[key] = torch.tensor(value, dtype=torch.float32)
    state["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] += 10  # at random it may find that there is no object, and no mask
    path = tmp_path_factory.mktemp("sam2") / "anything.pt"
    torch.save({"model": state}, path)
    return path


class Video:
    def __len__(self):
        return FRAMES

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        y, x = np.mgrid[:90, :140]
        disc = (x - 40 - 2 * index) ** 2 + (y - 45) ** 2 < 300
        return np.where(disc[..., None], [200, 60, 60], rng.integers(80, 120, (90, 140, 3))).astype(np.uint8)


PROMPTS = {
    "a click": [Prompt(0, ((40, 45),), (True,))],
    "a click and a box": [Prompt(3, ((46, 45),), (True,)), Prompt(3, box=(30, 20, 80, 70), object=2)],
    "clicks on two frames": [Prompt(2, ((44, 45), (5, 5)), (True, False)), Prompt(12, ((64, 45),), (True,), (40, 20, 90, 70))],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_the_backends_agree(weights, prompts):
    flax, package = open_segmenter(weights, "flax", SIZE), open_segmenter(weights, "sam2", SIZE)
    worst = 0.0
    for reverse in (False, True):
        ours, theirs = (list(segmenter.follow(Video(), prompts, reverse)) for segmenter in (flax, package))
        assert [frame for frame, _ in ours] == [frame for frame, _ in theirs]
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    masks, expected = (object_masks(segmenter, Video(), prompts) for segmenter in (flax, package))
    assert 0.01 < expected.mean() < 0.99
    print(f"logits differ by {worst:.2e} of the largest; {np.count_nonzero(masks != expected)} of {masks.size} pixels differ")
    # Memories are rounded to bfloat16: a last bit of float32 may move one of them by 2^-8, and the next frames see it.
    assert worst < 2.0**-8
    assert (masks == expected).mean() > 0.999
